"""One image of a user, as a tensor and back."""

from __future__ import annotations

from pathlib import Path

import numpy
import torch
from PIL import Image, ImageOps
from torch import Tensor

from smalto.core.errors import DataError, InputError, RunError, describe
from smalto.core.files import atomic_path, named_path
from smalto.core.progress import Progress
from smalto.images.finding import find_images
from smalto.images.image_file import ImageFile
from smalto.images.image_reader import ImageReader
from smalto.images.reading import LONGER_SIDE, BadImage
from smalto.images.reading import read_image as read_image_file
from smalto.images.tensors import to_tensor, to_uint8, to_unit_range


def read_image(
    path: str | Path, stride: int = 16, *, longer_side: int | None = LONGER_SIDE
) -> Tensor:
    """Read an image as ``smalto tokenize`` does: upright, reduced, cropped at the center.

    Args:
        path: an image file.
        stride: of the tokenizer; height and width become multiples of it.
        longer_side: a larger image is reduced to this; None or 0 keeps its size.

    Returns:
        float32 [1, 3, H, W] in [-1, 1].

    Raises:
        DataError: the image cannot be read, or ``path`` is not a single image.
        ConfigError: ``stride`` or ``longer_side`` is out of range.
    """
    return to_unit_range(read_pixels(single_file(path), stride, longer_side, Progress()))


def single_file(path: str | Path) -> ImageFile:
    """Return the image file at a path; raise DataError unless it is a single image."""
    if Path(path).is_dir():
        raise DataError(
            f"got the folder {path}; expected one image. Name an image, or use `smalto tokenize` "
            "and `smalto decode` for a folder."
        )
    files, _ = find_images(path)
    if len(files) != 1:
        raise DataError(
            f"{path} holds {len(files)} images; expected one. Name an image file, or use `smalto "
            "tokenize` and `smalto decode` for many images."
        )
    return files[0]


def read_pixels(
    file: ImageFile, stride: int, longer_side: int | None, progress: Progress
) -> Tensor:
    """Read an image like ``read_image``; return uint8 [1, 3, H, W]."""
    reader = ImageReader([file], stride, progress, longer_side=longer_side, workers=0)
    for _, image in reader:
        return image[None]
    raise DataError(f"{file.path} cannot be read: {reader.skipped[0].reason}.")


def read_whole(path: str | Path) -> numpy.ndarray:
    """Read an image in its own size; return uint8 [H, W, 3].

    Raises:
        DataError: it cannot be read.
    """
    file = single_file(path)
    try:
        return read_image_file(file, None)
    except BadImage as error:
        raise DataError(f"{file.path} cannot be read: {error}.") from None


def read_mask(path: str | Path, size: tuple[int, int]) -> Tensor:
    """Read a mask of an image of (H, W) pixels; return bool [H, W], True where it is light.

    Raises:
        DataError: it cannot be read.
        InputError: it has another size.
    """
    pixels = read_whole(path)
    if pixels.shape[:2] != size:
        raise InputError(
            f"got a mask of {pixels.shape[1]} x {pixels.shape[0]} pixels; the image has "
            f"{size[1]} x {size[0]}. Draw the mask over the image, white where to paint."
        )
    return torch.from_numpy(pixels.mean(axis=2) >= 128)


def fitted(image: numpy.ndarray, height: int, width: int) -> Tensor:
    """Crop an image uint8 [h, w, 3] at the center to an aspect ratio and resize it.

    Returns:
        uint8 [3, height, width].
    """
    resized = ImageOps.fit(Image.fromarray(image), (width, height), Image.Resampling.LANCZOS)
    return to_tensor(numpy.asarray(resized))


def fitted_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """Crop and resize a mask bool [h, w] like ``fitted``; a pixel that it touches is True."""
    pixels = Image.fromarray(mask.numpy().astype(numpy.uint8) * 255)
    resized = ImageOps.fit(pixels, (width, height), Image.Resampling.BOX)
    return torch.from_numpy(numpy.asarray(resized) > 0)


def write_png(path: str | Path, image: Tensor) -> None:
    """Write an image as PNG, atomically.

    Args:
        path: a file name that ends with ``.png``.
        image: floating point [3, H, W] or [1, 3, H, W] in [-1, 1].

    Raises:
        InputError: the tensor has another shape, or is not floating point.
        RunError: the name does not end with ``.png``, or is that of a folder.
    """
    target = png_path(path)
    if image.ndim == 4 and len(image) == 1:
        image = image[0]
    if image.ndim != 3 or len(image) != 3 or not image.is_floating_point():
        raise InputError(
            f"got {describe(image)}; expected one image [3, H, W], floating point in [-1, 1]. "
            "Write the images of a batch one by one; scale uint8 with image / 127.5 - 1."
        )
    with atomic_path(target) as temporary:
        pixels = to_uint8(image.detach()).permute(1, 2, 0).cpu().numpy()
        Image.fromarray(pixels).save(temporary, "PNG")


def png_path(path: str | Path) -> Path:
    """Return the path of a PNG file to write; raise RunError if it cannot be one."""
    target = named_path(path, "the image")
    if target.suffix.lower() != ".png" or target.is_dir():
        kind = "a folder" if target.is_dir() else f"the suffix {target.suffix!r}"
        raise RunError(f"{path}: got {kind}; expected a file name that ends with .png.")
    return target
