"""Metrics for TensorBoard, if the package tensorboard is installed. It is imported only here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

FOLDER = "tensorboard"


class TensorBoard:
    """Writer of metrics into ``folder/tensorboard``; a no-op if tensorboard is not installed.

    Args:
        folder: of the run.
        step: where the run starts or resumes; values of later steps are discarded.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._writer: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        # A resumed run repeats the steps since its checkpoint: purge their values.
        self._writer = SummaryWriter(str(folder / FOLDER), purge_step=step)

    def add(self, step: int, metrics: dict[str, float]) -> None:
        """Write the metrics of one step."""
        if self._writer is not None:
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close the file."""
        if self._writer is not None:
            self._writer.close()
