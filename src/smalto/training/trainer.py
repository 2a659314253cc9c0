"""The only training loop. It knows steps, logs, checkpoints and interruptions; what a step does is the task's."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from smalto.data.crops import CropStream
from smalto.progress import Progress
from smalto.tokenizer import ImageTokenizer
from smalto.training.checkpoint import RunFolder
from smalto.training.recipe import Recipe


class Task(Protocol):
    """What the loop trains."""

    tokenizer: ImageTokenizer

    def train_step(self, batch: Any, step: int) -> dict[str, float]:
        """Learn from one batch; returns figures for the log."""

    def evaluate(self) -> dict[str, float]:
        """Figures on fixed held-out data."""

    def state(self) -> dict[str, Any]:
        """What resuming needs beside the model."""


class Interrupted(Exception):
    """Someone asked the run to stop, and it saved itself first."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped after step {step}")
        self.step = step


def train_loop(task: Task, stream: CropStream, run: RunFolder, recipe: Recipe, start: int, progress: Progress) -> None:
    """Train from step ``start`` to ``recipe.steps``; step n is the n-th update, counted from 1.

    Raises:
        Interrupted: SIGINT or SIGTERM came; the last whole step is saved.
    """
    progress.begin("training", recipe.steps, "steps", done=start)
    with (
        _stop_requests() as stop,
        open(run.path / "log.jsonl", "a", encoding="utf-8", buffering=1) as log,
        open(run.path / "times.jsonl", "a", encoding="utf-8", buffering=1) as times,
    ):
        for step in range(start + 1, recipe.steps + 1):
            begun = time.perf_counter()
            batch = next(stream)
            waited = time.perf_counter() - begun
            figures = task.train_step(batch, step)
            if step % recipe.evaluate.every == 0 or step == recipe.steps:
                figures |= task.evaluate()
            seconds = time.perf_counter() - begun
            log.write(json.dumps({"step": step, **figures}) + "\n")
            times.write(json.dumps({"step": step, "seconds": round(seconds, 5), "waiting": round(waited, 5), "images": len(batch)}) + "\n")
            progress.advance(1, images=len(batch), **figures)
            if stop.is_set() or step % recipe.checkpoint.every == 0 or step == recipe.steps:
                run.save(step, task.tokenizer, {**task.state(), "stream": stream.position()}, recipe.checkpoint.keep)
            if stop.is_set() and step < recipe.steps:
                run.event("interrupted", step=step)
                raise Interrupted(step)
    progress.end()


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
