"""smalto turns images into discrete tokens and back.

The names below are loaded when first used, so that ``import smalto`` and the command line's ``--help`` stay fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smalto.data.token_dataset import TokenDataset, TokenLoader
    from smalto.data.token_rows import TokenRow
    from smalto.data.token_store import TokenStore
    from smalto.errors import SmaltoError
    from smalto.layout import TokenLayout
    from smalto.pipelines.convert import convert
    from smalto.pipelines.decode import decode
    from smalto.pipelines.demo import demo
    from smalto.pipelines.evaluate import evaluate
    from smalto.pipelines.info import info
    from smalto.pipelines.reconstruct import reconstruct
    from smalto.pipelines.tokenize import tokenize
    from smalto.pipelines.train import resume, train
    from smalto.quantizers import CodebookUpdater, Revive, VectorQuantizer
    from smalto.tokenizer import ImageTokenizer, SimpleVQVAE, TokenizerConfig, default_tokenizer, load
    from smalto.training.recipe import Recipe, load_recipe

__version__ = "0.1.0"

_HOME = {
    "CodebookUpdater": "smalto.quantizers",
    "ImageTokenizer": "smalto.tokenizer",
    "Recipe": "smalto.training.recipe",
    "Revive": "smalto.quantizers",
    "SimpleVQVAE": "smalto.tokenizer",
    "SmaltoError": "smalto.errors",
    "TokenDataset": "smalto.data.token_dataset",
    "TokenLayout": "smalto.layout",
    "TokenLoader": "smalto.data.token_dataset",
    "TokenRow": "smalto.data.token_rows",
    "TokenStore": "smalto.data.token_store",
    "TokenizerConfig": "smalto.tokenizer",
    "VectorQuantizer": "smalto.quantizers",
    "convert": "smalto.pipelines.convert",
    "decode": "smalto.pipelines.decode",
    "default_tokenizer": "smalto.tokenizer",
    "demo": "smalto.pipelines.demo",
    "evaluate": "smalto.pipelines.evaluate",
    "info": "smalto.pipelines.info",
    "load": "smalto.tokenizer",
    "load_recipe": "smalto.training.recipe",
    "reconstruct": "smalto.pipelines.reconstruct",
    "resume": "smalto.pipelines.train",
    "tokenize": "smalto.pipelines.tokenize",
    "train": "smalto.pipelines.train",
}

__all__ = [
    "CodebookUpdater",
    "ImageTokenizer",
    "Recipe",
    "Revive",
    "SimpleVQVAE",
    "SmaltoError",
    "TokenDataset",
    "TokenLayout",
    "TokenLoader",
    "TokenRow",
    "TokenStore",
    "TokenizerConfig",
    "VectorQuantizer",
    "convert",
    "decode",
    "default_tokenizer",
    "demo",
    "evaluate",
    "info",
    "load",
    "load_recipe",
    "reconstruct",
    "resume",
    "tokenize",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'smalto' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
