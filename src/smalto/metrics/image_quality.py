"""Similarity of reconstructions to their images."""

from __future__ import annotations

import torch
from torch import Tensor

from smalto.core.errors import InputError, MissingExtra, describe

MIN_MS_SSIM_SIDE = 176  # halved four times it is 11 pixels, the size of the window
_PIXELS_AT_ONCE = 2**22  # of each image, so that temporary copies stay small
BORDER = 5  # half of the window of SSIM, 11 pixels


def psnr(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of each image in dB, [B].

    Both arguments are [B, C, H, W] in [-1, 1]; the reconstruction is clamped to this range first.

    It is 10·log10(4 / mse), because the range of [-1, 1] is 2. Higher is better; +3 dB is half the
    squared error. Identical images give 100 dB instead of infinity, so that means stay finite.

    Raises:
        InputError: the tensors differ in shape, or are not floating point [B, C, H, W].
    """
    _check(reconstruction, images)
    height, width = images.shape[2:]
    error = torch.zeros(len(images), device=images.device)
    rows = max(1, _PIXELS_AT_ONCE // max(width, 1))
    for a, b in zip(reconstruction.split(rows, 2), images.split(rows, 2), strict=True):
        squares = (a.float().clamp(-1, 1) - b.float()).square()
        error = error + squares.mean(dim=(1, 2, 3)) * (a.shape[2] / max(height, 1))
    return 10 * torch.log10(4 / error.clamp(min=4e-10))


def ssim(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Return the structural similarity of each image, [B], at most 1, computed by torchmetrics.

    Wang et al. 2004, with a Gaussian window of 11 pixels and sigma 1.5. Both arguments are
    [B, C, H, W] in [-1, 1] with sides of at least 11; the reconstruction is clamped first.

    Raises:
        MissingExtra: torchmetrics is not installed.
        InputError: the tensors differ in shape, are not floating point, or are too small.
    """
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError:
        raise MissingExtra("torchmetrics", "eval", "SSIM") from None
    _check(reconstruction, images)
    if min(images.shape[2:]) <= 2 * BORDER:
        raise InputError(
            f"got images of {list(images.shape[2:])} pixels; expected sides of at least "
            f"{2 * BORDER + 1} for SSIM. Use larger images."
        )
    if not len(images):
        return images.new_zeros(0)
    unit = (reconstruction.float().clamp(-1, 1) + 1) / 2, (images.float() + 1) / 2
    _, similarity = structural_similarity_index_measure(
        *unit, data_range=1.0, reduction="none", return_full_image=True
    )
    # At the border the window exceeds the image. It is left out, as in scikit-image and in the
    # original implementation.
    inside = similarity[..., BORDER:-BORDER, BORDER:-BORDER]
    return inside.mean(dim=(1, 2, 3))


def ms_ssim(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Return the structural similarity over five scales of each image, [B], at most 1.

    Wang et al. 2003, computed by torchmetrics. The arguments are those of ``ssim``, with sides of
    at least 176.

    Raises:
        MissingExtra: torchmetrics is not installed.
        InputError: the tensors differ in shape, are not floating point, or are too small.
    """
    try:
        from torchmetrics.functional.image import multiscale_structural_similarity_index_measure
    except ImportError:
        raise MissingExtra("torchmetrics", "eval", "MS-SSIM") from None
    _check(reconstruction, images)
    if min(images.shape[2:]) < MIN_MS_SSIM_SIDE:
        raise InputError(
            f"got images of {list(images.shape[2:])} pixels; expected sides of at least "
            f"{MIN_MS_SSIM_SIDE} for MS-SSIM. Use larger images."
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
            f"got reconstruction {describe(reconstruction)} and images {describe(images)}; "
            "expected floating point of one shape [B, C, H, W] in [-1, 1]. Scale uint8 images with "
            "images.float() / 127.5 - 1."
        )
