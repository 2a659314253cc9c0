"""What the trainer trains: the protocols of a task and of its batches. Any model and any data can
stand behind them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class MonitoredMetric:
    """A metric of ``train_step`` that the monitor watches, as a moving average over about 50 steps.

    Attributes:
        name: of the metric.
        fault: (moving average, best moving average so far) -> what is wrong, in one sentence, or
            None. The best is -inf (inf if lower is better) until training has settled.
        higher_is_better: which of two values is the better one.
    """

    name: str
    fault: Callable[[float, float], str | None]
    higher_is_better: bool = True


class Task(Protocol):
    """A model and everything that trains it: losses, optimizers, moving averages.

    Attributes:
        device: of the model.
        batch_size: samples per step, of all processes together.
        monitored: the metrics that the monitor watches.
    """

    device: torch.device
    batch_size: int
    monitored: Sequence[MonitoredMetric]

    def train_step(self, batch: Any, step: int) -> dict[str, float]:
        """Train on this rank's part of a batch; return metrics, equal on all ranks.

        ``skipped`` among them means that the gradient was not finite and nothing was changed.
        """

    def evaluate(self) -> dict[str, float]:
        """Return metrics on fixed held-out data, equal on all ranks."""

    def back_off(self) -> None:
        """Train more carefully from here on: smaller learning rates. Called after a rollback."""

    def save(self, folder: Path) -> None:
        """Write the trained model into a folder that exists."""

    def load(self, folder: Path) -> None:
        """Read the model that ``save`` wrote.

        Raises:
            RunError: it cannot be read, or it does not fit.
        """

    def state(self) -> dict[str, Any]:
        """Return what resuming needs besides the saved model: tensors, numbers and text."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what ``state`` returned; ``load`` comes first."""


class BatchSource(Protocol):
    """An endless stream of one rank's parts of the batches, with a position."""

    def __next__(self) -> Any:
        """Return the next batch."""

    def state_dict(self) -> Any:
        """Return the position, as numbers and text."""

    def load_state_dict(self, states: list[Any]) -> None:
        """Continue from the positions of all ranks that saved, in rank order.

        Their number may differ from today's.
        """
