"""Many images on one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy
import torch
from PIL import Image
from torch import Tensor

from smalto.core.files import atomic_path
from smalto.images.tensors import to_tensor

GAP = 4  # pixels between images


def contact_sheet(images: Sequence[Tensor], columns: int | None = None) -> Tensor:
    """Return images side by side on white.

    Args:
        images: uint8 [3, H, W] of one size, at least one.
        columns: images in a row; None: about as many as rows.

    Returns:
        uint8 [3, rows * (H + 4) + 4, columns * (W + 4) + 4].
    """
    columns = columns or math.ceil(math.sqrt(len(images)))
    height, width = images[0].shape[1:]
    rows = -(-len(images) // columns)
    sheet = torch.full((3, rows * (height + GAP) + GAP, columns * (width + GAP) + GAP), 255)
    sheet = sheet.to(torch.uint8)
    for number, image in enumerate(images):
        top = GAP + number // columns * (height + GAP)
        left = GAP + number % columns * (width + GAP)
        sheet[:, top : top + height, left : left + width] = image
    return sheet


def write_contact_sheet(path: Path, files: Sequence[Path]) -> None:
    """Write a contact sheet of PNG files, as PNG."""
    images = []
    for file in files:
        with Image.open(file) as image:
            images.append(to_tensor(numpy.asarray(image.convert("RGB"))))
    with atomic_path(path) as temporary:
        pixels = contact_sheet(images).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(temporary, "PNG")
