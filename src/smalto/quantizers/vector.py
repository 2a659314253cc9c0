"""VectorQuantizer: every latent vector becomes the nearest code of one codebook."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from smalto.core.config import parse_config
from smalto.core.errors import InputError
from smalto.core.layout import TokenLayout
from smalto.core.precision import without_autocast
from smalto.quantizers.base import BaseQuantizerConfig, Quantizer, QuantizerOutput
from smalto.quantizers.code_space import ExplicitCodes
from smalto.quantizers.codebook import Codebook, EMACodebook, ProjectedCodebook
from smalto.quantizers.estimators import ESTIMATORS, estimate
from smalto.quantizers.latents import as_map, noise_vectors, projections, to_vectors
from smalto.search import Metric

CodebookKind = Literal["learned", "ema", "projected"]
EstimatorName = Literal["straight_through", "rotation", "diveq"]
CODEBOOKS: dict[str, type[Codebook]] = {
    "learned": Codebook,
    "ema": EMACodebook,
    "projected": ProjectedCodebook,
}


class VectorQuantizerConfig(BaseQuantizerConfig):
    """Settings of a VectorQuantizer; ``build()`` makes it."""

    kind: Literal["vector"] = "vector"
    codebook_size: int = Field(512, ge=1, le=2**24, description="number of codes (K)")
    latent_dim: int = Field(64, ge=1, le=65536, description="channels of the latents (C)")
    code_dim: int | None = Field(
        None,
        ge=1,
        le=65536,
        description="dimension of the codes, behind linear projections; default: latent_dim",
    )
    codebook: CodebookKind = Field(
        "learned",
        description="codes learn by gradient, moving averages, or through one linear map (SimVQ)",
    )
    metric: Metric = Field("l2", description="metric of the nearest-code search")
    unit_codes: bool = Field(
        False, description="with cosine: latents and codes are normalized to length 1"
    )
    beta: float = Field(
        0.25, ge=0, allow_inf_nan=False, description="weight of the commitment loss"
    )
    estimator: EstimatorName = Field(
        "straight_through", description="how the gradient passes the choice of a code"
    )

    @model_validator(mode="after")
    def _parts_fit(self) -> VectorQuantizerConfig:
        if self.unit_codes and self.metric != "cosine":
            raise ValueError(
                f'unit_codes needs metric="cosine": codes of length 1 are told apart by their '
                f"angle (got {self.metric!r})."
            )
        if self.codebook == "ema" and ESTIMATORS[self.estimator].teaches_codes:
            raise ValueError(
                f"estimator={self.estimator!r} trains codes by gradient and "
                'codebook="ema" does not take one: use codebook="learned" or "projected", or '
                "another estimator."
            )
        return self

    def build(self) -> VectorQuantizer:
        settings = self.model_dump(exclude={"kind", "codebook_size", "latent_dim"})
        return VectorQuantizer(self.codebook_size, self.latent_dim, **settings)

    def build_code_space(self, code_dim: int) -> ExplicitCodes:
        """Build the codes alone, in ``code_dim`` dimensions, for a quantizer that holds them."""
        return ExplicitCodes(
            CODEBOOKS[self.codebook](self.codebook_size, code_dim),
            self.metric,
            self.beta,
            unit_codes=self.unit_codes,
            codes_learn_by_task=ESTIMATORS[self.estimator].teaches_codes,
        )

    def folded(self) -> VectorQuantizerConfig:
        return (
            self.model_copy(update={"codebook": "learned"})
            if self.codebook == "projected"
            else self
        )


class VectorQuantizer(ExplicitCodes, Quantizer):
    """VQ (van den Oord et al. 2017, arXiv 1711.00937): latents [B, C, h, w] -> nearest codes.

    Args:
        num_embeddings: number of codes, K.
        embedding_dim: channels of the latents, C.
        beta: weight of the commitment loss.
        codebook: ``"learned"``: codes learn by gradient,
            loss = mse(q, sg[z]) + beta·mse(z, sg[q]).
            ``"ema"``: codes are moving averages kept by ``CodebookUpdater``,
            loss = beta·mse(z, sg[q]).
            ``"projected"``: frozen random codes times one linear map that learns by gradient
            (SimVQ, arXiv 2411.02038).
        metric: ``"l2"`` or ``"cosine"`` (VAR's z-normalized search: the angle decides, the stored
            code is the value).
        code_dim: search in this many dimensions, between two linear projections (Yu et al. 2022,
            arXiv 2110.04627); losses are taken there. None: codes have the dimension of the
            latents and there are no projections.
        estimator: ``"straight_through"``, ``"rotation"`` (arXiv 2410.06424) or ``"diveq"``
            (arXiv 2509.26469: codes learn from the task's gradient, so the loss is
            beta·mse(z, sg[q]) alone).
        unit_codes: with ``"cosine"``: codes and vectors are normalized to length 1 before the
            loss, and the value is the code of length 1 (LlamaGen).

    Attributes:
        embedding: the ``Codebook`` (an ``nn.Embedding``); its ``weight`` is [K, code_dim or C].

    Raises:
        ConfigError: a setting out of range, or two that exclude each other.
    """

    is_local = True

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        beta: float = 0.25,
        *,
        codebook: CodebookKind = "learned",
        metric: Metric = "l2",
        code_dim: int | None = None,
        estimator: EstimatorName = "straight_through",
        unit_codes: bool = False,
    ) -> None:
        settings: dict[str, Any] = {
            "codebook_size": num_embeddings,
            "latent_dim": embedding_dim,
            "beta": beta,
            "codebook": codebook,
            "metric": metric,
            "code_dim": code_dim,
            "estimator": estimator,
            "unit_codes": unit_codes,
        }
        parse_config(VectorQuantizerConfig, settings, "VectorQuantizer")
        nn.Module.__init__(self)
        # Projections are registered first: optimizer states of earlier runs depend on the order.
        self.project_in, self.project_out = projections(embedding_dim, code_dim)
        self._hold(
            CODEBOOKS[codebook](num_embeddings, code_dim or embedding_dim),
            metric,
            beta,
            unit_codes,
            ESTIMATORS[estimator].teaches_codes,
        )
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.latent_dim = embedding_dim
        self.estimator = estimator

    def get_codebook(self) -> Tensor:
        """Return the codes as the decoder sees them: [K, C], behind the projection if any."""
        with without_autocast(self.embedding.weight.device):
            return self.project_out(self.codes()).to(self.weight_dtype)

    def codebook(self) -> Tensor:
        return self.get_codebook()

    def forward(
        self, latents: Tensor, *, num_stages: int | None = None, noise: Tensor | None = None
    ) -> QuantizerOutput:
        """Quantize latents [B, C, h, w].

        Returns:
            quantized [B, C, h, w], loss (scalar), encoding_indices int64 [B*h*w].
        """
        self.check_latents(latents)
        self._check_stages(num_stages)
        with without_autocast(latents.device):
            vectors, valid = self._vectors(latents)
            codes, indices = self.assign(vectors, valid)
            loss_dtype = torch.promote_types(latents.dtype, self.dtype)
            loss = self.loss(vectors, codes, valid).to(loss_dtype)
            noise = noise_vectors(noise, latents, vectors.shape[1], self.dtype)
            quantized = estimate(self.estimator, vectors, codes, valid, noise, self.training)
            quantized = self.project_out(quantized).to(self.weight_dtype)  # what decode gives
            return QuantizerOutput(as_map(quantized.to(latents.dtype), latents), loss, indices)

    @torch.no_grad()
    def encode(self, latents: Tensor, layout: TokenLayout | None = None) -> Tensor:
        """Latents [B, C, h, w] -> tokens int64 [B, h*w]."""
        self.check_latents(latents)
        self.check_layout(latents, layout)
        with without_autocast(latents.device):
            _, indices = self.assign(*self._vectors(latents))
        return indices.view(latents.shape[0], latents.shape[2] * latents.shape[3])

    def decode(self, indices: Tensor, layout: TokenLayout) -> Tensor:
        """Tokens int64 [B, h*w] -> quantized latents [B, C, h, w]."""
        if not isinstance(layout, TokenLayout) or len(layout.grids) != 1:
            raise InputError(
                f"got {layout}; a single-scale quantizer decodes a TokenLayout of one grid, such "
                "as TokenLayout.single(4, 4)."
            )
        indices = self.check_indices(indices, layout.num_tokens)
        quantized = self.lookup([indices])
        quantized = quantized.view(indices.shape[0], *layout.grids[0], self.latent_dim)
        return quantized.permute(0, 3, 1, 2).contiguous()

    def lookup(self, blocks: Sequence[Tensor]) -> Tensor:
        """Token blocks int64 [B, L_i] -> their codes as the decoder sees them, [B, L, C]."""
        if not blocks:
            raise InputError("there are no tokens to look up: pass at least one block [B, L_i].")
        indices = self.check_range(torch.cat(list(blocks), dim=1))
        with without_autocast(indices.device):
            return self.project_out(self.embed(indices)).to(self.weight_dtype)

    def layout(self, height: int, width: int) -> TokenLayout:
        return TokenLayout.single(height, width)

    def token_gaps(self, latents: Tensor, tokens: Tensor, layout: TokenLayout) -> Tensor:
        vectors, _ = self._vectors(latents)
        return self.vector_gaps(vectors, tokens.flatten()).view(tokens.shape)

    def _vectors(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [B, C, h, w] -> vectors [N, D] as compared with codes, and validity, bool [N]."""
        vectors, valid = to_vectors(latents, self.dtype, self.project_in)
        return self.prepare(vectors), valid

    @staticmethod
    def _check_stages(num_stages: int | None) -> None:
        if num_stages not in (None, 1):
            raise InputError(
                f"got num_stages={num_stages}; this quantizer has one stage. Pass None or 1."
            )
