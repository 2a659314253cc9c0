"""Checking every row of a token store for damage."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy
import pyarrow

from smalto.core.errors import DataError, InputError
from smalto.core.progress import Progress
from smalto.store.schema import checksums, row_layouts, token_arrays
from smalto.store.token_store import TokenStore

MAX_PROBLEMS = 1000


@dataclass
class StoreCheck:
    """What a check of every row found.

    Attributes:
        num_rows: rows that the store says it has; ``num_checked``: those that could be read.
        problems: what is damaged, at most 1,000 lines; ``num_problems`` counts all.
    """

    num_rows: int
    num_checked: int = 0
    num_problems: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is damaged."""
        return not self.num_problems

    def add(self, problem: str) -> None:
        """Record a problem."""
        self.num_problems += 1
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(problem)


def check_store(store: TokenStore, progress: Progress | None = None) -> StoreCheck:
    """Check every row's checksum, range and length, and that ids are unique and found."""
    found, progress = StoreCheck(len(store)), progress or Progress()
    progress.start("checking", len(store), "rows")
    hashes: list[numpy.ndarray] = []
    lost: list[str] = []
    for table in store.tables():
        if isinstance(table, DataError):
            found.add(str(table))
            continue
        hashes.append(_check_table(store, table, found))
        lost = lost or _lost_by_the_index(store, table["id"].to_pylist())
        found.num_checked += table.num_rows
        progress.advance(table.num_rows)
    progress.finish()
    if lost:
        again = f"remove {store.path / '_indices'} and run `smalto store compact {store.path}`"
        found.add(
            f"the index of ids is damaged: it does not find {lost[0]!r}. No row is lost; {again}"
        )
    try:
        store.errors()
    except DataError as error:
        found.add(f"the table of bad images: {error}")
    every = numpy.concatenate(hashes) if hashes else numpy.zeros(0, numpy.uint64)
    if repeated := len(every) - len(numpy.unique(every)):
        found.add(f"{repeated} rows have an id that another row has too")
    return found


def _lost_by_the_index(store: TokenStore, ids: list[str]) -> list[str]:
    try:
        return store.lost_by_the_index(ids)
    except DataError:
        return ids


def _check_table(store: TokenStore, table: pyarrow.Table, found: StoreCheck) -> numpy.ndarray:
    """Note what is wrong with these rows; returns a hash of each id."""
    ids = table["id"].to_pylist()
    try:
        layouts, tokens, sums = (
            row_layouts(table, store.header),
            token_arrays(table),
            checksums(table),
        )
    except (InputError, ValueError) as error:
        found.add(f"rows {ids[0]!r} to {ids[-1]!r} make no sense: {error}")
        return numpy.zeros(0, numpy.uint64)
    for id, layout, row, expected, stored in zip(
        ids, layouts, tokens, sums, table["crc"].to_pylist(), strict=True
    ):
        if expected != stored:
            found.add(f"row {id!r} is damaged: its checksum does not fit")
        if len(row) != layout.num_tokens:
            found.add(
                f"row {id!r} has {len(row)} tokens; its layout {layout} has {layout.num_tokens}"
            )
        elif int(row.max()) >= store.header.codebook_size:
            found.add(
                f"row {id!r} has the token {int(row.max())}; there are {store.header.codebook_size} codes"
            )
    digests = b"".join(hashlib.blake2b(id.encode(), digest_size=8).digest() for id in ids)
    return numpy.frombuffer(digests, numpy.uint64)
