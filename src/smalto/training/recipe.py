"""Recipes: everything that decides what a training run does, as one checked TOML file."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import Field, model_validator

from smalto.core.config import Config, dotted_keys, nearest_key, parse_config
from smalto.core.device import Precision
from smalto.core.errors import ConfigError
from smalto.features.lpips import MIN_SIDE as MIN_LPIPS_SIDE
from smalto.images.reading import LONGER_SIDE
from smalto.losses import LossesConfig
from smalto.losses.adversarial import MIN_LAST_SIDE
from smalto.quantizers import MultiScaleVQConfig, Revive
from smalto.tokenizer import TokenizerConfig, default_tokenizer_config
from smalto.training.earlier_formats import rename_settings, rename_tables

NONE = "none"  # what TOML, which has no null, says for "not set": code_dim = "none"


class DataConfig(Config):
    """Images and crops."""

    source: str = Field("", description="folder of images; filled in when a run starts")
    size: int = Field(
        64,
        ge=8,
        le=8192,
        description="side of a crop in pixels; a multiple of the tokenizer's stride",
    )
    batch: int = Field(16, ge=1, le=65536, description="crops per step, of all processes together")
    longer_side: int = Field(
        LONGER_SIDE, ge=8, le=65536, description="larger images are reduced to this when decoded"
    )
    crops_per_image: int = Field(8, ge=1, le=4096, description="crops cut from one decode")
    flip: bool = Field(True, description="mirror half of the crops")
    color: float = Field(
        0.0,
        ge=0,
        le=1,
        description="how far the colors of crops may change; helps where images are few",
    )
    cache_mb: int = Field(
        1024, ge=0, description="decoded images kept in memory by each process, MiB"
    )


class OptimizerConfig(Config):
    """AdamW (Loshchilov and Hutter 2019) with a linear warm-up and a cosine decay to zero. Norms, biases and codes do not decay."""

    lr: float = Field(1e-3, gt=0, description="learning rate after the warm-up")
    betas: tuple[float, float] = Field((0.9, 0.999), description="how long both moments look back")
    weight_decay: float = Field(0.01, ge=0)
    warmup: int = Field(0, ge=0, description="steps of linear warm-up")
    decay: bool = Field(True, description="cosine decay to zero at the last step")
    clip: float = Field(0.0, ge=0, description="longer gradients are shortened to this; 0: never")
    accumulate: int = Field(
        1,
        ge=1,
        description="parts in which a process takes its batch, one after the other, to save memory",
    )
    ema_decay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="save moving averages of the weights with this decay, such as 0.999; 0: the weights",
    )


class CodebookConfig(Config):
    """Codebook upkeep, see CodebookUpdater."""

    decay_tokens: float = Field(
        160.0, gt=0, description="how far moving averages look back, in tokens per code"
    )
    revive_below: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="a code with less than this share of an even share is dead; 0: never",
    )

    def revive(self) -> Revive | None:
        return Revive(self.revive_below) if self.revive_below else None


class CheckpointConfig(Config):
    """How often a run saves itself."""

    every: int = Field(200, ge=1, description="steps between checkpoints")
    keep: int = Field(2, ge=1, description="checkpoints kept")


class MonitorConfig(Config):
    """What is done when a run goes wrong: see smalto.training.monitor."""

    action: Literal["warn", "rollback", "off"] = Field(
        "warn", description="rollback also goes back to a good checkpoint, more carefully"
    )
    psnr_drop: float = Field(3.0, gt=0, description="dB below the best moving average")
    usage_drop: float = Field(
        0.5, gt=0, lt=1, description="share of the most codes in use that is lost"
    )


class FinetuneConfig(Config):
    """Training that begins with a trained tokenizer."""

    tokenizer: str = Field("", description="folder it came from; filled in when a run starts")
    learn: Literal["everything", "decoder", "all-but-codebook"] = Field(
        "everything",
        description="decoder: tokens stay exactly as they are; all-but-codebook: codes stay, encoder and decoder learn",
    )


class EvaluateConfig(Config):
    """How often a run looks at held-out images."""

    every: int = Field(100, ge=1, description="steps between two looks at fixed held-out crops")
    crops: int = Field(64, ge=1, le=65536, description="how many of them")
    images: int = Field(256, ge=1, description="whole held-out images measured at the end, at most")


class Recipe(Config):
    """A whole training run. ``Recipe()`` is what training uses without a recipe."""

    seed: int = Field(0, ge=0, lt=2**63)
    steps: int = Field(2400, ge=0)
    precision: Precision = Field(
        "float32",
        description='"bf16" runs encoder and decoder in bfloat16; the quantizer stays in float32',
    )
    gradient_checkpointing: bool = Field(
        False, description="less memory in training, a third more time; for autoencoder.kind cnn"
    )
    channels_last: bool = Field(
        False,
        description="maps lie pixel by pixel in memory: faster for autoencoder.kind cnn in bf16",
    )
    compile: bool = Field(
        False, description="torch.compile: minutes at the start, faster steps; needs a C++ compiler"
    )
    tokenizer: TokenizerConfig = Field(default_factory=default_tokenizer_config)
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    losses: LossesConfig = LossesConfig()
    codebook: CodebookConfig = CodebookConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    monitor: MonitorConfig = MonitorConfig()
    finetune: FinetuneConfig = FinetuneConfig()

    @model_validator(mode="after")
    def _crops_fit(self) -> Recipe:
        stride = self.tokenizer.autoencoder.stride
        if self.data.size % stride:
            raise ValueError(
                f"data.size is {self.data.size}, which the tokenizer's stride {stride} does not divide."
            )
        quantizer = self.tokenizer.quantizer
        side = self.data.size // stride
        if isinstance(quantizer, MultiScaleVQConfig) and quantizer.grids[-1] != (side, side):
            rows, columns = quantizer.grids[-1]
            raise ValueError(
                f"data.size is {self.data.size}, so the latent map of a crop is {side} x {side}, and tokenizer.quantizer.scales end with "
                f"{rows} x {columns}. Set data.size to {rows * stride}, or scales that end with {side}."
            )
        if self.gradient_checkpointing and self.tokenizer.autoencoder.kind != "cnn":
            raise ValueError(
                f"gradient_checkpointing is for autoencoder.kind 'cnn'; this one is {self.tokenizer.autoencoder.kind!r}."
            )
        return self

    @model_validator(mode="after")
    def _losses_fit(self) -> Recipe:
        adversarial, perceptual = self.losses.adversarial, self.losses.perceptual
        if adversarial.weight and self.data.size >> adversarial.layers < MIN_LAST_SIDE:
            raise ValueError(
                f"losses.adversarial.layers is {adversarial.layers}, which leaves nothing of crops of {self.data.size} pixels. "
                f"Set it to at most {(self.data.size // MIN_LAST_SIDE).bit_length() - 1}."
            )
        if adversarial.lead > adversarial.start:
            raise ValueError(
                f"losses.adversarial.lead is {adversarial.lead}, more than the {adversarial.start} steps before its start."
            )
        if (
            perceptual.weight
            and perceptual.network == "lpips-vgg"
            and self.data.size < MIN_LPIPS_SIDE
        ):
            raise ValueError(
                f"losses.perceptual.network lpips-vgg needs crops of {MIN_LPIPS_SIDE} pixels; data.size is {self.data.size}."
            )
        if perceptual.weight and self.tokenizer.autoencoder.in_channels != 3:
            raise ValueError(
                "losses.perceptual looks at images of 3 channels; set losses.perceptual.weight to 0."
            )
        return self


def load_recipe(path: str | Path | None = None, settings: dict[str, Any] | None = None) -> Recipe:
    """Read a recipe from TOML, with some settings replaced.

    Args:
        path: a ``.toml`` file; None begins with ``Recipe()``.
        settings: dotted keys to values, e.g. ``{"data.size": 64, "optimizer.lr": 5e-4}``.

    Raises:
        ConfigError: not readable, not TOML, an unknown key (with the nearest right one) or a value out of range.
    """
    data = rename_tables(_read_toml(Path(path)), str(path)) if path else {}
    recipe = parse_config(Recipe, _merge(Recipe().model_dump(mode="json"), data), str(path))
    return change_recipe(recipe, settings or {})


def change_recipe(recipe: Recipe, settings: dict[str, Any]) -> Recipe:
    """A copy with some settings replaced, checked. Raises ConfigError as ``load_recipe`` does."""
    settings = rename_settings(settings, "settings")
    data = recipe.model_dump(mode="json")
    keys = dotted_keys(Recipe)
    for key, value in sorted(
        settings.items(), key=lambda item: not item[0].endswith(".kind")
    ):  # which settings there are follows from it
        if key not in keys:
            raise ConfigError(f"unknown key {key!r}: {nearest_key(key, keys)}")
        *parents, last = key.split(".")
        table = data
        for parent in parents:
            table = table.setdefault(parent, {})
        if last == "kind" and table.get("kind") != value:
            table.clear()  # the settings of another kind mean nothing to this one
        table[last] = _replace(value, NONE, None)
    return parse_config(Recipe, data, "recipe")


def codebook_size_key(recipe: Recipe) -> str:
    """Where the recipe's kind of quantizer keeps the number of codes."""
    inner = {"vector": "", "residual": "stage.", "product": "head.", "multiscale": "scale."}[
        recipe.tokenizer.quantizer.kind
    ]
    return f"tokenizer.quantizer.{inner}codebook_size"


