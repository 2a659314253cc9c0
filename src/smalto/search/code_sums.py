"""How many vectors each code got, and their sum: all that codebook upkeep needs to know of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

USAGE_WINDOW = 32  # tokens per code: usage@W looks at W = 32·K tokens, because every codebook looks used when one looks long enough


def code_sums(vectors: Tensor, indices: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """Count and add up the vectors of every code, in the same order every time: equal input gives bitwise equal sums.

    Args:
        vectors: [N, D] floating point.
        indices: int64 [N] in [0, codebook_size).
        codebook_size: K.

    Returns:
        counts [K] and sums [K, D], both at least float32. Memory is O((N + K)·D): no one-hot N x K matrix.
    """
    return code_sums_op(vectors, indices, codebook_size)


@torch.library.custom_op("smalto::code_sums", mutates_args=())
def code_sums_op(vectors: Tensor, indices: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    counts = torch.bincount(indices, minlength=codebook_size)
    add = _add_in_order if vectors.device.type == "cpu" else _add_by_segment
    return counts.to(vectors.dtype), add(vectors, indices, counts)


@code_sums_op.register_fake
def _(vectors: Tensor, indices: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(vectors.dtype, torch.float32)
    return vectors.new_empty(codebook_size, dtype=dtype), vectors.new_empty(
        codebook_size, vectors.shape[1], dtype=dtype
    )


def _add_in_order(vectors: Tensor, indices: Tensor, counts: Tensor) -> Tensor:
    return vectors.new_zeros(len(counts), vectors.shape[1]).index_add_(0, indices, vectors)


def _add_by_segment(vectors: Tensor, indices: Tensor, counts: Tensor) -> Tensor:
    """On a GPU index_add_ adds in whatever order its threads come; sorted by code, each sum has an order."""
    ordered = vectors[indices.argsort(stable=True)]
    return torch.segment_reduce(ordered, "sum", lengths=counts, axis=0, initial=0)
