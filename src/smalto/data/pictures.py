"""Where training takes its pictures from: a folder or a dataset, each as numbered tensors [C, H, W]."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from smalto.data.archives import PictureFile, Skipped
from smalto.data.decoding import Decoder
from smalto.data.images import MIN_PICTURES_TO_HOLD_OUT, BadPicture, held_out_order, is_held_out, printable
from smalto.errors import DataError, InputError


class Pictures(ABC):
    """Numbered pictures that can be asked for ahead of need. ``skipped`` grows as bad ones are met."""

    names: list[str]
    skipped: list[Skipped]
    blocks: numpy.ndarray | None = None  # [n], where pictures lie in blocks that are read as a whole: the block of each

    @abstractmethod
    def get(self, index: int) -> Tensor | None:
        """Picture ``index`` as uint8 in [0, 255] or float in [-1, 1], [C, H, W]; None where it cannot be read."""

    def ask(self, indices: Sequence[int]) -> None:  # noqa: B027 (loading ahead is not for every kind)
        """Begin to load these in the background; each is to be got once for every time that it is asked for."""

    def __len__(self) -> int:
        return len(self.names)


class FilePictures(Pictures):
    """Picture files, decoded in the background, kept as uint8 up to ``cache_bytes``.

    The cache keeps what came first: with passes over all pictures in changing order, that beats throwing out the oldest.
    """

    def __init__(self, files: list[PictureFile], decoder: Decoder[numpy.ndarray], cache_bytes: int) -> None:
        self.names = [file.name for file in files]
        self.skipped: list[Skipped] = []
        self.blocks = _blocks(files)
        self._files = files
        self._decoder = decoder
        self._free = cache_bytes
        self._cache: dict[int, Tensor | None] = {}
        self._asked: dict[int, tuple[Future[list[numpy.ndarray | BadPicture]] | None, int]] = {}  # and how often each is still to be got

    def ask(self, indices: Sequence[int]) -> None:
        for index in indices:
            if index not in self._cache:
                future, times = self._asked[index] if index in self._asked else (self._decoder.submit(self._files[index]), 0)
                self._asked[index] = future, times + 1

    def get(self, index: int) -> Tensor | None:
        if index not in self._cache:
            if index not in self._asked:
                self.ask([index])
            picture = self._load(index)
            size = picture.numel() if picture is not None else 0
            if size > self._free:
                return picture
            self._free -= size
            self._cache[index] = picture
            self._asked.pop(index, None)
        return self._cache[index]

    def _load(self, index: int) -> Tensor | None:
        future, times = self._asked.pop(index)
        if times > 1:
            self._asked[index] = future, times - 1
        try:
            array = self._decoder.result(self._files[index], future)
        except BadPicture as bad:
            self.skipped.append(Skipped(self.names[index], str(bad)))
            return None
        return to_tensor(array)


class DatasetPictures(Pictures):
    """Any map-style dataset whose items are [C, H, W] tensors (or begin with one): uint8 in [0, 255] or float in [-1, 1]."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self._dataset: Any = dataset
        self.names = [str(i) for i in range(len(dataset))]  # type: ignore[arg-type]
        self.skipped: list[Skipped] = []
        if not self.names:
            raise DataError("the dataset is empty.")

    def get(self, index: int) -> Tensor | None:
        item = self._dataset[index]
        picture = item[0] if isinstance(item, (tuple, list)) else item
        if not isinstance(picture, Tensor) or picture.ndim != 3 or not (picture.dtype == torch.uint8 or picture.is_floating_point()):
            got = f"{picture.dtype} {list(picture.shape)}" if isinstance(picture, Tensor) else type(picture).__name__
            raise InputError(f"item {index} of the dataset must be a tensor [C, H, W], uint8 or float in [-1, 1]; got {got}.")
        return picture


