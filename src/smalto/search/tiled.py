"""Exact nearest-code search in plain torch, in bounded memory: the reference for all backends.

The nearest code maximizes the score ``z·c - |c|²/2``, so the search is one matrix product per tile.
The maximum of a row is two to three times faster than its argmax, so there are two passes. The
first keeps only the best score of each tile of codes. The second computes the best tile again to
find the position in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from smalto.core.precision import plain_float32, without_autocast

CODES_PER_TILE = 256
COLUMNS = 16  # divides CODES_PER_TILE: float32 values in the widest vector register
QUERIES_PER_TILE = 2048
# The largest single temporary, 16 MiB in float32. Fewer than four of this size exist at once.
BUFFER_FLOATS = 2**22
QUERIES_PER_CHUNK = 2**16
# If queries, codes and scores are each at most this large, one product computes all scores, in a
# few times 4 MiB.
FEW_FLOATS = 2**20
_FEW = 32  # queries per tile


def search(queries: Tensor, codebook: Tensor, cosine: bool, exact: bool = False) -> Tensor:
    """Return ``nearest_codes`` without the checks: float [N, D], float [K, D] -> int64 [N]."""
    indices = torch.empty(len(queries), dtype=torch.int64, device=queries.device)
    with without_autocast(queries.device), plain_float32():
        largest = max(len(queries) * len(codebook), queries.numel(), codebook.numel())
        if not exact and largest <= FEW_FLOATS:
            return _search_few(queries, codebook, cosine)
        codes = _Codes(codebook, cosine)
        fitting = BUFFER_FLOATS // max(codes.num_tiles, queries.shape[1] + 1)
        chunk = max(1, min(QUERIES_PER_CHUNK, fitting))
        for rows in slices(len(queries), chunk):
            shifted = codes.with_ones(queries[rows], torch.float32)
            best = _best_of_each_tile(shifted, codes)
            if exact:
                indices[rows] = _position_exact(queries[rows], codes, best)
            else:
                indices[rows] = _position(shifted, codes, best)
    return indices


def _search_few(queries: Tensor, codebook: Tensor, cosine: bool) -> Tensor:
    """Search with one product, for a small search.

    Preparing tiles would take longer than the search itself.
    """
    (num_codes, dim) = codebook.shape
    shift = codebook.new_zeros(dim, dtype=torch.float32) if cosine else mean_code(codebook)
    padded = -(-num_codes // COLUMNS) * COLUMNS  # as tiles are
    codes = codebook.new_zeros(padded, dim, dtype=torch.float32)
    codes[:num_codes] = unit(shifted(codebook, shift)) if cosine else shifted(codebook, shift)
    offsets = codes.new_zeros(len(codes)) if cosine else codes.square().sum(dim=1).mul_(-0.5)
    offsets[num_codes:] = -torch.inf
    best, indices = torch.addmm(offsets, shifted(queries, shift), codes.T).max(dim=1)
    return torch.where(best.isfinite(), indices, 0)


class _Group(NamedTuple):
    """Consecutive tiles of codes, ready for matrix products.

    Attributes:
        first_tile: index of the first tile.
        tiles: [T, D+1, codes per tile]; their product with queries that end with a one is the
            scores.
    """

    first_tile: int
    tiles: Tensor


class _Codes:
    """Codebook in tiles, of which as many are prepared at a time as fit one temporary.

    Attributes:
        shift: float32 [D], subtracted from queries and codes.
        per_tile: codes per tile.
        num_tiles: number of tiles.
    """

    def __init__(self, codebook: Tensor, cosine: bool) -> None:
        (num_codes, dim) = codebook.shape
        self._codebook = codebook
        self._cosine = cosine
        # Subtracting the codebook's mean from both sides does not change l2 distances. It keeps the
        # products small, so float32 loses less precision.
        self.shift = codebook.new_zeros(dim, dtype=torch.float32) if cosine else mean_code(codebook)
        # With few tiles the second pass is a large share of the work, so the tiles are smaller.
        largest = CODES_PER_TILE if num_codes > 4 * CODES_PER_TILE else CODES_PER_TILE // 2
        fitting = min(largest, BUFFER_FLOATS // (dim + 1), num_codes)
        # If a product does not fill whole vector registers, its last columns are rounded
        # differently, so the higher one of two equal codes could win. Therefore every tile is
        # padded with codes of score -inf.
        self.per_tile = max(COLUMNS, -(-fitting // COLUMNS) * COLUMNS)
        self.num_tiles = -(-num_codes // self.per_tile)
        # All tiles at once if they fit one temporary. Otherwise smaller groups, because two groups
        # exist while the next one is prepared.
        fitting_tiles = BUFFER_FLOATS // (self.per_tile * (dim + 1))
        self._tiles_per_group = (
            self.num_tiles if self.num_tiles <= fitting_tiles else max(1, fitting_tiles // 4)
        )
        self._only: _Group | None = None

    def groups(self, dtype: torch.dtype = torch.float32) -> Iterator[_Group]:
        """Yield all tiles in groups, with values of ``dtype``."""
        if dtype is torch.float32 and self.num_tiles == self._tiles_per_group:
            self._only = self._only or self._prepare(slice(0, self.num_tiles), dtype)
            yield self._only
        else:
            for tiles in slices(self.num_tiles, self._tiles_per_group):
                yield self._prepare(tiles, dtype)

    def _prepare(self, tiles: slice, dtype: torch.dtype) -> _Group:
        part = self._codebook[tiles.start * self.per_tile : tiles.stop * self.per_tile]
        codes = shifted(part, self.shift, dtype)
        if self._cosine:
            codes = unit(codes)
        # Each tile is contiguous, with its codes in columns: products with rows in memory order are
        # slightly faster.
        out = codes.new_zeros(tiles.stop - tiles.start, codes.shape[1] + 1, self.per_tile)
        out[:, -1] = -torch.inf
        whole, rest = divmod(len(codes), self.per_tile)
        self._fill(out[:whole], codes[: whole * self.per_tile])
        if rest:
            self._fill(out[whole:, :, :rest], codes[whole * self.per_tile :])
        return _Group(tiles.start, out)

    def _fill(self, tiles: Tensor, codes: Tensor) -> None:
        """Write codes [T·k, D] and their offsets into tiles [T, D+1, k]."""
        number, _, size = tiles.shape
        tiles[:, :-1] = codes.view(number, size, codes.shape[1]).transpose(1, 2)
        for tile, part in zip(tiles, codes.split(size), strict=False):
            tile[-1] = 0 if self._cosine else part.square().sum(dim=1).mul_(-0.5)

    def with_ones(self, queries: Tensor, dtype: torch.dtype) -> Tensor:
        """Return shifted queries with a last column of ones, [n, D+1].

        That column includes the offset of each code in the product, which is cheaper than a
        separate addition.
        """
        out = queries.new_ones(queries.shape[0], queries.shape[1] + 1, dtype=dtype)
        wide = queries.to(torch.promote_types(queries.dtype, dtype))
        torch.sub(wide, self.shift, out=out[:, :-1])
        return out

    def similarity(self, queries: Tensor, numbers: Tensor) -> Tensor:
        """Queries [n, D], code indices [n] -> similarity of each pair, float64 [n].

        It is minus the squared distance, for cosine the product with the unit code.
        """
        chosen = self._codebook[numbers].double()
        if self._cosine:
            return (queries.double() * unit(chosen)).sum(dim=1)
        return (queries.double() - chosen).square().sum(dim=1).neg()

    def longest(self) -> float:
        """Return the length of the longest shifted code, for cosine 1."""
        if self._cosine:
            return 1.0
        parts = self._codebook.split(max(1, BUFFER_FLOATS // self._codebook.shape[1] // 2))
        return max(float((part.double() - self.shift).norm(dim=1).max()) for part in parts)


def _best_of_each_tile(queries: Tensor, codes: _Codes) -> Tensor:
    """Return the best score in every tile, [T, n]: the first pass."""
    best = queries.new_empty(codes.num_tiles, len(queries))
    buffer = queries.new_empty(min(QUERIES_PER_TILE, len(queries)), codes.per_tile)
    for group in codes.groups():
        for t, tile in enumerate(group.tiles, start=group.first_tile):
            for rows in slices(len(queries), QUERIES_PER_TILE):
                part = queries[rows]
                torch.amax(torch.mm(part, tile, out=buffer[: len(part)]), dim=1, out=best[t, rows])
    return best


def _position(queries: Tensor, codes: _Codes, best: Tensor) -> Tensor:
    """Return the index of the code with the best score, int64 [n]: the second pass.

    It searches only the tile that holds the best score.
    """
    # max() returns the first of equal maxima: ties go to the lowest tile here and to the lowest
    # code below. A NaN in a query makes every score NaN, an infinity makes every score infinite or
    # NaN, and amax propagates NaN. So the best score is finite exactly if the query was.
    top, winner = best.max(dim=0)
    order = winner.argsort()
    counts = torch.bincount(winner, minlength=codes.num_tiles).tolist()
    positions = torch.empty_like(winner)
    buffer = queries.new_empty(min(QUERIES_PER_TILE, len(queries)), codes.per_tile)
    begin = 0
    for group in codes.groups():
        sizes = counts[group.first_tile : group.first_tile + len(group.tiles)]
        rows = order[begin : begin + sum(sizes)]
        begin += len(rows)
        if len(rows) < _FEW * len(group.tiles):
            # Few queries per tile: a batched product with a copy of the tile for every query is
            # less work than a call per tile.
            for part in rows.split(max(1, BUFFER_FLOATS // 4 // group.tiles[0].numel())):
                scores = torch.bmm(
                    queries[part].unsqueeze(1), group.tiles[winner[part] - group.first_tile]
                ).squeeze(1)
                positions[part] = scores.max(dim=1).indices
        else:
            found = [
                torch.mm(part, tile, out=buffer[: len(part)]).max(dim=1).indices
                for tile, tile_queries in zip(
                    group.tiles, queries.index_select(0, rows).split(sizes), strict=True
                )
                for part in tile_queries.split(QUERIES_PER_TILE)
            ]
            positions.index_copy_(0, rows, torch.cat(found))
    return torch.where(top.isfinite(), winner * codes.per_tile + positions, 0)


def _position_exact(queries: Tensor, codes: _Codes, best: Tensor) -> Tensor:
    """Return the index of the nearest code, int64 [n]: the second pass in float64.

    It searches every tile that float32 cannot exclude.
    """
    top = best.amax(dim=0)
    # Worst-case rounding error of a product of D + 1 terms, in both of the compared scores.
    length = (queries.double() - codes.shift).norm(dim=1)
    reach = (length + codes.longest()) * codes.longest() * (queries.shape[1] + 8)
    indices = torch.zeros_like(top, dtype=torch.int64)
    found = torch.full_like(top, -torch.inf, dtype=torch.float64)
    for group in codes.groups(torch.float64):
        for t, tile in enumerate(group.tiles, start=group.first_tile):
            candidates = (best[t] >= top - reach * 2.0**-23) & top.isfinite()
            for part in candidates.nonzero().squeeze(1).split(QUERIES_PER_TILE):
                scores = torch.mm(codes.with_ones(queries[part], torch.float64), tile)
                margin = reach[part].unsqueeze(1) * 2.0**-52
                near = scores >= scores.amax(dim=1, keepdim=True) - margin
                score, position = _nearest_of(near, queries[part], codes, t * codes.per_tile)
                better = score > found[part]
                indices[part] = torch.where(better, position, indices[part])
                found[part] = torch.where(better, score, found[part])
    return indices


def _nearest_of(near: Tensor, queries: Tensor, codes: _Codes, first: int) -> tuple[Tensor, Tensor]:
    """Return the similarity and the index of the nearest code of each query, [n] and int64 [n].

    Candidates are the codes that are ``near`` (bool [n, k]); their indices start at ``first``. A
    matrix product may round its last columns differently, so equal codes could get different
    scores. Here each pair is computed separately, so that equal codes tie and the lowest index
    wins.
    """
    row, number = near.nonzero().unbind(1)
    number = number + first
    pairs = max(1, BUFFER_FLOATS // 4 // queries.shape[1])
    similar = torch.cat(
        [
            codes.similarity(queries[r], n)
            for r, n in zip(row.split(pairs), number.split(pairs), strict=True)
        ]
    )
    best = similar.new_full((len(near),), -torch.inf).scatter_reduce(0, row, similar, "amax")
    ties = similar == best[row]
    lowest = number.new_full((len(near),), first + near.shape[1]).scatter_reduce(
        0, row[ties], number[ties], "amin"
    )
    return best, lowest


def mean_code(codebook: Tensor) -> Tensor:
    """Return the mean of all codes, float32 [D]."""
    total = codebook.new_zeros(codebook.shape[1], dtype=torch.float32)
    for part in codebook.split(max(1, BUFFER_FLOATS // codebook.shape[1])):
        total += part.float().sum(dim=0)
    return total / codebook.shape[0]


def shifted(vectors: Tensor, shift: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return vectors [n, D] minus ``shift`` [D], subtracted before rounding to ``dtype``."""
    return (vectors.to(torch.promote_types(vectors.dtype, dtype)) - shift).to(dtype)


def unit(vectors: Tensor) -> Tensor:
    """Return vectors [n, D] scaled to length 1; zero stays zero."""
    tiny = torch.finfo(vectors.dtype).tiny
    # Divided by the largest value first, so that squares neither overflow nor underflow.
    vectors = vectors / vectors.abs().amax(dim=1, keepdim=True).clamp(min=tiny)
    return torch.nn.functional.normalize(vectors, dim=1, eps=tiny)


def slices(total: int, step: int) -> Iterator[slice]:
    """Return slices of length ``step`` that cover [0, total); the last may be shorter."""
    return (slice(start, min(start + step, total)) for start in range(0, total, step))
