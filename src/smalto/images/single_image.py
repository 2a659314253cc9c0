"""One image of a user, as a tensor and back."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from torch import Tensor

from smalto.core.errors import DataError, InputError, RunError, describe
from smalto.core.files import atomic_path, named_path
from smalto.core.progress import Progress
from smalto.images.finding import find_images
from smalto.images.image_file import ImageFile
from smalto.images.image_reader import ImageReader
from smalto.images.reading import LONGER_SIDE
from smalto.images.tensors import to_uint8, to_unit_range


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
