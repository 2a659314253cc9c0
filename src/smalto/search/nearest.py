"""The one entrance to nearest-code search: checks the arguments, then hands over to a backend."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from smalto.errors import InputError, describe
from smalto.search.tiled import nearest_tiled

Metric = Literal["l2", "cosine"]


def nearest_codes(queries: Tensor, codebook: Tensor, metric: Metric = "l2") -> Tensor:
    """Return the index of the nearest code of every query.

    Args:
        queries: [N, D] floating point.
        codebook: [K, D] floating point on the same device, K at least 1.
        metric: ``"l2"`` takes the smallest Euclidean distance, ``"cosine"`` the largest angle cosine
            ``z·c/|c|`` (the length of a code does not count; a zero code has cosine 0).

    Returns:
        int64 [N]; of codes that are equal the lowest index. No gradient flows. A row that holds a NaN or an infinity gets
        index 0. Computed in float32 whatever the input, autocast and TF32 settings; beside the result it needs at most
        64 MiB, whatever N and K.

    Raises:
        InputError: ranks or dimensions do not fit, no codes, integer input, or an unknown metric.
    """
    if not isinstance(queries, Tensor) or not isinstance(codebook, Tensor):
        raise InputError(f"queries and codebook must be tensors; got {describe(queries)} and {describe(codebook)}.")
    if queries.ndim != 2 or codebook.ndim != 2 or queries.shape[1] != codebook.shape[1] or queries.shape[1] == 0:
        raise InputError(
            f"nearest_codes expects queries [N, D] and a codebook [K, D] with the same D of at least 1; got {list(queries.shape)} "
            f"and {list(codebook.shape)}. Flatten a latent map [B, C, h, w] with .permute(0, 2, 3, 1).reshape(-1, C)."
        )
    if codebook.shape[0] == 0:
        raise InputError(f"the codebook is empty {list(codebook.shape)}: it needs at least one code.")
    if not queries.is_floating_point() or not codebook.is_floating_point():
        raise InputError(f"queries and codebook must be floating point; got {queries.dtype} and {codebook.dtype}.")
    if metric not in ("l2", "cosine"):
        raise InputError(f'metric must be "l2" or "cosine"; got {metric!r}.')
    with torch.no_grad():
        return nearest_tiled(queries, codebook, metric == "cosine")
