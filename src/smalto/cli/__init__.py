"""The command line. Each verb checks nothing itself: it calls one function of the library and prints what that returns."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from typing import Any

from smalto.cli.shared import fail
from smalto.cli.verbs import app
from smalto.core.errors import SmaltoError


def main() -> None:
    """Entry point: a user's mistake ends in one line and exit code 1, Ctrl-C in 130."""
    # Torch's threads wait by spinning; where another process of this kind wants the cores, a step can then take several times
    # as long. It must be said before torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # While torch is being imported Python may swallow a KeyboardInterrupt, and nothing is lost yet: leave at once.
    signal.signal(signal.SIGINT, _leave_at_once)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names may be no text
    try:
        app()
    except SmaltoError as error:
        fail(str(error), 1)
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except OSError as error:
        advice = (
            ". What was saved is whole: free some space and resume."
            if error.errno == errno.ENOSPC
            else "."
        )
        fail(
            f"{f'{error.filename}: ' if error.filename else ''}{error.strerror or error}{advice}", 1
        )
    except (MemoryError, RuntimeError) as error:
        from smalto.core.device import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        fail("out of memory. Try a smaller --batch, --size or --codebook-size.", 1)


def _leave_at_once(number: int, frame: Any) -> None:
    os.write(2, b"smalto: interrupted\n")
    os._exit(130)
