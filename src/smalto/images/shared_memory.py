"""Arrays that worker processes send back through shared memory: through a pipe they would be copied
seven times.
"""

from __future__ import annotations

import ctypes
import pickle
from collections import deque
from collections.abc import Callable
from multiprocessing.context import SpawnContext
from typing import Any, NamedTuple

BYTES = 2**21  # of a slot: 8 images of 256 x 256 pixels. Containers often share 64 MB in all
_ALIGNED = 64

_shared: memoryview | None = None  # in a worker


class SharedBuffers:
    """Memory shared with worker processes, in slots of 2 MiB; it is gone when the last process that
    has it ends, however it ends.
    """

    def __init__(self, context: SpawnContext, number: int) -> None:
        try:
            self.array = context.RawArray(ctypes.c_byte, number * BYTES)
        except OSError:  # no room for it: everything goes through the pipe
            number, self.array = 0, context.RawArray(ctypes.c_byte, 1)
        self._memory = memoryview(self.array).cast("B")
        self._free = deque(range(number))

    def take(self) -> int | None:
        """A slot for one job, if one is free."""
        return self._free.popleft() if self._free else None

    def unpack(self, slot: int | None, packed: Packed) -> Any:
        """The result of a job; its slot is free again."""
        buffers = [bytearray(self._memory[start:end]) for start, end in packed.places]
        if slot is not None:
            self._free.append(slot)
        return pickle.loads(
            packed.pickled, buffers=buffers
        )  # from a worker of our own, as all that comes through its pipe


class Packed(NamedTuple):
    """A result: its pickle, and where in the shared memory its arrays are (those that found no room
    are in the pickle).
    """

    pickled: bytes
    places: list[tuple[int, int]]


def use_shared_buffers(array: Any) -> None:
    """In a worker, at its start: the memory of ``SharedBuffers.array``."""
    global _shared
    _shared = memoryview(array).cast("B")


def run_and_pack(slot: int | None, job: Callable[..., Any], *arguments: Any) -> Packed:
    """In a worker: do a job and leave the arrays of its result in a slot."""
    result = job(*arguments)
    places: list[tuple[int, int]] = []

    def stays_in_the_pickle(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        start = -(-places[-1][1] // _ALIGNED) * _ALIGNED if places else (slot or 0) * BYTES
        if slot is None or _shared is None or start + len(raw) > (slot + 1) * BYTES:
            return True
        _shared[start : start + len(raw)] = raw
        places.append((start, start + len(raw)))
        return False

    return Packed(pickle.dumps(result, protocol=5, buffer_callback=stays_in_the_pickle), places)
