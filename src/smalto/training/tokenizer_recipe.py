"""The recipe of a tokenizer."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from smalto.core.config import Config
from smalto.features.lpips import MIN_SIDE as MIN_LPIPS_SIDE
from smalto.images.reading import LONGER_SIDE
from smalto.losses import LossesConfig
from smalto.losses.adversarial import MIN_LAST_SIDE
from smalto.quantizers import Revive
from smalto.tokenizer import TokenizerConfig, default_tokenizer_config
from smalto.training.recipe import EvaluateConfig, MonitorConfig, OptimizerConfig, Recipe


class DataConfig(Config):
    """Images and crops."""

    source: str = Field("", description="folder of images; filled in when a run starts")
    size: int = Field(
        64, ge=8, le=8192, description="side of a crop in pixels; a multiple of the stride"
    )
    batch: int = Field(16, ge=1, le=65536, description="crops per step, of all processes together")
    longer_side: int = Field(
        LONGER_SIDE, ge=8, le=65536, description="larger images are reduced to this when read"
    )
    crops_per_image: int = Field(8, ge=1, le=4096, description="crops from one read of an image")
    flip: bool = Field(True, description="mirror half of the crops")
    color: float = Field(
        0.0, ge=0, le=1, description="strength of color jitter; helps if images are few"
    )
    cache_mb: int = Field(1024, ge=0, description="images kept in memory by each process, MiB")


class CodebookConfig(Config):
    """Codebook learning: see CodebookUpdater."""

    decay_tokens: float = Field(
        160.0, gt=0, description="decay of moving averages, in tokens per code"
    )
    revive_below: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="a code is dead below this share of uniform use; 0: never",
    )

    def revive(self) -> Revive | None:
        return Revive(self.revive_below) if self.revive_below else None


class TokenizerMonitorConfig(MonitorConfig):
    """What happens if a run goes wrong, and what counts as wrong."""

    psnr_drop: float = Field(3.0, gt=0, description="dB below the best moving average")
    usage_drop: float = Field(
        0.5, gt=0, lt=1, description="share lost of the largest number of codes in use"
    )


class TokenizerEvaluateConfig(EvaluateConfig):
    """How often a run evaluates held-out images."""

    crops: int = Field(64, ge=1, le=65536, description="held-out crops evaluated in training")
    images: int = Field(
        256, ge=1, description="whole held-out images evaluated at the end, at most"
    )


class FinetuneConfig(Config):
    """Training that starts from a trained tokenizer."""

    tokenizer: str = Field(
        "", description="folder or name of that tokenizer; filled in when a run starts"
    )
    learn: Literal["everything", "decoder", "all-but-codebook"] = Field(
        "everything",
        description="decoder: tokens stay the same; all-but-codebook: codes are frozen",
    )


class TokenizerRecipe(Recipe):
    """A training run of a tokenizer. ``TokenizerRecipe()`` is the default of ``smalto train``."""

    trains: ClassVar[str] = "tokenizer"
    kind: Literal["tokenizer"] = "tokenizer"
    gradient_checkpointing: bool = Field(
        False, description="less memory, a third more time; for autoencoder.kind cnn"
    )
    channels_last: bool = Field(
        False, description="channels-last memory format: faster for autoencoder.kind cnn in bf16"
    )
    compile: bool = Field(
        False, description="torch.compile: minutes at the start, faster steps; needs a C++ compiler"
    )
    tokenizer: TokenizerConfig = Field(default_factory=default_tokenizer_config)
    data: DataConfig = DataConfig()
    losses: LossesConfig = LossesConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    codebook: CodebookConfig = CodebookConfig()
    evaluate: TokenizerEvaluateConfig = TokenizerEvaluateConfig()
    monitor: TokenizerMonitorConfig = TokenizerMonitorConfig()
    finetune: FinetuneConfig = FinetuneConfig()

    @property
    def codebook_size_key(self) -> str:
        """The dotted key of the number of codes."""
        return f"tokenizer.quantizer.{self.tokenizer.quantizer.codebook_size_key}"

    def is_fixed(self, key: str) -> bool:
        """Return whether a resumed run keeps this setting."""
        discriminator = ("losses.adversarial.width", "losses.adversarial.layers")
        return (
            super().is_fixed(key)
            or key.startswith(("tokenizer.", "finetune."))
            or (key in discriminator and bool(self.losses.adversarial.weight))
        )

    @model_validator(mode="after")
    def _crops_fit(self) -> TokenizerRecipe:
        stride = self.tokenizer.autoencoder.stride
        if self.data.size % stride:
            raise ValueError(
                f"data.size is {self.data.size}; it must be a multiple of the tokenizer's stride "
                f"{stride}."
            )
        grid = self.tokenizer.quantizer.latent_grid
        side = self.data.size // stride
        if grid is not None and grid != (side, side):
            rows, columns = grid
            raise ValueError(
                f"data.size is {self.data.size}, so the latent map of a crop is {side} x {side}, "
                f"and tokenizer.quantizer.scales end with {rows} x {columns}. Set data.size to "
                f"{rows * stride}, or scales that end with {side}."
            )
        if self.gradient_checkpointing and self.tokenizer.autoencoder.kind != "cnn":
            raise ValueError(
                "gradient_checkpointing is for autoencoder.kind 'cnn'; this one is "
                f"{self.tokenizer.autoencoder.kind!r}."
            )
        return self

    @model_validator(mode="after")
    def _losses_fit(self) -> TokenizerRecipe:
        adversarial, perceptual = self.losses.adversarial, self.losses.perceptual
        size = self.data.size
        if adversarial.weight and size >> adversarial.layers < MIN_LAST_SIDE:
            raise ValueError(
                f"losses.adversarial.layers is {adversarial.layers}, too many for crops of {size} "
                f"pixels. Set it to at most {(size // MIN_LAST_SIDE).bit_length() - 1}."
            )
        if adversarial.lead > adversarial.start:
            raise ValueError(
                f"losses.adversarial.lead is {adversarial.lead}, more than the "
                f"{adversarial.start} steps before its start."
            )
        if perceptual.weight and perceptual.network == "lpips-vgg" and size < MIN_LPIPS_SIDE:
            raise ValueError(
                f"losses.perceptual.network lpips-vgg needs crops of {MIN_LPIPS_SIDE} pixels; "
                f"data.size is {size}."
            )
        if perceptual.weight and self.tokenizer.autoencoder.in_channels != 3:
            raise ValueError(
                "losses.perceptual needs images of 3 channels; set losses.perceptual.weight to 0."
            )
        return self
