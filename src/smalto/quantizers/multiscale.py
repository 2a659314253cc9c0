"""MultiScaleVQ: one codebook on grids from coarse to fine.

Every scale quantizes the residual of the coarser ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import numpy
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from smalto.core.config import over_defaults
from smalto.core.errors import ConfigError, InputError, describe
from smalto.core.layout import TokenLayout, as_grids
from smalto.core.precision import without_autocast
from smalto.quantizers.base import BaseQuantizerConfig, Quantizer, QuantizerOutput, is_exporting
from smalto.quantizers.code_space import CodeSpace
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


class MultiScaleVQConfig(BaseQuantizerConfig):
    """Settings of a MultiScaleVQ; ``build()`` makes it.

    ``scale`` describes the quantizer that all scales share. Its projections and its estimator are
    used once, around all scales.
    """

    codebook_size_key: ClassVar[str] = "scale.codebook_size"
    kind: Literal["multiscale"] = "multiscale"
    scales: tuple[Scale | tuple[Scale, Scale], ...] = Field(
        (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        min_length=1,
        max_length=64,
        description="rows and columns of each scale, or one number for both; "
        "the last is the whole latent map",
    )
    num_phis: int | None = Field(
        4,
        ge=1,
        le=64,
        description="convolutions that smooth upsampled scales, shared evenly; None: one per scale",
    )
    phi_ratio: float = Field(
        0.5,
        ge=0,
        le=1,
        description="weight of the smoothed map in the result; 0: without convolutions",
    )
    scale: Annotated[VectorQuantizerConfig, over_defaults(_SCALE)] = _SCALE

    @model_validator(mode="after")
    def _parts_fit(self) -> MultiScaleVQConfig:
        if self.scale.unit_codes:
            raise ValueError(
                "scale.unit_codes must be false: the residual of a code of length 1 has a length "
                "of its own, which would be lost."
            )
        height, width = self.grids[-1]
        if any(h > height or w > width for h, w in self.grids):
            raise ValueError(
                f"got {self.scales}; scales must not be finer than the last one, which is the "
                "whole latent map. Put the finest scale last."
            )
        return self

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """The scales as (rows, columns)."""
        return as_grids(self.scales)

    @property
    def latent_grid(self) -> tuple[int, int]:
        return self.grids[-1]

    @property
    def codebook_size(self) -> int:
        return self.scale.codebook_size

    @property
    def latent_dim(self) -> int:
        return self.scale.latent_dim

    def build(self) -> MultiScaleVQ:
        return MultiScaleVQ(self)

    def folded(self) -> MultiScaleVQConfig:
        """Return the settings with a projected codebook as the plain one that it folds to."""
        return self.model_copy(update={"scale": self.scale.folded()})


class Phi(nn.Conv2d):
    """Smoothing ``(1 - ratio)·x + ratio·conv3x3(x)``, in the dtype of x [B, D, h, w].

    It is initialized as the identity.
    """

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
    """Multi-scale residual quantization of "Visual Autoregressive Modeling".

    See Tian et al. 2024, arXiv 2404.02905, algorithms 1 and 2. The scales run from coarse to fine.
    For each one:

    1. The residual of the latent map is averaged down to the grid of the scale.
    2. Every vector is assigned the nearest code of the shared codebook.
    3. The map of codes is upsampled (bicubic) to the full grid and smoothed by a convolution φ.
    4. The smoothed map is added to the result.

    Tokens are [B, Σ h_k·w_k] scale by scale, so the first ones alone decode to a coarser image.

    The loss is the mean over scales of ``mse(f̂_k, sg[f]) + beta·mse(sg[f̂_k], f)``, with f̂_k the
    result after k scales and f the latents. φ and learned codes learn from the first term. The
    search works on a detached residual without a graph.

    Attributes:
        scale: the code space that all scales share.
        phis: the convolutions; scale k of K uses the one whose tick is nearest to k/(K-1).
        scales: ((h_1, w_1), ..., (h_K, w_K)), for a latent map of (h_K, w_K).
    """

    is_progressive = True
    may_leave_parameters_unused = True  # a φ may belong to none of the scales

    def __init__(self, config: MultiScaleVQConfig) -> None:
        super().__init__()
        if not isinstance(config, MultiScaleVQConfig):
            raise ConfigError(
                f"got {describe(config)}; MultiScaleVQ expects a MultiScaleVQConfig. "
                "Call build() on one."
            )
        scale = config.scale
        self.codebook_size = scale.codebook_size
        self.latent_dim = scale.latent_dim
        self.code_dim = scale.code_dim or scale.latent_dim
        self.scales = config.grids
        self.beta = scale.beta
        self.estimator = scale.estimator
        self.project_in, self.project_out = projections(scale.latent_dim, scale.code_dim)
        self.scale: CodeSpace = scale.build_code_space(self.code_dim)
        num_phis = (config.num_phis or len(self.scales)) if config.phi_ratio else 0
        self.phis = nn.ModuleList(Phi(self.code_dim, config.phi_ratio) for _ in range(num_phis))
        self._phi_of_scale = phi_of_scale(len(self.scales), num_phis)

    def forward(
        self, latents: Tensor, *, num_stages: int | None = None, noise: Tensor | None = None
    ) -> QuantizerOutput:
        """Quantize latents [B, C, h, w] by the first ``num_stages`` scales."""
        self.check_latents(latents)
        layout = self.layout(*latents.shape[2:])
        num_scales = self._check_stages(num_stages, len(layout.grids))
        with without_autocast(latents.device):
            target, valid = self._target(latents)
            indices, results = self._quantize(target, valid, layout, num_scales)
            losses = [self.beta * masked_mse(target, result.detach(), valid) for result in results]
            if not ESTIMATORS[self.estimator].teaches_codes:
                losses += [masked_mse(result, target.detach(), valid) for result in results]
            loss_dtype = torch.promote_types(latents.dtype, target.dtype)
            loss = (torch.stack(losses).sum() / num_scales).to(loss_dtype)
            noise = noise_map(noise, latents, target.shape[1], target.dtype)
            quantized = estimate(self.estimator, target, results[-1], valid, noise, self.training)
            quantized = self._out(quantized).to(latents.dtype)
            return QuantizerOutput(quantized, loss, torch.cat(indices, dim=1).flatten())

    @torch.no_grad()
    def encode(self, latents: Tensor, layout: TokenLayout | None = None) -> Tensor:
        """Latents [B, C, h, w] -> tokens int64 [B, L], scale by scale.

        The grids are those of ``layout``, by default ``self.layout(h, w)``.

        Raises:
            InputError: the last grid is not the whole latent map, or another one is finer.
        """
        self.check_latents(latents)
        height, width = latents.shape[2:]
        layout = self.layout(height, width) if layout is None else layout
        if not isinstance(layout, TokenLayout) or layout.grids[-1] != (height, width):
            raise InputError(
                f"got {layout}; the last scale must be the whole latent map. "
                f"End the scales with ({height}, {width})."
            )
        if any(h > height or w > width for h, w in layout.grids):
            raise InputError(
                f"got {layout}; scales must not be finer than the last one, which is the whole "
                "latent map. Put the finest scale last."
            )
        with without_autocast(latents.device):
            indices, _ = self._quantize(*self._target(latents), layout, len(layout.grids))
        return torch.cat(indices, dim=1)

    def decode(self, indices: Tensor, layout: TokenLayout) -> Tensor:
        """Tokens int64 [B, L] -> quantized latents [B, C, h, w].

        Tokens of the first scales alone decode to a coarser result.
        """
        return self._out(self._results(indices, layout)[-1])

    def lookup(self, blocks: Sequence[Tensor]) -> Tensor:
        """Token blocks int64 [B, L_i] -> their codes before ``project_out``, [B, L, code_dim]."""
        if not blocks:
            raise InputError(
                "got an empty list; expected token blocks [B, L_i]. Pass at least one token block."
            )
        indices = self.check_range(torch.cat(list(blocks), dim=1))
        return self.scale.embed(indices).to(self.scale.weight_dtype)

    @torch.no_grad()
    def generator_input(self, blocks: Sequence[Tensor], layout: TokenLayout | None) -> Tensor:
        """Return the input of a next-scale model: token blocks [B, L_k] -> [B, L - L_1, code_dim].

        For each scale but the last, the result so far, averaged down to the next scale's grid. The
        tokens of the first scales alone give the input up to the scale after them.
        """
        layout = layout or self.configured_layout
        tokens = torch.cat(list(blocks), dim=1)
        results = self._results(tokens, layout)
        batch, dim = results[0].shape[:2]
        inputs = [
            self.scale_input(result, grid)
            for result, grid in zip(results, layout.grids[1:], strict=False)
        ]
        return torch.cat([results[0].new_zeros(batch, 0, dim), *inputs], dim=1)

    def scale_input(self, result: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return the input of a next-scale model for a scale, [B, h_k·w_k, code_dim].

        Args:
            result: after the scale before, [B, code_dim, h, w].
            grid: (h_k, w_k).
        """
        return area_pool(result, grid).flatten(2).transpose(1, 2)

    def add_scale(
        self, result: Tensor | None, codes: Tensor, number: int, layout: TokenLayout
    ) -> Tensor:
        """Return the result after scale ``number``, [B, code_dim, h, w].

        Args:
            result: after the scale before; None for the first one.
            codes: of the scale, [B, h_k·w_k, code_dim], as ``lookup`` returns them.
        """
        if result is None:
            size = len(codes), self.code_dim, *layout.grids[-1]
            result = codes.new_zeros(size, dtype=self.scale.dtype)
        with without_autocast(codes.device):
            codes = codes.to(result.dtype).flatten(0, 1)
            return result + self._spread(codes, number, layout, result)

    def layout(self, height: int, width: int) -> TokenLayout:
        """Return the scales in proportion to a latent map of ``height`` x ``width``.

        Each one is multiplied by height/h_K and width/w_K, rounded half up, and at least 1. The
        last one is (height, width).
        """
        rows, columns = self.scales[-1]
        grids = [
            (_in_proportion(h, height, rows), _in_proportion(w, width, columns))
            for h, w in self.scales[:-1]
        ]
        return TokenLayout((*grids, (height, width)))

    @property
    def configured_layout(self) -> TokenLayout:
        return TokenLayout(self.scales)

    def codebook(self) -> Tensor | None:
        """Return the codes before ``project_out``: [K, D]."""
        return self.scale.codebook()

    @torch.no_grad()
    def token_gaps(self, latents: Tensor, tokens: Tensor, layout: TokenLayout) -> Tensor:
        target, valid = self._target(latents)
        gaps = []
        results = [torch.zeros_like(target), *self._results(tokens, layout)[:-1]]
        blocks = self.check_prefix(tokens, layout)
        for number, (result, block) in enumerate(zip(results, blocks, strict=True)):
            rest, _ = self._residual(target, result, valid, number, layout)
            gaps.append(self.scale.vector_gaps(as_vectors(rest), block.flatten()).view(block.shape))
        return torch.cat(gaps, dim=1)

    def project_result(self, result: Tensor) -> Tensor:
        """Return the quantized latents [B, C, h, w] of a result [B, code_dim, h, w]."""
        return self._out(result)

    def _target(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [B, C, h, w] -> the map to quantize [B, D, h, w] and validity, bool [B, h, w]."""
        vectors, valid = to_vectors(latents, self.scale.dtype, self.project_in)
        return as_map(vectors, latents), valid.view(latents.shape[0], *latents.shape[2:])

    def _out(self, result: Tensor) -> Tensor:
        """Map before ``project_out`` [B, D, h, w] -> quantized latents [B, C, h, w]."""
        with without_autocast(result.device):
            return as_map(self.project_out(as_vectors(result)), result).to(self.scale.weight_dtype)

    def _quantize(
        self, target: Tensor, valid: Tensor, layout: TokenLayout, num_scales: int
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return the indices of each scale [B, h_k·w_k] and the result after it [B, D, h, w]."""
        total, indices, results = torch.zeros_like(target), [], []
        for number, (height, width) in enumerate(layout.grids[:num_scales]):
            rest, usable = self._residual(target, total, valid, number, layout)
            codes, found = self.scale.assign(as_vectors(rest), usable)
            total = total + self._spread(codes, number, layout, target)
            indices.append(found.view(target.shape[0], height * width))
            results.append(total)
        return indices, results

    @staticmethod
    def _residual(
        target: Tensor, total: Tensor, valid: Tensor, number: int, layout: TokenLayout
    ) -> tuple[Tensor, Tensor]:
        """Return the input of scale ``number`` [B, D, h_k, w_k], and validity bool [B·h_k·w_k]."""
        rest = keep(target - total, valid).detach()
        if number == len(layout.grids) - 1:
            return rest, valid.flatten()
        # The mean over valid vectors alone; if all are, this divides by exactly 1.
        pooled = area_pool(valid.unsqueeze(1).to(target.dtype), layout.grids[number])
        rest = area_pool(rest, layout.grids[number]) / pooled.clamp(min=1e-9)
        return rest, (pooled > 0).flatten()

    def _results(self, indices: Tensor, layout: TokenLayout) -> list[Tensor]:
        """Return the result after each scale of ``indices``, a list of [B, D, h, w]."""
        if not isinstance(layout, TokenLayout):
            raise InputError(
                f"got {describe(layout)}; a multi-scale quantizer decodes a TokenLayout, such as "
                "quantizer.layout(16, 16)."
            )
        blocks = self.check_prefix(indices, layout)
        height, width = layout.grids[-1]
        with without_autocast(indices.device):
            size = indices.shape[0], self.code_dim, height, width
            total = torch.zeros(size, dtype=self.scale.dtype, device=indices.device)
            results = []
            for number, block in enumerate(blocks):
                codes = self.scale.embed(block.flatten())
                total = total + self._spread(codes, number, layout, total)
                results.append(total)
        return results

    def _spread(self, codes: Tensor, number: int, layout: TokenLayout, like: Tensor) -> Tensor:
        """Codes of scale ``number`` [B·h_k·w_k, D] -> their share of the result [B, D, h, w]."""
        height, width = layout.grids[number]
        added = codes.view(like.shape[0], height, width, codes.shape[1])
        added = added.permute(0, 3, 1, 2).contiguous()
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
                f"got num_stages={num_stages}; this quantizer has {num_scales} stages, its scales. "
                f"Pass a number from 1 to {num_scales}."
            )
        return num_stages or num_scales


