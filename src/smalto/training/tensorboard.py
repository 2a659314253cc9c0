"""The log as TensorBoard shows it, where the package tensorboard is installed; imported only here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

FOLDER = "tensorboard"


class TensorBoard:
    """Writes metrics into ``folder/tensorboard``, or nothing at all where tensorboard is not installed."""

    def __init__(self, folder: Path, step: int) -> None:
        self._writer: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self._writer = SummaryWriter(
            str(folder / FOLDER), purge_step=step
        )  # a resumed run repeats what was not saved

    def add(self, step: int, metrics: dict[str, float]) -> None:
        if self._writer is not None:
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
