"""One image of a user, as a tensor and back."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from torch import Tensor

from smalto.core.errors import DataError, InputError, describe
from smalto.core.files import atomic_path
from smalto.core.progress import Progress
from smalto.images.finding import find_images
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
        DataError: the image cannot be read.
    """
    return to_unit_range(read_bytes(path, stride, longer_side, Progress()))


def read_bytes(
    path: str | Path, stride: int, longer_side: int | None, progress: Progress
) -> Tensor:
    """Read an image like ``read_image``; return uint8 [1, 3, H, W]."""
    if Path(path).is_dir():
        raise DataError(
            f"got the folder {path}; expected one image. Name an image, or use `smalto tokenize` "
            "and `smalto decode` for a folder."
        )
    files, _ = find_images(path)
    reader = ImageReader(files, stride, progress, longer_side=longer_side, workers=0)
    for _, image in reader:
        return image[None]
    raise DataError(f"{path} cannot be read: {reader.skipped[0].reason}.")


def write_png(path: str | Path, image: Tensor) -> None:
    """Write an image [3, H, W] or [1, 3, H, W] in [-1, 1] as PNG, atomically.

    Raises:
        InputError: the tensor has another shape.
    """
    image = image[0] if image.ndim == 4 and len(image) == 1 else image
    if image.ndim != 3 or len(image) != 3:
        raise InputError(
            f"got {describe(image)}; expected one image [3, H, W] in [-1, 1]. Write the images "
            "of a batch one by one."
        )
    with atomic_path(Path(path)) as temporary:
        Image.fromarray(to_uint8(image.detach()).permute(1, 2, 0).cpu().numpy()).save(
            temporary, "PNG"
        )
