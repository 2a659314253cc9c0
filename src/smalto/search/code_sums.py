"""Number and sum of the vectors of each code: all that codebook updates need from a batch."""

from __future__ import annotations

import torch
from torch import Tensor

# Tokens per code: usage@W covers the last W = 32·K tokens. The window is bounded, because over a
# long enough one every code is used.
USAGE_WINDOW = 32


def code_sums(vectors: Tensor, indices: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """Count and sum the vectors of every code.

    The order of summation is fixed, so equal input gives bitwise equal sums.

    Args:
        vectors: [N, D] floating point.
        indices: int64 [N] in [0, codebook_size).
        codebook_size: K.

    Returns:
        counts [K] and sums [K, D], both at least float32. Memory is O((N + K)·D), without a one-hot
        N x K matrix.
    """
    return code_sums_op(vectors, indices, codebook_size)


@torch.library.custom_op("smalto::code_sums", mutates_args=())
def code_sums_op(vectors: Tensor, indices: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """Compute ``code_sums`` as one operator."""
    vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    counts = torch.bincount(indices, minlength=codebook_size)
    add = _add_in_order if vectors.device.type == "cpu" else add_by_segment
    return counts.to(vectors.dtype), add(vectors, indices, counts)


@code_sums_op.register_fake
def _(vectors: Tensor, indices: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(vectors.dtype, torch.float32)
    counts = vectors.new_empty(codebook_size, dtype=dtype)
    sums = vectors.new_empty(codebook_size, vectors.shape[1], dtype=dtype)
    return counts, sums


def _add_in_order(vectors: Tensor, indices: Tensor, counts: Tensor) -> Tensor:
    return vectors.new_zeros(len(counts), vectors.shape[1]).index_add_(0, indices, vectors)


def add_by_segment(vectors: Tensor, indices: Tensor, counts: Tensor) -> Tensor:
    """Sum by segments of the vectors sorted by code.

    On a GPU the order of additions in index_add_ depends on its threads; here it is fixed.
    """
    ordered = vectors[indices.argsort(stable=True)]
    return torch.segment_reduce(ordered, "sum", lengths=counts, axis=0, initial=0)
