"""How many vectors each code got, and their sum: all that codebook upkeep needs to know of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

USAGE_WINDOW = 32  # tokens per code: usage@W looks at W = 32·K tokens, because every codebook looks used when one looks long enough


def code_sums(vectors: Tensor, indices: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """Count and add up the vectors of every code.

    Args:
        vectors: [N, D] floating point.
        indices: int64 [N] in [0, codebook_size).
        codebook_size: K.

    Returns:
        counts [K] and sums [K, D], both at least float32. Memory is O(K·D): no one-hot N x K matrix.
    """
    dtype = torch.promote_types(vectors.dtype, torch.float32)
    counts = torch.bincount(indices, minlength=codebook_size).to(dtype)
    sums = torch.zeros(codebook_size, vectors.shape[1], dtype=dtype, device=vectors.device)
    return counts, sums.index_add_(0, indices, vectors.to(dtype))
