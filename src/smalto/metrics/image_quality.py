"""How near a reconstruction comes to its image."""

from __future__ import annotations

import torch
from torch import Tensor

from smalto.core.errors import InputError, MissingExtra, describe

MIN_MS_SSIM_SIDE = 176  # halved four times, its sides still hold the window of 11
BORDER = 5  # half of the 11 pixels of SSIM's window


def psnr(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image, [B]; both [B, C, H, W], the reconstruction is clamped to [-1, 1] first.

    10·log10(4 / mse), because the range of [-1, 1] is 2. Higher is better; +3 dB is half the squared error. Identical images give 100 dB
    and not infinity, so that a mean over many stays a number.
    """
    _check(reconstruction, images)
    error = (reconstruction.float().clamp(-1, 1) - images.float()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(4 / error.clamp(min=4e-10))


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
    _check(reconstruction, images)
    if min(images.shape[2:]) <= 2 * BORDER:
        raise InputError(
            f"SSIM needs sides of at least {2 * BORDER + 1} pixels; got {list(images.shape[2:])}."
        )
    if not len(images):
        return images.new_zeros(0)
    unit = (reconstruction.float().clamp(-1, 1) + 1) / 2, (images.float() + 1) / 2
    _, similarity = structural_similarity_index_measure(
        *unit, data_range=1.0, reduction="none", return_full_image=True
    )
    # The border, where the window hangs over the edge, is left out, as in scikit-image and in the original.
    inside = similarity[..., BORDER:-BORDER, BORDER:-BORDER]
    return inside.mean(dim=(1, 2, 3))


def ms_ssim(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Structural similarity over five scales, [B], at most 1 (Wang et al. 2003), by torchmetrics. As ``ssim``, with sides of at least 176.

    Raises:
        MissingExtra: torchmetrics is not installed.
    """
    try:
        from torchmetrics.functional.image import multiscale_structural_similarity_index_measure
    except ImportError:
        raise MissingExtra("torchmetrics", "eval", "MS-SSIM") from None
    _check(reconstruction, images)
    if min(images.shape[2:]) < MIN_MS_SSIM_SIDE:
        raise InputError(
            f"MS-SSIM needs sides of at least {MIN_MS_SSIM_SIDE} pixels; got {list(images.shape[2:])}."
        )
    if not len(images):
        return images.new_zeros(0)
    unit = (reconstruction.float().clamp(-1, 1) + 1) / 2, (images.float() + 1) / 2
    return multiscale_structural_similarity_index_measure(*unit, data_range=1.0, reduction="none")


def _check(reconstruction: Tensor, images: Tensor) -> None:
    if (
        reconstruction.shape != images.shape
        or images.ndim != 4
        or not (images.is_floating_point() and reconstruction.is_floating_point())
    ):
        raise InputError(
            f"reconstruction and images must be floating point in [-1, 1] and of one shape [B, C, H, W]; got {describe(reconstruction)} "
            f"and {describe(images)}."
        )
