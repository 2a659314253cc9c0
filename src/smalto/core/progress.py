"""Interface through which long jobs report progress. Only the command line displays it."""

from __future__ import annotations


class Progress:
    """No-op progress reporter (the default). Subclass it to display progress."""

    def start(self, title: str, total: int | None, unit: str, done: int = 0) -> None:
        """Begin a job of ``total`` units (None: unknown), of which ``done`` are complete."""

    def set_total(self, total: int) -> None:
        """Set the number of units, if it was unknown at ``start``."""

    def advance(self, number: int = 1, **metrics: float) -> None:
        """Count ``number`` more units; ``metrics`` are the latest values to show beside the bar."""

    def finish(self) -> None:
        """End the job."""

    def message(self, text: str) -> None:
        """Show one line of text to the user."""
