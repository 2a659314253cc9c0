"""Nearest-code search by faiss on the CPU: distance and argmin in one loop (Douze et al. 2024, arXiv 2401.08281)."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from smalto.errors import MissingExtra
from smalto.search import tiled
from smalto.search.tiled import BLOCK_FLOATS, mean_code, shifted, slices, unit

CODES_PER_TILE = 8192  # of few dimensions: these stay in the second-level cache, a whole large codebook does not
COLUMNS = 64  # divides CODES_PER_TILE: codes that faiss takes at a time
MOST_DIMENSIONS = 16  # beyond, faiss multiplies matrices as torch does, and not faster
FEWEST_FLOATS = 128_000  # with fewer numbers in the queries faiss 1.15 goes code by code, 15 times slower
_LARGEST = 1e15  # of a number in a query


def is_faster(queries: Tensor, codebook: Tensor) -> bool:
    """The rule, as measured by ``benchmarks/search.py``: few dimensions, many queries, on the CPU, where faiss is installed."""
    return (
        queries.device.type == "cpu"
        and queries.shape[1] <= MOST_DIMENSIONS
        and queries.numel() >= FEWEST_FLOATS
        and codebook.numel() <= BLOCK_FLOATS
        and is_installed()
    )


@functools.cache
def is_installed() -> bool:
    """Whether faiss can be imported; asked once."""
    return importlib.util.find_spec("faiss") is not None


def search(queries: Tensor, codebook: Tensor, cosine: bool) -> Tensor:
    """``nearest_codes`` without the checks, on CPU tensors: float [N, D], float [K, D] -> int64 [N]."""
    shift = queries.new_zeros(queries.shape[1], dtype=torch.float32) if cosine else mean_code(codebook)
    codes = shifted(codebook, shift)
    if cosine:
        codes = unit(codes)  # between vectors of one length the nearest is the one at the smallest angle
    indices = torch.empty(len(queries), dtype=torch.int64)
    for rows in slices(len(queries), max(1, BLOCK_FLOATS // queries.shape[1])):
        block = shifted(queries[rows], shift)
        # faiss squares a query, which can overflow, and knows nothing of NaN.
        tame = (block.abs() < _LARGEST).all(dim=1)
        indices[rows] = _search_block(unit(block) if cosine else block, codes)
        if not tame.all():
            indices[rows][~tame] = tiled.search(queries[rows][~tame], codebook, cosine)
    return indices


def _search_block(queries: Tensor, codes: Tensor) -> Tensor:
    """Tile by tile of codes; of equal distances the first stays."""
    faiss = _faiss()
    best = torch.full((len(queries),), torch.inf)
    indices = torch.zeros(len(queries), dtype=torch.int64)
    for rows in slices(len(codes), CODES_PER_TILE):
        # faiss rounds the last codes of an odd number in another way, and of two equal codes the higher could win: so the tile is filled
        # up with copies of its first code, and whoever finds one of those has found the first.
        tile = codes[rows]
        padded = torch.cat([tile, tile[:1].expand(-len(tile) % COLUMNS, -1)])
        distances, positions = (torch.from_numpy(found[:, 0]) for found in faiss.knn(queries.numpy(), padded.numpy(), 1))
        positions = torch.where(positions < len(tile), positions, 0)
        better = distances < best
        best = torch.where(better, distances, best)
        indices = torch.where(better, positions + rows.start, indices)
    return indices


def _faiss() -> Any:
    if not is_installed():
        raise MissingExtra("faiss-cpu", "ann", 'backend="faiss"')
    return importlib.import_module("faiss")
