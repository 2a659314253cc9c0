"""Recipes: everything that decides what a training run does. This is the part that every kind of
recipe shares.
"""

from __future__ import annotations

import tomllib
from typing import Any, ClassVar, Literal, TypeVar

import tomli_w
from pydantic import Field

from smalto.core.config import Beta, Config, dotted_keys, nearest_key, parse_config
from smalto.core.device import Precision
from smalto.core.errors import ConfigError
from smalto.training.earlier_formats import rename_settings

NONE = "none"  # stands for null in TOML: code_dim = "none"


class AdamWConfig(Config):
    """AdamW (Loshchilov and Hutter 2019). Norms, biases and codes or embeddings do not decay."""

    betas: tuple[Beta, Beta] = Field(
        (0.9, 0.999), description="decay rates of the first and second moments"
    )
    weight_decay: float = Field(0.01, ge=0, le=1e4)
    decay: bool = Field(True, description="lower the learning rate after the warm-up")
    clip: float = Field(0.0, ge=0, description="maximum norm of the gradient; 0: no clipping")
    accumulate: int = Field(
        1,
        ge=1,
        le=2**20,
        description="micro-batches that a process splits its batch into, to save memory",
    )
    ema_decay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="save moving averages of the weights with this decay; 0: the weights",
    )


class OptimizerConfig(AdamWConfig):
    """AdamW with a linear warm-up and a cosine decay to zero."""

    lr: float = Field(1e-3, gt=0, le=1e4, description="learning rate after the warm-up")
    warmup: int = Field(0, ge=0, description="steps of linear warm-up")


class CheckpointConfig(Config):
    """How often a run saves checkpoints."""

    every: int = Field(200, ge=1, description="steps between checkpoints")
    keep: int = Field(2, ge=1, description="checkpoints kept")


class MonitorConfig(Config):
    """What happens if a run goes wrong: see smalto.training.monitor."""

    action: Literal["warn", "rollback", "off"] = Field(
        "warn", description="rollback returns to a good checkpoint with smaller learning rates"
    )


class EvaluateConfig(Config):
    """How often a run evaluates held-out data."""

    every: int = Field(100, ge=1, description="steps between evaluations of fixed held-out data")


class Recipe(Config):
    """A training run of any kind.

    Attributes:
        trains: which model it trains, "tokenizer" or "generator"; recipes of several kinds may
            train the same.
    """

    trains: ClassVar[str]
    kind: str
    seed: int = Field(
        0,
        ge=0,
        lt=2**63,
        description="random seed for initialization, crops and augmentation",
    )
    steps: int = Field(2400, ge=0, description="training steps")
    precision: Precision = Field(
        "float32",
        description='"bf16" runs the network in bfloat16; a quantizer stays in float32',
    )
    optimizer: AdamWConfig = AdamWConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    monitor: MonitorConfig = MonitorConfig()

    @property
    def codebook_size_key(self) -> str:
        """The dotted key of the number of codes; empty if the recipe does not decide it."""
        return ""

    def is_fixed(self, key: str) -> bool:
        """Return whether a resumed run keeps this setting."""
        return key in ("data.source", "seed")


RecipeT = TypeVar("RecipeT", bound=Recipe)


def change_recipe(recipe: RecipeT, settings: dict[str, Any]) -> RecipeT:
    """Return a copy with some settings replaced, checked.

    Args:
        recipe: the original.
        settings: dotted keys to values, such as ``{"data.size": 64, "optimizer.lr": 5e-4}``.

    Raises:
        ConfigError: an unknown key (with the nearest right one), or a value out of range.
    """
    data = recipe.model_dump(mode="json")
    keys = dotted_keys(type(recipe))
    settings = rename_settings(settings, "settings")
    # Kinds first: the other settings depend on them.
    for key, value in sorted(settings.items(), key=lambda item: not item[0].endswith(".kind")):
        if key not in keys or key == "kind":
            raise ConfigError(f"unknown key {key!r}: {nearest_key(key, keys)}")
        *parents, last = key.split(".")
        table = data
        for parent in parents:
            table = table.setdefault(parent, {})
        if last == "kind" and table.get("kind") != value:
            table.clear()  # the settings of another kind mean nothing to this one
        table[last] = replace_values(value, NONE, None)
    return parse_config(type(recipe), data, "recipe")


def recipe_toml(recipe: Recipe) -> str:
    """Return the recipe as TOML, with every setting."""
    return tomli_w.dumps(replace_values(recipe.model_dump(mode="json"), None, NONE))


def parse_setting(text: str) -> tuple[str, Any]:
    """Parse ``a.b=value`` from a command line: the value as TOML, otherwise as plain text.

    Raises:
        ConfigError: the text lacks ``=``.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(
            f"got {text!r}; --set takes key=value, such as --set optimizer.lr=0.0005."
        )
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except (ValueError, RecursionError):  # not TOML, or a number of thousands of digits
        return key.strip(), None if value.strip() == NONE else value.strip()


def replace_values(data: Any, old: Any, new: Any) -> Any:
    """Return a copy of nested tables with one value replaced by another."""
    if isinstance(data, dict):
        return {key: replace_values(value, old, new) for key, value in data.items()}
    return new if data == old else data