def phi_of_scale(num_scales: int, num_phis: int) -> tuple[int, ...]:
    """Return which of ``num_phis`` convolutions each scale uses, computed exactly as in VAR.

    Some scales lie on ties that rounding decides, so the arithmetic must be the same.
    """
    if not num_phis:
        return ()
    margin = 1 / 3 / num_phis if num_phis == 4 else 1 / 2 / num_phis
    ticks = numpy.linspace(margin, 1 - margin, num_phis)
    positions = [k / (num_scales - 1) if num_scales > 1 else 0.0 for k in range(num_scales)]
    return tuple(int(numpy.argmin(numpy.abs(ticks - position))) for position in positions)


def area_pool(latent_map: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the means of a map [B, D, h, w] over the parts of a grid, [B, D, h_k, w_k]."""
    if not is_exporting():
        return F.interpolate(latent_map, size=grid, mode="area")
    # torch and ONNX cannot export that operator for sizes that are dynamic and may be 1.
    rows, columns = (
        _part_means(latent_map, axis, parts) for axis, parts in zip((2, 3), grid, strict=True)
    )
    return rows @ latent_map @ columns.T


def _part_means(latent_map: Tensor, axis: int, parts: int) -> Tensor:
    """Return the matrix [parts, length] whose product with an axis is the mean of each part."""
    length = latent_map.shape[axis]
    positions = torch.arange(length, device=latent_map.device)
    numbers = torch.arange(parts, device=latent_map.device)[:, None]
    starts = numbers * length // parts
    ends = ((numbers + 1) * length + parts - 1) // parts
    inside = (positions >= starts) & (positions < ends)
    return inside.to(latent_map.dtype) / (ends - starts)


def _in_proportion(size: int, wanted: int, configured: int) -> int:
    return max(1, (2 * size * wanted + configured) // (2 * configured))
