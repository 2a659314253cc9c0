"""What long work tells whoever watches. The library says it to this; only the command line shows it."""

from __future__ import annotations


class Progress:
    """Hears of long work and shows nothing: the default. Subclass it to show something."""

    def start(self, title: str, total: int | None, unit: str, done: int = 0) -> None:
        """A job of ``total`` units begins (None: unknown), ``done`` of them already made."""

    def set_total(self, total: int) -> None:
        """How many units there are, where ``start`` could not say."""

    def advance(self, number: int = 1, **metrics: float) -> None:
        """``number`` more units are done; ``metrics`` are the latest values to show beside the bar."""

    def finish(self) -> None:
        """The job is over."""

    def message(self, text: str) -> None:
        """One line that a person should read."""
