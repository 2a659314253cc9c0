"""VectorQuantizer: every latent vector becomes the nearest code of one codebook."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from smalto.config import Config
from smalto.errors import ConfigError, InputError
from smalto.layout import TokenLayout
from smalto.precision import without_autocast
from smalto.quantizers.base import Quantizer, QuantizerOutput
from smalto.quantizers.codebook import Codebook, EMACodebook
from smalto.quantizers.estimators import straight_through
from smalto.search import Metric, nearest_codes


class VectorQuantizerConfig(Config):
    """Settings of a VectorQuantizer; ``build()`` makes it."""

    kind: Literal["vector"] = "vector"
    codebook_size: int = Field(512, ge=1, le=2**24, description="number of codes (K)")
    latent_dim: int = Field(64, ge=1, le=65536, description="channels of the latents (C)")
    code_dim: int | None = Field(None, ge=1, le=65536, description="look codes up in this many dimensions, behind linear projections")
    codebook: Literal["learned", "ema"] = Field("learned", description="codes learn by gradient or by moving averages")
    metric: Metric = Field("l2", description="what nearest means")
    beta: float = Field(0.25, ge=0, description="weight of the commitment loss")

    def build(self) -> VectorQuantizer:
        return VectorQuantizer(
            self.codebook_size, self.latent_dim, self.beta, codebook=self.codebook, metric=self.metric, code_dim=self.code_dim
        )


class NearestCode(nn.Module):
    """The search as a module without parameters: the one place that sees every vector and its code, where the updater listens."""

    def __init__(self, metric: Metric) -> None:
        super().__init__()
        self.metric: Metric = metric

    def forward(self, vectors: Tensor, codes: Tensor, valid: Tensor) -> Tensor:
        """Vectors [N, D], codes [K, D], valid bool [N] -> indices int64 [N], 0 where not valid."""
        return torch.where(valid, nearest_codes(vectors, codes, self.metric), 0)


class VectorQuantizer(Quantizer):
    """VQ (van den Oord et al. 2017, arXiv 1711.00937): latents [B, C, h, w] -> nearest codes.

    Args:
        num_embeddings: number of codes, K.
        embedding_dim: channels of the latents, C.
        beta: weight of the commitment loss.
        codebook: ``"learned"``: the codes learn by gradient, loss = mse(q, sg[z]) + beta·mse(z, sg[q]).
            ``"ema"``: the codes are moving averages kept by ``CodebookUpdater``, loss = beta·mse(z, sg[q]).
        metric: ``"l2"`` or ``"cosine"`` (VAR's z-normalised search: the angle decides, the stored code is the value).
        code_dim: search in this many dimensions, between two linear projections (Yu et al. 2022, arXiv 2110.04627); the
            losses are taken there. None: codes have the dimension of the latents and there are no projections.
        estimator: ``"straight_through"``.

    Attributes:
        embedding: the ``Codebook`` (an ``nn.Embedding``) or ``EMACodebook``; ``embedding.weight`` is [K, code_dim or C].
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        beta: float = 0.25,
        *,
        codebook: Literal["learned", "ema"] = "learned",
        metric: Metric = "l2",
        code_dim: int | None = None,
        estimator: Literal["straight_through"] = "straight_through",
    ) -> None:
        super().__init__()
        if num_embeddings < 1 or embedding_dim < 1 or (code_dim is not None and code_dim < 1):
            raise ConfigError(
                f"num_embeddings, embedding_dim and code_dim must be at least 1; got {num_embeddings}, {embedding_dim}, {code_dim}."
            )
        if not beta >= 0:
            raise ConfigError(f"beta must be 0 or more; got {beta}.")
        if codebook not in ("learned", "ema"):
            raise ConfigError(f'codebook must be "learned" or "ema"; got {codebook!r}.')
        if metric not in ("l2", "cosine"):
            raise ConfigError(f'metric must be "l2" or "cosine"; got {metric!r}.')
        if estimator != "straight_through":
            raise ConfigError(f'estimator must be "straight_through"; got {estimator!r}.')
        self.num_embeddings = self.codebook_size = num_embeddings
        self.embedding_dim = self.latent_dim = embedding_dim
        self.beta = beta
        dim = code_dim or embedding_dim
        self.project_in: nn.Module = nn.Identity()
        self.project_out: nn.Module = nn.Identity()
        if code_dim:
            self.project_in, self.project_out = _projections(embedding_dim, code_dim)
        self.embedding = (EMACodebook if codebook == "ema" else Codebook)(num_embeddings, dim)
        self.nearest = NearestCode(metric)

    def get_codebook(self) -> Tensor:
        """The codes as the decoder sees them: [K, C], behind the projection where there is one."""
        with without_autocast(self.embedding.weight.device):
            return self.project_out(self.embedding.weight)

    def forward(self, latents: Tensor) -> QuantizerOutput:
        """Quantize latents [B, C, h, w] -> (quantized [B, C, h, w], loss, indices int64 [B*h*w]).

        A vector that holds a NaN or an infinity takes code 0 and is left out of loss, gradient and statistics.
        """
        self.check_latents(latents)
        with without_autocast(latents.device):
            vectors, valid = self._vectors(latents)
            indices = self.nearest(vectors, self.embedding.weight, valid)
            codes = self.embedding(indices).to(vectors.dtype)
            mask = valid.to(vectors.dtype).unsqueeze(1)
            count = (mask.sum() * vectors.shape[1]).clamp(min=1)
            loss = self.beta * ((vectors - codes.detach()) * mask).square().sum() / count
            if not isinstance(self.embedding, EMACodebook):
                loss = loss + ((codes - vectors.detach()) * mask).square().sum() / count
            quantized = self.project_out(straight_through(vectors, codes))
        return QuantizerOutput(self._to_map(quantized, latents), loss, indices)

    @torch.no_grad()
    def encode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] -> tokens int64 [B, h*w]."""
        self.check_latents(latents)
        with without_autocast(latents.device):
            vectors, valid = self._vectors(latents)
            indices = self.nearest(vectors, self.embedding.weight, valid)
        return indices.view(latents.shape[0], latents.shape[2] * latents.shape[3])

    def decode(self, indices: Tensor, layout: TokenLayout) -> Tensor:
        """Tokens int64 [B, h*w] -> quantized latents [B, C, h, w].

        Raises:
            InputError: another number of tokens than the layout's, more than one grid, or an index that is no code's.
        """
        if not isinstance(layout, TokenLayout) or len(layout.grids) != 1:
            raise InputError(f"a single-scale quantizer decodes a TokenLayout of one grid, such as TokenLayout.single(4, 4); got {layout}.")
        indices = self.check_indices(indices, layout.num_tokens)
        height, width = layout.grids[0]
        quantized = self.lookup(indices.reshape(-1))
        return quantized.view(indices.shape[0], height, width, self.latent_dim).permute(0, 3, 1, 2).contiguous()

    def lookup(self, indices: Tensor) -> Tensor:
        """Indices int64 [...] -> codes as the decoder sees them [..., C]."""
        with without_autocast(indices.device):
            return self.project_out(self.embedding(indices))

    def layout(self, height: int, width: int) -> TokenLayout:
        return TokenLayout.single(height, width)

    def _vectors(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [B, C, h, w] -> vectors [N, code_dim] in at least float32, and which of them are finite, bool [N]."""
        flat = latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1])
        wide = torch.promote_types(latents.dtype, self.embedding.weight.dtype)
        flat = flat.to(torch.promote_types(wide, torch.float32))
        valid = flat.isfinite().all(dim=1)
        # Masked before the projection: behind it 0 * NaN would reach the gradient of its weights.
        return self.project_in(torch.where(valid.unsqueeze(1), flat, 0)), valid

    @staticmethod
    def _to_map(vectors: Tensor, like: Tensor) -> Tensor:
        batch, channels, height, width = like.shape
        return vectors.to(like.dtype).view(batch, height, width, channels).permute(0, 3, 1, 2).contiguous()


class _Projection(nn.Linear):
    """A linear layer that computes in the precision of what it is given."""

    def forward(self, vectors: Tensor) -> Tensor:
        assert self.bias is not None
        return nn.functional.linear(vectors, self.weight.to(vectors.dtype), self.bias.to(vectors.dtype))


def _projections(latent_dim: int, code_dim: int) -> tuple[nn.Module, nn.Module]:
    """The ways into and out of the space of codes. They begin as one: out undoes in, on a random subspace.

    With two unrelated random matrices the decoder first has to learn to read the codes: 0.3 dB after 400 steps.
    """
    project_in, project_out = _Projection(latent_dim, code_dim), _Projection(code_dim, latent_dim)
    nn.init.orthogonal_(project_in.weight)
    with torch.no_grad():
        project_out.weight.copy_(project_in.weight.T)
    for projection in (project_in, project_out):
        nn.init.zeros_(projection.bias)
    return project_in, project_out
