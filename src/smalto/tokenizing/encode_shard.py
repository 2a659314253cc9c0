"""Image files to rows of tokens: the part of a tokenizing job that any worker can run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from smalto.images.image_file import ImageFile, Skipped
from smalto.images.reading import BadImage, UnreadableImage
from smalto.images.retries import read_with_retries
from smalto.images.tensors import to_unit_range, views_of
from smalto.images.transforms import Prepared, Transform
from smalto.inference.inference_tokenizer import InferenceTokenizer
from smalto.store.schema import TokenRow, row_id
from smalto.tokenizing.plan import FileError

# What one core encodes at once: 4 images of 256 x 256. With twice as many float32 was a quarter
# slower (bf16 of the smallest network a few per cent faster), and a job took 150 to 250 MiB more.
PIXELS_PER_PIECE = 2**18


NOT_FINITE = "not encodable: the latents are not finite"


class Shard(NamedTuple):
    """What became of some files.

    Attributes:
        rows: the tokens, one row per view of an image, in the order of the files.
        errors: the images that could not be used.
        unreadable: the images that the system could not read now.
        names: of the images in ``rows``.
        notes: name and note of images that a user should look at.
        files: all of them.
    """

    rows: list[TokenRow]
    errors: list[FileError]
    unreadable: list[Skipped]
    names: list[str]
    notes: list[tuple[str, str]]
    files: Sequence[ImageFile]


def encode_shard(
    files: Sequence[ImageFile],
    transform: Transform,
    inference: InferenceTokenizer,
    images: Iterable[Prepared | BadImage] | None = None,
) -> Shard:
    """Read, transform and encode some image files.

    A pure function of picklable arguments: threads, processes and Ray can run it.

    Args:
        files: to tokenize.
        transform: of images.
        inference: the tokenizer.
        images: the files as read elsewhere, in the same order; None: read them here.
    """
    if images is None:
        images = (read_with_retries(transform.prepare, file) for file in files)
    prepared: list[tuple[ImageFile, Prepared]] = []
    errors: list[FileError] = []
    unreadable: list[Skipped] = []
    for file, image in zip(files, images, strict=True):
        if isinstance(image, UnreadableImage):
            unreadable.append(Skipped(file.name, str(image)))
        elif isinstance(image, BadImage):
            skipped = Skipped(file.name, str(image))
            errors.append(FileError(skipped, file.size, file.modified))
        else:
            prepared.append((file, image))
    views = [views_of(image.views, transform.flip) for _, image in prepared]
    rows: list[TokenRow] = []
    names: list[str] = []
    notes: list[tuple[str, str]] = []
    encoded = _encode_views(views, inference)
    for (file, image), seen, (tokens, is_finite) in zip(prepared, views, encoded, strict=True):
        if not is_finite:
            errors.append(FileError(Skipped(file.name, NOT_FINITE), file.size, file.modified))
            continue
        rows += _rows(file, image, seen, tokens, transform, inference)
        names.append(file.name)
        notes += [(file.name, image.note)] if image.note else []
    return Shard(rows, errors, unreadable, names, notes, files)


def _encode_views(views: list[Tensor], inference: InferenceTokenizer) -> list[tuple[Tensor, bool]]:
    """Encode the views uint8 [V, 3, H, W] of each image -> tokens int64 [V, L] of each, and
    whether its latents are finite.

    Views of one shape are encoded together, in pieces.
    """
    by_shape: dict[torch.Size, list[int]] = {}
    for number, image in enumerate(views):
        by_shape.setdefault(image.shape, []).append(number)
    encoded: list[tuple[Tensor, bool]] = [(torch.zeros(0), False)] * len(views)
    for shape, numbers in by_shape.items():
        stacked = torch.cat([views[number] for number in numbers])
        size = piece_size(inference, shape[-2] * shape[-1])
        pieces = [inference.encode_finite(to_unit_range(piece)) for piece in stacked.split(size)]
        tokens = torch.cat([piece for piece, _ in pieces]).split(shape[0])
        finite = torch.cat([finite for _, finite in pieces]).split(shape[0])
        for number, of_image, is_finite in zip(numbers, tokens, finite, strict=True):
            encoded[number] = of_image, bool(is_finite.all())
    return encoded


def piece_size(inference: InferenceTokenizer, pixels: int) -> int:
    """Return how many images of so many pixels are encoded at once."""
    if inference.device.type != "cpu":
        return inference.batch
    return max(1, min(inference.batch, PIXELS_PER_PIECE // pixels))


def _rows(
    file: ImageFile,
    image: Prepared,
    views: Tensor,
    tokens: Tensor,
    transform: Transform,
    inference: InferenceTokenizer,
) -> list[TokenRow]:
    """The rows of one image."""
    layout = inference.tokenizer.layout(*views.shape[-2:])
    small = tokens.numpy().astype(inference.identity.token_dtype)
    return [
        TokenRow(
            row_id(file.name, view),
            small[number],
            layout,
            file.label,
            image.height,
            image.width,
            image.crops[number % len(image.crops)],
            file.size,
            file.modified,
            image.digest,
        )
        for number, view in enumerate(transform.view_names())
    ]
