"""Endless stream of training batches: random crops, several per read of an image."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

from smalto.core.errors import DataError, describe
from smalto.images.image_set import ImageSet
from smalto.images.parquet import MIXED_ROW_GROUPS
from smalto.images.tensors import enlarge, to_unit_range

WINDOW = 64  # about this many images are open at a time; their crops are mixed


@dataclass
class RowPosition:
    """Position of one row of the batches in its sequence of crops.

    A row uses every B-th image visited. The crops of a few consecutive visits, its window, are
    mixed.

    Attributes:
        row: index in the batch.
        visit: index of the window's first visit, counted in this row.
        offset: crops of the window that have been used.
    """

    row: int
    visit: int = 0
    offset: int = 0


class CropStream:
    """Endless iterator over batches of random crops [B, C, size, size] in [-1, 1].

    Each epoch visits the images in a new order, and each visit gives ``crops_per_image`` crops.
    Row r of every batch uses the visits r, r + B, r + 2B, .... Several processes that make some
    rows each therefore read disjoint shares of the images. Together their rows are the batches of a
    single process. The rows change images at different times and prefetch the next ones. Position,
    flip and color change of a crop depend only on (seed, epoch, index of the image).

    Args:
        images: the images.
        indices: of the images to use.
        size: side of a crop; smaller images are enlarged to it.
        batch: crops per batch, B.
        seed: random seed.
        crops_per_image: crops from each visit.
        flip: mirror half of the crops horizontally.
        color: strength of the random change of brightness, contrast, saturation and hue, 0 to 1.
        rows: make only these rows of each batch; default: all.

    Attributes:
        enlarged: indices of the images that were smaller than a crop.

    Raises:
        DataError: a whole epoch passes without a readable image.
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
            raise DataError("got no images to crop; expected at least one index.")
        self._images = images
        self._indices = indices
        self._size = size
        self._batch = batch
        self._seed = seed
        self._crops_per_image = crops_per_image
        self._flip = flip
        self._color = color
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
        if not self._prefetched:  # for all rows first, or the second would wait for the first
            self._prefetched = True
            for number in range(self._images_per_row):
                for at in self._positions:
                    if number < self._window(at):
                        self._images.prefetch([self._visited(at, at.visit + number)[1]])
        crops = [next(at) for at in self._crops]
        if len({(crop.shape[0], crop.dtype) for crop, _ in crops}) > 1:
            kinds = sorted({describe(crop) for crop, _ in crops})
            raise DataError(
                f"got images of different channels or dtypes: {', '.join(kinds)}; expected one. "
                "Convert the images to one number of channels and one dtype."
            )
        batch = to_unit_range(torch.stack([crop for crop, _ in crops]))
        if not self._color:
            return batch
        return jitter_colors(batch, numpy.stack([chances for _, chances in crops]), self._color)

    def state_dict(self) -> list[list[int]]:
        """Return where the next batch starts: [row, visit, offset] of each row of this process."""
        return [[at.row, at.visit, at.offset] for at in self._positions]

    def load_state_dict(self, states: list[list[list[int]]]) -> None:
        """Continue from the states of all processes, whose number may have changed since."""
        self._start_at([position for state in states for position in state])

    def _start_at(self, saved: list[list[int]]) -> None:
        positions = {row: RowPosition(row, visit, offset) for row, visit, offset in saved}
        if positions.keys() == set(range(self._batch)):
            self._positions = [positions[row] for row in self._rows]
        else:  # another batch size: start all rows at the mean number of visits
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
                raise DataError(
                    "none of the images can be read any more. Check that their folder is still "
                    "there, then start or resume the run."
                )
            plan = self._plan(at, readable)
            for offset in range(at.offset, len(plan)):
                at.offset = offset + 1
                index, image, chances = plan[offset]
                yield self._cut(image, index, chances[:3]), chances[3:]
            at.visit = visits.stop
            at.offset = 0

    def _window(self, at: RowPosition) -> int:
        """Return the number of images in a row's window.

        The first windows differ in length, so that not all rows change images at the same time.
        """
        return self._images_per_row if at.visit else 1 + at.row % self._images_per_row

    def _visited(self, at: RowPosition, visit: int) -> tuple[int, int]:
        """Return the epoch and the image index of a row's visit."""
        epoch, place = divmod(visit * self._batch + at.row, len(self._indices))
        if epoch not in self._orders:
            self._orders = {e: order for e, order in self._orders.items() if e >= epoch - 2}
            self._orders[epoch] = self._order(epoch)
        return epoch, self._indices[self._orders[epoch][place]]

    def _order(self, epoch: int) -> numpy.ndarray:
        """Return the order of an epoch.

        If images lie in row groups, which are read as a whole, MIXED_ROW_GROUPS of them are mixed
        at a time.
        """
        random = numpy.random.default_rng([self._seed, epoch])
        row_groups = self._images.row_groups
        if row_groups is None:
            return random.permutation(len(self._indices)).astype(numpy.uint32)
        names, own = numpy.unique(row_groups[self._indices], return_inverse=True)
        group = random.permutation(len(names))[own] // MIXED_ROW_GROUPS
        return numpy.lexsort((random.random(len(own)), group)).astype(numpy.uint32)

    def _plan(
        self, at: RowPosition, images: list[tuple[int, int, Tensor]]
    ) -> list[tuple[int, Tensor, Any]]:
        """Return (image index, image, random numbers) of every crop of a window, shuffled."""
        crops = []
        for epoch, index, image in images:
            # Random numbers of a crop: down, across, flip; brightness, contrast, saturation, hue.
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
        if side < self._size:  # after the crop: a thin strip would become huge
            self.enlarged.add(index)
            crop = enlarge(crop, self._size)
        return crop.flip(-1) if self._flip and flip < 0.5 else crop


def jitter_colors(images: Tensor, chances: Any, amount: float) -> Tensor:
    """Change brightness, contrast, saturation and hue of images [B, 3, H, W] in [-1, 1].

    Args:
        images: other numbers of channels are returned unchanged.
        chances: random numbers [B, 4] in [0, 1).
        amount: strength, 0 to 1.
    """
    if images.shape[1] != 3:
        return images
    chances = torch.from_numpy(chances).float() * 2 - 1
    brightness = chances[:, 0] * 0.4 * amount
    contrast = 1 + chances[:, 1] * 0.4 * amount
    saturation = 1 + chances[:, 2] * 0.6 * amount
    angle = chances[:, 3] * math.pi * amount
    # Hue is a rotation around the gray axis, saturation a scaling away from it. Neither changes the
    # gray component.
    gray = torch.full((3, 3), 1 / 3)
    across = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3)
    turned = (
        angle.cos()[:, None, None] * (torch.eye(3) - gray) + angle.sin()[:, None, None] * across
    )
    matrices = contrast[:, None, None] * (gray + saturation[:, None, None] * turned)
    changed = torch.einsum("bij,bjhw->bihw", matrices, images) + brightness[:, None, None, None]
    return changed.clamp(-1, 1)
