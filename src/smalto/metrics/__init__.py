"""What the report's numbers mean, each as one function."""

from smalto.metrics.codebook import CodebookMeter, perplexity, used
from smalto.metrics.image import psnr, ssim

__all__ = ["CodebookMeter", "perplexity", "psnr", "ssim", "used"]
