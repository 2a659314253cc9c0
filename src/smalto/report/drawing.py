"""Images for the report: encoded into the page, error maps, token maps."""

from __future__ import annotations

import base64
import io

import numpy
import torch
from PIL import Image
from torch import Tensor

ERROR_GAIN = 4  # error maps show four times the difference
_HEAT = (
    (0, (0, 0, 4)),
    (0.25, (81, 18, 124)),
    (0.5, (183, 55, 121)),
    (0.75, (252, 137, 97)),
    (1, (252, 253, 191)),
)


def data_uri(pixels: Tensor, lossless: bool = True) -> str:
    """uint8 [3, H, W] as a WebP image inside a ``data:`` address."""
    buffer = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(
        buffer, "WEBP", lossless=lossless, quality=80
    )
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def error_map(image: Tensor, reconstruction: Tensor) -> Tensor:
    """Absolute difference of two uint8 [3, H, W], averaged over channels and times four, as colors from black to pale yellow."""
    share = (
        ((image.int() - reconstruction.int()).abs().float().mean(dim=0) * (ERROR_GAIN / 255))
        .clamp(max=1)
        .numpy()
    )
    positions, colors = [p for p, _ in _HEAT], numpy.array([c for _, c in _HEAT], dtype=float)
    channels = [numpy.interp(share, positions, colors[:, c]) for c in range(3)]
    return torch.from_numpy(numpy.stack(channels).round().astype(numpy.uint8))


def code_colors(codebook: Tensor) -> Tensor:
    """One color per code, uint8 [K, 3], for codes [K, D] or the first of [G, K, D]. Codes that are alike look alike."""
    codebook = codebook[0] if codebook.ndim == 3 else codebook
    centerd = codebook.float() - codebook.float().mean(dim=0)
    if centerd.shape[1] < 3:
        centerd = torch.nn.functional.pad(centerd, (0, 3 - centerd.shape[1]))
    # The three main directions of the codes.
    _, _, directions = torch.linalg.svd(centerd, full_matrices=False)
    coordinates = torch.zeros(len(centerd), 3)
    coordinates[:, : len(directions[:3])] = centerd @ directions[:3].T
    # Ranks spread the colors evenly, whatever the distances.
    ranks = coordinates.argsort(dim=0).argsort(dim=0).float() / max(1, len(coordinates) - 1)
    return (40 + 200 * ranks).to(torch.uint8)


def token_map(tokens: Tensor, grid: tuple[int, int], colors: Tensor, scale: int) -> Tensor:
    """Tokens [L] of one grid as an image uint8 [3, h*scale, w*scale]."""
    small = colors[tokens].view(*grid, 3).permute(2, 0, 1)
    return small.repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2)
