"""How near a reconstruction comes to its picture."""

from __future__ import annotations

import torch
from torch import Tensor

from smalto.errors import MissingExtra


def psnr(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image, [B]; both [B, C, H, W], the reconstruction is clamped to [-1, 1] first.

    10·log10(4 / mse), because the range of [-1, 1] is 2. Higher is better; +3 dB is half the squared error. Identical images give inf.
    """
    error = (reconstruction.float().clamp(-1, 1) - images.float()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(4 / error)


def ssim(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Structural similarity of each image, [B], at most 1 (Wang et al. 2004; Gaussian window of 11, sigma 1.5), by torchmetrics.

    Both [B, C, H, W] in [-1, 1] with sides of at least 11; the reconstruction is clamped first.

    Raises:
        MissingExtra: torchmetrics is not installed.
    """
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError:
        raise MissingExtra("torchmetrics", "eval", "SSIM") from None
    value = structural_similarity_index_measure(
        (reconstruction.float().clamp(-1, 1) + 1) / 2, (images.float() + 1) / 2, data_range=1.0, reduction="none"
    )
    assert isinstance(value, Tensor)
    return value
