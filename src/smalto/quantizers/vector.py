"""VectorQuantizer: every latent vector becomes the nearest code of one codebook."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from smalto.core.config import Config, parse_config
from smalto.core.errors import InputError
from smalto.core.layout import TokenLayout
from smalto.core.precision import without_autocast
from smalto.quantizers.base import Quantizer, QuantizerOutput
from smalto.quantizers.codebook import Codebook, EMACodebook, ProjectedCodebook
from smalto.quantizers.estimators import ESTIMATORS, estimate
from smalto.quantizers.latents import as_map, masked_mse, noise_vectors, projections, to_vectors
from smalto.search import Metric, nearest_codes

CodebookKind = Literal["learned", "ema", "projected"]
EstimatorName = Literal["straight_through", "rotation", "diveq"]
CODEBOOKS: dict[str, type[Codebook]] = {
    "learned": Codebook,
    "ema": EMACodebook,
    "projected": ProjectedCodebook,
}


class VectorQuantizerConfig(Config):
    """Settings of a VectorQuantizer; ``build()`` makes it."""

    kind: Literal["vector"] = "vector"
    codebook_size: int = Field(512, ge=1, le=2**24, description="number of codes (K)")
    latent_dim: int = Field(64, ge=1, le=65536, description="channels of the latents (C)")
    code_dim: int | None = Field(
        None,
        ge=1,
        le=65536,
        description="look codes up in this many dimensions, behind linear projections",
    )
    codebook: CodebookKind = Field(
        "learned",
        description="codes learn by gradient, by moving averages, or together through one linear map (SimVQ)",
    )
    metric: Metric = Field("l2", description="what nearest means")
    unit_codes: bool = Field(
        False, description="with cosine: latents and codes are brought to length 1"
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
                f'unit_codes brings vectors to length 1, so nearest means the angle: set metric="cosine" (got {self.metric!r}).'
            )
        if self.codebook == "ema" and ESTIMATORS[self.estimator].teaches_codes:
            raise ValueError(
                f'estimator={self.estimator!r} teaches codes by gradient and codebook="ema" takes none: '
                'use codebook="learned" or "projected", or another estimator.'
            )
        return self

    def build(self) -> VectorQuantizer:
        settings = self.model_dump(exclude={"kind", "codebook_size", "latent_dim"})
        return VectorQuantizer(self.codebook_size, self.latent_dim, **settings)

    def folded(self) -> VectorQuantizerConfig:
        """The same with a projected codebook as the plain one that it folds to."""
        return (
            self.model_copy(update={"codebook": "learned"})
            if self.codebook == "projected"
            else self
        )


class NearestCode(nn.Module):
    """The search as a module without parameters: the one place that sees every vector and its code.

    Attributes:
        metric: what nearest means.
        listener: called with (module, vectors, codes, indices, valid) after each search: how ``CodebookUpdater`` learns what was used.
            An attribute and not a forward hook, because torch.compile notices when an attribute changes.
    """

    def __init__(self, metric: Metric) -> None:
        super().__init__()
        self.metric: Metric = metric
        self.observer: Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor], None] | None = None

    def forward(self, vectors: Tensor, codes: Tensor, valid: Tensor) -> Tensor:
        """Vectors [N, D], codes [K, D], valid bool [N] -> indices int64 [N], 0 where not valid."""
        indices = torch.where(valid, nearest_codes(vectors, codes, self.metric), 0)
        if self.observer is not None:
            self.observer(self, vectors, codes, indices, valid)
        return indices


class VectorQuantizer(Quantizer):
    """VQ (van den Oord et al. 2017, arXiv 1711.00937): latents [B, C, h, w] -> nearest codes.

    Args:
        num_embeddings: number of codes, K.
        embedding_dim: channels of the latents, C.
        beta: weight of the commitment loss.
        codebook: ``"learned"``: the codes learn by gradient, loss = mse(q, sg[z]) + beta·mse(z, sg[q]).
            ``"ema"``: the codes are moving averages kept by ``CodebookUpdater``, loss = beta·mse(z, sg[q]).
            ``"projected"``: frozen random codes times one linear map that learns by gradient (SimVQ, arXiv 2411.02038).
        metric: ``"l2"`` or ``"cosine"`` (VAR's z-normalized search: the angle decides, the stored code is the value).
        code_dim: search in this many dimensions, between two linear projections (Yu et al. 2022, arXiv 2110.04627); the
            losses are taken there. None: codes have the dimension of the latents and there are no projections.
        estimator: ``"straight_through"``, ``"rotation"`` (arXiv 2410.06424) or ``"diveq"`` (arXiv 2509.26469: the codes learn from the
            task's gradient, so the loss is beta·mse(z, sg[q]) alone).
        unit_codes: with ``"cosine"``: codes and vectors are brought to length 1 before the loss, and the value is the code of length 1
            (LlamaGen).

    Attributes:
        embedding: the ``Codebook`` (an ``nn.Embedding``); its ``weight`` is [K, code_dim or C].

    Raises:
        ConfigError: a setting out of range, or two that exclude each other.
    """

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
        super().__init__()
        settings: dict[str, Any] = {
            "codebook_size": num_embeddings,
            "latent_dim": embedding_dim,
            "beta": beta,
            "codebook": codebook,
        }
        settings |= {
            "metric": metric,
            "code_dim": code_dim,
            "estimator": estimator,
            "unit_codes": unit_codes,
        }
        parse_config(VectorQuantizerConfig, settings, "VectorQuantizer")
        self.num_embeddings = self.codebook_size = num_embeddings
        self.embedding_dim = self.latent_dim = embedding_dim
        self.beta, self.estimator, self.unit_codes = beta, estimator, unit_codes
        self.project_in, self.project_out = projections(embedding_dim, code_dim)
        self.embedding = CODEBOOKS[codebook](num_embeddings, code_dim or embedding_dim)
        self.nearest = NearestCode(metric)

    def codes(self) -> Tensor:
        """The codes as vectors are compared with them: [K, D], at least float32."""
        codes = self.embedding.codes().to(self.dtype)
        return nn.functional.normalize(codes, dim=1, eps=UNIT_EPS) if self.unit_codes else codes

    def get_codebook(self) -> Tensor:
        """The codes as the decoder sees them: [K, C], behind the projection where there is one."""
        with without_autocast(self.embedding.weight.device):
            return self.project_out(self.codes()).to(self.embedding.weight.dtype)

    def forward(
        self, latents: Tensor, *, num_stages: int | None = None, noise: Tensor | None = None
    ) -> QuantizerOutput:
        """Quantize latents [B, C, h, w] -> (quantized [B, C, h, w], loss, encoding_indices int64 [B*h*w])."""
        self.check_latents(latents)
        self._check_stages(num_stages)
        with without_autocast(latents.device):
            vectors, valid = self.vectors(latents)
            codes, indices = self.assign(vectors, valid)
            loss = self.loss(vectors, codes, valid).to(
                torch.promote_types(latents.dtype, self.dtype)
            )
            noise = noise_vectors(noise, latents, vectors.shape[1], self.dtype)
            quantized = estimate(self.estimator, vectors, codes, valid, noise, self.training)
            quantized = self.project_out(quantized).to(
                self.embedding.weight.dtype
            )  # what decode gives
            return QuantizerOutput(as_map(quantized.to(latents.dtype), latents), loss, indices)

    @torch.no_grad()
    def encode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] -> tokens int64 [B, h*w]."""
        self.check_latents(latents)
        with without_autocast(latents.device):
            _, indices = self.assign(*self.vectors(latents))
        return indices.view(latents.shape[0], latents.shape[2] * latents.shape[3])

    def decode(self, indices: Tensor, layout: TokenLayout) -> Tensor:
        """Tokens int64 [B, h*w] -> quantized latents [B, C, h, w]."""
        if not isinstance(layout, TokenLayout) or len(layout.grids) != 1:
            raise InputError(
                f"a single-scale quantizer decodes a TokenLayout of one grid, such as TokenLayout.single(4, 4); got {layout}."
            )
        indices = self.check_indices(indices, layout.num_tokens)
        quantized = self.lookup([indices])
        return (
            quantized.view(len(indices), *layout.grids[0], self.latent_dim)
            .permute(0, 3, 1, 2)
            .contiguous()
        )

    def lookup(self, blocks: Sequence[Tensor]) -> Tensor:
        """Codes of tokens as the decoder sees them: blocks of int64 [B, L_i] -> [B, L, C]."""
        if not blocks:
            raise InputError("there are no tokens to look up: pass at least one block [B, L_i].")
        indices = self.check_range(torch.cat(list(blocks), dim=1))
        with without_autocast(indices.device):
            return self.project_out(nn.functional.embedding(indices, self.codes())).to(
                self.embedding.weight.dtype
            )

    def layout(self, height: int, width: int) -> TokenLayout:
        return TokenLayout.single(height, width)

    @property
    def dtype(self) -> torch.dtype:
        """What everything is computed in: the weights', at least float32."""
        return torch.promote_types(self.embedding.weight.dtype, torch.float32)

    def vectors(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [B, C, h, w] -> vectors [N, D] as they are compared with codes, and which are usable, bool [N]."""
        vectors, valid = to_vectors(latents, self.dtype, self.project_in)
        return (
            nn.functional.normalize(vectors, dim=1, eps=UNIT_EPS) if self.unit_codes else vectors
        ), valid

    def assign(self, vectors: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors [N, D] -> their codes [N, D], with the gradient of the codebook, and indices int64 [N]."""
        codes = self.codes()
        indices = self.nearest(vectors.detach(), codes.detach(), valid)
        return nn.functional.embedding(indices, codes), indices

    def loss(self, vectors: Tensor, codes: Tensor, valid: Tensor) -> Tensor:
        """What pulls vectors [N, D] and codes [N, D] together; rows that are not ``valid`` do not count."""
        commitment = self.beta * masked_mse(vectors, codes.detach(), valid)
        if isinstance(self.embedding, EMACodebook) or ESTIMATORS[self.estimator].teaches_codes:
            return commitment
        return masked_mse(codes, vectors.detach(), valid) + commitment

    @staticmethod
    def _check_stages(num_stages: int | None) -> None:
        if num_stages not in (None, 1):
            raise InputError(
                f"this quantizer has no stages; num_stages must be None or 1; got {num_stages}."
            )


UNIT_EPS = 1e-6  # shorter vectors keep their direction only: a gradient through 1/length would tear the encoder apart