def parse_setting(text: str) -> tuple[str, Any]:
    """``a.b=value`` from a command line: the value is read as TOML, and as plain text where it is none.

    Raises:
        ConfigError: there is no ``=``.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(
            f"--set takes key=value, such as --set optimizer.lr=0.0005; got {text!r}."
        )
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), None if value.strip() == NONE else value.strip()


def recipe_toml(recipe: Recipe) -> str:
    """The recipe as TOML, every setting written out."""
    return tomli_w.dumps(_replace(recipe.model_dump(mode="json"), None, NONE))


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return _replace(tomllib.loads(path.read_text(encoding="utf-8")), NONE, None)
    except OSError as error:
        raise ConfigError(f"the recipe {path} cannot be read ({error.strerror}).") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"the recipe {path} is not valid TOML: {error}.") from None


def _replace(data: Any, old: Any, new: Any) -> Any:
    """A copy of tables inside tables with one value in place of another."""
    if isinstance(data, dict):
        return {key: _replace(value, old, new) for key, value in data.items()}
    return new if data == old else data


def _merge(base: Any, over: Any) -> Any:
    if not isinstance(base, dict) or not isinstance(over, dict):
        return over
    if "kind" in over and over["kind"] != base.get("kind"):
        return over  # the settings of another kind mean nothing to this one
    return {**base, **{key: _merge(base.get(key), value) for key, value in over.items()}}
