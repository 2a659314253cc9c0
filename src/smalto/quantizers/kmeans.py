"""k-means, which initializes codebooks."""

from __future__ import annotations

import torch
from torch import Tensor

from smalto.search import Metric, code_sums, nearest_codes


def kmeans(
    vectors: Tensor,
    num_codes: int,
    metric: Metric,
    generator: torch.Generator,
    num_iterations: int = 10,
) -> Tensor:
    """Run Lloyd's algorithm from a random choice of distinct vectors.

    Args:
        vectors: [N, D], finite.
        num_codes: requested number of centers, K.
        metric: ``"cosine"`` groups by angle; the centers are means of the unnormalized vectors,
            because the stored code is the value.
        generator: CPU generator for the random choice.
        num_iterations: rounds of assignment and averaging.

    Returns:
        [min(K, number of distinct vectors), D]. A center that loses all its vectors moves to the
        vector with the largest error.
    """
    distinct = torch.unique(vectors, dim=0)
    chosen = torch.randperm(len(distinct), generator=generator)[:num_codes].to(vectors.device)
    centers = distinct[chosen]
    if len(distinct) <= num_codes:
        return centers
    for _ in range(num_iterations):
        indices = nearest_codes(vectors, centers, metric)
        counts, sums = code_sums(vectors, indices, len(centers))
        means = (sums / counts.clamp(min=1).unsqueeze(1)).to(centers.dtype)
        empty = (counts == 0).nonzero().squeeze(1)
        if len(empty):
            errors = _errors(vectors, centers[indices], metric)
            means[empty] = vectors[errors.topk(min(len(empty), len(vectors))).indices]
        centers = means
    return centers


def _errors(vectors: Tensor, centers: Tensor, metric: Metric) -> Tensor:
    if metric == "cosine":
        return 1 - torch.nn.functional.cosine_similarity(vectors, centers)
    return (vectors - centers).square().sum(dim=1)
