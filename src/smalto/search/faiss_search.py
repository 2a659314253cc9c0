"""Nearest-code search by faiss on the CPU: distance and argmin in one loop (Douze et al. 2024, arXiv 2401.08281)."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from smalto.errors import MissingExtra
from smalto.search import tiled
from smalto.search.tiled import slices

Floats = NDArray[numpy.float32]

FLOATS_PER_TILE = 2**16  # of codes: these stay in the second-level cache, a whole large codebook does not
COLUMNS = 64  # codes that faiss takes at a time
MOST_DIMENSIONS = 16  # beyond, faiss multiplies matrices as torch does, and not faster
FEWEST_FLOATS = 128_000  # with fewer numbers in the queries faiss 1.15 goes code by code, 15 times slower
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
    codes, vectors = _numpy(codebook), _numpy(queries)
    if not cosine:
        shift = codes.mean(axis=0, dtype=numpy.float64).astype(numpy.float32)
        codes, vectors = codes - shift, vectors - shift
    codes, vectors = codes.astype(numpy.float32, copy=False), vectors.astype(numpy.float32, copy=False)
    # faiss squares a query, which can overflow, and knows nothing of NaN.
    tame = bool(numpy.abs(vectors).max(initial=0) < _LARGEST)
    wild = None if tame else torch.from_numpy(~(numpy.abs(vectors) < _LARGEST).all(axis=1))
    if cosine:
        with numpy.errstate(invalid="ignore"):
            codes, vectors = _unit(codes), _unit(vectors)  # between vectors of one length the nearest is at the smallest angle
    indices = torch.from_numpy(_search_codes(vectors, codes))
    if wild is not None:
        indices[wild] = tiled.search(queries[wild], codebook, cosine)
    return indices


def _search_codes(queries: Floats, codes: Floats) -> NDArray[numpy.int64]:
    """The codes are shared out to threads, tile by tile. Of equal distances the first stays."""
    num_threads = torch.get_num_threads()
    share = -(-len(codes) // num_threads)
    size = -(-min(share, FLOATS_PER_TILE // codes.shape[1]) // COLUMNS) * COLUMNS
    tiles = list(slices(len(codes), size))
    best = numpy.full(len(queries), numpy.inf, dtype=numpy.float32)
    indices = numpy.zeros(len(queries), dtype=numpy.int64)
    # faiss has an OpenMP pool of its own, whose threads would spin for milliseconds after every search and slow down what torch does
    # next. One thread of Python per core, each with one of faiss's, leaves that pool asleep.
    with ThreadPoolExecutor(num_threads) as threads:
        for rows, (distances, positions) in zip(tiles, threads.map(lambda tile: _search_tile(queries, codes[tile]), tiles), strict=True):
            better = distances < best
            best[better] = distances[better]
            indices[better] = positions[better] + rows.start
    return indices


def _search_tile(queries: Floats, tile: Floats) -> tuple[Floats, NDArray[numpy.int64]]:
    faiss = _faiss()
    faiss.omp_set_num_threads(1)  # of this thread alone
    # faiss rounds the last codes of an odd number in another way, and of two equal codes the higher could win: so the tile is filled up
    # with copies of its first code, and whoever finds one of those has found the first.
    padding = numpy.repeat(tile[:1], -len(tile) % COLUMNS, axis=0)
    distances, positions = faiss.knn(queries, numpy.concatenate([tile, padding]) if len(padding) else tile, 1)
    return distances[:, 0], numpy.where(positions[:, 0] < len(tile), positions[:, 0], 0)


def _numpy(vectors: Tensor) -> NDArray[numpy.floating]:
    """Without a copy where numpy knows the numbers. numpy and not torch, so that torch's threads do not spin when faiss begins."""
    return (vectors if vectors.dtype in (torch.float32, torch.float64) else vectors.float()).numpy()


def _unit(vectors: Floats) -> Floats:
    """Vectors at length 1; zero stays zero."""
    lengths = numpy.sqrt(numpy.square(vectors, dtype=numpy.float64).sum(axis=1, keepdims=True))
    return (vectors / numpy.maximum(lengths, numpy.finfo(numpy.float32).tiny)).astype(numpy.float32)


def _faiss() -> Any:
    if not is_installed():
        raise MissingExtra("faiss-cpu", "ann", 'backend="faiss"')
    return importlib.import_module("faiss")
