"""The endless stream of training batches: random crops, several from each decode."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

from smalto.core.errors import DataError
from smalto.images.image_set import Pictures
from smalto.images.parquet import MIXED_BLOCKS
from smalto.images.tensors import enlarge, to_unit_range

WINDOW = 64  # pictures whose crops are mixed, about


@dataclass
class Lane:
    """What one row of the batches is made of: every B-th picture visited, a few at a time, their crops mixed.

    Attributes:
        row: of the batch.
        visit: number of the window's first visit, counted in this lane.
        offset: crops of the window that are used.
    """

    row: int
    visit: int = 0
    offset: int = 0


class CropStream:
    """Batches of random crops [B, C, size, size] in [-1, 1], for ever.

    Each epoch visits the pictures in a new order, and each visit gives ``crops_per_picture`` crops. Row r of every batch takes the visits
    r, r + B, r + 2B, ...; so several processes that make some rows each decode a share of the pictures each, and together they make the
    batches that one process would. The rows renew their pictures at different times, each while the ones before are used. Where a
    crop lies, whether it is flipped and how its colours change follow from (seed, epoch, number of the picture) alone.

    Args:
        pictures: the pictures.
        indices: the numbers of those to use.
        size: side of a crop; smaller pictures are enlarged to it.
        batch: crops per batch, B.
        seed: decides everything random.
        crops_per_picture: crops from each visit.
        flip: mirror half of the crops left to right.
        colour: how far brightness, contrast, saturation and hue of a crop may change, 0 to 1.
        rows: make only these rows of each batch; default all.
        position: where to go on, from ``position`` of earlier streams, of all rows together.

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
        colour: float = 0.0,
        rows: range | None = None,
        position: list[list[int]] | None = None,
    ) -> None:
        if not indices:
            raise DataError("there is no picture to take crops from.")
        self._pictures, self._indices = pictures, indices
        self._size, self._batch, self._seed = size, batch, seed
        self._crops_per_picture, self._flip, self._colour = crops_per_picture, flip, colour
        self._lane_pictures = max(1, -(-WINDOW // batch))
        self._lanes = self._go_on(position or [], rows or range(batch))
        self.enlarged: set[int] = set()
        self._orders: dict[int, numpy.ndarray] = {}
        self._asked_first = False
        self._crops = [self._lane(lane) for lane in self._lanes]

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        if not self._asked_first:  # of all lanes at once, or the second would wait for the first
            self._asked_first = True
            for number in range(self._lane_pictures):
                for lane in self._lanes:
                    if number < self._window(lane):
                        self._pictures.ask([self._visited(lane, lane.visit + number)[1]])
        crops = [next(lane) for lane in self._crops]
        if len({(crop.shape[0], crop.dtype) for crop, _ in crops}) > 1:
            raise DataError(f"the pictures differ in channels or type: {sorted({f'{c.dtype} {list(c.shape)}' for c, _ in crops})}.")
        batch = to_unit_range(torch.stack([crop for crop, _ in crops]))
        return change_colours(batch, numpy.stack([chances for _, chances in crops]), self._colour) if self._colour else batch

    def position(self) -> list[list[int]]:
        """Where the next batch begins, [row, visit, offset] of each lane of this process; plain numbers, to be saved."""
        return [[lane.row, lane.visit, lane.offset] for lane in self._lanes]

    def _go_on(self, position: list[list[int]], rows: range) -> list[Lane]:
        lanes = {row: Lane(row, visit, offset) for row, visit, offset in position}
        if lanes.keys() == set(range(self._batch)):
            return [lanes[row] for row in rows]
        # Another number of rows than before: every lane begins where about as many pictures have been visited.
        visits = sum(lane.visit for lane in lanes.values()) // self._batch
        return [Lane(row, visits) for row in rows]

    def _lane(self, lane: Lane) -> Iterator[tuple[Tensor, Any]]:
        fruitless = 0
        while True:
            visits = range(lane.visit, lane.visit + self._window(lane))
            visited = [self._visited(lane, visit) for visit in visits]
            sources = [(epoch, index, self._pictures.get(index)) for epoch, index in visited]
            following = Lane(lane.row, visits.stop)
            self._pictures.ask([self._visited(lane, visits.stop + n)[1] for n in range(self._window(following))])
            readable = [(epoch, index, picture) for epoch, index, picture in sources if picture is not None]
            fruitless = 0 if readable else fruitless + len(visits)
            if fruitless > len(self._indices):
                raise DataError("none of the pictures can be read any more. Has the folder moved?")
            plan = self._plan(lane, readable)
            for offset in range(lane.offset, len(plan)):
                lane.offset = offset + 1
                index, picture, chances = plan[offset]
                yield self._cut(picture, index, chances[:3]), chances[3:]
            lane.visit, lane.offset = visits.stop, 0

    def _window(self, lane: Lane) -> int:
        """Pictures of a lane's window. The first ones differ in length, so that not all lanes want new pictures at once."""
        return self._lane_pictures if lane.visit else 1 + lane.row % self._lane_pictures

    def _visited(self, lane: Lane, visit: int) -> tuple[int, int]:
        """Epoch and picture of a lane's visit."""
        epoch, place = divmod(visit * self._batch + lane.row, len(self._indices))
        if epoch not in self._orders:
            self._orders = {e: order for e, order in self._orders.items() if e >= epoch - 2}
            self._orders[epoch] = self._order(epoch)
        return epoch, self._indices[self._orders[epoch][place]]

    def _order(self, epoch: int) -> numpy.ndarray:
        """The order of an epoch. Where pictures lie in blocks that are read as a whole, a few blocks are mixed at a time."""
        random, blocks = numpy.random.default_rng([self._seed, epoch]), self._pictures.blocks
        if blocks is None:
            return random.permutation(len(self._indices)).astype(numpy.uint32)
        names, own = numpy.unique(blocks[self._indices], return_inverse=True)
        group = random.permutation(len(names))[own] // MIXED_BLOCKS
        return numpy.lexsort((random.random(len(own)), group)).astype(numpy.uint32)

    def _plan(self, lane: Lane, pictures: list[tuple[int, int, Tensor]]) -> list[tuple[int, Tensor, Any]]:
        """Picture and chances of every crop of a window, mixed."""
        crops = []
        for epoch, index, picture in pictures:
            # Chances of a crop: down, across, flip; brightness, contrast, saturation, hue.
            chances = numpy.random.default_rng([self._seed, epoch, index, 1]).random((self._crops_per_picture, 7))
            crops += [(index, picture, chance) for chance in chances]
        order = numpy.random.default_rng([self._seed, lane.row, lane.visit, 2]).permutation(len(crops))
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


def change_colours(images: Tensor, chances: Any, amount: float) -> Tensor:
    """Change brightness, contrast, saturation and hue of images [B, 3, H, W] in [-1, 1]; chances [B, 4] in [0, 1)."""
    if images.shape[1] != 3:
        return images
    chances = torch.from_numpy(chances).float() * 2 - 1
    brightness, contrast, saturation = chances[:, 0] * 0.4 * amount, 1 + chances[:, 1] * 0.4 * amount, 1 + chances[:, 2] * 0.6 * amount
    angle = chances[:, 3] * math.pi * amount
    # Around the axis of greys: a turn for the hue, a stretch for the saturation, both of what is not grey.
    grey = torch.full((3, 3), 1 / 3)
    across = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3)
    turned = angle.cos()[:, None, None] * (torch.eye(3) - grey) + angle.sin()[:, None, None] * across
    matrices = contrast[:, None, None] * (grey + saturation[:, None, None] * turned)
    changed = torch.einsum("bij,bjhw->bihw", matrices, images) + brightness[:, None, None, None]
    return changed.clamp(-1, 1)
