"""The only training loop: steps, logs, checkpoints, faults, interruptions. What a step does is the
task's.
"""

from __future__ import annotations

import json
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch

from smalto.core import distributed
from smalto.core.device import peak_memory
from smalto.core.errors import RunError
from smalto.core.progress import Progress
from smalto.core.signals import raise_stopped, stop_signals
from smalto.training.checkpoint import Checkpoint
from smalto.training.monitor import WINDOW, TrainingMonitor
from smalto.training.random_state import random_state, set_random_state
from smalto.training.recipe import Recipe
from smalto.training.run_folder import RunFolder
from smalto.training.task import BatchSource, Task
from smalto.training.tensorboard import TensorBoard

MAX_ROLLBACKS = 3  # to one checkpoint


class Interrupted(Exception):
    """A signal asked the run to stop, and the run saved itself first."""

    def __init__(self, step: int, number: int = signal.SIGINT) -> None:
        super().__init__(f"stopped after step {step}")
        self.step = step
        self.number = number  # of the signal


class Trainer:
    """Trains a task from one step of a run to its last; step n is the n-th update, counted from 1.

    Args:
        task: the model and its training.
        batches: this rank's parts of the batches.
        run: the folder that rank 0 writes to; it must exist when training starts.
        recipe: of the run.
        progress: receives steps, metrics and messages.
    """

    def __init__(
        self, task: Task, batches: BatchSource, run: Path, recipe: Recipe, progress: Progress
    ) -> None:
        self._task = task
        self._batches = batches
        self._path = run
        self._recipe = recipe
        self._progress = progress
        self._monitor = TrainingMonitor(task.monitored)
        self._step = 0
        self._rollbacks: Counter[int] = Counter()  # to each checkpoint

    def state(self) -> dict[str, Any]:
        """Return what resuming needs besides the model. Every rank calls it."""
        device = self._task.device
        return {
            "task": self._task.state(),
            "batches": distributed.gather_objects(self._batches.state_dict(), device),
            "random": distributed.gather_objects(random_state(device), device),
            "monitor": self._monitor.state_dict(),
            "threads": torch.get_num_threads(),
        }

    def load(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint, of the same or another number of processes."""
        state = checkpoint.state
        self._task.load(checkpoint.folder)
        self._task.load_state(state["task"])
        self._batches.load_state_dict(state["batches"])
        if distributed.rank() < len(state["random"]):
            set_random_state(state["random"][distributed.rank()], self._task.device)
        self._monitor.load_state_dict(state["monitor"])
        self._step = checkpoint.step

    def train(self) -> None:
        """Train to the last step.

        Raises:
            Interrupted: SIGINT, SIGTERM or SIGHUP arrived; the last whole step is saved.
            DataError: the images can no longer be read; the last whole step is saved.
            RunError: training diverged, no step had a finite gradient, or three rollbacks to one
                checkpoint did not help.
        """
        recipe = self._recipe
        run = RunFolder(self._path)
        self._progress.start("training", recipe.steps, "steps", done=self._step)
        has_learned = self._step > 0 or not recipe.steps
        with _stop_requests() as stop, closing(_RunLog(run)) as log:
            while self._step < recipe.steps:
                begin = time.perf_counter()
                batch = self._next_batch(run, stop)
                waiting = time.perf_counter() - begin
                self._step += 1
                metrics = self._train_step(batch)
                times = self._times(begin, waiting)
                has_learned = has_learned or "skipped" not in metrics
                log.write(self._step, metrics, times)
                self._progress.advance(1, images=self._task.batch_size, **metrics)
                if self._must_roll_back(run, metrics):
                    log.close()
                    self._roll_back(run)
                    continue
                # A step without a gradient does not leave a state worth returning to.
                due = self._step % recipe.checkpoint.every == 0 and "skipped" not in metrics
                if due or self._step == recipe.steps:
                    self._save(run)
            self._raise_if_stopped(run, _any_rank([bool(stop)], self._task.device)[0], stop)
        self._progress.finish()
        if not has_learned:
            raise RunError(
                f"none of the {recipe.steps} steps had a finite gradient, so nothing was learned. "
                "Check that the images are finite, or lower optimizer.lr."
            )

    def _next_batch(self, run: RunFolder, stop: list[int]) -> Any:
        """Return the next batch.

        If a rank must stop or cannot make its part, save the run as before the batch and raise on
        all ranks.
        """
        position = self._batches.state_dict()
        failure = None
        batch = None
        try:
            if not stop:
                batch = next(self._batches)
        except Exception as error:  # of the images, or of the user's dataset
            failure = error
        stopping, failing = _any_rank([bool(stop), failure is not None], self._task.device)
        if not stopping and not failing:
            return batch
        self._batches.load_state_dict(distributed.gather_objects(position, self._task.device))
        self._save(run)
        if failing:
            self._progress.message(f"saved after step {self._step}")
            raise failure or RunError(
                "another process could not make its part of the batch; its error message gives "
                f"the reason. The run is saved after step {self._step}: resume with --resume."
            )
        self._raise_if_stopped(run, stopping, stop)
        raise AssertionError("a rank stops or fails")

    def _raise_if_stopped(self, run: RunFolder, stopping: bool, stop: list[int]) -> None:
        if not stopping:
            return
        if distributed.rank() == 0:
            run.event("interrupted", step=self._step)
        raise Interrupted(self._step, *stop)

    def _train_step(self, batch: Any) -> dict[str, float]:
        """Train one step; return its metrics, with those of an evaluation if it is due."""
        metrics = self._task.train_step(batch, self._step)
        is_last = self._step == self._recipe.steps
        if self._step % self._recipe.evaluate.every == 0 or is_last:
            metrics |= self._task.evaluate()
        return metrics

    def _times(self, begin: float, waiting: float) -> dict[str, float]:
        return {
            "seconds": round(time.perf_counter() - begin, 5),
            "waiting": round(waiting, 5),
            "images": self._task.batch_size,
            "memory_mb": peak_memory(self._task.device) // 2**20,
        }

    def _save(self, run: RunFolder) -> None:
        state = self.state()
        if distributed.rank() == 0:
            run.save(self._step, self._task.save, state, self._recipe.checkpoint.keep)

    def _must_roll_back(self, run: RunFolder, metrics: dict[str, float]) -> bool:
        """Report the faults that the monitor finds; return whether to roll back."""
        action = self._recipe.monitor.action
        faults = self._monitor.check(self._step, metrics)
        if self._monitor.has_diverged and action != "rollback":
            raise RunError(
                f"step {self._step}: {faults[0]}. Then resume: checkpoints are from before."
            )
        if action == "off":
            return False
        for fault in faults:
            self._progress.message(f"step {self._step}: {fault}")
            if distributed.rank() == 0:
                run.event("warning", step=self._step, text=fault)
        return bool(faults) and action == "rollback"

    def _roll_back(self, run: RunFolder) -> None:
        """Return to the newest checkpoint from before the fault had an effect, and back off."""
        failed, steps = self._step, run.steps()
        before = [step for step in steps if step <= failed - WINDOW]
        newest = max(before, default=min(steps))
        target = distributed.broadcast_object(newest, self._task.device)
        if self._rollbacks[target] == MAX_ROLLBACKS:
            raise RunError(
                f"training went wrong at step {failed}, after {MAX_ROLLBACKS} rollbacks to step "
                f"{target} with ever smaller learning rates. {run.path} is complete up to there. "
                "Look at its report and log, and resume with other settings."
            )
        self._rollbacks[target] += 1
        self.load(run.read(target))
        for _ in range(self._rollbacks[target]):
            self._task.back_off()
        if distributed.rank() == 0:
            run.forget_after(target)
            run.event("rollback", step=failed, to=target)
        self._progress.message(
            f"rollback from step {failed} to step {target}, with smaller learning rates"
        )
        self._progress.advance(target - failed, images=0)


class _RunLog:
    """The logs and curves of a run, one line of each per step; only rank 0 writes them."""

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._open: tuple[TextIO, TextIO, TensorBoard] | None = None

    def write(self, step: int, metrics: dict[str, float], times: dict[str, float]) -> None:
        if distributed.rank() > 0:
            return
        if self._open is None:
            files = [self._append_to(name) for name in ("log.jsonl", "times.jsonl")]
            self._open = files[0], files[1], TensorBoard(self._run.path, step)
        log, times_log, board = self._open
        log.write(json.dumps({"step": step, **metrics}) + "\n")
        times_log.write(json.dumps({"step": step, **times}) + "\n")
        speed = {
            "images_per_second": times["images"] / times["seconds"],
            "waiting": times["waiting"],
        }
        board.add(step, metrics | speed)

    def close(self) -> None:
        for file in self._open or ():
            file.close()
        self._open = None

    def _append_to(self, name: str) -> TextIO:
        return open(self._run.path / name, "a", encoding="utf-8", buffering=1)


def _any_rank(flags: list[bool], device: torch.device) -> list[bool]:
    """Return for each flag whether it is set on any rank: all must stop at the same step."""
    if distributed.world_size() == 1:
        return flags
    counts = distributed.all_reduce(torch.tensor(flags, dtype=torch.float32, device=device))
    return [count > 0 for count in counts.tolist()]


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """Yield a list that receives the first stop signal, so that the step in progress ends.

    A second signal interrupts at once.
    """
    received: list[int] = []

    def request(number: int, frame: Any) -> None:
        if received:
            raise_stopped(number, frame)
        received.append(number)

    with stop_signals(request):
        yield received
