"""Exact nearest-code search in plain torch, in bounded memory: the reference for every other backend.

The nearest code maximizes the score ``z·c - |c|²/2``, so one matrix product per tile does the work. Taking a row's maximum
is two to three times faster than taking its position, so there are two passes: the first keeps only the best score of
each tile of codes, the second looks at the winning tile again to find the position in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from smalto.core.precision import plain_float32, without_autocast

CODES_PER_TILE = 256
COLUMNS = 16  # divides CODES_PER_TILE: float32 numbers in the widest vector register
QUERIES_PER_TILE = 2048
BUFFER_FLOATS = (
    2**22
)  # 16 MiB in float32: the largest single temporary; fewer than four of this size live at once
QUERIES_PER_CHUNK = 2**16
FEW_FLOATS = (
    2**20
)  # where queries, codes and scores are all this small, all is computed at once, in a few times 4 MiB


def search(queries: Tensor, codebook: Tensor, cosine: bool, exact: bool = False) -> Tensor:
    """``nearest_codes`` without the checks: float [N, D], float [K, D] -> int64 [N]."""
    indices = torch.empty(len(queries), dtype=torch.int64, device=queries.device)
    with without_autocast(queries.device), plain_float32():
        if (
            not exact
            and max(len(queries) * len(codebook), queries.numel(), codebook.numel()) <= FEW_FLOATS
        ):
            return _search_few(queries, codebook, cosine)
        codes = _Codes(codebook, cosine)
        chunk = max(
            1, min(QUERIES_PER_CHUNK, BUFFER_FLOATS // max(codes.num_tiles, queries.shape[1] + 1))
        )
        for rows in slices(len(queries), chunk):
            shifted = codes.with_ones(queries[rows], torch.float32)
            best = _best_of_each_tile(shifted, codes)
            if exact:
                indices[rows] = _position_exact(queries[rows], codes, best)
            else:
                indices[rows] = _position(shifted, codes, best)
    return indices


def _search_few(queries: Tensor, codebook: Tensor, cosine: bool) -> Tensor:
    """The plain way, for a small search: preparing tiles would take longer than the search itself."""
    (num_codes, dim) = codebook.shape
    shift = codebook.new_zeros(dim, dtype=torch.float32) if cosine else mean_code(codebook)
    codes = codebook.new_zeros(
        -(-num_codes // COLUMNS) * COLUMNS, dim, dtype=torch.float32
    )  # padded as tiles are
    codes[:num_codes] = unit(shifted(codebook, shift)) if cosine else shifted(codebook, shift)
    offsets = codes.new_zeros(len(codes)) if cosine else codes.square().sum(dim=1).mul_(-0.5)
    offsets[num_codes:] = -torch.inf
    best, indices = torch.addmm(offsets, shifted(queries, shift), codes.T).max(dim=1)
    return torch.where(best.isfinite(), indices, 0)


class _Group(NamedTuple):
    """Some tiles of codes, ready to be multiplied."""

    first_tile: int
    tiles: Tensor  # [T, D+1, codes per tile]; queries that end with a one give scores when multiplied with them


class _Codes:
    """A codebook in tiles, as many of them prepared at a time as fit one temporary."""

    def __init__(self, codebook: Tensor, cosine: bool) -> None:
        (num_codes, dim), self._codebook, self._cosine = codebook.shape, codebook, cosine
        # Shifting both sides by the codebook's mean leaves l2 distances alone and keeps the products small, so float32 loses less.
        self.shift = codebook.new_zeros(dim, dtype=torch.float32) if cosine else mean_code(codebook)
        # In products narrower than whole vector registers the columns at the edge are rounded in another way than the rest, and of two
        # equal codes the higher could win: so every tile is padded with codes that score -inf.
        largest = (
            CODES_PER_TILE if num_codes > 4 * CODES_PER_TILE else CODES_PER_TILE // 2
        )  # of few tiles, the second pass is a large part
        fitting = min(largest, BUFFER_FLOATS // (dim + 1), num_codes)
        self.per_tile = max(COLUMNS, -(-fitting // COLUMNS) * COLUMNS)
        self.num_tiles = -(-num_codes // self.per_tile)
        # All at once where that fits one temporary; otherwise in smaller groups, because two are there while the next one is made.
        fitting_tiles = BUFFER_FLOATS // (self.per_tile * (dim + 1))
        self._tiles_per_group = (
            self.num_tiles if self.num_tiles <= fitting_tiles else max(1, fitting_tiles // 4)
        )
        self._only: _Group | None = None

    def groups(self, dtype: torch.dtype = torch.float32) -> Iterator[_Group]:
        if dtype is torch.float32 and self.num_tiles == self._tiles_per_group:
            self._only = self._only or self._prepare(slice(0, self.num_tiles), dtype)
            yield self._only
        else:
            for tiles in slices(self.num_tiles, self._tiles_per_group):
                yield self._prepare(tiles, dtype)

    def _prepare(self, tiles: slice, dtype: torch.dtype) -> _Group:
        codes = shifted(
            self._codebook[tiles.start * self.per_tile : tiles.stop * self.per_tile],
            self.shift,
            dtype,
        )
        if self._cosine:
            codes = unit(codes)
        # One tile after the other, each with its codes in columns: products with rows in memory order are a little faster.
        out = codes.new_zeros(tiles.stop - tiles.start, codes.shape[1] + 1, self.per_tile)
        out[:, -1] = -torch.inf
        whole, rest = divmod(len(codes), self.per_tile)
        self._fill(out[:whole], codes[: whole * self.per_tile])
        if rest:
            self._fill(out[whole:, :, :rest], codes[whole * self.per_tile :])
        return _Group(tiles.start, out)

    def _fill(self, tiles: Tensor, codes: Tensor) -> None:
        """Put codes [T·k, D] and their offsets into tiles [T, D+1, k]."""
        number, _, size = tiles.shape
        tiles[:, :-1] = codes.view(number, size, codes.shape[1]).transpose(1, 2)
        for tile, part in zip(tiles, codes.split(size), strict=False):
            tile[-1] = 0 if self._cosine else part.square().sum(dim=1).mul_(-0.5)

    def with_ones(self, queries: Tensor, dtype: torch.dtype) -> Tensor:
        """Shifted queries [n, D+1] that end with a one.

        That column takes the offset of each code into the product: cheaper than adding it afterwards.
        """
        out = queries.new_ones(queries.shape[0], queries.shape[1] + 1, dtype=dtype)
        torch.sub(
            queries.to(torch.promote_types(queries.dtype, dtype)), self.shift, out=out[:, :-1]
        )
        return out

    def similarity(self, queries: Tensor, numbers: Tensor) -> Tensor:
        """Of pairs, in float64: minus the squared distance, or the product with the unit code. [n, D], [n] -> [n]."""
        chosen = self._codebook[numbers].double()
        if self._cosine:
            return (queries.double() * unit(chosen)).sum(dim=1)
        return (queries.double() - chosen).square().sum(dim=1).neg()

    def longest(self) -> float:
        """Length of the longest shifted code, for cosine 1."""
        if self._cosine:
            return 1.0
        parts = self._codebook.split(max(1, BUFFER_FLOATS // self._codebook.shape[1] // 2))
        return max(float((part.double() - self.shift).norm(dim=1).max()) for part in parts)


def _best_of_each_tile(queries: Tensor, codes: _Codes) -> Tensor:
    """First pass: the best score in every tile, [T, n]."""
    best = queries.new_empty(codes.num_tiles, len(queries))
    buffer = queries.new_empty(min(QUERIES_PER_TILE, len(queries)), codes.per_tile)
    for group in codes.groups():
        for t, tile in enumerate(group.tiles, start=group.first_tile):
            for rows in slices(len(queries), QUERIES_PER_TILE):
                part = queries[rows]
                torch.amax(torch.mm(part, tile, out=buffer[: len(part)]), dim=1, out=best[t, rows])
    return best


def _position(queries: Tensor, codes: _Codes, best: Tensor) -> Tensor:
    """Second pass: the position of the best score, from the one tile that holds it."""
    # Of equal maxima, max() returns the first: ties go to the lowest tile here and to the lowest code below.
    # A NaN in a query makes every score NaN, an infinity makes every score infinite or NaN, and amax passes a NaN on: so the best
    # score tells whether the query was finite.
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
            # Few queries to a tile: every query takes a copy of its tile along, which is less work than a call per tile.
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


_FEW = 32  # queries per tile


def _position_exact(queries: Tensor, codes: _Codes, best: Tensor) -> Tensor:
    """Second pass in float64, over every tile that float32 cannot rule out."""
    top = best.amax(dim=0)
    # Rounding of a product of D + 1 terms, in the worst case, on both of the scores that are compared.
    length = (queries.double() - codes.shift).norm(dim=1)
    reach = (length + codes.longest()) * codes.longest() * (queries.shape[1] + 8)
    indices = torch.zeros_like(top, dtype=torch.int64)
    found = torch.full_like(top, -torch.inf, dtype=torch.float64)
    for group in codes.groups(torch.float64):
        for t, tile in enumerate(group.tiles, start=group.first_tile):
            for part in (
                ((best[t] >= top - reach * 2.0**-23) & top.isfinite())
                .nonzero()
                .squeeze(1)
                .split(QUERIES_PER_TILE)
            ):
                scores = torch.mm(codes.with_ones(queries[part], torch.float64), tile)
                near = (
                    scores >= scores.amax(dim=1, keepdim=True) - reach[part].unsqueeze(1) * 2.0**-52
                )
                score, position = _nearest_of(near, queries[part], codes, t * codes.per_tile)
                better = score > found[part]
                indices[part] = torch.where(better, position, indices[part])
                found[part] = torch.where(better, score, found[part])
    return indices


def _nearest_of(near: Tensor, queries: Tensor, codes: _Codes, first: int) -> tuple[Tensor, Tensor]:
    """Of the codes that are ``near`` [n, k] each query, numbered from ``first``: the similarity of the nearest, and its number.

    A product may round the columns at its edges in another way than the rest: equal codes would get different scores. Here each pair is
    computed by itself, so that equal codes are equally near, and the lowest is taken.
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
    """The mean of all codes, float32 [D]."""
    total = codebook.new_zeros(codebook.shape[1], dtype=torch.float32)
    for part in codebook.split(max(1, BUFFER_FLOATS // codebook.shape[1])):
        total += part.float().sum(dim=0)
    return total / codebook.shape[0]


def shifted(vectors: Tensor, shift: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Vectors [n, D] less ``shift`` [D], subtracted before anything is rounded to ``dtype``."""
    return (vectors.to(torch.promote_types(vectors.dtype, dtype)) - shift).to(dtype)


def unit(vectors: Tensor) -> Tensor:
    """Vectors [n, D] at length 1; zero stays zero."""
    tiny = torch.finfo(vectors.dtype).tiny
    vectors = vectors / vectors.abs().amax(dim=1, keepdim=True).clamp(
        min=tiny
    )  # so that squares neither overflow nor vanish
    return torch.nn.functional.normalize(vectors, dim=1, eps=tiny)


def slices(total: int, step: int) -> Iterator[slice]:
    """[0, total) in slices of ``step``; the last may be shorter."""
    return (slice(start, min(start + step, total)) for start in range(0, total, step))
