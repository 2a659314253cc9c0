"""LogitVQ: a linear layer scores all codes, and the code of the highest logit is taken."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from smalto.core.errors import InputError
from smalto.core.layout import TokenLayout
from smalto.core.precision import without_autocast
from smalto.quantizers.base import BaseQuantizerConfig, Quantizer, QuantizerOutput
from smalto.quantizers.latents import Projection, as_map, keep, projections, to_vectors

TILE = 2**22  # logits at a time: 16 MiB in float32


class LogitVQConfig(BaseQuantizerConfig):
    """Settings of a LogitVQ; ``build()`` makes it."""

    kind: Literal["logit"] = "logit"
    codebook_size: int = Field(512, ge=1, le=2**24, description="number of codes (K)")
    latent_dim: int = Field(64, ge=1, le=65536, description="channels of the latents (C)")
    code_dim: int | None = Field(
        None,
        ge=1,
        le=65536,
        description="dimension of the codes, behind linear projections; default: latent_dim",
    )
    kl_weight: float = Field(
        5e-4,
        ge=0,
        allow_inf_nan=False,
        description="weight of the divergence between the softmax of the logits and uniform use",
    )

    def build(self) -> LogitVQ:
        return LogitVQ(self.codebook_size, self.latent_dim, self.code_dim, self.kl_weight)


class LogitVQ(Quantizer):
    """Latents [B, C, h, w] -> the codes with the highest logits.

    Inference of the Gumbel-softmax quantizer (Jang et al. 2016, arXiv 1611.01144) of DALL-E and
    taming-transformers. In training the value is the code, and the gradient is that of the mean
    code under the softmax of the logits (IBQ, Shi et al. 2024, arXiv 2412.02692), without Gumbel
    noise. The loss is ``kl_weight`` times the divergence from uniform use. Logits are computed in
    tiles, in the backward pass again, so N x K numbers are never in memory.

    Args:
        codebook_size: number of codes, K.
        latent_dim: channels of the latents, C.
        code_dim: dimension of the codes D, between two linear projections; None: C, without them.
        kl_weight: weight of the loss.

    Attributes:
        proj: linear layer D -> K, whose output are the logits.
        embedding: the codes; its ``weight`` is [K, D].
    """

    is_local = True

    def __init__(
        self,
        codebook_size: int,
        latent_dim: int,
        code_dim: int | None = None,
        kl_weight: float = 5e-4,
    ) -> None:
        super().__init__()
        self.codebook_size = codebook_size
        self.latent_dim = latent_dim
        self.code_dim = code_dim or latent_dim
        self.kl_weight = kl_weight
        self.project_in, self.project_out = projections(latent_dim, code_dim)
        self.proj = Projection(self.code_dim, codebook_size)
        self.embedding = nn.Embedding(codebook_size, self.code_dim)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all arithmetic: that of the weights, at least float32."""
        return torch.promote_types(self.embedding.weight.dtype, torch.float32)

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype that decoded codes are returned in."""
        return self.embedding.weight.dtype

    def codebook(self) -> Tensor:
        with without_autocast(self.embedding.weight.device):
            codes = self.project_out(self.embedding.weight.to(self.dtype))
            return codes.to(self.weight_dtype)

    def forward(
        self, latents: Tensor, *, num_stages: int | None = None, noise: Tensor | None = None
    ) -> QuantizerOutput:
        self.check_latents(latents)
        if num_stages not in (None, 1) or noise is not None:
            raise InputError(
                f"got num_stages={num_stages} and noise={'None' if noise is None else 'a tensor'}; "
                "this quantizer has one stage and uses no noise. Leave both out."
            )
        with without_autocast(latents.device):
            vectors, valid = to_vectors(latents, self.dtype, self.project_in)
            indices = self._highest(vectors, valid)
            codes = self._codes(indices)
            means, losses = self._softmax(vectors, valid)
            moved = keep(means - means.detach(), valid)  # exactly zero
            loss = losses.sum() / valid.sum().clamp(min=1)
            loss_dtype = torch.promote_types(latents.dtype, self.dtype)
            # bitwise what decode returns
            quantized = self.project_out(codes + moved).to(self.weight_dtype)
            return QuantizerOutput(
                as_map(quantized.to(latents.dtype), latents), loss.to(loss_dtype), indices
            )

    @torch.no_grad()
    def encode(self, latents: Tensor, layout: TokenLayout | None = None) -> Tensor:
        self.check_latents(latents)
        self.check_layout(latents, layout)
        with without_autocast(latents.device):
            indices = self._highest(*to_vectors(latents, self.dtype, self.project_in))
        return indices.view(latents.shape[0], latents.shape[2] * latents.shape[3])

    def decode(self, indices: Tensor, layout: TokenLayout) -> Tensor:
        if not isinstance(layout, TokenLayout) or len(layout.grids) != 1:
            raise InputError(
                f"got {layout}; a single-scale quantizer decodes a TokenLayout of one grid, such "
                "as TokenLayout.single(4, 4)."
            )
        indices = self.check_indices(indices, layout.num_tokens)
        codes = self.lookup([indices])
        codes = codes.view(indices.shape[0], *layout.grids[0], self.latent_dim)
        return codes.permute(0, 3, 1, 2).contiguous()

    def lookup(self, blocks: Sequence[Tensor]) -> Tensor:
        if not blocks:
            raise InputError("there are no tokens to look up: pass at least one block [B, L_i].")
        indices = self.check_range(torch.cat(list(blocks), dim=1))
        with without_autocast(indices.device):
            return self.project_out(self._codes(indices)).to(self.weight_dtype)

    def layout(self, height: int, width: int) -> TokenLayout:
        return TokenLayout.single(height, width)

    @torch.no_grad()
    def token_gaps(self, latents: Tensor, tokens: Tensor, layout: TokenLayout) -> Tensor:
        """Return how far the logits of tokens lie below the highest ones, float64 [B, L].

        The unit is ``|z| · |w| + |bias|``, the scale of the rounding errors of a logit.
        """
        vectors, valid = to_vectors(latents, self.dtype, self.project_in)
        weight, bias = self.proj.weight.double(), self.proj.bias.double()

        def logits(indices: Tensor) -> Tensor:
            return (vectors.double() * weight[indices]).sum(dim=1) + bias[indices]

        highest = self._highest(vectors, valid)
        scale = vectors.double().norm(dim=1) * weight.norm(dim=1).amax() + bias.abs().amax()
        gaps = (logits(highest) - logits(tokens.flatten())) / scale.clamp(min=1e-300)
        return gaps.clamp(min=0).view(tokens.shape)

    def _codes(self, indices: Tensor) -> Tensor:
        return nn.functional.embedding(indices, self.embedding.weight.to(self.dtype))

    def _tiles(self, vectors: Tensor) -> tuple[Tensor, ...]:
        return vectors.split(max(1, TILE // self.codebook_size))

    def _highest(self, vectors: Tensor, valid: Tensor) -> Tensor:
        """Vectors [N, C], valid bool [N] -> indices int64 [N], 0 if not valid."""
        with torch.no_grad():
            highest = [self.proj(tile).argmax(dim=1) for tile in self._tiles(vectors)]
        return torch.where(valid, torch.cat(highest), 0)

    def _softmax(self, vectors: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean codes under the softmax [N, C] and the weighted divergences [N]."""
        parts = [
            checkpoint(self._softmax_tile, tile, use_reentrant=False)
            if torch.is_grad_enabled()
            else self._softmax_tile(tile)
            for tile in self._tiles(vectors)
        ]
        means, losses = zip(*parts, strict=True)
        return torch.cat(means), torch.where(valid, torch.cat(losses), 0)

    def _softmax_tile(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        log_shares = self.proj(vectors).log_softmax(dim=1)
        shares = log_shares.exp()
        divergence = (shares * (log_shares + math.log(self.codebook_size))).sum(dim=1)
        return shares @ self.embedding.weight.to(self.dtype), self.kl_weight * divergence