def _blocks(files: list[PictureFile]) -> numpy.ndarray | None:
    """The row group of every file of a source that has such; a file of its own is a block of its own."""
    if all(file.block < 0 for file in files):
        return None
    numbers: dict[Any, int] = {}
    places = ((file.path, file.block) if file.block >= 0 else file.name for file in files)
    return numpy.array([numbers.setdefault(place, len(numbers)) for place in places])


def to_tensor(array: numpy.ndarray) -> Tensor:
    """uint8 [H, W, 3] -> uint8 [3, H, W]."""
    return torch.from_numpy(array.transpose(2, 0, 1).copy())


def to_unit_range(picture: Tensor) -> Tensor:
    """uint8 in [0, 255] -> float32 in [-1, 1]; floats stay as they are."""
    return picture.float() / 127.5 - 1 if picture.dtype == torch.uint8 else picture.float()


def to_uint8(image: Tensor) -> Tensor:
    """Float in [-1, 1] -> uint8 in [0, 255], clamped and rounded."""
    return ((image.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def enlarge(picture: Tensor, size: int) -> Tensor:
    """Scale [C, H, W] up until its shorter side is ``size``."""
    scale = size / min(picture.shape[1:])
    target = [max(size, round(side * scale)) for side in picture.shape[1:]]
    bigger = F.interpolate(picture[None].float(), target, mode="bicubic", align_corners=False)[0]
    return bigger.round().clamp(0, 255).to(torch.uint8) if picture.dtype == torch.uint8 else bigger.clamp(-1, 1)


def centre_crop(picture: Tensor, multiple: int) -> Tensor:
    """Cut [C, H, W] to multiples of ``multiple``, evenly on both sides; a picture that is smaller than one is enlarged to it."""
    if min(picture.shape[1:]) < multiple:
        picture = enlarge(picture, multiple)
    height, width = (side // multiple * multiple for side in picture.shape[1:])
    top, left = (picture.shape[-2] - height) // 2, (picture.shape[-1] - width) // 2
    return picture[..., top : top + height, left : left + width]


def split(pictures: Pictures) -> tuple[list[int], list[int]]:
    """Numbers of the pictures to train on and of those held out: 10 % by hash of name, at least one readable one.

    Fewer than 4 pictures hold nothing out.

    Raises:
        DataError: no picture can be read.
    """
    names = pictures.names
    held_out: list[int] = []
    if len(names) >= MIN_PICTURES_TO_HOLD_OUT:
        held_out = [i for i, name in enumerate(names) if is_held_out(name)]
        if not any(True for _ in _readable(pictures, held_out)):
            for i in held_out_order(names):
                if i not in held_out:
                    held_out.append(i)
                    if pictures.get(i) is not None:
                        break
    out = set(held_out)
    train = [i for i in range(len(names)) if i not in out]
    if not any(True for _ in _readable(pictures, train)):
        if not any(True for _ in _readable(pictures, held_out)):
            reasons = "; ".join(f"{printable(name)} ({reason})" for name, reason in pictures.skipped[:8])
            raise DataError(f"none of the {len(names)} pictures can be read: {reasons}.")
        return list(range(len(names))), []  # the only readable ones are held out: better to train on them than not at all
    return train, sorted(held_out)


def split_by_name(pictures: Pictures, held_out: Sequence[str]) -> tuple[list[int], list[int]]:
    """Like ``split``, with the names to hold out given."""
    names = set(held_out)
    return [i for i, n in enumerate(pictures.names) if n not in names], [i for i, n in enumerate(pictures.names) if n in names]


def _readable(pictures: Pictures, indices: Sequence[int]) -> Iterator[Tensor]:
    for start in range(0, len(indices), 16):
        pictures.ask(indices[start : start + 16])
        for i in indices[start : start + 16]:
            picture = pictures.get(i)
            if picture is not None:
                yield picture


def views_of(views: numpy.ndarray, flip: bool) -> Tensor:
    """Views uint8 [V, H, W, 3] -> [V, 3, H, W]; with ``flip`` the same mirrored after them."""
    images = torch.from_numpy(views).permute(0, 3, 1, 2)
    return torch.cat([images, images.flip(-1)]) if flip else images
