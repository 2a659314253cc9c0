"""Nearest-code search by faiss on the CPU: distance and argmin in one loop (Douze et al. 2024, arXiv 2401.08281)."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from smalto.core.errors import MissingExtra
from smalto.search import tiled
from smalto.search.tiled import slices

Floats = NDArray[numpy.float32]
Numbers = NDArray[numpy.floating]

FLOATS_PER_TILE = (
    2**16
)  # of codes: these stay in the second-level cache, a whole large codebook does not
COLUMNS = 64  # codes that faiss takes at a time
MOST_DIMENSIONS = 16  # beyond, faiss multiplies matrices as torch does, and not faster
FEWEST_FLOATS = (
    128_000  # with fewer numbers in the queries faiss 1.15 goes code by code, 15 times slower
)
MOST_FLOATS = 2**20  # it copies queries and codebook: beyond, tiled search needs less memory
_LARGEST = 1e15  # of a number in a query


def is_faster(queries: Tensor, codebook: Tensor) -> bool:
    """The rule, as measured by ``benchmarks/search.py``: few dimensions, many queries, on the CPU, where faiss is installed."""
    return (
        queries.device.type == "cpu"
        and queries.shape[1] <= MOST_DIMENSIONS
        and FEWEST_FLOATS <= queries.numel() <= MOST_FLOATS
        and codebook.numel() <= MOST_FLOATS
        and is_installed()
    )


@functools.cache
def is_installed() -> bool:
    """Whether faiss can be imported; asked once."""
    return importlib.util.find_spec("faiss") is not None


def search(queries: Tensor, codebook: Tensor, cosine: bool) -> Tensor:
    """``nearest_codes`` without the checks, on CPU tensors: float [N, D], float [K, D] -> int64 [N]."""
    if not is_installed():
        raise MissingExtra("faiss-cpu", "ann", 'backend="faiss"')
    codes, vectors = _numpy(codebook), _numpy(queries)
    if cosine and not codes.any(axis=1).all():
        return tiled.search(
            queries, codebook, cosine
        )  # a zero code has no direction, so distances tell nothing of angles
    shift = numpy.zeros(1, numpy.float32) if cosine else codes.mean(axis=0).astype(numpy.float32)
    vectors = _prepare(vectors, shift, cosine=False)
    # faiss squares a query, which can overflow, and knows nothing of NaN; a zero query has no direction.
    wild = None
    odd = ~vectors.any(axis=1) if cosine else numpy.zeros(len(vectors), dtype=bool)
    if not numpy.abs(vectors).max(initial=0) < _LARGEST:
        odd |= ~(numpy.abs(vectors) < _LARGEST).all(axis=1)
    if odd.any():
        wild = torch.from_numpy(odd)
        vectors[odd] = 0
    if cosine:
        vectors = _unit(vectors)
    indices = torch.from_numpy(_search_codes(vectors, codes, shift, cosine))
    if wild is not None:
        indices[wild] = tiled.search(queries[wild], codebook, cosine)
    return indices


def _search_codes(
    queries: Floats, codes: Numbers, shift: Floats, cosine: bool
) -> NDArray[numpy.int64]:
    """Tile by tile of codes; of equal distances the first stays."""
    faiss = _faiss()
    faiss.omp_set_num_threads(torch.get_num_threads())
    best = numpy.full(len(queries), numpy.inf, dtype=numpy.float32)
    indices = numpy.zeros(len(queries), dtype=numpy.int64)
    for rows in slices(len(codes), -(-FLOATS_PER_TILE // (codes.shape[1] * COLUMNS)) * COLUMNS):
        tile = _prepare(codes[rows], shift, cosine)
        # faiss rounds the last codes of an odd number in another way, and of two equal codes the higher could win: so the tile is filled
        # up with copies of its first code, and whoever finds one of those has found the first.
        padding = numpy.repeat(tile[:1], -len(tile) % COLUMNS, axis=0)
        found = faiss.knn(queries, numpy.concatenate([tile, padding]) if len(padding) else tile, 1)
        distances, positions = (
            found[0][:, 0],
            numpy.where(found[1][:, 0] < len(tile), found[1][:, 0], 0),
        )
        better = distances < best
        best = numpy.where(better, distances, best)
        indices = numpy.where(better, positions + rows.start, indices)
    return indices


def _prepare(vectors: Numbers, shift: Floats, cosine: bool) -> Floats:
    """Vectors less ``shift``; for cosine at length 1, because between vectors of one length the nearest is at the smallest angle."""
    shifted = (vectors - shift).astype(numpy.float32, copy=False)
    return _unit(shifted) if cosine else shifted


def _numpy(vectors: Tensor) -> Numbers:
    """Without a copy where numpy knows the numbers. numpy and not torch, so that torch's threads do not spin when faiss begins."""
    return (vectors if vectors.dtype in (torch.float32, torch.float64) else vectors.float()).numpy()


def _unit(vectors: Floats) -> Floats:
    """Vectors at length 1; zero stays zero."""
    lengths = numpy.sqrt(numpy.square(vectors, dtype=numpy.float64).sum(axis=1, keepdims=True))
    return (vectors / numpy.maximum(lengths, numpy.finfo(numpy.float32).tiny)).astype(numpy.float32)


@functools.cache
def _faiss() -> Any:
    """faiss, with threads that sleep when they have nothing to do.

    It brings an OpenMP of its own, whose threads would spin for milliseconds after every search and slow down what torch does next.
    OpenMP asks for this once, when it is loaded; so torch's, which is loaded already, stays as it is.
    """
    before = os.environ.get("OMP_WAIT_POLICY")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        return importlib.import_module("faiss")
    finally:
        if before is None:
            del os.environ["OMP_WAIT_POLICY"]
