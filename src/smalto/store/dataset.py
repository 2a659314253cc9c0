"""Training data set over a token store.

It is shuffled, sharded over processes and workers, and resumes exactly after an interruption.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from smalto.core import distributed
from smalto.core.errors import ConfigError, InputError
from smalto.store.joined_stores import JoinedStores
from smalto.store.lance_table import MissingFile
from smalto.store.token_store import TokensAndLabels

Shuffle = Literal["chunks", "rows", "none"]
DENSE = 0.25  # share of chosen rows from which a span is read whole
_DECIDE_THE_ORDER = (
    "num_rows",
    "num_replacements",
    "world_size",
    "seed",
    "batch_size",
    "shuffle",
    "chunk_rows",
    "chunks_mixed",
    "drop_last",
)


class TokenDataset(IterableDataset[dict[str, Any]]):
    """Iterable data set of the batches of one epoch of a token store, or of several.

    A batch is a dict:

    - ``tokens``: int64 [B, L], or a list of [L_i] if images keep their shape;
    - ``label``: int64 [B], the index of the label in ``classes``, -1 for none;
    - ``idx_Bl``, only with ``model``: list of the token blocks, int64 [B, l] per scale;
    - ``var_input``, only with ``model``: the result of ``model.idxBl_to_var_input``, which is the
      input of a next-scale model.

    The batches of an epoch depend only on the store, the arguments below, the epoch and the number
    of processes. DataLoader workers yield batches in turn, so any number of them gives the same
    batches in the same order. They need ``batch_size=None`` and must be spawned, because Lance does
    not support forks.

    Every process gets the same number of rows. With n rows on p processes, n % p rows are left out.
    With ``"rows"`` these are different rows in every epoch, otherwise rows at the end of a chunk.

    Args:
        path: the token store, a folder of stores, or a list of these: stores of the same kind are
            read one after the other.
        batch_size: rows per batch of one process.
        shuffle: ``"chunks"``: chunks of ``chunk_rows`` rows in random order, with the rows of
            ``chunks_mixed`` chunks mixed at a time. It reads whole chunks, which is fast.
            ``"rows"``: all rows in random order. It is several times slower, and needs 8 bytes of
            memory per row. ``"none"``: as stored.
        seed: random seed of the order, together with ``epoch``.
        chunk_rows: rows per chunk.
        chunks_mixed: chunks that are shuffled together.
        drop_last: leave out a last batch that is not full.
        model: any object with ``idxBl_to_var_input``; it must be picklable if there are workers.
        rows: indices of the rows to use, int64, increasing; None: all rows.
        lengths: how many rows of each store to read, the first ones; None: all that it has now.
        rank, world_size: index of this process and number of processes. Default: those of
            torch.distributed.

    Attributes:
        epoch: number of the epoch, from 0.
        first_batch: index of the first batch to yield.
        num_rows: rows that are used.
        num_replacements: commits that had replaced rows by then.
        classes: names of the labels, sorted.

    Raises:
        ConfigError: an argument is out of range.
        InputError: there is a ``model``, and images keep their shape.
    """

    def __init__(
        self,
        path: str | Path | Sequence[str | Path],
        batch_size: int,
        *,
        shuffle: Shuffle = "chunks",
        seed: int = 0,
        chunk_rows: int = 4096,
        chunks_mixed: int = 8,
        drop_last: bool = False,
        model: Any = None,
        rows: numpy.ndarray | None = None,
        lengths: Sequence[int] | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        if batch_size < 1 or chunk_rows < 1 or chunks_mixed < 1:
            raise ConfigError(
                f"got batch_size {batch_size}, chunk_rows {chunk_rows} and chunks_mixed "
                f"{chunks_mixed}; expected at least 1. Set each of them to 1 or more."
            )
        if shuffle not in ("chunks", "rows", "none"):
            raise ConfigError(
                f'got shuffle={shuffle!r}; expected "chunks", "rows" or "none". Use "chunks".'
            )
        store = JoinedStores.open(path, lengths)
        if rows is not None and (
            rows.ndim != 1
            or rows.dtype.kind not in "iu"
            or (len(rows) and (rows[0] < 0 or rows[-1] >= len(store)))
            or (numpy.diff(rows) <= 0).any()
        ):
            raise ConfigError(
                f"got rows {rows.dtype} {list(rows.shape)}; expected increasing indices from 0 to "
                f"{len(store) - 1}. Use numpy.unique(rows)."
            )
        if model is not None and store.header.layout is None:
            raise InputError(
                f"got {store}, whose images keep their shapes, and a model; expected images of one "
                "shape, whose token blocks can be stacked. Tokenize with --size."
            )
        self.paths = store.paths
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.chunk_rows = chunk_rows
        self.chunks_mixed = chunks_mixed
        self.drop_last = drop_last
        self.model = model
        self.rank = distributed.rank() if rank is None else rank
        self.world_size = distributed.world_size() if world_size is None else world_size
        self.epoch = 0
        self.first_batch = 0
        self.rows = rows
        self.num_rows = len(store) if rows is None else len(rows)
        self.lengths = store.lengths
        self.num_replacements = store.num_replacements
        self.classes = store.classes()
        self._store: JoinedStores | None = store
        self._process = os.getpid()

    def __len__(self) -> int:
        """Return the number of batches per epoch of one process."""
        own = self.num_rows // self.world_size
        return own // self.batch_size if self.drop_last else -(-own // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        worker_id, num_workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        mine = range(self.first_batch + worker_id, len(self), num_workers)
        read = self._by_rows if self.shuffle == "rows" else self._by_chunks
        for rows in read(mine):
            yield self._batch(rows)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_store": None}  # each worker opens the store itself

    def _opened(self) -> JoinedStores:
        if self._store is None:
            self._store = JoinedStores.open(self.paths, self.lengths)
            self._process = os.getpid()
            self._check_order(self._store)
        if self._process != os.getpid():
            raise InputError(
                "got a process that was forked from the one that opened the store, in which Lance "
                "would hang; expected a spawned one. Use smalto.TokenLoader(dataset, workers=2) "
                "or DataLoader(dataset, batch_size=None, num_workers=2, "
                'multiprocessing_context="spawn").'
            )
        return self._store

    def _read(self, low: int, high: int) -> TokensAndLabels:
        """Return the used rows [low, high)."""
        if self.rows is None:
            return self._retry(JoinedStores.tokens, low, high)
        chosen = self.rows[low:high]
        first, last = int(chosen[0]), int(chosen[-1])
        if len(chosen) < DENSE * (last + 1 - first):
            return self._retry(JoinedStores.tokens_at, chosen)
        tokens, labels = self._retry(JoinedStores.tokens, first, last + 1)
        return tokens[chosen - first], labels[chosen - first]

    def _read_at(self, indices: numpy.ndarray) -> TokensAndLabels:
        """Return the used rows of these numbers, in any order."""
        return self._retry(
            JoinedStores.tokens_at, indices if self.rows is None else self.rows[indices]
        )

    def _retry(self, read: Callable[..., TokensAndLabels], *where: Any) -> TokensAndLabels:
        """Read rows; if the store was compacted since it was opened, open it again and retry.

        Compaction keeps the order of rows.
        """
        store = self._opened()
        try:
            return read(store, *where, self.classes)
        except MissingFile:
            versions = store.versions
            store.refresh()
            if store.versions == versions:
                raise
            self._check_order(store)
            return read(self._opened(), *where, self.classes)

    def _check_order(self, store: JoinedStores) -> None:
        """Raise InputError if rows were replaced since: others may be at their indices now."""
        if store.num_replacements != self.num_replacements:
            raise InputError(
                f"rows of {store} were replaced after the data set was created, which changes "
                "their order. Create the TokenDataset again, and start the epoch again."
            )

    def _share(self) -> tuple[int, int]:
        """Return start and stop of this process's share of the epoch's rows."""
        own = self.num_rows // self.world_size
        return self.rank * own, (self.rank + 1) * own

    def _random(self, *what: int) -> numpy.random.Generator:
        return numpy.random.default_rng((self.seed, self.epoch, *what))

    def _by_rows(self, mine: range) -> Iterator[Rows]:
        start, stop = self._share()
        order = self._random(2).permutation(self.num_rows)[start:stop]
        for batch in mine:
            indices = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield Rows([self._read_at(indices)])

    def _by_chunks(self, mine: range) -> Iterator[Rows]:
        """Yield batches from groups of chunks, which are read whole and shuffled.

        A batch may begin in one group and end in the next.
        """
        first = 0
        start, stop = self._share()
        begun = Rows([])
        for number, spans in enumerate(self._groups()):
            last = first + sum(high - low for low, high in spans)
            wanted = [
                batch
                for batch in range(first // self.batch_size, -(-last // self.batch_size))
                if batch in mine
            ]
            if wanted:
                rows = Rows([self._read(low, high) for low, high in spans])
                order = (
                    self._random(1, number).permutation(last - first)
                    if self.shuffle == "chunks"
                    else numpy.arange(last - first)
                )
                for batch in wanted:
                    end = min((batch + 1) * self.batch_size, stop - start)
                    begun = begun.and_of(
                        rows, order[max(batch * self.batch_size - first, 0) : end - first]
                    )
                    if end <= last:
                        yield begun
                        begun = Rows([])
            first = last

    def _groups(self) -> Iterator[list[tuple[int, int]]]:
        """Yield the spans of this process's rows that are read and shuffled together."""
        start, stop = self._share()
        number = -(-self.num_rows // self.chunk_rows)
        order = (
            self._random(0).permutation(number)
            if self.shuffle == "chunks"
            else numpy.arange(number)
        )
        spans = []
        position = 0
        for chunk in order.tolist():
            low = chunk * self.chunk_rows
            length = min(self.chunk_rows, self.num_rows - low)
            begin = max(start - position, 0)
            end = min(stop - position, length)
            if begin < end:
                spans.append((low + begin, low + end))
            position += length
        mixed = self.chunks_mixed if self.shuffle == "chunks" else 1
        for first in range(0, len(spans), mixed):
            yield spans[first : first + mixed]

    def _batch(self, rows: Rows) -> dict[str, Any]:
        layout = self._opened().header.layout
        if layout is None:
            return {
                "tokens": [torch.from_numpy(row.astype(numpy.int64)) for row in rows.tokens],
                "label": torch.from_numpy(rows.labels),
            }
        batch: dict[str, Any] = {
            "tokens": torch.from_numpy(rows.tokens.astype(numpy.int64)),
            "label": torch.from_numpy(rows.labels),
        }
        if self.model is not None:
            with torch.no_grad():
                batch["idx_Bl"] = list(batch["tokens"].split(layout.lengths, dim=1))
                batch["var_input"] = self.model.idxBl_to_var_input(batch["idx_Bl"])
        return batch


class Rows:
    """Tokens and labels of some rows.

    Attributes:
        tokens: [n, L], or an array of n objects, which are arrays [L_i].
        labels: int64 [n], indices of the labels; -1: none.
    """

    def __init__(self, parts: list[TokensAndLabels]) -> None:
        tokens, labels = zip(*parts, strict=True) if parts else ((), ())
        self.tokens: numpy.ndarray = numpy.concatenate(tokens) if tokens else numpy.zeros(0)
        self.labels: numpy.ndarray = (
            numpy.concatenate(labels) if labels else numpy.zeros(0, numpy.int64)
        )

    def and_of(self, others: Rows, chosen: numpy.ndarray) -> Rows:
        """Return these rows followed by the chosen rows of ``others``."""
        more = (others.tokens[chosen], others.labels[chosen])
        return Rows([(self.tokens, self.labels), more] if len(self.labels) else [more])


class TokenLoader:
    """Data loader over the epochs of a TokenDataset, with a position that can be saved.

    Each ``for batch in loader`` starts at the position and runs to the end of the epoch. The next
    loop starts the next epoch. Save ``state_dict()`` in the checkpoint of the model: after
    ``load_state_dict`` the loader resumes with the next batch, even with another number of workers.

    Args:
        dataset: the data set.
        workers: processes that prefetch batches. 0 reads in this process, which is fast enough for
            most models.
    """

    def __init__(self, dataset: TokenDataset, workers: int = 0) -> None:
        self.dataset = dataset
        self.workers = workers
        self._epoch = 0
        self._batches = 0

    def __len__(self) -> int:
        """Return the number of batches per epoch of one process."""
        return len(self.dataset)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.dataset.epoch = self._epoch
        self.dataset.first_batch = self._batches
        context = multiprocessing.get_context("spawn") if self.workers else None
        loader: DataLoader[dict[str, Any]] = DataLoader(
            self.dataset,
            batch_size=None,
            num_workers=self.workers,
            multiprocessing_context=context,
            generator=torch.Generator(),  # it would draw a seed from the process's generator
        )
        for batch in loader:
            self._batches += 1
            yield batch
        self._epoch += 1
        self._batches = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the position and the settings that determine the order, as plain values."""
        return {
            "epoch": self._epoch,
            "batches": self._batches,
            **{name: getattr(self.dataset, name) for name in _DECIDE_THE_ORDER},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a position.

        Raises:
            InputError: the number of rows or processes, or a setting of the data set, differs from
                the saved one, so the order would differ; or ``state`` is not a position.
        """
        state = _upgrade_position(state)
        if missing := {"epoch", "batches", *_DECIDE_THE_ORDER} - set(state):
            raise InputError(
                f"got a dict without {', '.join(sorted(missing))}; expected the position of a "
                "TokenLoader. Pass the result of loader.state_dict()."
            )
        for key in _DECIDE_THE_ORDER:
            if state[key] != (now := getattr(self.dataset, key)):
                raise InputError(
                    f"got {key} {now}; expected {state[key]}, with which the position was saved, "
                    f"because {key} determines the order of rows. Use the saved {key}, or start "
                    "without the position."
                )
        self._epoch = state["epoch"]
        self._batches = state["batches"]


def _upgrade_position(state: dict[str, Any]) -> dict[str, Any]:
    """Return a position that was saved under earlier names of the settings under present ones."""
    names = {"block_rows": "chunk_rows", "blocks_mixed": "chunks_mixed"}
    renamed: dict[str, Any] = {"num_replacements": 0}
    renamed |= {names.get(key, key): value for key, value in state.items()}
    if renamed.get("shuffle") == "blocks":
        renamed["shuffle"] = "chunks"
    return renamed
