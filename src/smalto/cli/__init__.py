"""Command-line interface. Each command calls one function of the library and prints its result."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import warnings
from typing import Any

from smalto.cli.shared import fail
from smalto.cli.verbs import app
from smalto.core.errors import RenamedSettingWarning, SmaltoError
from smalto.core.signals import handled_signals, leave_at_once
from smalto.core.text import printable_lines


def main() -> None:
    """Run the command line: a user's mistake exits with status 1 and one line, Ctrl-C with 130."""
    limit_thread_spinning()
    # Python may swallow a KeyboardInterrupt while torch is being imported. No work can be lost yet,
    # so the process exits immediately.
    for number in handled_signals():
        signal.signal(number, leave_at_once)
    show_renamed_settings_in_one_line()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names may not be valid text
    try:
        _refuse_empty_arguments(sys.argv[1:])
        app()
    except SmaltoError as error:
        fail(str(error), 1)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        disk_full = error.errno == errno.ENOSPC
        advice = " Saved files are complete: free some space and resume." if disk_full else ""
        fail(f"{place}{error.strerror or error}.{advice}", 1)
    except (MemoryError, RuntimeError) as error:
        from smalto.core.device import is_out_of_memory

        if "can't start new thread" in str(error):
            fail("no more threads can be started. Raise the limit (ulimit -u), or use fewer.", 1)
        if not is_out_of_memory(error):
            raise
        fail("out of memory. Try a smaller --batch, --size or --codebook-size.", 1)


def limit_thread_spinning() -> None:
    """Make OpenMP's threads spin for microseconds before they sleep, unless the user has set it.

    By default they spin for milliseconds: two processes on the same two cores then take 12 times as
    long for a step. Without any spinning a search takes 1.4 times as long (benchmarks/waiting.py).
    GNU's OpenMP reads GOMP_SPINCOUNT, others OMP_WAIT_POLICY. Both do so when torch is imported.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ |= {"GOMP_SPINCOUNT": "1000", "OMP_WAIT_POLICY": "PASSIVE"}


def _refuse_empty_arguments(arguments: list[str]) -> None:
    """Raise SmaltoError if an argument is empty: as a path it would be the current folder."""
    for previous, argument in zip(["", *arguments], arguments, strict=False):
        is_value = argument == "" and previous.startswith("--")
        if argument == "" or (argument.startswith("--") and argument.endswith("=")):
            place = f" for {previous}" if is_value else f" in {argument}" if argument else ""
            raise SmaltoError(
                f"got an empty value{place}, perhaps of a shell variable that is not set; expected "
                "a path or a value."
            )


def show_renamed_settings_in_one_line() -> None:
    """Print each RenamedSettingWarning as ``smalto: TEXT``, without a file name and source line."""
    show_other = warnings.showwarning

    def show(message: Any, category: type[Warning], *args: Any, **options: Any) -> None:
        if issubclass(category, RenamedSettingWarning):
            print(f"smalto: {printable_lines(str(message))}", file=sys.stderr)
        else:
            show_other(message, category, *args, **options)

    warnings.showwarning = show
