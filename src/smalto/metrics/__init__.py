"""Metrics of image quality and codebook usage, one function each."""

from smalto.metrics.codebook_usage import CodebookMeter, perplexity, used
from smalto.metrics.frechet import FeatureMoments, frechet_distance
from smalto.metrics.image_quality import ms_ssim, psnr, ssim

__all__ = [
    "CodebookMeter",
    "FeatureMoments",
    "frechet_distance",
    "ms_ssim",
    "perplexity",
    "psnr",
    "ssim",
    "used",
]
