"""The endless stream of training batches: random crops, many from each decode."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

from smalto.data.pictures import Pictures, enlarge, to_unit_range
from smalto.errors import DataError

WINDOW = 64  # pictures whose crops are mixed, and that are held decoded at once


@dataclass
class Position:
    """How far the stream has come: which pass over the pictures, which window of it, which crop of the window."""

    epoch: int = 0
    window: int = 0
    offset: int = 0


class CropStream:
    """Batches of random crops [B, C, size, size] in [-1, 1], for ever.

    Each epoch visits the pictures in a new order, a window of 64 at a time; each picture gives ``crops_per_picture`` crops, and those of a
    window are mixed. Where a crop lies and whether it is flipped follows from (seed, epoch, number of the picture) alone, not
    from who decoded it. The next window is decoded while this one is used.

    Args:
        pictures: where they come from.
        indices: the ones to use.
        size: side of a crop; pictures that are smaller are enlarged, and their numbers kept in ``enlarged``.
        batch: crops per batch.
        seed: decides order, crops and flips.
        crops_per_picture: crops cut from one decode.
        flip: mirror half of the crops left to right.
        position: where to go on, from ``position`` of an earlier stream.

    Raises:
        DataError: when a whole epoch passes without a readable picture.
    """

    def __init__(
        self,
        pictures: Pictures,
        indices: list[int],
        *,
        size: int,
        batch: int,
        seed: int,
        crops_per_picture: int = 8,
        flip: bool = True,
        position: dict[str, int] | None = None,
    ) -> None:
        if not indices:
            raise DataError("there is no picture to take crops from.")
        self._pictures, self._indices = pictures, indices
        self._size, self._batch, self._seed = size, batch, seed
        self._crops_per_picture, self._flip = crops_per_picture, flip
        self._position = Position(**(position or {}))
        self.enlarged: set[int] = set()
        self._orders: dict[int, numpy.ndarray] = {}
        self._crops = self._stream()

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        crops = [next(self._crops) for _ in range(self._batch)]
        if len({(crop.shape[0], crop.dtype) for crop in crops}) > 1:
            raise DataError(f"the pictures differ in channels or type: {sorted({f'{c.dtype} {list(c.shape)}' for c in crops})}.")
        return to_unit_range(torch.stack(crops))

    def position(self) -> dict[str, int]:
        """Where the next batch begins; plain numbers, to be saved."""
        return vars(self._position).copy()

    def _stream(self) -> Iterator[Tensor]:
        at = self._position
        windows = -(-len(self._indices) // WINDOW)
        while True:
            got_any = at.window > 0 or at.offset > 0
            for window in range(at.window, windows):
                self._pictures.ask(self._window(at.epoch, window))
                sources = {i: self._pictures.get(i) for i in self._window(at.epoch, window)}
                following = (at.epoch, window + 1) if window + 1 < windows else (at.epoch + 1, 0)
                self._pictures.ask(self._window(*following))
                at.window = window
                plan = self._plan(at.epoch, window, [i for i, picture in sources.items() if picture is not None])
                for offset in range(at.offset, len(plan)):
                    at.offset = offset + 1
                    got_any = True
                    index, place = plan[offset]
                    picture = sources[index]
                    assert picture is not None
                    yield self._cut(picture, index, place)
                at.offset = 0
            if not got_any:
                raise DataError("none of the pictures can be read any more. Has the folder moved?")
            at.epoch, at.window = at.epoch + 1, 0

    def _window(self, epoch: int, window: int) -> list[int]:
        if epoch not in self._orders:
            # Two epochs at most: this one, and the next whose first window is decoded ahead.
            self._orders = {e: order for e, order in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = numpy.random.default_rng([self._seed, epoch]).permutation(len(self._indices))
        return [self._indices[i] for i in self._orders[epoch][window * WINDOW : (window + 1) * WINDOW]]

    def _plan(self, epoch: int, window: int, indices: list[int]) -> list[tuple[int, Any]]:
        """Picture and place of every crop of a window, mixed."""
        crops = []
        for index in indices:
            # Three shares per crop: down, across, flip.
            shares = numpy.random.default_rng([self._seed, epoch, index, 1]).random((self._crops_per_picture, 3))
            crops += [(index, share) for share in shares]
        order = numpy.random.default_rng([self._seed, epoch, window, 2]).permutation(len(crops))
        return [crops[i] for i in order]

    def _cut(self, picture: Tensor, index: int, place: Any) -> Tensor:
        side = min(self._size, *picture.shape[1:])
        down, across, flip = place
        top = int(down * (picture.shape[1] - side + 1))
        left = int(across * (picture.shape[2] - side + 1))
        crop = picture[:, top : top + side, left : left + side]
        if side < self._size:  # cut first: of a thin strip only this much is enlarged
            self.enlarged.add(index)
            crop = enlarge(crop, self._size)
        return crop.flip(-1) if self._flip and flip < 0.5 else crop
