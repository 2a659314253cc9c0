"""Checking a token store: every row for damage, and a sample of pictures by encoding them again."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch

from smalto.data.images import BadPicture
from smalto.data.lance_table import pyarrow
from smalto.data.pictures import to_unit_range, views_of
from smalto.data.sources import locate
from smalto.data.token_rows import TokenRow, checksums, row_layouts, split_id, token_arrays
from smalto.data.token_store import TokenStore
from smalto.data.transform import Transform
from smalto.errors import DataError, InputError
from smalto.progress import Progress

MOST_PROBLEMS = 1000


@dataclass
class Verification:
    """What ``verify`` found.

    Attributes:
        num_rows: rows that the store says it has; ``num_checked``: those that could be read.
        problems: what is wrong with the store, at most 1,000 lines; ``num_problems`` counts all.
        num_sampled: rows that were encoded again; ``not_found``: names of the sample that are not in the source any more, or cannot be
            read; ``changed``: those whose files are others than when they were tokenized.
        differing: (id, number of tokens that differ, position of the first) of pictures that gave other tokens.
    """

    num_rows: int
    num_checked: int = 0
    num_problems: int = 0
    problems: list[str] = field(default_factory=list)
    num_sampled: int = 0
    num_tokens_sampled: int = 0
    not_found: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    differing: list[tuple[str, int, int]] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Nothing is damaged, and every picture of the sample gave the same tokens again."""
        return not self.num_problems and not self.differing

    def add(self, problem: str) -> None:
        self.num_problems += 1
        if len(self.problems) < MOST_PROBLEMS:
            self.problems.append(problem)


def verify_store(
    store: TokenStore,
    sample: int = 0,
    *,
    tokenizer: Any = None,
    source: str | Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Verification:
    """Check every row's checksum, range and length, that ids are unique and found; then encode some pictures again.

    Args:
        sample: how many rows to encode again, drawn by ``seed``.
        tokenizer: the ImageTokenizer that wrote the store, where there is a sample.
        source: where the pictures are; None: where they were.

    Raises:
        InputError: a sample without its tokenizer, or of tokens that no Transform of smalto made.
    """
    progress = progress or Progress()
    found = Verification(len(store))
    _check_rows(store, found, progress)
    if sample and found.num_checked and found.num_checked == found.num_rows:  # else what cannot be read comes first
        _encode_again(store, sample, tokenizer, source or store.header.source, seed, found, progress)
    return found


def _check_rows(store: TokenStore, found: Verification, progress: Progress) -> None:
    progress.begin("checking", len(store), "rows")
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
    progress.end()
    if lost:
        again = f"remove {store.path / '_indices'} and run `smalto store compact {store.path}`"
        found.add(f"the index of ids is damaged: it does not find {lost[0]!r}. No row is lost; {again}")
    try:
        store.errors()
    except DataError as error:
        found.add(f"the table of bad pictures: {error}")
    every = numpy.concatenate(hashes) if hashes else numpy.zeros(0, numpy.uint64)
    if repeated := len(every) - len(numpy.unique(every)):
        found.add(f"{repeated} rows have an id that another row has too")


def _lost_by_the_index(store: TokenStore, ids: list[str]) -> list[str]:
    try:
        return store.lost_by_the_index(ids)
    except DataError:
        return ids


def _check_table(store: TokenStore, table: pyarrow.Table, found: Verification) -> numpy.ndarray:
    """Note what is wrong with these rows; returns a hash of each id."""
    ids = table["id"].to_pylist()
    try:
        layouts, tokens, sums = row_layouts(table, store.header), token_arrays(table), checksums(table)
    except (InputError, ValueError) as error:
        found.add(f"rows {ids[0]!r} to {ids[-1]!r} make no sense: {error}")
        return numpy.zeros(0, numpy.uint64)
    for id, layout, row, expected, stored in zip(ids, layouts, tokens, sums, table["crc"].to_pylist(), strict=True):
        if expected != stored:
            found.add(f"row {id!r} is damaged: its checksum does not fit")
        if len(row) != layout.num_tokens:
            found.add(f"row {id!r} has {len(row)} tokens; its layout {layout} has {layout.num_tokens}")
        elif int(row.max()) >= store.header.codebook_size:
            found.add(f"row {id!r} has the token {int(row.max())}; there are {store.header.codebook_size} codes")
    digests = b"".join(hashlib.blake2b(id.encode(), digest_size=8).digest() for id in ids)
    return numpy.frombuffer(digests, numpy.uint64)


@torch.no_grad()
def _encode_again(
    store: TokenStore, sample: int, tokenizer: Any, source: str | Path, seed: int, found: Verification, progress: Progress
) -> None:
    header = store.header
    if tokenizer is None:
        raise InputError("to encode a sample again, verify needs the tokenizer: verify(sample=16, tokenizer=smalto.load(folder)).")
    if not isinstance(header.transform, Transform):
        raise InputError(f"the pictures became tokens by {header.transform!r}, which smalto cannot repeat: verify without a sample.")
    if (fingerprint := tokenizer.fingerprint()) != header.fingerprint:
        raise InputError(f"this tokenizer is not the one that wrote {store.path}: {fingerprint[:12]}, not {header.fingerprint[:12]}.")
    chosen = numpy.sort(numpy.random.default_rng(seed).choice(len(store), min(sample, len(store)), replace=False))
    rows: dict[str, list[tuple[str, TokenRow]]] = {}  # picture: (view, row) of each of its rows
    for row in store.token_rows_at(chosen):
        name, view = split_id(row.id)
        rows.setdefault(name, []).append((view, row))
    runner = tokenizer.for_inference(header.precision)
    device = next(tokenizer.parameters()).device
    names = header.transform.view_names()
    progress.begin("encoding again", len(rows), "pictures")
    for file in locate(source, rows) if source else ():
        progress.advance()
        of_file = rows.pop(file.name)
        try:
            prepared = header.transform.prepare(file)
        except BadPicture:
            found.not_found.append(file.name)
            continue
        if any(row.digest not in (b"", prepared.digest) for _, row in of_file):
            found.changed.append(file.name)
            continue
        images = views_of(prepared.views, header.transform.flip)
        for view, row in of_file:
            again = runner.encode(to_unit_range(images[names.index(view)][None]).to(device)).cpu()[0].numpy()
            found.num_sampled += 1
            found.num_tokens_sampled += len(again)
            different = numpy.flatnonzero(again != row.tokens) if len(again) == len(row.tokens) else numpy.arange(len(row.tokens))
            if len(different):
                found.differing.append((row.id, len(different), int(different[0])))
    progress.end()
    found.not_found += sorted(rows)
