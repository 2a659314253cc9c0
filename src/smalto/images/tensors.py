"""Image tensors: value ranges, crops, views."""

from __future__ import annotations

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor


def to_tensor(array: numpy.ndarray) -> Tensor:
    """Convert an image: uint8 [H, W, 3] -> uint8 [3, H, W]."""
    return torch.from_numpy(array.transpose(2, 0, 1).copy())


def to_unit_range(image: Tensor) -> Tensor:
    """Convert uint8 in [0, 255] to float32 in [-1, 1]; floats keep their values."""
    if image.dtype != torch.uint8:
        return image.float()
    return image.float().div_(127.5).sub_(1)  # in place: a large photograph has 300 MB in float32


def to_uint8(image: Tensor) -> Tensor:
    """Convert float in [-1, 1] to uint8 in [0, 255], clamped and rounded."""
    return image.float().clamp(-1, 1).add_(1).mul_(127.5).round_().to(torch.uint8)


def enlarge(image: Tensor, size: int) -> Tensor:
    """Enlarge an image [C, H, W] so that its shorter side is ``size`` (bicubic)."""
    scale = size / min(image.shape[1:])
    target = [max(size, round(side * scale)) for side in image.shape[1:]]
    bigger = F.interpolate(image[None].float(), target, mode="bicubic", align_corners=False)[0]
    return (
        bigger.round().clamp(0, 255).to(torch.uint8)
        if image.dtype == torch.uint8
        else bigger.clamp(-1, 1)
    )


def center_crop(image: Tensor, multiple: int) -> Tensor:
    """Crop an image [C, H, W] at the center to multiples of ``multiple``.

    An image with a side below ``multiple`` is enlarged first.
    """
    if min(image.shape[1:]) < multiple:
        image = enlarge(image, multiple)
    height, width = (side // multiple * multiple for side in image.shape[1:])
    top = (image.shape[-2] - height) // 2
    left = (image.shape[-1] - width) // 2
    return image[..., top : top + height, left : left + width]


def views_of(views: numpy.ndarray, flip: bool) -> Tensor:
    """Convert views uint8 [V, H, W, 3] to [V, 3, H, W]; ``flip`` appends mirrored copies."""
    images = torch.from_numpy(views).permute(0, 3, 1, 2)
    return torch.cat([images, images.flip(-1)]) if flip else images
