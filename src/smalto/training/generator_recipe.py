"""The recipe of a generator."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from smalto.core.config import Beta, Config
from smalto.generator import TransformerConfig
from smalto.training.recipe import AdamWConfig, EvaluateConfig, MonitorConfig, Recipe

LR_PER_256 = 1e-4  # VAR's learning rate for a batch of 256 rows; it is proportional to the batch
WARMUP_SHARE = 0.02  # of the steps, as in VAR


class GeneratorOptimizerConfig(AdamWConfig):
    """AdamW with VAR's schedule: a linear warm-up, a constant part, a linear decay to 1 %."""

    betas: tuple[Beta, Beta] = Field(
        (0.9, 0.95), description="decay rates of the first and second moments"
    )
    weight_decay: float = Field(0.05, ge=0, le=1e4)
    clip: float = Field(2.0, ge=0, description="maximum norm of the gradient; 0: no clipping")
    lr: float | None = Field(
        None,
        gt=0,
        le=1e4,
        description='learning rate after the warm-up; "none": 1e-4 per 256 rows of a batch',
    )
    warmup: int | None = Field(
        None, ge=0, description='steps of linear warm-up; "none": 2 % of the steps'
    )


class TokensConfig(Config):
    """Rows of token stores."""

    source: str | tuple[str, ...] = Field(
        "", description="token store, folder of stores, or list; filled in when a run starts"
    )
    tokenizer: str = Field(
        "", description="folder or name of its tokenizer; empty: the one recorded in the store"
    )
    batch: int = Field(64, ge=1, le=65536, description="rows per step, of all processes together")
    labels: bool = Field(True, description="learn the labels of the rows; false: unconditional")


class GeneratorMonitorConfig(MonitorConfig):
    """What happens if a run goes wrong, and what counts as wrong."""

    loss_rise: float = Field(0.5, gt=0, description="nats above the best moving average")


class GeneratorEvaluateConfig(EvaluateConfig):
    """How often a run evaluates held-out rows."""

    rows: int = Field(512, ge=1, le=2**20, description="held-out rows evaluated, at most")
    samples: int = Field(
        8, ge=0, le=64, description="images per label in the report, for at most 10 labels"
    )


class GeneratorRecipe(Recipe):
    """A training run of a generator on token stores."""

    trains: ClassVar[str] = "generator"
    kind: Literal["generator"] = "generator"
    gradient_checkpointing: bool = Field(False, description="less memory, a third more time")
    generator: TransformerConfig = TransformerConfig()
    data: TokensConfig = TokensConfig()
    optimizer: GeneratorOptimizerConfig = GeneratorOptimizerConfig()
    evaluate: GeneratorEvaluateConfig = GeneratorEvaluateConfig()
    monitor: GeneratorMonitorConfig = GeneratorMonitorConfig()

    def is_fixed(self, key: str) -> bool:
        """Return whether a resumed run keeps this setting."""
        kept = ("data.tokenizer", "data.labels", "data.batch")
        return super().is_fixed(key) or key.startswith("generator.") or key in kept

    @property
    def lr(self) -> float:
        """The learning rate after the warm-up."""
        chosen = self.optimizer.lr
        return LR_PER_256 * self.data.batch / 256 if chosen is None else chosen

    @property
    def warmup(self) -> int:
        """The steps of linear warm-up."""
        chosen = self.optimizer.warmup
        return round(WARMUP_SHARE * self.steps) if chosen is None else chosen
