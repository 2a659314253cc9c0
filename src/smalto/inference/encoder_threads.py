"""Encoding a stream of images: on CPUs in several threads of one core each, elsewhere in one beside the rest of the work."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

import torch
from torch import Tensor

from smalto.core.errors import SmaltoError
from smalto.images.tensors import to_unit_range
from smalto.inference.inference_tokenizer import InferenceTokenizer

T = TypeVar("T")
# Of what one core encodes at once: 4 images of 256 x 256. With twice as many float32 was a quarter slower (bf16 of the smallest network
# a few per cent faster), and a job took 150 to 250 MiB more. Probably because the heaps that glibc gives to threads end at 64 MiB.
_PIXELS_PER_PIECE = 2**18


class Encoders:
    """Encodes batches in the background and gives them back in order. Use as a context manager.

    On a CPU each thread works on a piece of its own with one core. Nobody waits at the end of each layer for the core that was lent to a
    decoding process, and pieces are small enough to stay near its caches.
    """

    def __init__(self, inference: InferenceTokenizer) -> None:
        self._inference, self._cores = (
            inference,
            torch.get_num_threads() if inference.device.type == "cpu" else 1,
        )
        self._pool = ThreadPoolExecutor(
            self._cores, initializer=_use_one_core if inference.device.type == "cpu" else None
        )

    def encode(self, batches: Iterable[tuple[T, Tensor]]) -> Iterator[tuple[T, Tensor]]:
        """(anything, images uint8 [B, 3, H, W]) -> (the same, tokens int64 [B, L] on the CPU); a few pieces are begun ahead."""
        waiting: deque[tuple[T, list[Future[Tensor]]]] = deque()
        stopped: SmaltoError | None = None
        batches = iter(batches)
        while True:
            try:
                thing, images = next(batches)
            except StopIteration:
                break
            except SmaltoError as error:  # too many bad images: what is under way is finished first
                stopped = error
                break
            waiting.append(
                (
                    thing,
                    [
                        self._pool.submit(self._encode, piece)
                        for piece in images.split(self._piece(images))
                    ],
                )
            )
            while sum(len(pieces) for _, pieces in waiting) > 2 * self._cores and len(waiting) > 1:
                yield _finished(*waiting.popleft())
        for done in waiting:
            yield _finished(*done)
        if stopped is not None:
            raise stopped

    def __enter__(self) -> Encoders:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
        if self._inference.device.type == "cpu":
            torch.set_num_threads(self._cores)

    def _piece(self, images: Tensor) -> int:
        if self._inference.device.type != "cpu":
            return self._inference.batch
        return max(
            1,
            min(self._inference.batch, _PIXELS_PER_PIECE // (images.shape[-2] * images.shape[-1])),
        )

    def _encode(self, images: Tensor) -> Tensor:
        return self._inference.encode(to_unit_range(images))


def _use_one_core() -> None:
    torch.set_num_threads(1)  # of this thread; others keep theirs


def _finished(thing: T, pieces: list[Future[Tensor]]) -> tuple[T, Tensor]:
    return thing, torch.cat([piece.result() for piece in pieces])
