"""Nearest-code search: the public function, which checks its arguments and calls a backend."""

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
        metric: ``"l2"``: the smallest Euclidean distance. ``"cosine"``: the largest cosine
            ``z·c/|c|`` (the length of a code does not count; a zero code has cosine 0).
        backend: ``"tiled"``: torch, on every device. ``"faiss"``: faiss, on the CPU. None: the
            faster one, by a measured rule (``benchmarks/search.py``); tiled if faiss is not
            installed.
        exact: resolve the ties of float32 by a comparison in float64 (always tiled).

    Returns:
        int64 [N]; the lowest index if codes are equal. The result carries no gradient. A row that
        holds a NaN or an infinity gets index 0.

    The computation is in float32, whatever the input, autocast and TF32 settings. The squared
    distance of the chosen code exceeds the best by at most ``4·2⁻²⁴·√D·(|z|+max|c|)²``. If the best
    two differ by more, every backend and every split of the batch gives the same index. Absolute
    values must stay below about 1e18, because squares overflow there, and codes must be finite.

    Beside the result the search needs at most 64 MiB of memory, whatever N and K, and twice that
    with ``exact=True``. faiss copies its input if it is requested by name.

    Raises:
        InputError: ranks or dimensions do not fit, the codebook is empty, the input is not floating
            point, or the metric or backend is unknown.
        MissingExtra: faiss is requested and not installed.
    """
    if not isinstance(queries, Tensor) or not isinstance(codebook, Tensor):
        raise InputError(
            f"got {describe(queries)} and {describe(codebook)}; queries and codebook must be "
            "tensors. Convert them with torch.as_tensor(...)."
        )
    if (
        queries.ndim != 2
        or codebook.ndim != 2
        or queries.shape[1] != codebook.shape[1]
        or queries.shape[1] == 0
    ):
        raise InputError(
            f"got {list(queries.shape)} and {list(codebook.shape)}; expected queries [N, D] and a "
            "codebook [K, D] with the same D of at least 1. Flatten a latent map [B, C, h, w] with "
            ".permute(0, 2, 3, 1).flatten(0, 2)."
        )
    if codebook.shape[0] == 0:
        raise InputError(
            f"got an empty codebook {list(codebook.shape)}; expected at least one code. "
            "Pass a codebook [K, D]."
        )
    if not queries.is_floating_point() or not codebook.is_floating_point():
        raise InputError(
            f"got {queries.dtype} and {codebook.dtype}; queries and codebook must be floating "
            "point. Convert them with .float()."
        )
    if metric not in ("l2", "cosine"):
        raise InputError(f'got metric={metric!r}; expected "l2" or "cosine".')
    if backend not in (None, "tiled", "faiss"):
        raise InputError(f'got backend={backend!r}; expected "tiled", "faiss" or None.')
    if backend == "faiss" and (exact or queries.device.type != "cpu"):
        raise InputError(
            f'got backend="faiss" with exact={exact} on {queries.device.type}; faiss searches in '
            "float32 on the CPU. Use backend=None."
        )
    with torch.no_grad():
        indices: Tensor = nearest_op(queries, codebook, metric == "cosine", backend or "", exact)
        return indices


def search(queries: Tensor, codebook: Tensor, cosine: bool, backend: str, exact: bool) -> Tensor:
    """Return ``nearest_codes`` without the checks; an empty ``backend`` selects the faster one."""
    prefers_faiss = not backend and not exact and faiss_search.is_faster(queries, codebook)
    if backend == "faiss" or prefers_faiss:
        return faiss_search.search(queries, codebook, cosine)
    return tiled.search(queries, codebook, cosine, exact)


# One operator, so that a compiled model has the search as one node. Not torch.library.custom_op:
# its first call imports torch's compiler, which costs 1.5 s and 100 MB in every program that only
# encodes.
torch.library.define("smalto::nearest_codes", torch.library.infer_schema(search, mutates_args=()))
torch.library.impl("smalto::nearest_codes", "default", search)
nearest_op = torch.ops.smalto.nearest_codes.default


def _fake(queries: Tensor, codebook: Tensor, cosine: bool, backend: str, exact: bool) -> Tensor:
    return queries.new_empty(queries.shape[0], dtype=torch.int64)


torch.library.register_fake("smalto::nearest_codes", _fake)
