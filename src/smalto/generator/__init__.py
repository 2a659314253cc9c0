"""Autoregressive models over the tokens of a tokenizer: transformer, cache, sampling, files."""

from smalto.generator.config import GeneratorConfig, TransformerConfig
from smalto.generator.generator import Generator, Samples
from smalto.generator.generator_folder import load_generator, save_generator, save_tokenizer
from smalto.generator.kv_cache import KVCache
from smalto.generator.requests import Fixed
from smalto.generator.transformer import Transformer

__all__ = [
    "Fixed",
    "Generator",
    "GeneratorConfig",
    "KVCache",
    "Samples",
    "Transformer",
    "TransformerConfig",
    "load_generator",
    "save_generator",
    "save_tokenizer",
]
