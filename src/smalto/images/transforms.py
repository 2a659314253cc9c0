"""What is done to an image before it becomes tokens, and doing it. No torch here: decoding workers import this."""

from __future__ import annotations

import hashlib
from typing import BinaryIO, Literal, NamedTuple

import numpy
from pydantic import Field, model_validator

from smalto.core.config import Config
from smalto.images.archives import open_file
from smalto.images.image_file import ImageFile
from smalto.images.reading import LONGER_SIDE, bad_image_errors, decode, reduced


class Prepared(NamedTuple):
    """One image, ready for a tokenizer.

    Attributes:
        views: uint8 [V, H, W, 3], the crops of the image.
        height, width: of the whole image, upright, before anything was done to it.
        crops: of each view (top, left, height, width) in pixels of the whole image.
        digest: 16 bytes that tell the file's contents apart from others.
    """

    views: numpy.ndarray
    height: int
    width: int
    crops: list[tuple[int, int, int, int]]
    digest: bytes


class Transform(Config):
    """How whole images are brought to a size that a tokenizer takes.

    Attributes:
        stride: of the tokenizer.
        size: the shorter side is brought to this (enlarged too) and a square cut; None keeps the shape of the image.
        longer_side: where the shape is kept: larger images are reduced to this; None keeps their size.
        crops: with ``size``: 1 cuts the middle, 5 the four corners too.
        flip: a mirrored view beside each (made after decoding).
    """

    stride: int = Field(ge=1)
    size: int | None = Field(None, ge=1, le=2**16)
    longer_side: int | None = Field(LONGER_SIDE, ge=1)
    crops: Literal[1, 5] = 1
    flip: bool = False

    @model_validator(mode="after")
    def _parts_fit(self) -> Transform:
        if self.size is not None and self.size % self.stride:
            raise ValueError(
                f"size must be a multiple of the tokenizer's stride {self.stride}; got {self.size}"
            )
        if self.crops != 1 and self.size is None:
            raise ValueError("crops of an image need a size: say which")
        return self

    def __str__(self) -> str:
        """In words: what a token store and metrics say of themselves."""
        if self.size is None:
            reduced = f"longer side at most {self.longer_side}" if self.longer_side else "full size"
            words = f"{reduced}, center crop to a multiple of {self.stride}"
        else:
            cut = "center crop" if self.crops == 1 else "center and corner crops"
            words = f"shorter side to {self.size}, {cut} to {self.size} x {self.size}"
        return words + (", each mirrored too" if self.flip else "")

    def view_names(self) -> tuple[str, ...]:
        """What tells the rows of one image apart; the first is the image itself."""
        names = ("", "top-left", "top-right", "bottom-left", "bottom-right")[: self.crops]
        return names + tuple(f"{name}-flip".strip("-") for name in names) if self.flip else names

    def prepare(self, file: ImageFile) -> Prepared:
        """Read, decode, bring to size and cut one image.

        Raises:
            BadImage: it cannot be decoded.
        """
        with bad_image_errors(), open_file(file) as stream:
            digest = content_digest(stream)
            stream.seek(0)
            image, width, height = decode(stream, self._target)
            pixels = numpy.asarray(image)
        boxes = self._boxes(*pixels.shape[:2])
        views = numpy.stack([pixels[top : top + h, left : left + w] for top, left, h, w in boxes])
        down, across = height / pixels.shape[0], width / pixels.shape[1]
        crops = [
            (round(top * down), round(left * across), round(h * down), round(w * across))
            for top, left, h, w in boxes
        ]
        return Prepared(views, height, width, crops, digest)

    def _target(self, width: int, height: int) -> tuple[int, int]:
        if self.size is not None:
            return _with_shorter_side(width, height, self.size)
        width, height = reduced(width, height, self.longer_side)
        return (
            (width, height)
            if min(width, height) >= self.stride
            else _with_shorter_side(width, height, self.stride)
        )

    def _boxes(self, height: int, width: int) -> list[tuple[int, int, int, int]]:
        h, w = (
            (self.size, self.size)
            if self.size
            else (height // self.stride * self.stride, width // self.stride * self.stride)
        )
        down, across = height - h, width - w
        places = [(down // 2, across // 2), (0, 0), (0, across), (down, 0), (down, across)][
            : self.crops
        ]
        return [(top, left, h, w) for top, left in places]


def content_digest(stream: BinaryIO) -> bytes:
    """16 bytes of BLAKE2b of all that follows in a file."""
    digest = hashlib.blake2b(digest_size=16)
    while block := stream.read(2**20):
        digest.update(block)
    return digest.digest()


def _with_shorter_side(width: int, height: int, side: int) -> tuple[int, int]:
    scale = side / min(width, height)
    return max(side, round(width * scale)), max(side, round(height * scale))
