"""The only training loop. It knows steps, logs, checkpoints, faults and interruptions; what a step does is the task's."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch

from smalto.core import distributed
from smalto.core.device import peak_memory
from smalto.core.errors import RunError
from smalto.core.progress import Progress
from smalto.images.crops import CropStream
from smalto.tokenizer import ImageTokenizer
from smalto.training.checkpoint import Checkpoint
from smalto.training.monitor import WINDOW, TrainingMonitor
from smalto.training.random_state import random_state, set_random_state
from smalto.training.recipe import Recipe
from smalto.training.run_folder import RunFolder
from smalto.training.tensorboard import TensorBoard

MAX_RETURNS = 3  # of the guard to one checkpoint


class Task(Protocol):
    """What the loop trains."""

    device: torch.device

    @property
    def result(self) -> ImageTokenizer:
        """What is saved."""

    def train_step(self, batch: Any, step: int) -> dict[str, float]:
        """Learn from this process's part of a batch; returns metrics for the log, the same in all processes."""

    def evaluate(self) -> dict[str, float]:
        """Metrics on fixed held-out data, the same in all processes."""

    def back_off(self) -> None:
        """Go on more carefully."""

    def state(self) -> dict[str, Any]:
        """What resuming needs beside the result."""

    def load(self, result: ImageTokenizer, state: dict[str, Any]) -> None:
        """Go on from what was saved."""


