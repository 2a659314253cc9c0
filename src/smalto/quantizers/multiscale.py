"""MultiScaleVQ: one codebook, from a coarse grid to a fine one; every scale quantizes what the coarser ones left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from smalto.core.config import Config, over_defaults
from smalto.core.errors import ConfigError, InputError, describe
from smalto.core.layout import TokenLayout, as_grids
from smalto.core.precision import without_autocast
from smalto.quantizers.base import Quantizer, QuantizerOutput
from smalto.quantizers.estimators import ESTIMATORS, estimate
from smalto.quantizers.latents import (
    as_map,
    as_vectors,
    keep,
    masked_mse,
    noise_map,
    projections,
    to_vectors,
)
from smalto.quantizers.vector import VectorQuantizerConfig

Scale = Annotated[int, Field(ge=1, le=65536)]
_SCALE = VectorQuantizerConfig(codebook_size=4096, latent_dim=32)


class MultiScaleVQConfig(Config):
    """Settings of a MultiScaleVQ; ``build()`` makes it.

    ``scale`` is the quantizer of one scale, which all share. Its projections and its estimator are used once, around all scales.
    """

    kind: Literal["multiscale"] = "multiscale"
    scales: tuple[Scale | tuple[Scale, Scale], ...] = Field(
        (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        min_length=1,
        max_length=64,
        description="rows and columns of each scale, or one number for both; the last is the whole latent map",
    )
    num_phis: int | None = Field(
        4,
        ge=1,
        le=64,
        description="convolutions that smooth enlarged scales, shared evenly; None: one per scale",
    )
    phi_ratio: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of the smoothed in the result; 0: there are no convolutions",
    )
    scale: Annotated[VectorQuantizerConfig, over_defaults(_SCALE)] = _SCALE

    @model_validator(mode="after")
    def _parts_fit(self) -> MultiScaleVQConfig:
        if self.scale.unit_codes:
            raise ValueError(
                "scale.unit_codes must be false: what a code of length 1 leaves has another length, which would be lost."
            )
        height, width = self.grids[-1]
        if any(h > height or w > width for h, w in self.grids):
            raise ValueError(
                f"scales must not be finer than the last one, which is the whole latent map; got {self.scales}."
            )
        return self

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """The scales as (rows, columns)."""
        return as_grids(self.scales)

    @property
    def codebook_size(self) -> int:
        return self.scale.codebook_size

    @property
    def latent_dim(self) -> int:
        return self.scale.latent_dim

    def build(self) -> MultiScaleVQ:
        return MultiScaleVQ(self)

    def folded(self) -> MultiScaleVQConfig:
        """The same with a projected codebook as the plain one that it folds to."""
        return self.model_copy(update={"scale": self.scale.folded()})


class Phi(nn.Conv2d):
    """``(1 - ratio)·x + ratio·conv3x3(x)``, in the precision of x. It begins as the identity."""

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__(width, width, 3, padding=1)
        self.ratio = ratio

    def reset_parameters(self) -> None:
        nn.init.dirac_(self.weight)
        assert self.bias is not None
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is not None
        smoothed = F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype), padding=1)
        return x * (1 - self.ratio) + smoothed * self.ratio


class MultiScaleVQ(Quantizer):
    """Multi-scale residual quantization (Tian et al. 2024, "Visual Autoregressive Modeling", arXiv 2404.02905, algorithms 1 and 2).

    From the coarsest scale on: what is left of the latent map is averaged down to the scale's grid, every vector there takes the nearest
    code of the one codebook, the map of codes is enlarged (bicubic) to the full grid, smoothed by a convolution φ, and added to
    the result. Tokens [B, Σ h_k·w_k] scale by scale, so the first ones alone are a coarser image.

    The loss is the mean over scales of ``mse(f̂_k, sg[f]) + beta·mse(sg[f̂_k], f)``, where f̂_k is the result after k scales and f the
    latents. φ and learned codes learn from the first term; the search works on a detached residual that keeps no graph.

    Attributes:
        scale: the VectorQuantizer of one scale, which all share.
        phis: the convolutions; scale k of K takes the one whose tick is nearest to k/(K-1).
        scales: ((h_1, w_1), ..., (h_K, w_K)), for a latent map of (h_K, w_K).
    """

    def __init__(self, config: MultiScaleVQConfig) -> None:
        super().__init__()
        if not isinstance(config, MultiScaleVQConfig):
            raise ConfigError(
                f"MultiScaleVQ takes a MultiScaleVQConfig; got {describe(config)}. Or call build() on one."
            )
        scale = config.scale
        self.codebook_size, self.latent_dim, self.scales = (
            scale.codebook_size,
            scale.latent_dim,
            config.grids,
        )
        self.beta, self.estimator = scale.beta, scale.estimator
        self.project_in, self.project_out = projections(scale.latent_dim, scale.code_dim)
        dim = scale.code_dim or scale.latent_dim
        self.scale = scale.model_copy(update={"latent_dim": dim, "code_dim": None}).build()
        num_phis = (config.num_phis or len(self.scales)) if config.phi_ratio else 0
        self.phis = nn.ModuleList(Phi(dim, config.phi_ratio) for _ in range(num_phis))
        self._phi_of_scale = phi_of_scale(len(self.scales), num_phis)

    def forward(
        self, latents: Tensor, *, num_stages: int | None = None, noise: Tensor | None = None
    ) -> QuantizerOutput:
        """Quantize latents [B, C, h, w] by the first ``num_stages`` scales; see ``Quantizer.forward``."""
        self.check_latents(latents)
        layout = self.layout(*latents.shape[2:])
        num_scales = self._check_stages(num_stages, len(layout.grids))
        with without_autocast(latents.device):
            target, valid = self._target(latents)
            indices, results = self._quantize(target, valid, layout, num_scales)
            losses = [self.beta * masked_mse(target, result.detach(), valid) for result in results]
            if not ESTIMATORS[self.estimator].teaches_codes:
                losses += [masked_mse(result, target.detach(), valid) for result in results]
            loss = (torch.stack(losses).sum() / num_scales).to(
                torch.promote_types(latents.dtype, target.dtype)
            )
            noise = noise_map(noise, latents, target.shape[1], target.dtype)
            quantized = estimate(self.estimator, target, results[-1], valid, noise, self.training)
            return QuantizerOutput(
                self._out(quantized).to(latents.dtype), loss, torch.cat(indices, dim=1).flatten()
            )

    @torch.no_grad()
    def encode(self, latents: Tensor, layout: TokenLayout | None = None) -> Tensor:
        """Latents [B, C, h, w] -> tokens int64 [B, L], scale by scale, in the grids of ``layout`` (default: ``self.layout(h, w)``)."""
        self.check_latents(latents)
        height, width = latents.shape[2:]
        layout = self.layout(height, width) if layout is None else layout
        if not isinstance(layout, TokenLayout) or layout.grids[-1] != (height, width):
            raise InputError(
                f"the last scale must be the whole latent map, ({height}, {width}); got {layout}."
            )
        if any(h > height or w > width for h, w in layout.grids):
            raise InputError(
                f"scales must not be finer than the last one, which is the whole latent map; got {layout}."
            )
        with without_autocast(latents.device):
            indices, _ = self._quantize(*self._target(latents), layout, len(layout.grids))
        return torch.cat(indices, dim=1)

    def decode(self, indices: Tensor, layout: TokenLayout) -> Tensor:
        """Tokens int64 [B, L] -> quantized latents [B, C, h, w]; of the first scales alone: the coarser result that they make."""
        return self._out(self._results(indices, layout)[-1])

    def lookup(self, blocks: Sequence[Tensor]) -> Tensor:
        """Codes of tokens, in the space of codes: blocks of int64 [B, L_i] -> [B, L, code_dim or C]."""
        return self.scale.lookup(blocks)

    @torch.no_grad()
    def var_input(self, indices: Tensor, layout: TokenLayout) -> Tensor:
        """What a next-scale model is given to predict every scale but the first: tokens [B, L] -> [B, L - L_1, code_dim or C].

        For each scale but the last the result so far, averaged down to the next scale's grid. Tokens of the first scales alone
        give the input up to the scale after them.
        """
        results = self._results(indices, layout)
        batch, dim = results[0].shape[:2]
        inputs = [
            _pool(result, grid).flatten(2).transpose(1, 2)
            for result, grid in zip(results, layout.grids[1:], strict=False)
        ]
        return torch.cat([results[0].new_zeros(batch, 0, dim), *inputs], dim=1)

    def layout(self, height: int, width: int) -> TokenLayout:
        """Every scale in proportion: times height/h_K and width/w_K, rounded half up, at least 1; the last one is (height, width)."""
        rows, columns = self.scales[-1]
        grids = [
            (_in_proportion(h, height, rows), _in_proportion(w, width, columns))
            for h, w in self.scales[:-1]
        ]
        return TokenLayout((*grids, (height, width)))

    def get_codebook(self) -> Tensor:
        """The codes, in the space of codes: [K, D]."""
        return self.scale.get_codebook()

    def _target(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Latents -> the map to be quantized [B, D, h, w], and which of its vectors are usable, bool [B, h, w]."""
        vectors, valid = to_vectors(latents, self.scale.dtype, self.project_in)
        return as_map(vectors, latents), valid.view(latents.shape[0], *latents.shape[2:])

    def _out(self, result: Tensor) -> Tensor:
        with without_autocast(result.device):
            return as_map(self.project_out(as_vectors(result)), result).to(
                self.scale.embedding.weight.dtype
            )

    def _quantize(
        self, target: Tensor, valid: Tensor, layout: TokenLayout, num_scales: int
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The indices of each scale [B, h_k·w_k], and the result after it [B, D, h, w]."""
        share = valid.unsqueeze(1).to(target.dtype)
        total, indices, results = torch.zeros_like(target), [], []
        for number, grid in enumerate(layout.grids[:num_scales]):
            rest, usable = keep(target - total, valid).detach(), valid.flatten()
            if number < len(layout.grids) - 1:
                # The mean over usable vectors alone; where all are, this divides by exactly 1.
                pooled = _pool(share, grid)
                rest, usable = _pool(rest, grid) / pooled.clamp(min=1e-9), (pooled > 0).flatten()
            codes, found = self.scale.assign(as_vectors(rest), usable)
            total = total + self._spread(codes, number, layout, target)
            indices.append(found.view(target.shape[0], grid[0] * grid[1]))
            results.append(total)
        return indices, results

    def _results(self, indices: Tensor, layout: TokenLayout) -> list[Tensor]:
        """The result after each scale that ``indices`` has, [B, D, h, w]."""
        if not isinstance(layout, TokenLayout):
            raise InputError(
                f"a multi-scale quantizer decodes a TokenLayout, such as quantizer.layout(16, 16); got {describe(layout)}."
            )
        blocks = self.check_prefix(indices, layout)
        height, width = layout.grids[-1]
        with without_autocast(indices.device):
            codes = self.scale.codes()
            total = codes.new_zeros(indices.shape[0], codes.shape[1], height, width)
            results = []
            for number, block in enumerate(blocks):
                total = total + self._spread(
                    F.embedding(block.flatten(), codes), number, layout, total
                )
                results.append(total)
        return results

    def _spread(self, codes: Tensor, number: int, layout: TokenLayout, like: Tensor) -> Tensor:
        """The codes of scale ``number``, [B·h_k·w_k, D] -> what they add to the result, [B, D, h, w]."""
        height, width = layout.grids[number]
        added = (
            codes.view(like.shape[0], height, width, codes.shape[1])
            .permute(0, 3, 1, 2)
            .contiguous()
        )
        if number < len(layout.grids) - 1:
            added = F.interpolate(added, size=layout.grids[-1], mode="bicubic")
        if not self.phis:
            return added
        standard = len(layout.grids) == len(self.scales)
        order = self._phi_of_scale if standard else phi_of_scale(len(layout.grids), len(self.phis))
        return self.phis[order[number]](added)

    @staticmethod
    def _check_stages(num_stages: int | None, num_scales: int) -> int:
        if num_stages is not None and not (
            isinstance(num_stages, int) and 1 <= num_stages <= num_scales
        ):
            raise InputError(
                f"this quantizer has {num_scales} stages, its scales; got {num_stages} of them. Take from 1 to {num_scales}."
            )
        return num_stages or num_scales


def phi_of_scale(num_scales: int, num_phis: int) -> tuple[int, ...]:
    """Which of ``num_phis`` convolutions each scale takes, exactly as VAR chooses: some scales lie on ties that rounding decides."""
    if not num_phis:
        return ()
    margin = 1 / 3 / num_phis if num_phis == 4 else 1 / 2 / num_phis
    ticks = numpy.linspace(margin, 1 - margin, num_phis)
    positions = [k / (num_scales - 1) if num_scales > 1 else 0.0 for k in range(num_scales)]
    return tuple(int(numpy.argmin(numpy.abs(ticks - position))) for position in positions)


def _pool(latent_map: Tensor, grid: tuple[int, int]) -> Tensor:
    return F.interpolate(latent_map, size=grid, mode="area")


def _in_proportion(size: int, wanted: int, configured: int) -> int:
    return max(1, (2 * size * wanted + configured) // (2 * configured))
