"""ResidualVQ: the first stage takes the nearest code, every further one quantizes the residual."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from smalto.core.config import over_defaults
from smalto.core.errors import ConfigError, InputError, describe
from smalto.core.layout import TokenLayout
from smalto.core.precision import without_autocast
from smalto.quantizers.base import BaseQuantizerConfig, Quantizer, QuantizerOutput
from smalto.quantizers.code_space import CodeSpace
from smalto.quantizers.estimators import estimate
from smalto.quantizers.latents import as_map, noise_vectors, projections, to_vectors
from smalto.quantizers.vector import VectorQuantizerConfig

_STAGE = VectorQuantizerConfig(codebook="ema")


class ResidualVQConfig(BaseQuantizerConfig):
    """Settings of a ResidualVQ; ``build()`` makes it.

    ``stage`` describes the quantizer of one stage. Its projections and its estimator are used once,
    around all stages.
    """

    codebook_size_key: ClassVar[str] = "stage.codebook_size"
    kind: Literal["residual"] = "residual"
    num_stages: int = Field(4, ge=1, le=64, description="codes that are summed for every vector")
    stage: Annotated[VectorQuantizerConfig, over_defaults(_STAGE)] = _STAGE

    @model_validator(mode="after")
    def _parts_fit(self) -> ResidualVQConfig:
        if self.stage.unit_codes:
            raise ValueError(
                "stage.unit_codes must be false: the residual of a code of length 1 has a length "
                "of its own, which would be lost."
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
        return self.model_copy(update={"stage": self.stage.folded()})


class ResidualVQ(Quantizer):
    """Residual VQ (Zeghidour et al. 2021, arXiv 2107.03312; Lee et al. 2022, arXiv 2203.01941).

    Tokens [B, S·h·w] stage by stage: the first k·h·w of them decode with k stages. The search works
    on detached residuals and one estimator is applied to the sum, so with straight-through the
    gradient is the identity at any depth. The loss is the mean of the stages' losses.

    Attributes:
        stages: one code space per stage, behind ``project_in``.
    """

    is_progressive = True
    is_local = True

    def __init__(self, config: ResidualVQConfig) -> None:
        super().__init__()
        if not isinstance(config, ResidualVQConfig):
            raise ConfigError(
                f"got {describe(config)}; ResidualVQ takes a ResidualVQConfig. Call build() on one."
            )
        stage = config.stage
        self.codebook_size = stage.codebook_size
        self.latent_dim = stage.latent_dim
        self.code_dim = stage.code_dim or stage.latent_dim
        self.estimator = stage.estimator
        self.project_in, self.project_out = projections(stage.latent_dim, stage.code_dim)
        self.stages = nn.ModuleList(
            stage.build_code_space(self.code_dim) for _ in range(config.num_stages)
        )

    def forward(
        self, latents: Tensor, *, num_stages: int | None = None, noise: Tensor | None = None
    ) -> QuantizerOutput:
        """Quantize latents [B, C, h, w] by the first ``num_stages`` stages."""
        self.check_latents(latents)
        stages = self._first(num_stages)
        with without_autocast(latents.device):
            vectors, valid = self._vectors(latents)
            total, indices, losses = torch.zeros_like(vectors), [], []
            for stage in stages:
                # The commitment pulls the vector towards the sum so far; nothing else is
                # differentiated through the residual.
                residual = vectors - total.detach()
                codes, stage_indices = stage.assign(residual.detach(), valid)
                losses.append(stage.loss(residual, codes, valid))
                indices.append(stage_indices)
                total = total + codes
            loss_dtype = torch.promote_types(latents.dtype, vectors.dtype)
            loss = torch.stack(losses).mean().to(loss_dtype)
            noise = noise_vectors(noise, latents, vectors.shape[1], vectors.dtype)
            quantized = estimate(self.estimator, vectors, total, valid, noise, self.training)
            quantized = self.project_out(quantized).to(stages[0].weight_dtype)  # what decode gives
            quantized = as_map(quantized.to(latents.dtype), latents)
            return QuantizerOutput(quantized, loss, _stage_major(indices, latents).reshape(-1))

    @torch.no_grad()
    def encode(self, latents: Tensor, layout: TokenLayout | None = None) -> Tensor:
        """Latents [B, C, h, w] -> tokens int64 [B, S*h*w], stage by stage."""
        self.check_latents(latents)
        self.check_layout(latents, layout)
        with without_autocast(latents.device):
            vectors, valid = self._vectors(latents)
            total, indices = torch.zeros_like(vectors), []
            for stage in self._first(None):
                codes, stage_indices = stage.assign(vectors - total, valid)
                indices.append(stage_indices)
                total = total + codes
        return _stage_major(indices, latents)

    def decode(self, indices: Tensor, layout: TokenLayout) -> Tensor:
        """Tokens int64 [B, k*h*w] -> quantized latents [B, C, h, w] from the first k stages."""
        if not isinstance(layout, TokenLayout) or not layout.has_equal_grids:
            raise InputError(
                f"got {layout}; a residual quantizer decodes a TokenLayout of equal grids, one per "
                "stage, such as quantizer.layout(4, 4)."
            )
        self._first(len(layout.grids))
        blocks = self.check_prefix(indices, layout)
        stages = self._first(len(blocks))
        with without_autocast(indices.device):
            total = torch.zeros((), dtype=stages[0].dtype, device=indices.device)
            for stage, block in zip(stages, blocks, strict=True):
                total = total + stage.embed(block)
            quantized = self.project_out(total).to(stages[0].weight_dtype)
        quantized = quantized.view(indices.shape[0], *layout.grids[0], self.latent_dim)
        return quantized.permute(0, 3, 1, 2).contiguous()

    def lookup(self, blocks: Sequence[Tensor]) -> Tensor:
        """Token blocks int64 [B, L_i], one per stage -> codes before ``project_out`` [B, L, D]."""
        stages = self._first(len(blocks))
        codes = [
            stage.embed(self.check_range(block))
            for stage, block in zip(stages, blocks, strict=True)
        ]
        return torch.cat(codes, dim=1).to(stages[0].weight_dtype)

    def layout(self, height: int, width: int) -> TokenLayout:
        return TokenLayout(((height, width),) * len(self.stages))

    def codebook(self) -> Tensor | None:
        """Return the codes of all stages before ``project_out``: [S, K, D]."""
        codebooks = [stage.codebook() for stage in self._first(None)]
        explicit = [codes for codes in codebooks if codes is not None]
        return torch.stack(explicit) if len(explicit) == len(codebooks) else None

    def token_gaps(self, latents: Tensor, tokens: Tensor, layout: TokenLayout) -> Tensor:
        vectors, _ = self._vectors(latents)
        total, gaps = torch.zeros_like(vectors), []
        for stage, block in zip(self._first(None), self.check_prefix(tokens, layout), strict=True):
            gaps.append(stage.vector_gaps(vectors - total, block.flatten()).view(block.shape))
            total = total + stage.embed(block.flatten())
        return torch.cat(gaps, dim=1)

    def _first(self, num_stages: int | None) -> list[CodeSpace]:
        stages: list[CodeSpace] = list(self.stages)  # type: ignore[arg-type]
        if num_stages is not None and not (
            isinstance(num_stages, int) and 1 <= num_stages <= len(stages)
        ):
            raise InputError(
                f"got {num_stages} stages; this quantizer has {len(stages)} stages. "
                f"Take from 1 to {len(stages)}."
            )
        return stages[:num_stages]

    def _vectors(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        return to_vectors(latents, self._first(1)[0].dtype, self.project_in)


def _stage_major(indices: list[Tensor], latents: Tensor) -> Tensor:
    """Per stage [B*h*w] -> tokens [B, S*h*w]."""
    num_positions = latents.shape[2] * latents.shape[3]
    by_stage = [i.view(latents.shape[0], num_positions) for i in indices]
    return torch.stack(by_stage, dim=1).flatten(1)
