"""Several token stores, read as one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import numpy

from smalto.core.errors import DataError, InputError
from smalto.store.schema import StoreHeader
from smalto.store.token_store import TokensAndLabels, TokenStore, is_store

_SAME = ("fingerprint", "codebook_size", "grids", "transform", "precision")


class JoinedStores:
    """Rows of token stores of one kind, one store after the other, for reading.

    Attributes:
        stores: at least one.
        header: of the first.
    """

    def __init__(self, stores: Sequence[TokenStore]) -> None:
        self.stores = list(stores)
        self.header: StoreHeader = self.stores[0].header
        self._starts = numpy.cumsum([0, *map(len, self.stores)])

    @classmethod
    def open(cls, path: str | Path | Sequence[str | Path]) -> Self:
        """Open a store, a folder of stores, or a list of these.

        Raises:
            DataError: there is none, or one is damaged.
            InputError: they hold tokens of different kinds.
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
        return cls(stores)

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
        """Load the newest version of each store; their numbers of rows must not shrink."""
        for store in self.stores:
            store.refresh()

    def classes(self) -> list[str]:
        """Return all labels that occur, sorted."""
        return sorted({label for store in self.stores for label in store.classes()})

    def ids(self) -> Iterator[str]:
        """Yield the ids of all rows, in order."""
        for store, start, stop in zip(self.stores, self._starts, self._starts[1:], strict=False):
            for number, id in enumerate(store.iterate_ids()):
                if number == stop - start:  # rows that were added since
                    break
                yield id

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
