"""Signals that ask a process to end: SIGINT (Ctrl-C), SIGTERM, SIGHUP (the terminal was closed)."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
SECONDS_TO_CLEAN_UP = 4.0
_first: tuple[int, float] | None = None  # the first signal that raised Stopped, and when
_WORDS = {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGHUP": "hung up"}


class Stopped(KeyboardInterrupt):
    """A signal asked the process to end.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(stop_word(number))
        self.number = number


def stop_word(number: int) -> str:
    """Return what happened, for a message: "interrupted", "terminated" or "hung up"."""
    return _WORDS[signal.Signals(number).name]


def exit_status(number: int) -> int:
    """Return the exit status of a process that a signal has ended, as shells define it."""
    return 128 + number


def raise_stopped(number: int, frame: Any) -> None:
    """Signal handler that raises Stopped for the first signal.

    Further ones are ignored while the process cleans up: an exception in the middle of that could
    leave workers running. After SECONDS_TO_CLEAN_UP the process exits at once.
    """
    global _first
    if _first is None:
        _first = number, time.monotonic()
        raise Stopped(number)
    if time.monotonic() - _first[1] > SECONDS_TO_CLEAN_UP:
        os._exit(exit_status(_first[0]))


def leave_at_once(number: int, frame: Any) -> None:
    """Signal handler that exits with one line; silent if an earlier signal was reported."""
    if _first is None:
        os.write(2, f"smalto: {stop_word(number)}\n".encode())
    os._exit(exit_status(_first[0] if _first else number))


def handled_signals() -> list[int]:
    """Return the stop signals that are not ignored, as SIGHUP is by nohup.

    SIGINT is always among them. Shells ignore it for what they start with ``&``, but ``kill -INT``
    asks the process to end.
    """
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    ignored = {n for n, handler in before.items() if handler in (signal.SIG_IGN, None)}
    return [number for number in STOP_SIGNALS if number == signal.SIGINT or number not in ignored]


@contextmanager
def stop_signals(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Handle the stop signals for the duration of the block; outside the main thread do nothing.

    A SIGHUP or SIGTERM that is ignored stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in handled_signals()}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier if earlier is not None else signal.SIG_DFL)
