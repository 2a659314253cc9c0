"""Whole images for a tokenizer: read in the background, cut to what its stride divides, in batches of one shape."""

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
from smalto.images.tensors import to_tensor
from smalto.images.transforms import Transform
from smalto.images.worker_pool import ReaderPool

T = TypeVar("T")


def default_workers(workers: int | None = None) -> int:
    """Decoding processes: as asked for, else all cores of this process but one, between 1 and 8."""
    if workers is not None and workers < 0:
        raise ConfigError(f"workers must be 0 or more; got {workers}.")
    own = (os.cpu_count() or 2) // local_world_size()
    return workers if workers is not None else min(8, max(1, own - 1))


class ImageReader:
    """Whole images for a tokenizer: decoded in the background, cut to what its stride divides.

    Attributes:
        skipped: files that could not be used, and why; grows while reading.
        transform: what is done to each image.
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
        self._files, self._progress, self._workers = files, progress, default_workers(workers)
        self.skipped: list[Skipped] = []

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """(name, uint8 [3, H, W]) of every image that can be read."""
        with ReaderPool(
            self._workers if len(self._files) > 1 else 0, self.transform.prepare
        ) as decoder:
            for file, image in decoder.in_order(self._files):
                self._progress.advance()
                if isinstance(image, BadImage):
                    self.skipped.append(Skipped(file.name, str(image)))
                    continue
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
    """The transform for a tokenizer of this stride; ``longer_side`` 0 keeps the size.

    Raises:
        ConfigError: the parts do not fit.
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
    """Group images of equal shape into (names, [B, C, H, W]) of at most ``batch``; at most 4 batches' worth wait at a time."""
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
