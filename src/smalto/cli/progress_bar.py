"""Progress bar and messages of the command line."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from smalto.core.progress import Progress
from smalto.core.text import printable_lines

SECONDS_BETWEEN_LINES = 5.0
_SHOWN = {
    "loss": "loss {:.4f}",
    "psnr": "PSNR {:.1f}",
    "usage": "codes {:.0%}",
    "held_out_psnr": "held-out {:.1f}",
    "accuracy": "accuracy {:.1%}",
    "held_out_loss": "held-out {:.3f}",
    "errors": "{:.0f} errors",
}


class ConsoleProgress(Progress):
    """A live bar on a terminal; elsewhere a plain line every 5 seconds."""

    def __init__(self) -> None:
        now = time.monotonic()
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._bars: Bars | None = None
        self._task = TaskID(0)
        self._metrics: dict[str, float] = {}
        self._title = ""
        self._unit = ""
        self._total: int | None = None
        self._first = 0
        self._done = 0
        self._images = 0
        self._begun = now
        self._last_line = now

    def start(self, title: str, total: int | None, unit: str, done: int = 0) -> None:
        now = time.monotonic()
        self._title = title
        self._unit = unit
        self._total = total
        self._first = done
        self._done = done
        self._images = 0
        self._metrics = {}
        self._begun = now
        self._last_line = now
        if self._console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=16),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                # Metrics come last, because a narrow terminal cuts off the end of the line.
                TextColumn("left  {task.fields[metrics]}"),
            )
            self._bars = Bars(*columns, console=self._console, refresh_per_second=5)
            self._task = self._bars.add_task(title, total=total, completed=done, metrics="")
            self._bars.start()

    def set_total(self, total: int) -> None:
        self._total = total
        if self._bars is not None:
            self._bars.update(self._task, total=total)

    def advance(self, number: int = 1, **metrics: float) -> None:
        self._done += number
        self._images += int(metrics.pop("images", number))
        self._metrics |= metrics
        if self._bars is not None:
            self._bars.update(self._task, advance=number, metrics=self._text())
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self._line()

    def finish(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
        elif self._done > self._first:
            self._line()

    def message(self, text: str) -> None:
        self._console.print(printable_lines(text), markup=False)

    def close(self) -> None:
        """Stop the live bar, also after an error."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def _text(self) -> str:
        seconds = max(time.monotonic() - self._begun, 1e-6)
        unit = "rows" if self._unit == "rows" else "images"
        metrics = [
            form.format(self._metrics[key]) for key, form in _SHOWN.items() if key in self._metrics
        ]
        return "  ".join([f"{self._images / seconds:.1f} {unit}/s", *metrics])

    def _line(self) -> None:
        made = self._done - self._first
        seconds = time.monotonic() - self._begun
        left = ""
        if self._total and made and self._total > self._done:
            left = f"  {seconds / made * (self._total - self._done):.0f} s left"
        total = f"/{self._total}" if self._total is not None else ""
        line = f"{self._title} {self._done}{total} {self._unit}  {self._text()}{left}"
        print(line, file=sys.stderr, flush=True)
