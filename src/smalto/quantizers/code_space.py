"""Code spaces: sets of codes, each with its rule for assigning a code to a vector.

Residual, product and multi-scale quantizers are built from them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from smalto.core.precision import without_autocast
from smalto.quantizers.codebook import Codebook, EMACodebook
from smalto.quantizers.latents import masked_mse
from smalto.search import Metric, nearest_codes

UNIT_EPS = 1e-6  # shorter vectors are divided by this: a gradient of 1/length would be too large


class CodeSpace(nn.Module, ABC):
    """Set of K codes of dimension D, explicit or implicit, and the rule that assigns them.

    Attributes:
        codebook_size: K, a Python integer even for implicit codes.
        code_dim: D.
    """

    codebook_size: int
    code_dim: int

    @property
    @abstractmethod
    def weight_dtype(self) -> torch.dtype:
        """The dtype that decoded codes are returned in."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all arithmetic: that of the weights, at least float32."""
        return torch.promote_types(self.weight_dtype, torch.float32)

    @abstractmethod
    def assign(self, vectors: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors [N, D], valid bool [N] -> their codes [N, D] and indices int64 [N].

        The returned codes carry the gradient of the codebook. Rows that are not valid get index 0.
        """

    @abstractmethod
    def embed(self, indices: Tensor) -> Tensor:
        """Indices int64 [...] -> codes [..., D]."""

    @abstractmethod
    def loss(self, vectors: Tensor, codes: Tensor, valid: Tensor) -> Tensor:
        """Return the loss (scalar) that pulls vectors [N, D] and codes [N, D] together.

        Only rows that are ``valid`` (bool [N]) count.
        """

    def codebook(self) -> Tensor | None:
        """Return all codes [K, D], or None if they are implicit."""
        return None

    def prepare(self, vectors: Tensor) -> Tensor:
        """Return vectors [N, D] in the form in which they are compared with codes."""
        return vectors

    @torch.no_grad()
    def vector_gaps(self, vectors: Tensor, indices: Tensor) -> Tensor:
        """Return how much farther the codes of ``indices`` are than the nearest ones, float64 [N].

        The unit is ``(|z| + |c|)²``, the scale of the rounding errors of a squared distance. The
        result is 0 for the nearest code and about 1e-7 for a tie that float32 decides by rounding.
        """
        vectors = vectors.detach()
        nearest, _ = self.assign(
            vectors, torch.ones(len(vectors), dtype=torch.bool, device=vectors.device)
        )
        codes = self.embed(indices).double()
        scale = (
            vectors.double().norm(dim=1)
            + torch.maximum(codes.norm(dim=1), nearest.double().norm(dim=1))
        ).square()
        difference = self._distance(vectors.double(), codes) - self._distance(
            vectors.double(), nearest.double()
        )
        return (difference / scale.clamp(min=torch.finfo(torch.float64).tiny)).clamp(min=0)

    def _distance(self, vectors: Tensor, codes: Tensor) -> Tensor:
        return (vectors - codes).square().sum(dim=1)


class NearestCode(nn.Module):
    """Nearest-code search as a module without parameters.

    Attributes:
        metric: the metric of the search.
        observer: called with (module, vectors, codes, indices, valid) after each search, for every
            vector. ``CodebookUpdater`` counts use through it. An attribute and not a forward hook,
            because torch.compile guards attributes.
    """

    def __init__(self, metric: Metric) -> None:
        super().__init__()
        self.metric: Metric = metric
        self.observer: Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor], None] | None = None

    def forward(self, vectors: Tensor, codes: Tensor, valid: Tensor) -> Tensor:
        """Vectors [N, D], codes [K, D], valid bool [N] -> indices int64 [N], 0 if not valid."""
        indices = torch.where(valid, nearest_codes(vectors, codes, self.metric), 0)
        if self.observer is not None:
            self.observer(self, vectors, codes, indices, valid)
        return indices


class ExplicitCodes(CodeSpace):
    """Code space of a codebook: a vector is assigned the nearest code.

    Args:
        embedding: the codebook.
        metric: the metric of the search.
        beta: weight of the commitment loss.
        unit_codes: codes have length 1 (with ``"cosine"``).
        codes_learn_by_task: the estimator passes the task's gradient to the codes, so they do not
            need a codebook loss.

    Attributes:
        embedding: the ``Codebook`` (an ``nn.Embedding``); its ``weight`` is [K, D].
        nearest: the search.
    """

    def __init__(
        self,
        embedding: Codebook,
        metric: Metric,
        beta: float,
        *,
        unit_codes: bool = False,
        codes_learn_by_task: bool = False,
    ) -> None:
        super().__init__()
        self._hold(embedding, metric, beta, unit_codes, codes_learn_by_task)

    def _hold(
        self,
        embedding: Codebook,
        metric: Metric,
        beta: float,
        unit_codes: bool,
        codes_learn_by_task: bool,
    ) -> None:
        self.codebook_size = embedding.num_embeddings
        self.code_dim = embedding.embedding_dim
        self.beta = beta
        self.unit_codes = unit_codes
        self.codes_learn_by_task = codes_learn_by_task
        self.embedding = embedding
        self.nearest = NearestCode(metric)

    @property
    def weight_dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    def codes(self) -> Tensor:
        """Return the codes as vectors are compared with them: [K, D], at least float32."""
        codes = self.embedding.codes().to(self.dtype)
        return nn.functional.normalize(codes, dim=1, eps=UNIT_EPS) if self.unit_codes else codes

    def codebook(self) -> Tensor:
        """Return the codes in the dtype of the weights, [K, D]."""
        return self.codes().to(self.weight_dtype)

    def prepare(self, vectors: Tensor) -> Tensor:
        return nn.functional.normalize(vectors, dim=1, eps=UNIT_EPS) if self.unit_codes else vectors

    def assign(self, vectors: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        codes = self.codes()
        indices = self.nearest(vectors.detach(), codes.detach(), valid)
        return nn.functional.embedding(indices, codes), indices

    def embed(self, indices: Tensor) -> Tensor:
        with without_autocast(indices.device):  # a projection would round the codes
            return nn.functional.embedding(indices, self.codes())

    def loss(self, vectors: Tensor, codes: Tensor, valid: Tensor) -> Tensor:
        commitment = self.beta * masked_mse(vectors, codes.detach(), valid)
        if isinstance(self.embedding, EMACodebook) or self.codes_learn_by_task:
            return commitment
        return masked_mse(codes, vectors.detach(), valid) + commitment

    def _distance(self, vectors: Tensor, codes: Tensor) -> Tensor:
        if self.nearest.metric == "cosine":
            vectors = nn.functional.normalize(vectors, dim=1)
            codes = nn.functional.normalize(codes, dim=1)
        return super()._distance(vectors, codes)
