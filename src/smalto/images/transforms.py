"""What is done to an image before it is tokenized. No torch here: reader workers import this."""

from __future__ import annotations

import hashlib
from typing import BinaryIO, Literal, NamedTuple

import numpy
from pydantic import Field, model_validator

from smalto.core.config import Config
from smalto.images.archives import open_file
from smalto.images.image_file import ImageFile
from smalto.images.image_formats import suffix_of
from smalto.images.reading import LONGER_SIDE, DeepGray, bad_image_errors, read_stream, reduced


class Prepared(NamedTuple):
    """One image, ready for a tokenizer.

    Attributes:
        views: uint8 [V, H, W, 3], the crops of the image.
        height, width: of the whole image, upright, before it was resized.
        crops: of each view (top, left, height, width) in pixels of the whole image.
        digest: 16-byte hash of the file's contents.
        note: what a user should know about the image's brightness; usually empty.
    """

    views: numpy.ndarray
    height: int
    width: int
    crops: list[tuple[int, int, int, int]]
    digest: bytes
    note: str = ""


class Transform(Config):
    """How whole images are resized and cropped for a tokenizer.

    Attributes:
        stride: of the tokenizer.
        size: resize the shorter side to this (enlarging it too) and crop a square; None keeps the
            aspect ratio of the image.
        resize: with ``size``: resize the shorter side to this instead, before the crop; VAR's
            loader uses 1.125 times ``size``. None: to ``size``.
        longer_side: without ``size``: larger images are reduced to this; None keeps their size.
        crops: with ``size``: 1 for the center crop, 5 for the four corner crops too.
        flip: add a mirrored view of each crop. The caller mirrors the pixels.
        deep_gray: how 16-bit, 32-bit and float gray becomes 8-bit gray. ``"full"`` maps the whole
            range of the type to black and white, ``"range"`` the image's own minimum and maximum.
    """

    stride: int = Field(ge=1)
    size: int | None = Field(None, ge=1, le=2**16)
    resize: int | None = Field(None, ge=1, le=2**16)
    longer_side: int | None = Field(LONGER_SIDE, ge=1)
    crops: Literal[1, 5] = 1
    flip: bool = False
    deep_gray: DeepGray = "full"

    @model_validator(mode="after")
    def _parts_fit(self) -> Transform:
        if self.size is not None and self.size % self.stride:
            raise ValueError(
                f"size must be a multiple of the tokenizer's stride {self.stride}; got {self.size}"
            )
        if self.resize is not None and (self.size is None or self.resize < self.size):
            raise ValueError(
                f"resize is the shorter side before a crop of size; got resize {self.resize} and "
                f"size {self.size}. Set size, and resize to at least that"
            )
        if self.crops != 1 and self.size is None:
            raise ValueError(
                f"{self.crops} crops of an image need a size; got size None. Set size to a "
                f"multiple of {self.stride}"
            )
        return self

    def __str__(self) -> str:
        """Return the transform in words, as token stores and metrics show it."""
        if self.size is None:
            reduced = f"longer side at most {self.longer_side}" if self.longer_side else "full size"
            words = f"{reduced}, center crop to a multiple of {self.stride}"
        else:
            cut = "center crop" if self.crops == 1 else "center and corner crops"
            shorter_side = self.resize or self.size
            words = f"shorter side to {shorter_side}, {cut} to {self.size} x {self.size}"
        if self.flip:
            words += ", each mirrored too"
        if self.deep_gray != "full":
            words += f", deep gray scaled by {self.deep_gray}"
        return words

    def view_names(self) -> tuple[str, ...]:
        """Return the suffixes that tell the rows of one image apart; the first one is empty."""
        names = ("", "top-left", "top-right", "bottom-left", "bottom-right")[: self.crops]
        return names + tuple(f"{name}-flip".strip("-") for name in names) if self.flip else names

    def prepare(self, file: ImageFile) -> Prepared:
        """Read, resize and crop one image.

        Raises:
            BadImage: it cannot be read.
        """
        with bad_image_errors(), open_file(file) as stream:
            digest = content_digest(stream)
            stream.seek(0)
            read = read_stream(
                stream,
                self._target,
                suffix=suffix_of(file.file_name),
                deep_gray=self.deep_gray,
            )
            pixels = numpy.asarray(read.image)
        boxes = self._boxes(*pixels.shape[:2])
        views = numpy.stack([pixels[top : top + h, left : left + w] for top, left, h, w in boxes])
        down = read.height / pixels.shape[0]
        across = read.width / pixels.shape[1]
        crops = [
            (round(top * down), round(left * across), round(h * down), round(w * across))
            for top, left, h, w in boxes
        ]
        return Prepared(views, read.height, read.width, crops, digest, read.note)

    def _target(self, width: int, height: int) -> tuple[int, int]:
        if self.size is not None:
            return _with_shorter_side(width, height, self.resize or self.size)
        width, height = reduced(width, height, self.longer_side)
        if min(width, height) >= self.stride:
            return width, height
        return _with_shorter_side(width, height, self.stride)

    def _boxes(self, height: int, width: int) -> list[tuple[int, int, int, int]]:
        h = self.size or height // self.stride * self.stride
        w = self.size or width // self.stride * self.stride
        down = height - h
        across = width - w
        corners = [(0, 0), (0, across), (down, 0), (down, across)]
        places = [(down // 2, across // 2), *corners][: self.crops]
        return [(top, left, h, w) for top, left in places]


def content_digest(stream: BinaryIO) -> bytes:
    """Return the 16-byte BLAKE2b hash of the rest of a file."""
    digest = hashlib.blake2b(digest_size=16)
    while block := stream.read(2**20):
        digest.update(block)
    return digest.digest()


def _with_shorter_side(width: int, height: int, side: int) -> tuple[int, int]:
    scale = side / min(width, height)
    return max(side, round(width * scale)), max(side, round(height * scale))
