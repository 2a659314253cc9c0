"""Codebooks: the K codes of a quantizer, and how they learn."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn


class Codebook(nn.Embedding):
    """Codebook of K codes of dimension D that learn by gradient; ``weight`` is [K, D]."""

    def reset_parameters(self) -> None:
        if self.weight.is_meta:  # torch would import its compiler for that, half a second
            return
        # About unit length in any dimension. The usual uniform(±1/K) puts all codes in one tiny
        # ball around zero: the few at its edge then win every latent and the rest never learn.
        nn.init.normal_(self.weight, std=self.embedding_dim**-0.5)

    def codes(self) -> Tensor:
        """Return the codes, [K, D]."""
        return self.weight

    def forward(self, input: Tensor) -> Tensor:
        """Indices int64 [...] -> codes [..., D]."""
        return nn.functional.embedding(input, self.codes())

    @torch.no_grad()
    def place(self, rows: Tensor, vectors: Tensor) -> None:
        """Set the codes ``rows`` (int64 [R]) to ``vectors`` [R, D]."""
        self.weight[rows] = vectors.to(self.weight.dtype)


class EMACodebook(Codebook):
    """Codebook of K moving averages of the vectors assigned to each code.

    See van den Oord et al. 2017, arXiv 1711.00937, appendix A.1. The optimizer does not change
    ``weight``; ``CodebookUpdater`` calls ``absorb``. Counts are in units of uniform use: a code
    that gets an even share of the tokens has ``ema_counts`` 1, whatever the batch size.
    """

    ema_counts: Tensor
    ema_sums: Tensor

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__(num_embeddings, embedding_dim)
        self.weight.requires_grad_(False)
        self.register_buffer("ema_counts", torch.ones(num_embeddings))
        self.register_buffer("ema_sums", self.weight.detach().clone())

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if "ema_sums" in self._buffers:  # nn.Embedding calls this before it is registered
            self.ema_counts.fill_(1)
            self.ema_sums.copy_(self.weight.detach())

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        # .half() and .bfloat16() call this. Averages move by less than such dtypes can resolve, so
        # their buffers stay at least float32.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name in ("ema_counts", "ema_sums"):
            buffer = self._buffers[name]
            assert buffer is not None
            self._buffers[name] = buffer.to(torch.promote_types(buffer.dtype, torch.float32))
        return self

    @torch.no_grad()
    def absorb(self, counts: Tensor, sums: Tensor, decay: float) -> None:
        """Move each code towards the mean of the vectors assigned to it.

        Args:
            counts: vectors per code, [K], in units of uniform use.
            sums: their sums, [K, D], in the same units.
            decay: weight of the past, in [0, 1].
        """
        self.ema_counts.mul_(decay).add_(counts, alpha=1 - decay)
        self.ema_sums.mul_(decay).add_(sums, alpha=1 - decay)
        # Sums and counts decay together, so an unused code does not move. Below 1e-8 both are too
        # small to divide, and the code keeps its last value.
        alive = self.ema_counts > 1e-8
        means = self.ema_sums / self.ema_counts.clamp(min=1e-8).unsqueeze(1)
        self.weight.copy_(torch.where(alive.unsqueeze(1), means, self.weight.to(means.dtype)))

    @torch.no_grad()
    def place(self, rows: Tensor, vectors: Tensor) -> None:
        super().place(rows, vectors)
        self.ema_counts[rows] = 1
        self.ema_sums[rows] = vectors.to(self.ema_sums.dtype)


class ProjectedCodebook(Codebook):
    """SimVQ codebook (Zhu et al. 2024, arXiv 2411.02038): frozen vectors times one linear map.

    The map learns by gradient, so every step moves every code and no code is left unused.
    ``weight`` holds the frozen random vectors [K, D], ``projection`` the map [D, D].
    """

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__(num_embeddings, embedding_dim)
        self.weight.requires_grad_(False)
        self.projection = nn.Parameter(torch.eye(embedding_dim))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if "projection" in self._parameters:  # nn.Embedding calls this before it is registered
            nn.init.eye_(self.projection)

    def codes(self) -> Tensor:
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        codes = self.weight.to(wide) @ self.projection.to(wide)
        return codes.to(self.weight.dtype)  # rounded as a plain codebook would store them

    @torch.no_grad()
    def fit(self, vectors: Tensor) -> None:
        """Choose the map so that the codes have the second moments of ``vectors`` [N, D].

        This initializes training.
        """
        # On the CPU: D x D is little work, and some devices lack float64.
        own = self.weight.cpu().double()
        wanted = vectors.cpu().double()
        whitening = _root(own.T @ own / len(own), -0.5)
        coloring = _root(wanted.T @ wanted / len(wanted), 0.5)
        self.projection.copy_(whitening @ coloring)

    def fold(self) -> Codebook:
        """Return a plain codebook of the same codes, for saving and for formats without a map."""
        plain = Codebook(self.num_embeddings, self.embedding_dim, device=self.weight.device)
        plain.weight = nn.Parameter(self.codes().detach().clone())
        return plain

    def place(self, rows: Tensor, vectors: Tensor) -> None:
        raise AssertionError("projected codes move together")


def _root(moments: Tensor, power: float) -> Tensor:
    """Return a power of a symmetric matrix [D, D]; directions of zero variance stay zero."""
    values, directions = torch.linalg.eigh(moments)
    kept = values > values[-1] * 1e-12
    powers = torch.where(kept, values.clamp(min=torch.finfo(values.dtype).tiny) ** power, 0)
    return directions * powers @ directions.T
