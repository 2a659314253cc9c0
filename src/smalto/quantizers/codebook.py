"""The K vectors of a quantizer, and how they learn."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn


class Codebook(nn.Embedding):
    """K codes of dimension D that learn by gradient; ``weight`` is [K, D]."""

    def reset_parameters(self) -> None:
        # About unit length in any dimension. The usual uniform(±1/K) puts all codes in one tiny ball around zero: the few on its
        # rim then win every latent and the rest never learn.
        nn.init.normal_(self.weight, std=self.embedding_dim**-0.5)

    def codes(self) -> Tensor:
        """The codes, [K, D]."""
        return self.weight

    def forward(self, input: Tensor) -> Tensor:
        """Indices int64 [...] -> codes [..., D]."""
        return nn.functional.embedding(input, self.codes())

    @torch.no_grad()
    def place(self, rows: Tensor, vectors: Tensor) -> None:
        """Put codes ``rows`` (int64 [R]) at ``vectors`` [R, D]."""
        self.weight[rows] = vectors.to(self.weight.dtype)


class EMACodebook(Codebook):
    """K codes that are moving averages of the vectors assigned to them (van den Oord et al. 2017, appendix A.1).

    The optimizer leaves ``weight`` alone; ``CodebookUpdater`` calls ``absorb``. Counts are in units of uniform use: a code that gets
    its even share of the tokens has ``ema_counts`` 1, whatever the batch.
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
        if "ema_sums" in self._buffers:  # not yet, when nn.Embedding calls this
            self.ema_counts.fill_(1)
            self.ema_sums.copy_(self.weight.detach())

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        # .half() and .bfloat16() come through here. Averages move by less than such numbers can tell apart, so theirs stay wide.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name in ("ema_counts", "ema_sums"):
            buffer = self._buffers[name]
            assert buffer is not None
            self._buffers[name] = buffer.to(torch.promote_types(buffer.dtype, torch.float32))
        return self

    @torch.no_grad()
    def absorb(self, counts: Tensor, sums: Tensor, decay: float) -> None:
        """Move towards the mean of what was assigned: counts [K] and sums [K, D], both in units of uniform use."""
        self.ema_counts.mul_(decay).add_(counts, alpha=1 - decay)
        self.ema_sums.mul_(decay).add_(sums, alpha=1 - decay)
        # Sums and counts shrink together, so a code that nothing hits stays where it is, until both are too small to divide.
        alive = self.ema_counts > 1e-8
        means = self.ema_sums / self.ema_counts.clamp(min=1e-8).unsqueeze(1)
        self.weight.copy_(torch.where(alive.unsqueeze(1), means, self.weight.to(means.dtype)))

    @torch.no_grad()
    def place(self, rows: Tensor, vectors: Tensor) -> None:
        super().place(rows, vectors)
        self.ema_counts[rows] = 1
        self.ema_sums[rows] = vectors.to(self.ema_sums.dtype)


class ProjectedCodebook(Codebook):
    """SimVQ (Zhu et al. 2024, arXiv 2411.02038): frozen random vectors times one linear map that learns by gradient.

    Every step moves every code, so none can be left behind. ``weight`` holds the frozen vectors [K, D], ``projection`` the map [D, D].
    """

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__(num_embeddings, embedding_dim)
        self.weight.requires_grad_(False)
        self.projection = nn.Parameter(torch.eye(embedding_dim))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if "projection" in self._parameters:  # not yet, when nn.Embedding calls this
            nn.init.eye_(self.projection)

    def codes(self) -> Tensor:
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        return (self.weight.to(wide) @ self.projection.to(wide)).to(
            self.weight.dtype
        )  # what a plain codebook could hold

    @torch.no_grad()
    def fit(self, vectors: Tensor) -> None:
        """Choose the map so that the codes have the second moments of ``vectors`` [N, D]: the beginning of training."""
        own, wanted = (
            self.weight.cpu().double(),
            vectors.cpu().double(),
        )  # D x D is little work, and not every device has float64
        projection = _root(own.T @ own / len(own), -0.5) @ _root(
            wanted.T @ wanted / len(wanted), 0.5
        )
        self.projection.copy_(projection)

    def fold(self) -> Codebook:
        """A plain codebook of the same codes: for saving, and for layouts that know no map."""
        plain = Codebook(self.num_embeddings, self.embedding_dim, device=self.weight.device)
        plain.weight = nn.Parameter(self.codes().detach().clone())
        return plain

    def place(self, rows: Tensor, vectors: Tensor) -> None:
        raise AssertionError("projected codes move together")


def _root(moments: Tensor, power: float) -> Tensor:
    """A power of a symmetric matrix; directions in which there is nothing stay empty."""
    values, directions = torch.linalg.eigh(moments)
    kept = values > values[-1] * 1e-12
    powers = torch.where(kept, values.clamp(min=torch.finfo(values.dtype).tiny) ** power, 0)
    return directions * powers @ directions.T
