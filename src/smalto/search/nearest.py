"""The one entrance to nearest-code search: checks the arguments, then hands over to a backend."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from smalto.core.errors import InputError, describe
from smalto.search import faiss_search, tiled

Metric = Literal["l2", "cosine"]
Backend = Literal["tiled", "faiss"]


def nearest_codes(
    queries: Tensor,
    codebook: Tensor,
    metric: Metric = "l2",
    *,
    backend: Backend | None = None,
    exact: bool = False,
) -> Tensor:
    """Return the index of the nearest code of every query.

    Args:
        queries: [N, D] floating point.
        codebook: [K, D] floating point on the same device, K at least 1.
        metric: ``"l2"`` takes the smallest Euclidean distance, ``"cosine"`` the largest angle cosine
            ``z·c/|c|`` (the length of a code does not count; a zero code has cosine 0).
        backend: ``"tiled"``: torch, on every device. ``"faiss"``: faiss, on the CPU. None: the faster one, by a rule
            that was measured (``benchmarks/search.py``); tiled where faiss is not installed.
        exact: settle what float32 leaves open by comparing in float64 (always tiled).

    Returns:
        int64 [N]; of codes that are equal the lowest index. No gradient flows. A row that holds a NaN or an infinity gets
        index 0. Computed in float32 whatever the input, autocast and TF32 settings: the squared distance of the chosen code exceeds
        the best by at most ``4·2⁻²⁴·√D·(|z|+max|c|)²``, and where the best two differ by more, every backend and every split of
        the batch gives the same index. Numbers must stay below about 1e18, where squares overflow, and codes must be finite. Beside the
        result it needs at most 64 MiB, whatever N and K (with ``exact=True`` twice that; faiss, when asked for by name, copies its input).

    Raises:
        InputError: ranks or dimensions do not fit, no codes, integer input, or an unknown metric or backend.
        MissingExtra: faiss is asked for and not installed.
    """
    if not isinstance(queries, Tensor) or not isinstance(codebook, Tensor):
        raise InputError(
            f"queries and codebook must be tensors; got {describe(queries)} and {describe(codebook)}."
        )
    if (
        queries.ndim != 2
        or codebook.ndim != 2
        or queries.shape[1] != codebook.shape[1]
        or queries.shape[1] == 0
    ):
        raise InputError(
            f"nearest_codes expects queries [N, D] and a codebook [K, D] with the same D of at least 1; got {list(queries.shape)} "
            f"and {list(codebook.shape)}. Flatten a latent map [B, C, h, w] with .permute(0, 2, 3, 1).reshape(-1, C)."
        )
    if codebook.shape[0] == 0:
        raise InputError(
            f"the codebook is empty {list(codebook.shape)}: it needs at least one code."
        )
    if not queries.is_floating_point() or not codebook.is_floating_point():
        raise InputError(
            f"queries and codebook must be floating point; got {queries.dtype} and {codebook.dtype}."
        )
    if metric not in ("l2", "cosine"):
        raise InputError(f'metric must be "l2" or "cosine"; got {metric!r}.')
    if backend not in (None, "tiled", "faiss"):
        raise InputError(f'backend must be "tiled", "faiss" or None; got {backend!r}.')
    if backend == "faiss" and (exact or queries.device.type != "cpu"):
        raise InputError(
            'backend="faiss" searches in float32 on the CPU; use backend=None for exact=True and for other devices.'
        )
    with torch.no_grad():
        indices: Tensor = nearest_op(queries, codebook, metric == "cosine", backend or "", exact)
        return indices


def search(queries: Tensor, codebook: Tensor, cosine: bool, backend: str, exact: bool) -> Tensor:
    """``nearest_codes`` without the checks; an empty ``backend`` chooses."""
    if backend == "faiss" or (
        not backend and not exact and faiss_search.is_faster(queries, codebook)
    ):
        return faiss_search.search(queries, codebook, cosine)
    return tiled.search(queries, codebook, cosine, exact)


# One operator, so that a compiled model has the search as one node. Not by torch.library.custom_op: its first call imports torch's
# compiler, a second and a half and 100 MB for every program that only encodes.
torch.library.define("smalto::nearest_codes", torch.library.infer_schema(search, mutates_args=()))
torch.library.impl("smalto::nearest_codes", "default", search)
nearest_op = torch.ops.smalto.nearest_codes.default


def _fake(queries: Tensor, codebook: Tensor, cosine: bool, backend: str, exact: bool) -> Tensor:
    return queries.new_empty(queries.shape[0], dtype=torch.int64)


torch.library.register_fake("smalto::nearest_codes", _fake)
