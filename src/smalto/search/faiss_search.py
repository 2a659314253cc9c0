"""Nearest-code search by faiss on the CPU.

faiss computes distances and argmin in one loop (Douze et al. 2024, arXiv 2401.08281).
"""

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

# Size of a tile of codes. Tiles of this size stay in the L2 cache, a large codebook does not.
FLOATS_PER_TILE = 2**16
COLUMNS = 64  # codes that faiss processes at a time
MOST_DIMENSIONS = 16  # above it faiss uses matrix products like torch, and is not faster
# With a smaller query tensor faiss 1.15 searches code by code, which is 15 times slower.
FEWEST_FLOATS = 128_000
# faiss copies queries and codebook. If either is larger, tiled search needs less memory.
MOST_FLOATS = 2**20
_LARGEST = 1e15  # absolute value in a query: faiss squares queries, which could overflow


def is_faster(queries: Tensor, codebook: Tensor) -> bool:
    """Return whether faiss is faster than tiled search.

    It is on the CPU, with few dimensions and many queries, if faiss is installed. The limits were
    measured with ``benchmarks/search.py``.
    """
    return (
        queries.device.type == "cpu"
        and queries.shape[1] <= MOST_DIMENSIONS
        and FEWEST_FLOATS <= queries.numel() <= MOST_FLOATS
        and codebook.numel() <= MOST_FLOATS
        and is_installed()
    )


@functools.cache
def is_installed() -> bool:
    """Return whether faiss can be imported; the result is cached."""
    return importlib.util.find_spec("faiss") is not None


def search(queries: Tensor, codebook: Tensor, cosine: bool) -> Tensor:
    """Return ``nearest_codes`` without the checks, on CPU tensors.

    Float [N, D], float [K, D] -> int64 [N].

    Raises:
        MissingExtra: faiss is not installed.
    """
    if not is_installed():
        raise MissingExtra("faiss-cpu", "ann", 'backend="faiss"')
    codes = _numpy(codebook)
    vectors = _numpy(queries)
    # A zero code does not have a direction, so its distances are not a measure of angles.
    if cosine and not codes.any(axis=1).all():
        return tiled.search(queries, codebook, cosine)
    shift = numpy.zeros(1, numpy.float32) if cosine else codes.mean(axis=0).astype(numpy.float32)
    vectors = _prepare(vectors, shift, cosine=False)
    # Tiled search handles what faiss cannot: squares that overflow, NaN, and, for cosine, zero
    # queries, which do not have a direction.
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
    """Search tile by tile of codes; at equal distances the lowest index wins."""
    faiss = _faiss()
    faiss.omp_set_num_threads(torch.get_num_threads())
    best = numpy.full(len(queries), numpy.inf, dtype=numpy.float32)
    indices = numpy.zeros(len(queries), dtype=numpy.int64)
    codes_per_tile = -(-FLOATS_PER_TILE // (codes.shape[1] * COLUMNS)) * COLUMNS
    for rows in slices(len(codes), codes_per_tile):
        tile = _prepare(codes[rows], shift, cosine)
        # In an incomplete group of codes faiss rounds differently, so the higher one of two equal
        # codes could win. Therefore the tile is padded with copies of its first code, and a match
        # with a copy counts as a match with the first.
        padding = numpy.repeat(tile[:1], -len(tile) % COLUMNS, axis=0)
        found = faiss.knn(queries, numpy.concatenate([tile, padding]) if len(padding) else tile, 1)
        distances = found[0][:, 0]
        positions = numpy.where(found[1][:, 0] < len(tile), found[1][:, 0], 0)
        better = distances < best
        best = numpy.where(better, distances, best)
        indices = numpy.where(better, positions + rows.start, indices)
    return indices


def _prepare(vectors: Numbers, shift: Floats, cosine: bool) -> Floats:
    """Return vectors minus ``shift``, scaled to length 1 for cosine.

    Between vectors of equal length the nearest one is at the smallest angle.
    """
    shifted = (vectors - shift).astype(numpy.float32, copy=False)
    return _unit(shifted) if cosine else shifted


def _numpy(vectors: Tensor) -> Numbers:
    """Return a tensor as a numpy array, without a copy for float32 and float64.

    The preparation runs in numpy, so that torch's threads do not spin when faiss starts.
    """
    is_native = vectors.dtype in (torch.float32, torch.float64)
    return (vectors if is_native else vectors.float()).numpy()


def _unit(vectors: Floats) -> Floats:
    """Return vectors scaled to length 1; zero stays zero."""
    lengths = numpy.sqrt(numpy.square(vectors, dtype=numpy.float64).sum(axis=1, keepdims=True))
    return (vectors / numpy.maximum(lengths, numpy.finfo(numpy.float32).tiny)).astype(numpy.float32)


@functools.cache
def _faiss() -> Any:
    """Import faiss, with idle threads that sleep.

    faiss ships its own OpenMP library. Its threads would spin for milliseconds after every search
    and slow down the next torch operation. OpenMP reads OMP_WAIT_POLICY once, when it is loaded, so
    torch's OpenMP, which is already loaded, is not affected.
    """
    before = os.environ.get("OMP_WAIT_POLICY")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        return importlib.import_module("faiss")
    finally:
        if before is None:
            del os.environ["OMP_WAIT_POLICY"]
