"""Check of every row of a token store for damage."""

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
    """Check the checksum, range and length of every row, that ids are unique, and the id index.

    Args:
        store: the token store.
        progress: receives the number of rows checked.
    """
    found = StoreCheck(len(store))
    progress = progress or Progress()
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
        found.add(
            f"the index of ids is damaged: it does not find {lost[0]!r}. No row is lost; "
            f"remove {store.path / '_indices'} and run `smalto store compact {store.path}`"
        )
    try:
        store.errors()
    except DataError as error:
        found.add(f"the table of bad images: {error}")
    every = numpy.concatenate(hashes) if hashes else numpy.zeros(0, numpy.uint64)
    if repeated := len(every) - len(numpy.unique(every)):
        found.add(f"{repeated} rows have the id of another row")
    return found


def _lost_by_the_index(store: TokenStore, ids: list[str]) -> list[str]:
    try:
        return store.lost_by_the_index(ids)
    except DataError:
        return ids


def _check_table(store: TokenStore, table: pyarrow.Table, found: StoreCheck) -> numpy.ndarray:
    """Record the problems of these rows, and return a 64-bit hash of each id."""
    ids = table["id"].to_pylist()
    try:
        layouts = row_layouts(table, store.header)
        tokens = token_arrays(table)
        sums = checksums(table)
    except (InputError, ValueError) as error:
        found.add(f"rows {ids[0]!r} to {ids[-1]!r} are invalid: {error}")
        return numpy.zeros(0, numpy.uint64)
    for id, layout, row, expected, stored in zip(
        ids, layouts, tokens, sums, table["crc"].to_pylist(), strict=True
    ):
        if expected != stored:
            found.add(f"row {id!r} is damaged: its content does not match its checksum")
        if len(row) != layout.num_tokens:
            found.add(
                f"row {id!r}: got {len(row)} tokens; expected {layout.num_tokens} for its layout "
                f"{layout}"
            )
        elif int(row.max()) >= store.header.codebook_size:
            found.add(
                f"row {id!r}: got the token {int(row.max())}; expected values in "
                f"[0, {store.header.codebook_size})"
            )
    digests = b"".join(hashlib.blake2b(id.encode(), digest_size=8).digest() for id in ids)
    return numpy.frombuffer(digests, numpy.uint64)
