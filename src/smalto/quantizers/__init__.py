"""Quantizers turn latents into indices and back; the updater looks after their codebooks."""

from smalto.quantizers.base import Quantizer, QuantizerOutput
from smalto.quantizers.codebook import Codebook, EMACodebook
from smalto.quantizers.updater import CodebookUpdater, Revive
from smalto.quantizers.vector import VectorQuantizer, VectorQuantizerConfig

__all__ = [
    "Codebook",
    "CodebookUpdater",
    "EMACodebook",
    "Quantizer",
    "QuantizerOutput",
    "Revive",
    "VectorQuantizer",
    "VectorQuantizerConfig",
]
