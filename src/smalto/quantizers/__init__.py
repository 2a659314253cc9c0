"""Quantizers, which map latents to indices and back, and the updater of their codebooks."""

from smalto.quantizers.base import Quantizer, QuantizerOutput
from smalto.quantizers.codebook import Codebook, EMACodebook, ProjectedCodebook
from smalto.quantizers.config import QuantizerConfig
from smalto.quantizers.folding import fold
from smalto.quantizers.logit import LogitVQ, LogitVQConfig
from smalto.quantizers.multiscale import MultiScaleVQ, MultiScaleVQConfig
from smalto.quantizers.product import ProductVQ, ProductVQConfig
from smalto.quantizers.residual import ResidualVQ, ResidualVQConfig
from smalto.quantizers.updater import CodebookUpdater, Revive
from smalto.quantizers.vector import VectorQuantizer, VectorQuantizerConfig

__all__ = [
    "Codebook",
    "CodebookUpdater",
    "EMACodebook",
    "LogitVQ",
    "LogitVQConfig",
    "MultiScaleVQ",
    "MultiScaleVQConfig",
    "ProductVQ",
    "ProductVQConfig",
    "ProjectedCodebook",
    "Quantizer",
    "QuantizerConfig",
    "QuantizerOutput",
    "ResidualVQ",
    "ResidualVQConfig",
    "Revive",
    "VectorQuantizer",
    "VectorQuantizerConfig",
    "fold",
]
