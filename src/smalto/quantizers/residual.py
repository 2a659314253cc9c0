"""ResidualVQ: the first stage takes the nearest code, every further one quantizes what is left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from smalto.core.config import Config, over_defaults
from smalto.core.errors import ConfigError, InputError, describe
from smalto.core.layout import TokenLayout
from smalto.core.precision import without_autocast
from smalto.quantizers.base import Quantizer, QuantizerOutput
from smalto.quantizers.estimators import estimate
from smalto.quantizers.latents import as_map, noise_vectors, projections, to_vectors
from smalto.quantizers.vector import VectorQuantizer, VectorQuantizerConfig

_STAGE = VectorQuantizerConfig(codebook="ema")


class ResidualVQConfig(Config):
    """Settings of a ResidualVQ; ``build()`` makes it.

    ``stage`` is the quantizer that one stage alone would be. Its projections and its estimator are used once, around all stages.
    """

    kind: Literal["residual"] = "residual"
    num_stages: int = Field(4, ge=1, le=64, description="codes that are added up for every vector")
    stage: Annotated[VectorQuantizerConfig, over_defaults(_STAGE)] = _STAGE

    @model_validator(mode="after")
    def _parts_fit(self) -> ResidualVQConfig:
        if self.stage.unit_codes:
            raise ValueError(
                "stage.unit_codes must be false: what a code of length 1 leaves has another length, which would be lost."
            )
        return self

    @property
    def codebook_size(self) -> int:
        return self.stage.codebook_size

    @property
    def latent_dim(self) -> int:
        return self.stage.latent_dim

    def build(self) -> ResidualVQ:
        return ResidualVQ(self)

    def folded(self) -> ResidualVQConfig:
        """The same with projected codebooks as the plain ones that they fold to."""
        return self.model_copy(update={"stage": self.stage.folded()})


class ResidualVQ(Quantizer):
    """Residual vector quantization (Zeghidour et al. 2021, arXiv 2107.03312; Lee et al. 2022, arXiv 2203.01941).

    Tokens [B, S·h·w] stage by stage: the first k·h·w of them are an image with k stages. The search works on detached residuals and one
    estimator is applied to the sum, so with straight-through the gradient is the identity at any depth. The loss is the mean over
    stages of the stage's own.

    Attributes:
        stages: one VectorQuantizer each, in the space behind ``project_in``.
    """

    def __init__(self, config: ResidualVQConfig) -> None:
        super().__init__()
        if not isinstance(config, ResidualVQConfig):
            raise ConfigError(
                f"ResidualVQ takes a ResidualVQConfig; got {describe(config)}. Or call build() on one."
            )
        stage = config.stage
        self.codebook_size, self.latent_dim, self.estimator = (
            stage.codebook_size,
            stage.latent_dim,
            stage.estimator,
        )
        self.project_in, self.project_out = projections(stage.latent_dim, stage.code_dim)
        inner = stage.model_copy(
            update={"latent_dim": stage.code_dim or stage.latent_dim, "code_dim": None}
        )
        self.stages = nn.ModuleList(inner.build() for _ in range(config.num_stages))

    def forward(
        self, latents: Tensor, *, num_stages: int | None = None, noise: Tensor | None = None
    ) -> QuantizerOutput:
        """Quantize latents [B, C, h, w] by the first ``num_stages`` stages; see ``Quantizer.forward``."""
        self.check_latents(latents)
        stages = self._first(num_stages)
        with without_autocast(latents.device):
            vectors, valid = self._vectors(latents)
            total, indices, losses = torch.zeros_like(vectors), [], []
            for stage in stages:
                # The commitment pulls the vector towards the sum so far; nothing else is differentiated through the residual.
                residual = vectors - total.detach()
                codes, stage_indices = stage.assign(residual.detach(), valid)
                losses.append(stage.loss(residual, codes, valid))
                indices.append(stage_indices)
                total = total + codes
            loss = torch.stack(losses).mean().to(torch.promote_types(latents.dtype, vectors.dtype))
            noise = noise_vectors(noise, latents, vectors.shape[1], vectors.dtype)
            quantized = estimate(self.estimator, vectors, total, valid, noise, self.training)
            quantized = self.project_out(quantized).to(
                stages[0].embedding.weight.dtype
            )  # what decode gives
            return QuantizerOutput(
                as_map(quantized.to(latents.dtype), latents),
                loss,
                _stage_major(indices, latents).reshape(-1),
            )

    @torch.no_grad()
    def encode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] -> tokens int64 [B, S*h*w], stage by stage."""
        self.check_latents(latents)
        with without_autocast(latents.device):
            vectors, valid = self._vectors(latents)
            total, indices = torch.zeros_like(vectors), []
            for stage in self._first(None):
                codes, stage_indices = stage.assign(vectors - total, valid)
                indices.append(stage_indices)
                total = total + codes
        return _stage_major(indices, latents)

    def decode(self, indices: Tensor, layout: TokenLayout) -> Tensor:
        """Tokens int64 [B, k*h*w] -> quantized latents [B, C, h, w] from k stages, all of the layout's or the first ones."""
        if not isinstance(layout, TokenLayout) or len(set(layout.grids)) != 1:
            raise InputError(
                f"a residual quantizer decodes a TokenLayout of equal grids, one per stage; got {layout}."
            )
        self._first(len(layout.grids))
        blocks = self.check_prefix(indices, layout)
        stages = self._first(len(blocks))
        with without_autocast(indices.device):
            total = torch.zeros((), dtype=stages[0].dtype, device=indices.device)
            for stage, block in zip(stages, blocks, strict=True):
                total = total + nn.functional.embedding(block, stage.codes())
            quantized = self.project_out(total).to(stages[0].embedding.weight.dtype)
        return (
            quantized.view(len(indices), *layout.grids[0], self.latent_dim)
            .permute(0, 3, 1, 2)
            .contiguous()
        )

    def lookup(self, blocks: Sequence[Tensor]) -> Tensor:
        """Codes of tokens, in the space of codes before ``project_out``: int64 [B, L_i], one block per stage -> [B, L, code_dim or C]."""
        stages = self._first(len(blocks))
        return torch.cat(
            [stage.lookup([block]) for stage, block in zip(stages, blocks, strict=True)], dim=1
        )

    def layout(self, height: int, width: int) -> TokenLayout:
        return TokenLayout(((height, width),) * len(self.stages))

    def get_codebook(self) -> Tensor:
        """The codes of all stages, in the space of codes: [S, K, D]."""
        return torch.stack([stage.get_codebook() for stage in self._first(None)])

    def _first(self, num_stages: int | None) -> list[VectorQuantizer]:
        stages = [stage for stage in self.stages if isinstance(stage, VectorQuantizer)]
        if num_stages is not None and not (
            isinstance(num_stages, int) and 1 <= num_stages <= len(stages)
        ):
            raise InputError(
                f"this quantizer has {len(stages)} stages; got {num_stages} of them. Take from 1 to {len(stages)}."
            )
        return stages[:num_stages]

    def _vectors(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        return to_vectors(latents, self._first(1)[0].dtype, self.project_in)


def _stage_major(indices: list[Tensor], latents: Tensor) -> Tensor:
    """Per stage [B*h*w] -> tokens [B, S*h*w]."""
    num_positions = latents.shape[2] * latents.shape[3]
    return torch.stack([i.view(latents.shape[0], num_positions) for i in indices], dim=1).flatten(1)
