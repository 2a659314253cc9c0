"""Exact nearest-code search in plain torch, in bounded memory: the reference for every other backend.

The nearest code maximises the score ``z·c - |c|²/2``, so one matrix product per tile does the work. Taking a row's maximum
is two to three times faster than taking its position, so there are two passes: the first keeps only the best score of
each tile of codes, the second looks at the winning tile again to find the position in it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from smalto.precision import plain_float32, without_autocast

CODES_PER_TILE = 256
COLUMNS = 16  # divides CODES_PER_TILE: float32 numbers in the widest vector register
QUERIES_PER_TILE = 2048
_BLOCK_FLOATS = 2**22  # 16 MiB: the largest single temporary; fewer than four of this size live at once
_BLOCK_QUERIES = 2**16


@torch.library.custom_op("smalto::nearest_tiled", mutates_args=())
def nearest_tiled(queries: Tensor, codebook: Tensor, cosine: bool) -> Tensor:
    """``nearest_codes`` without the checks: float [N, D], float [K, D] -> int64 [N]."""
    num_queries, dim = queries.shape
    indices = torch.empty(num_queries, dtype=torch.int64, device=queries.device)
    with without_autocast(queries.device), plain_float32():
        # Shifting both sides by the codebook's mean leaves l2 distances alone and keeps the products small, so float32 loses less.
        shift = queries.new_zeros(dim, dtype=torch.float32) if cosine else _mean(codebook)
        num_tiles = -(-codebook.shape[0] // _codes_per_tile(dim))
        block = max(1, min(_BLOCK_QUERIES, _BLOCK_FLOATS // max(num_tiles, dim + 1)))
        for rows in _slices(num_queries, block):
            # A column of ones takes the offset of each code into the product: cheaper than adding it afterwards.
            shifted = queries.new_ones(rows.stop - rows.start, dim + 1, dtype=torch.float32)
            torch.sub(queries[rows], shift, out=shifted[:, :dim])
            indices[rows] = _search_block(shifted, codebook, shift, cosine)
    return indices


@nearest_tiled.register_fake
def _(queries: Tensor, codebook: Tensor, cosine: bool) -> Tensor:
    return queries.new_empty(queries.shape[0], dtype=torch.int64)


def _search_block(queries: Tensor, codebook: Tensor, shift: Tensor, cosine: bool) -> Tensor:
    tiles = list(_slices(codebook.shape[0], _codes_per_tile(codebook.shape[1])))
    best = queries.new_empty(len(tiles), queries.shape[0])
    scores = queries.new_empty(min(QUERIES_PER_TILE, queries.shape[0]), CODES_PER_TILE)
    for t, codes in enumerate(tiles):
        matrix = _prepare(codebook[codes], shift, cosine)
        for rows in _slices(queries.shape[0], QUERIES_PER_TILE):
            torch.amax(_product(queries[rows], matrix, scores), dim=1, out=best[t, rows])
    # Of equal maxima, max() returns the first: ties go to the lowest tile here and to the lowest code below.
    # A NaN in a query makes every score NaN, an infinity makes every score infinite or NaN, and amax passes a NaN on: so the best
    # score tells whether the query was finite.
    top, winner = best.max(dim=0)
    order = winner.argsort()
    counts = torch.bincount(winner, minlength=len(tiles)).tolist()
    indices = torch.empty_like(winner)
    for codes, tile_rows in zip(tiles, order.split(counts), strict=True):
        if not len(tile_rows):
            continue
        matrix = _prepare(codebook[codes], shift, cosine)
        for part in tile_rows.split(QUERIES_PER_TILE):
            indices[part] = _product(queries[part], matrix, scores).max(dim=1).indices + codes.start
    return torch.where(top.isfinite(), indices, 0)


def _product(queries: Tensor, matrix: Tensor, buffer: Tensor) -> Tensor:
    """queries [n, D+1] @ matrix [D+1, k], written into the beginning of ``buffer``."""
    out = buffer.view(-1)[: len(queries) * matrix.shape[1]].view(len(queries), matrix.shape[1])
    return torch.mm(queries, matrix, out=out)


def _prepare(codes: Tensor, shift: Tensor, cosine: bool) -> Tensor:
    """Codes [k, D] -> matrix [D+1, k'] that gives scores when multiplied with queries that end with a one.

    k' is k rounded up to whole vector registers; what is added scores -inf. In narrower products the columns at the edge are rounded
    in another way than the rest, and of two equal codes the higher could win.
    """
    codes = codes.float() - shift
    if cosine:
        codes = torch.nn.functional.normalize(codes, dim=1, eps=torch.finfo(torch.float32).tiny)
        offset = codes.new_zeros(codes.shape[0], 1)
    else:
        offset = codes.square().sum(dim=1, keepdim=True).mul_(-0.5)
    padding = -codes.shape[0] % COLUMNS
    codes = torch.nn.functional.pad(codes, (0, 0, 0, padding))
    offset = torch.nn.functional.pad(offset, (0, 0, 0, padding), value=-torch.inf)
    return torch.cat([codes, offset], dim=1).t()


def _codes_per_tile(dim: int) -> int:
    """As many codes as a tile takes without its matrix outgrowing the largest temporary."""
    return max(1, min(CODES_PER_TILE, _BLOCK_FLOATS // dim))


def _mean(codebook: Tensor) -> Tensor:
    total = codebook.new_zeros(codebook.shape[1], dtype=torch.float32)
    for part in codebook.split(max(1, _BLOCK_FLOATS // codebook.shape[1])):
        total += part.float().sum(dim=0)
    return total / codebook.shape[0]


def _slices(total: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, total)) for start in range(0, total, step))
