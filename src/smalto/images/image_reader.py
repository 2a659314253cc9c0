"""Whole images for a tokenizer: read in the background, cropped, in batches of equal shape."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from smalto.core.config import parse_config
from smalto.core.distributed import local_world_size
from smalto.core.errors import ConfigError
from smalto.core.progress import Progress
from smalto.images.image_file import ImageFile, Skipped
from smalto.images.reading import LONGER_SIDE, BadImage, DeepGray
from smalto.images.retries import SourceCheck
from smalto.images.tensors import to_tensor
from smalto.images.transforms import Transform
from smalto.images.worker_pool import ReaderPool

T = TypeVar("T")
MOST_WORKERS = 1024


def default_workers(workers: int | None = None) -> int:
    """Return the number of reader processes.

    Default: all cores of this process but one, between 1 and 8.

    Raises:
        ConfigError: ``workers`` is negative, or too many.
    """
    if workers is not None and not 0 <= workers <= MOST_WORKERS:
        raise ConfigError(f"workers must be between 0 and {MOST_WORKERS:,}; got {workers}.")
    own = (os.cpu_count() or 2) // local_world_size()
    return workers if workers is not None else min(8, max(1, own - 1))


class ImageReader:
    """Iterable of whole images, cropped to multiples of a tokenizer's stride.

    Worker processes read the images in the background.

    Attributes:
        skipped: files that could not be read so far, and why.
        transform: how each image is resized and cropped.

    Args:
        files: to read, in this order.
        stride: of the tokenizer.
        progress: advances by 1 per file.
        longer_side: without ``size``: larger images are reduced to this; None or 0 keeps their
            size.
        size: resize the shorter side to this and crop a square; None keeps the aspect ratio.
        workers: reader processes; 0 reads in this process; None: see ``default_workers``.
    """

    def __init__(
        self,
        files: list[ImageFile],
        stride: int,
        progress: Progress,
        *,
        longer_side: int | None = LONGER_SIDE,
        size: int | None = None,
        workers: int | None = None,
    ) -> None:
        self.transform = transform_of(stride, size=size, longer_side=longer_side)
        self._files = files
        self._progress = progress
        self._workers = default_workers(workers)
        self.skipped: list[Skipped] = []

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, uint8 [3, H, W]) of every image that can be read.

        Raises:
            DataError: the source cannot be read any more.
        """
        workers = self._workers if len(self._files) > 1 else 0
        check = SourceCheck()
        with ReaderPool(workers, self.transform.prepare) as pool:
            for file, image in pool.in_order(self._files):
                self._progress.advance()
                if isinstance(image, BadImage):
                    skipped = Skipped(file.name, str(image))
                    self.skipped.append(skipped)
                    check.add(file, skipped.reason if skipped.is_unreadable else "")
                    if check.is_gone:
                        raise check.error("Then run the same command again.")
                    continue
                check.add(file)
                yield file.name, to_tensor(image.views[0])


def transform_of(
    stride: int,
    *,
    size: int | None = None,
    resize: int | None = None,
    longer_side: int | None = LONGER_SIDE,
    crops: int = 1,
    flip: bool = False,
    deep_gray: DeepGray = "full",
) -> Transform:
    """Return the transform for a tokenizer of this stride; ``longer_side`` 0 keeps the size.

    Raises:
        ConfigError: the arguments do not fit together.
    """
    settings = {
        "stride": stride,
        "size": size,
        "resize": resize,
        "longer_side": longer_side or None,
        "crops": crops,
        "flip": flip,
        "deep_gray": deep_gray,
    }
    return parse_config(Transform, settings, "transform")


def batches_of_one_shape(
    images: Iterable[tuple[T, Tensor]], batch: int
) -> Iterator[tuple[list[T], Tensor]]:
    """Yield batches (names, [B, C, H, W]) of images of equal shape, B at most ``batch``.

    At most 4 * ``batch`` images wait for their batch to fill; then the fullest one is yielded.
    """
    waiting: dict[tuple[int, ...], list[tuple[T, Tensor]]] = {}
    for name, image in images:
        group = waiting.setdefault(tuple(image.shape), [])
        group.append((name, image))
        if len(group) == batch or sum(map(len, waiting.values())) >= 4 * batch:
            fullest = max(waiting, key=lambda shape: len(waiting[shape]))
            yield _stack(waiting.pop(fullest))
    for group in waiting.values():
        yield _stack(group)


def _stack(group: list[tuple[T, Tensor]]) -> tuple[list[T], Tensor]:
    return [name for name, _ in group], torch.stack([image for _, image in group])
