"""Several token stores, read as one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import numpy

from smalto.core.errors import DataError, InputError
from smalto.store.schema import StoreHeader
from smalto.store.token_store import TokensAndLabels, TokenStore, is_store

ROWS_AT_ONCE = 2**16
_SAME = ("fingerprint", "codebook_size", "grids", "transform", "precision")


class JoinedStores:
    """Rows of token stores of one kind, one store after the other, for reading.

    Args:
        stores: at least one.
        lengths: how many rows of each to read, the first ones; None: all that it has now. Rows
            that are added later change no index.

    Attributes:
        stores: as given.
        lengths: rows of each store.
        header: of the first store.

    Raises:
        InputError: a store has fewer rows.
    """

    def __init__(self, stores: Sequence[TokenStore], lengths: Sequence[int] | None = None) -> None:
        self.stores = list(stores)
        self.lengths = list(map(len, self.stores)) if lengths is None else list(lengths)
        self._check_lengths()
        self.header: StoreHeader = self.stores[0].header
        self._starts = numpy.cumsum([0, *self.lengths])

    @classmethod
    def open(
        cls, path: str | Path | Sequence[str | Path], lengths: Sequence[int] | None = None
    ) -> Self:
        """Open a store, a folder of stores, or a list of these.

        Raises:
            DataError: a store does not exist, or is damaged.
            InputError: they hold tokens of different kinds, or too few rows.
        """
        paths = [path] if isinstance(path, (str, Path)) else path
        found = [store for given in paths for store in find_stores(given)]
        if not found:
            raise InputError("got an empty list of token stores; expected at least one.")
        stores = [TokenStore.open(store) for store in found]
        for store in stores[1:]:
            for name in _SAME:
                first, other = getattr(stores[0].header, name), getattr(store.header, name)
                if first != other:
                    raise InputError(
                        f"got {found[0]} with {name} {first} and {store.path} with {other}; "
                        "expected stores of one kind. Leave one of them out, or tokenize its "
                        "images like the others."
                    )
        if lengths is not None and len(lengths) != len(stores):
            raise InputError(
                f"got {len(stores)} token stores; expected {len(lengths)}, as before. Name the "
                "same stores."
            )
        return cls(stores, lengths)

    @property
    def paths(self) -> list[Path]:
        """Return the folders of the stores."""
        return [store.path for store in self.stores]

    def __len__(self) -> int:
        """Return the number of rows."""
        return int(self._starts[-1])

    def __str__(self) -> str:
        names = ", ".join(map(str, self.paths[:3]))
        return names if len(self.paths) <= 3 else f"{names} and {len(self.paths) - 3} more"

    @property
    def num_replacements(self) -> int:
        """Return how many commits have replaced rows, which may change the order of rows."""
        return sum(store.num_replacements for store in self.stores)

    @property
    def versions(self) -> list[int]:
        """Return the version of each store."""
        return [store.version for store in self.stores]

    def refresh(self) -> None:
        """Load the newest version of each store."""
        for store in self.stores:
            store.refresh()
        self._check_lengths()

    def _check_lengths(self) -> None:
        for store, length in zip(self.stores, self.lengths, strict=True):
            if len(store) < length:
                raise InputError(
                    f"{store.path}: got {len(store):,} rows; expected at least {length:,}, the "
                    "number when it was first read. Restore them, or start again without them."
                )

    def classes(self) -> list[str]:
        """Return all labels that occur, sorted."""
        found: set[str] = set()
        for store, length in zip(self.stores, self.lengths, strict=True):
            if length == len(store):
                found.update(store.classes())
            else:
                starts = range(0, length, ROWS_AT_ONCE)
                found.update(*(store.labels(i, min(i + ROWS_AT_ONCE, length)) for i in starts))
        return sorted(found - {""})

    def ids(self) -> Iterator[str]:
        """Yield the ids of all rows, in order."""
        for number in range(len(self.stores)):
            yield from self.ids_of(number)

    def ids_of(self, number: int) -> Iterator[str]:
        """Yield the ids of the rows of one store, in order."""
        return itertools.islice(self.stores[number].iterate_ids(), self.lengths[number])

    def tokens(self, start: int, stop: int, classes: Sequence[str]) -> TokensAndLabels:
        """Return the rows [start, stop) for training, like ``TokenStore.tokens``."""
        parts = []
        for store, first, last in zip(self.stores, self._starts, self._starts[1:], strict=False):
            low, high = max(start, int(first)), min(stop, int(last))
            if low < high:
                parts.append(store.tokens(low - int(first), high - int(first), classes))
        return _join(parts) if parts else self.stores[0].tokens(0, 0, classes)

    def tokens_at(self, indices: numpy.ndarray, classes: Sequence[str]) -> TokensAndLabels:
        """Return rows by index in any order, like ``TokenStore.tokens_at``."""
        owners = numpy.searchsorted(self._starts, indices, side="right") - 1
        places, parts = [], []
        for owner in numpy.unique(owners).tolist():
            mine = numpy.flatnonzero(owners == owner)
            places.append(mine)
            rows = indices[mine] - self._starts[owner]
            parts.append(self.stores[owner].tokens_at(rows, classes))
        if len(parts) == 1:
            return parts[0]
        tokens, labels = _join(parts) if parts else self.stores[0].tokens(0, 0, classes)
        order = numpy.argsort(numpy.concatenate(places)) if places else numpy.zeros(0, numpy.int64)
        return tokens[order], labels[order]


def find_stores(path: str | Path) -> list[Path]:
    """Return the token stores at a path: itself, or the stores directly in a folder, sorted.

    Raises:
        DataError: there is none.
    """
    path = Path(path)
    if is_store(path) or not path.is_dir():
        return [path]  # ``TokenStore.open`` reports what is wrong
    found = sorted(child for child in path.iterdir() if is_store(child))
    if not found:
        raise DataError(
            f"{path} is not a token store and has none in it; expected a folder created by "
            "`smalto tokenize`, or a folder of such folders. Name one."
        )
    return found


def _join(parts: list[TokensAndLabels]) -> TokensAndLabels:
    tokens, labels = zip(*parts, strict=True)
    return numpy.concatenate(tokens), numpy.concatenate(labels)
