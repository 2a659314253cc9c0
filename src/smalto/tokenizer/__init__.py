"""The tokenizer: encoder, quantizer and decoder, its files, and token blocks for generators."""

from smalto.tokenizer.loading import load
from smalto.tokenizer.model import ImageTokenizer, TokenizerConfig, TokenizerOutput
from smalto.tokenizer.presets import (
    SimpleVQVAE,
    SimpleVQVAEConfig,
    default_tokenizer,
    default_tokenizer_config,
)

__all__ = [
    "ImageTokenizer",
    "SimpleVQVAE",
    "SimpleVQVAEConfig",
    "TokenizerConfig",
    "TokenizerOutput",
    "default_tokenizer",
    "default_tokenizer_config",
    "load",
]
