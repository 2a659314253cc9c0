"""What becomes of freed memory: kept for the next tensor, or given back to the system at once."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from smalto.core.process_wide import ProcessWideSetting


@contextmanager
def retain_freed_memory() -> Iterator[None]:
    """Inside, glibc keeps what tensors free. Elsewhere, and where MALLOC_* variables say something else, it changes nothing.

    glibc gives blocks above 32 MiB back to the system at once, and the system clears every page of the next one: at 256 x 256 pixels
    a fifth of the time that a convolutional network takes on a CPU. Afterwards everything free is given back.
    """
    with _reused.hold():
        yield


@contextmanager
def release_freed_memory() -> Iterator[None]:
    """Gives free memory back; inside, glibc asks the system for every block from 64 KiB on, and gives it back when it is freed.
    ``reused_memory`` waits meanwhile.

    For work in many threads of a library: glibc gives each of them a heap of its own, in which what was freed stays.
    """
    with _returned.hold():
        yield


def keep_middle_sized_blocks() -> None:
    """Has glibc keep up to 64 MiB of what is freed from now on, as it does by itself once a process has freed a large block.

    For processes whose blocks are of middle size: one that decodes images of 500 x 375 pixels cleared pages for a fifth of its time.
    """
    _set(_PLAIN)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
# The first two would adjust themselves to what was freed, up to the values of _PLAIN, had nobody set them.
_PLAIN = ((_M_TRIM_THRESHOLD, 2**26), (_M_MMAP_THRESHOLD, 2**25), (_M_MMAP_MAX, 2**16))
_REUSED = ((_M_TRIM_THRESHOLD, 2**31 - 1), (_M_MMAP_THRESHOLD, 2**25), (_M_MMAP_MAX, 0))
_RETURNED = ((_M_TRIM_THRESHOLD, 2**26), (_M_MMAP_THRESHOLD, 2**16), (_M_MMAP_MAX, 2**16))


def _glibc() -> Any:
    """The C library, where it is glibc and nobody has tuned its memory already."""
    tuned = (
        any(name.startswith("MALLOC_") and name.endswith("_") for name in os.environ)
        or "GLIBC_TUNABLES" in os.environ
    )
    if tuned or platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return None
    return ctypes.CDLL(None)


def _set(settings: tuple[tuple[int, int], ...]) -> None:
    if (libc := _glibc()) is not None:
        for setting, value in settings:
            libc.mallopt(setting, value)


def _reuse() -> None:
    if not _returned.inside:
        _set(_REUSED)


def _end_of_reuse() -> None:
    if not _returned.inside:
        _set(_PLAIN)
    _give_back()


def _return() -> None:
    _set(_RETURNED)
    _give_back()


def _end_of_return() -> None:
    _set(_REUSED if _reused.inside else _PLAIN)


def _give_back() -> None:
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


_reused, _returned = (
    ProcessWideSetting(_reuse, _end_of_reuse),
    ProcessWideSetting(_return, _end_of_return),
)
