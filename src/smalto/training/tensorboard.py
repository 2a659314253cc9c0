"""Metrics for TensorBoard, if the package tensorboard is installed. It is imported only here."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, BinaryIO

FOLDER = "tensorboard"


class TensorBoard:
    """Writer of metrics into ``folder/tensorboard``; a no-op if tensorboard is not installed.

    torch's SummaryWriter is not used, because its thread opens the file again for every write and
    fails with a traceback once the folder was removed.

    Args:
        folder: of the run.
        step: where the run starts or resumes; values of later steps are discarded.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._file: BinaryIO | None = None
        self._records: Any = None
        try:
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError:
            return
        (folder / FOLDER).mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time():.6f}.{os.getpid()}"
        self._file = open(folder / FOLDER / name, "wb")  # noqa: SIM115 (see close)
        self._records = RecordWriter(self._file)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        # A resumed run repeats the steps since its checkpoint: purge their values.
        start = SessionLog(status=SessionLog.START)
        self._write(Event(wall_time=time.time(), step=step, session_log=start))

    def add(self, step: int, metrics: dict[str, float]) -> None:
        """Write the metrics of one step."""
        if self._file is None:
            return
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in metrics.items()]
        self._write(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def _write(self, event: Any) -> None:
        self._records.write(event.SerializeToString())
