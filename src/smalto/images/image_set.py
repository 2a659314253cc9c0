"""Training images by index, from image files or a dataset, as tensors [C, H, W]."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils.data import Dataset

from smalto.core.errors import DataError, InputError, describe
from smalto.images.image_file import ImageFile, Skipped
from smalto.images.reading import BadImage, UnreadableImage
from smalto.images.retries import SourceCheck
from smalto.images.tensors import to_tensor
from smalto.images.worker_pool import ReaderPool, ReadJob


class ImageSet(ABC):
    """Images by index, with prefetching.

    Attributes:
        names: of the images.
        skipped: images that could not be read so far, and why.
        unreadable: names of images that the system could not read at times, and why. They are not
            skipped: the next epoch reads them again.
        row_groups: int [n], the row group of each image, if images lie in parquet row groups that
            are read as a whole; else None.
    """

    names: list[str]
    skipped: list[Skipped]
    unreadable: dict[str, str]
    row_groups: numpy.ndarray | None = None

    @abstractmethod
    def get(self, index: int) -> Tensor | None:
        """Return image ``index`` [C, H, W], uint8 in [0, 255] or float in [-1, 1].

        Return None if it cannot be read.
        """

    def prefetch(self, indices: Sequence[int]) -> None:  # noqa: B027 (optional for a subclass)
        """Start to load images in the background. Call ``get`` exactly once per ``prefetch``."""

    def __len__(self) -> int:
        return len(self.names)


class ImageFiles(ImageSet):
    """Image files, read in the background, cached as uint8 up to ``cache_bytes``.

    The cache keeps what came first: with passes over all images in changing order, that hits more
    often than evicting the least recently used.

    Args:
        files: the images.
        pool: reads them.
        cache_bytes: size of the cache.

    Raises:
        DataError: from ``get``, if so many images in a row became unreadable that their source is
            gone.
    """

    def __init__(
        self, files: list[ImageFile], pool: ReaderPool[numpy.ndarray], cache_bytes: int
    ) -> None:
        self.names = [file.name for file in files]
        self.skipped: list[Skipped] = []
        self.unreadable: dict[str, str] = {}
        self.row_groups = _row_groups(files)
        self._files = files
        self._pool = pool
        self._check = SourceCheck()
        self._free = cache_bytes
        self._cache: dict[int, Tensor | None] = {}
        # Jobs in progress, and how often each is still to be fetched by ``get``.
        self._requested: dict[int, tuple[ReadJob[numpy.ndarray], int]] = {}

    def prefetch(self, indices: Sequence[int]) -> None:
        for index in indices:
            if index in self._cache:
                continue
            if index not in self._requested:
                self._requested[index] = self._pool.submit([self._files[index]]), 0
            job, times = self._requested[index]
            self._requested[index] = job, times + 1

    def get(self, index: int) -> Tensor | None:
        if index not in self._cache:
            if index not in self._requested:
                self.prefetch([index])
            outcome = self._load(index)
            if isinstance(outcome, UnreadableImage):
                self._note_unreadable(self._files[index], str(outcome))
                return None
            self._check.add(self._files[index])
            if isinstance(outcome, BadImage):
                self.skipped.append(Skipped(self.names[index], str(outcome)))
            image = None if isinstance(outcome, BadImage) else to_tensor(outcome)
            size = image.numel() if image is not None else 0
            if size > self._free:
                return image
            self._free -= size
            self._cache[index] = image
            self._requested.pop(index, None)
        return self._cache[index]

    def _note_unreadable(self, file: ImageFile, reason: str) -> None:
        """Record an image that cannot be read now; raise DataError if the source is gone.

        An image that stays unreadable counts once: in later epochs it may be the only one that is
        not in the cache.
        """
        if file.name not in self.unreadable:
            self._check.add(file, reason)
        self.unreadable[file.name] = reason
        if self._check.is_gone:
            raise self._check.error("Then start or resume the run.")

    def _load(self, index: int) -> numpy.ndarray | BadImage:
        job, times = self._requested.pop(index)
        if times > 1:
            self._requested[index] = job, times - 1
        (image,) = job.result()
        return image


class DatasetImages(ImageSet):
    """Map-style dataset whose items are images, or tuples and lists that start with one.

    An image is a tensor [C, H, W], uint8 in [0, 255] or float in [-1, 1].
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        self._dataset: Any = dataset
        self.names = [str(i) for i in range(len(dataset))]  # type: ignore[arg-type]
        self.skipped: list[Skipped] = []
        self.unreadable: dict[str, str] = {}
        if not self.names:
            raise DataError("the dataset is empty; expected at least one image.")

    def get(self, index: int) -> Tensor | None:
        item = self._dataset[index]
        image = item[0] if isinstance(item, (tuple, list)) else item
        is_image = (
            isinstance(image, Tensor)
            and image.ndim == 3
            and (image.dtype == torch.uint8 or image.is_floating_point())
        )
        if not is_image:
            raise InputError(
                f"item {index} of the dataset must be a tensor [C, H, W], uint8 or float in "
                f"[-1, 1]; got {describe(image)}."
            )
        return image


def _row_groups(files: list[ImageFile]) -> numpy.ndarray | None:
    """Return the row group of every file; None if no file lies in one.

    A file outside row groups counts as a row group with one image.
    """
    if all(file.row_group < 0 for file in files):
        return None
    numbers: dict[Any, int] = {}
    places = ((file.path, file.row_group) if file.row_group >= 0 else file.name for file in files)
    return numpy.array([numbers.setdefault(place, len(numbers)) for place in places])
