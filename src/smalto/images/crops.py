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
from smalto.images.image_set import ImageSet
from smalto.images.parquet import MIXED_ROW_GROUPS
from smalto.images.tensors import enlarge, to_unit_range

WINDOW = 64  # images whose crops are mixed, about


@dataclass
class RowPosition:
    """What one row of the batches is made of: every B-th image visited, a few at a time, their crops mixed.

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

    Each epoch visits the images in a new order, and each visit gives ``crops_per_image`` crops. Row r of every batch takes the visits
    r, r + B, r + 2B, ...; so several processes that make some rows each decode a share of the images each, and together they make the
    batches that one process would. The rows renew their images at different times, each while the ones before are used. Where a
    crop lies, whether it is flipped and how its colors change follow from (seed, epoch, number of the image) alone.

    Args:
        images: the images.
        indices: the numbers of those to use.
        size: side of a crop; smaller images are enlarged to it.
        batch: crops per batch, B.
        seed: decides everything random.
        crops_per_image: crops from each visit.
        flip: mirror half of the crops left to right.
        color: how far brightness, contrast, saturation and hue of a crop may change, 0 to 1.
        rows: make only these rows of each batch; default all.

    Raises:
        DataError: when a whole epoch passes without a readable image.
    """

    def __init__(
        self,
        images: ImageSet,
        indices: list[int],
        *,
        size: int,
        batch: int,
        seed: int,
        crops_per_image: int = 8,
        flip: bool = True,
        color: float = 0.0,
        rows: range | None = None,
    ) -> None:
        if not indices:
            raise DataError("there is no image to take crops from.")
        self._images, self._indices = images, indices
        self._size, self._batch, self._seed = size, batch, seed
        self._crops_per_image, self._flip, self._color = crops_per_image, flip, color
        self._images_per_row = max(1, -(-WINDOW // batch))
        self._rows = rows or range(batch)
        self.enlarged: set[int] = set()
        self._orders: dict[int, numpy.ndarray] = {}
        self._prefetched = False
        self._positions: list[RowPosition] = []
        self._crops: list[Iterator[tuple[Tensor, Any]]] = []
        self._start_at([])

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        if not self._prefetched:  # of all lanes at once, or the second would wait for the first
            self._prefetched = True
            for number in range(self._images_per_row):
                for at in self._positions:
                    if number < self._window(at):
                        self._images.prefetch([self._visited(at, at.visit + number)[1]])
        crops = [next(at) for at in self._crops]
        if len({(crop.shape[0], crop.dtype) for crop, _ in crops}) > 1:
            raise DataError(
                f"the images differ in channels or type: {sorted({f'{c.dtype} {list(c.shape)}' for c, _ in crops})}."
            )
        batch = to_unit_range(torch.stack([crop for crop, _ in crops]))
        return (
            jitter_colors(batch, numpy.stack([chances for _, chances in crops]), self._color)
            if self._color
            else batch
        )

    def state_dict(self) -> list[list[int]]:
        """Return where the next batch starts: [row, visit, offset] of each row of this process."""
        return [[at.row, at.visit, at.offset] for at in self._positions]

    def load_state_dict(self, states: list[list[list[int]]]) -> None:
        """Continue from the positions of all processes, whose number may differ from today's."""
        self._start_at([position for state in states for position in state])

    def _start_at(self, saved: list[list[int]]) -> None:
        positions = {row: RowPosition(row, visit, offset) for row, visit, offset in saved}
        if positions.keys() == set(range(self._batch)):
            self._positions = [positions[row] for row in self._rows]
        else:  # another batch size: every row starts where about as many images have been visited
            visits = sum(at.visit for at in positions.values()) // self._batch
            self._positions = [RowPosition(row, visits) for row in self._rows]
        self._prefetched = False
        self._crops = [self._crops_of_row(at) for at in self._positions]

    def _crops_of_row(self, at: RowPosition) -> Iterator[tuple[Tensor, Any]]:
        fruitless = 0
        while True:
            visits = range(at.visit, at.visit + self._window(at))
            visited = [self._visited(at, visit) for visit in visits]
            sources = [(epoch, index, self._images.get(index)) for epoch, index in visited]
            following = RowPosition(at.row, visits.stop)
            self._images.prefetch(
                [self._visited(at, visits.stop + n)[1] for n in range(self._window(following))]
            )
            readable = [
                (epoch, index, image) for epoch, index, image in sources if image is not None
            ]
            fruitless = 0 if readable else fruitless + len(visits)
            if fruitless > len(self._indices):
                raise DataError("none of the images can be read any more. Has the folder moved?")
            plan = self._plan(at, readable)
            for offset in range(at.offset, len(plan)):
                at.offset = offset + 1
                index, image, chances = plan[offset]
                yield self._cut(image, index, chances[:3]), chances[3:]
            at.visit, at.offset = visits.stop, 0

    def _window(self, at: RowPosition) -> int:
        """Images of a lane's window. The first ones differ in length, so that not all lanes want new images at once."""
        return self._images_per_row if at.visit else 1 + at.row % self._images_per_row

    def _visited(self, at: RowPosition, visit: int) -> tuple[int, int]:
        """Epoch and image of a lane's visit."""
        epoch, place = divmod(visit * self._batch + at.row, len(self._indices))
        if epoch not in self._orders:
            self._orders = {e: order for e, order in self._orders.items() if e >= epoch - 2}
            self._orders[epoch] = self._order(epoch)
        return epoch, self._indices[self._orders[epoch][place]]

    def _order(self, epoch: int) -> numpy.ndarray:
        """The order of an epoch. Where images lie in row_groups that are read as a whole, a few row_groups are mixed at a time."""
        random, row_groups = numpy.random.default_rng([self._seed, epoch]), self._images.row_groups
        if row_groups is None:
            return random.permutation(len(self._indices)).astype(numpy.uint32)
        names, own = numpy.unique(row_groups[self._indices], return_inverse=True)
        group = random.permutation(len(names))[own] // MIXED_ROW_GROUPS
        return numpy.lexsort((random.random(len(own)), group)).astype(numpy.uint32)

    def _plan(
        self, at: RowPosition, images: list[tuple[int, int, Tensor]]
    ) -> list[tuple[int, Tensor, Any]]:
        """Image and chances of every crop of a window, mixed."""
        crops = []
        for epoch, index, image in images:
            # Chances of a crop: down, across, flip; brightness, contrast, saturation, hue.
            chances = numpy.random.default_rng([self._seed, epoch, index, 1]).random(
                (self._crops_per_image, 7)
            )
            crops += [(index, image, chance) for chance in chances]
        order = numpy.random.default_rng([self._seed, at.row, at.visit, 2]).permutation(len(crops))
        return [crops[i] for i in order]

    def _cut(self, image: Tensor, index: int, place: Any) -> Tensor:
        side = min(self._size, *image.shape[1:])
        down, across, flip = place
        top = int(down * (image.shape[1] - side + 1))
        left = int(across * (image.shape[2] - side + 1))
        crop = image[:, top : top + side, left : left + side]
        if side < self._size:  # cut first: of a thin strip only this much is enlarged
            self.enlarged.add(index)
            crop = enlarge(crop, self._size)
        return crop.flip(-1) if self._flip and flip < 0.5 else crop


def jitter_colors(images: Tensor, chances: Any, amount: float) -> Tensor:
    """Change brightness, contrast, saturation and hue of images [B, 3, H, W] in [-1, 1]; chances [B, 4] in [0, 1)."""
    if images.shape[1] != 3:
        return images
    chances = torch.from_numpy(chances).float() * 2 - 1
    brightness, contrast, saturation = (
        chances[:, 0] * 0.4 * amount,
        1 + chances[:, 1] * 0.4 * amount,
        1 + chances[:, 2] * 0.6 * amount,
    )
    angle = chances[:, 3] * math.pi * amount
    # Around the axis of grays: a turn for the hue, a stretch for the saturation, both of what is not gray.
    gray = torch.full((3, 3), 1 / 3)
    across = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3)
    turned = (
        angle.cos()[:, None, None] * (torch.eye(3) - gray) + angle.sin()[:, None, None] * across
    )
    matrices = contrast[:, None, None] * (gray + saturation[:, None, None] * turned)
    changed = torch.einsum("bij,bjhw->bihw", matrices, images) + brightness[:, None, None, None]
    return changed.clamp(-1, 1)
