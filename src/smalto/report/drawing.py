"""Images of the report: data URIs, error maps, token maps."""

from __future__ import annotations

import base64
import io

import numpy
import torch
from PIL import Image
from torch import Tensor

ERROR_GAIN = 4  # error maps show the difference times this
_HEAT = (
    (0, (0, 0, 4)),
    (0.25, (81, 18, 124)),
    (0.5, (183, 55, 121)),
    (0.75, (252, 137, 97)),
    (1, (252, 253, 191)),
)


def data_uri(pixels: Tensor, lossless: bool = True) -> str:
    """Return uint8 [3, H, W] as a WebP image in a ``data:`` URI."""
    buffer = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(
        buffer, "WEBP", lossless=lossless, quality=80
    )
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def error_map(image: Tensor, reconstruction: Tensor) -> Tensor:
    """Return the absolute difference of two uint8 [3, H, W] as a heat map uint8 [3, H, W].

    The difference is averaged over channels and multiplied by 4. Colors run from black (equal) to
    pale yellow.
    """
    difference = (image.int() - reconstruction.int()).abs().float().mean(dim=0)
    share = (difference * (ERROR_GAIN / 255)).clamp(max=1).numpy()
    positions = [p for p, _ in _HEAT]
    colors = numpy.array([c for _, c in _HEAT], dtype=float)
    channels = [numpy.interp(share, positions, colors[:, c]) for c in range(3)]
    return torch.from_numpy(numpy.stack(channels).round().astype(numpy.uint8))


def token_map(colors: Tensor, grid: tuple[int, int], scale: int) -> Tensor:
    """Draw one grid of tokens: colors uint8 [L, 3] -> image uint8 [3, h*scale, w*scale]."""
    small = colors.view(*grid, 3).permute(2, 0, 1)
    return small.repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2)
