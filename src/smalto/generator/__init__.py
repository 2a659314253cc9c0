"""Autoregressive models over the tokens of a tokenizer: transformer, cache, sampling, files."""

from smalto.generator.config import GeneratorConfig
from smalto.generator.generator import Fixed, Generator, Samples
from smalto.generator.generator_folder import load_generator, save_generator
from smalto.generator.kv_cache import KVCache
from smalto.generator.transformer import Transformer

__all__ = [
    "Fixed",
    "Generator",
    "GeneratorConfig",
    "KVCache",
    "Samples",
    "Transformer",
    "load_generator",
    "save_generator",
]