class Interrupted(Exception):
    """Someone asked the run to stop, and it saved itself first."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped after step {step}")
        self.step = step


class Trainer:
    """Trains a task from one step of a run to its last; step n is the n-th update, counted from 1.

    Args:
        task: what learns.
        stream_at: makes the stream of this process's batches, from a position or None.
        run: the folder where everything is written, by the first process; it must be there when training begins.
        recipe: how.
        progress: hears of it.
    """

    def __init__(
        self,
        task: Task,
        stream_at: Callable[[list[list[int]] | None], CropStream],
        run: Path,
        recipe: Recipe,
        progress: Progress,
    ) -> None:
        self._task, self._stream_at, self._path, self._recipe, self._progress = (
            task,
            stream_at,
            run,
            recipe,
            progress,
        )
        self.stream = stream_at(None)
        self._monitor = TrainingMonitor(recipe.monitor)
        self._step = 0
        self._returns: Counter[int] = Counter()  # how often the guard went back to each checkpoint

    def state(self) -> dict[str, Any]:
        """All that resuming needs beside the task's result. Every process calls it."""
        device = self._task.device
        return {
            "task": self._task.state(),
            "batches": [
                at
                for positions in distributed.gather_objects(self.stream.position(), device)
                for at in positions
            ],
            "random": distributed.gather_objects(random_state(device), device),
            "monitor": self._monitor.state_dict(),
            "threads": torch.get_num_threads(),
        }

    def load(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint, also one that another number of processes wrote."""
        state = checkpoint.state
        self._task.load(checkpoint.tokenizer, state["task"])
        self.stream = self._stream_at(state["batches"])
        if distributed.rank() < len(state["random"]):
            set_random_state(state["random"][distributed.rank()], self._task.device)
        self._monitor.load_state_dict(state["monitor"])
        self._step = checkpoint.step

    def train(self) -> None:
        """Train to the last step.

        Raises:
            Interrupted: SIGINT or SIGTERM came; the last whole step is saved.
            RunError: the guard went back to one checkpoint three times in vain.
        """
        recipe = self._recipe
        self._run = RunFolder(self._path)
        self._progress.start("training", recipe.steps, "steps", done=self._step)
        with _stop_requests() as stop, closing(_RunLog(self._run)) as run_log:
            while self._step < recipe.steps:
                self._step += 1
                metrics, times = self._one_step()
                run_log.write(self._step, metrics, times)
                self._progress.advance(1, images=recipe.data.batch, **metrics)
                if self._went_wrong(metrics):
                    run_log.close()
                    self._roll_back()
                    continue
                stopping = _any_rank(stop.is_set(), self._task.device)
                due = (
                    self._step % recipe.checkpoint.every == 0 and "skipped" not in metrics
                )  # a state that gave no gradient is no good one
                if stopping or due or self._step == recipe.steps:
                    self._save()
                if stopping and self._step < recipe.steps:
                    if distributed.rank() == 0:
                        self._run.event("interrupted", step=self._step)
                    raise Interrupted(self._step)
        self._progress.finish()

    def _one_step(self) -> tuple[dict[str, float], dict[str, float]]:
        begun = time.perf_counter()
        batch = next(self.stream)
        waited = time.perf_counter() - begun
        metrics = self._task.train_step(batch, self._step)
        if self._step % self._recipe.evaluate.every == 0 or self._step == self._recipe.steps:
            metrics |= self._task.evaluate()
        seconds = time.perf_counter() - begun
        times = {
            "seconds": round(seconds, 5),
            "waiting": round(waited, 5),
            "images": self._recipe.data.batch,
            "memory_mb": peak_memory(self._task.device) // 2**20,
        }
        return metrics, times

    def _save(self) -> None:
        state = self.state()
        if distributed.rank() == 0:
            self._run.save(self._step, self._task.result, state, self._recipe.checkpoint.keep)

    def _went_wrong(self, metrics: dict[str, float]) -> bool:
        """Let the guard look and say what it sees; whether to go back."""
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
                self._run.event("warning", step=self._step, text=fault)
        return bool(faults) and action == "rollback"

    def _roll_back(self) -> None:
        """Go back to the newest checkpoint from before the fault could be felt, and on from there more carefully each time."""
        failed, steps = self._step, self._run.steps()
        target = distributed.broadcast_object(
            max([s for s in steps if s <= failed - WINDOW], default=min(steps)), self._task.device
        )
        if self._returns[target] == MAX_RETURNS:
            raise RunError(
                f"training went wrong at step {failed}, after {MAX_RETURNS} returns to step {target} with ever smaller learning rates. "
                f"{self._run.path} is whole up to there. Look at its report and log, and resume with other settings."
            )
        self._returns[target] += 1
        self.load(self._run.read(target))
        for _ in range(self._returns[target]):
            self._task.back_off()
        if distributed.rank() == 0:
            self._run.forget_after(target)
            self._run.event("rollback", step=failed, to=target)
        self._progress.message(
            f"going back from step {failed} to step {target}, with smaller learning rates"
        )
        self._progress.advance(target - failed, images=0)


class _RunLog:
    """The lines and curves of a run, one of each per step; only the first process writes them."""

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._open: tuple[TextIO, TextIO, TensorBoard] | None = None

    def write(self, step: int, metrics: dict[str, float], times: dict[str, float]) -> None:
        if distributed.rank() > 0:
            return
        if self._open is None:
            self._open = (
                _lines(self._run, "log.jsonl"),
                _lines(self._run, "times.jsonl"),
                TensorBoard(self._run.path, step),
            )
        log, times_log, board = self._open
        log.write(json.dumps({"step": step, **metrics}) + "\n")
        times_log.write(json.dumps({"step": step, **times}) + "\n")
        board.add(
            step,
            metrics
            | {
                "images_per_second": times["images"] / times["seconds"],
                "waiting": times["waiting"],
            },
        )

    def close(self) -> None:
        for file in self._open or ():
            file.close()
        self._open = None


def _lines(run: RunFolder, name: str) -> TextIO:
    return open(run.path / name, "a", encoding="utf-8", buffering=1)


def _any_rank(flag: bool, device: torch.device) -> bool:
    """Whether ``flag`` is set in any process: all must leave at the same step."""
    if distributed.world_size() == 1:
        return flag
    return bool(distributed.all_reduce(torch.tensor([float(flag)], device=device)))


@contextmanager
def _stop_requests() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets, so that the step under way ends well. A second one interrupts at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def request(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
