"""Reading a token store for training: shuffled, shared by processes and workers, and exactly where it was after an interruption."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from smalto.core import distributed
from smalto.core.errors import ConfigError, InputError
from smalto.store.token_store import TokenStore

Shuffle = Literal["chunks", "rows", "none"]
_DECIDE_THE_ORDER = (
    "num_rows",
    "world_size",
    "seed",
    "batch_size",
    "shuffle",
    "chunk_rows",
    "chunks_mixed",
    "drop_last",
)


class TokenDataset(IterableDataset[dict[str, Any]]):
    """One epoch of batches out of a token store, from a position on.

    A batch is a dict: ``tokens`` int64 [B, L] (a list of [L_i] where images keep their shape) and ``label`` int64 [B], the number of the
    label in ``classes``, -1 for none. With ``model`` also ``idx_Bl``, its chunks, and ``var_input``, what ``model.idxBl_to_var_input``
    makes of them: the input of a next-scale model.

    The batches of an epoch follow from seed, epoch, batch size and number of processes alone. Workers of a DataLoader
    (``batch_size=None``, spawned: Lance does not survive a fork) take turns, so any number of them gives the same batches in the same
    order. Every process gets equally many rows; of n rows on p processes n % p are left out: with ``"rows"`` others in each epoch, else
    rows at the end of a chunk.

    Args:
        path: the store.
        batch_size: rows per batch of one process.
        shuffle: ``"chunks"``: chunks of ``chunk_rows`` rows in random order, ``chunks_mixed`` of them mixed at a time; reads whole chunks,
            and is fast. ``"rows"``: any row anywhere; several times slower, and 8 bytes of memory per row. ``"none"``: as stored.
        seed: decides the order, together with ``epoch``.
        drop_last: leave out a last batch that is not full.
        model: any object with ``idxBl_to_var_input``; it must be picklable where there are workers.
        rank, world_size: which share of how many; default: those of torch.distributed.
    """

    def __init__(
        self,
        path: str | Path,
        batch_size: int,
        *,
        shuffle: Shuffle = "chunks",
        seed: int = 0,
        chunk_rows: int = 4096,
        chunks_mixed: int = 8,
        drop_last: bool = False,
        model: Any = None,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        if batch_size < 1 or chunk_rows < 1 or chunks_mixed < 1:
            raise ConfigError(
                f"batch_size, chunk_rows and chunks_mixed are at least 1; got {batch_size}, {chunk_rows}, {chunks_mixed}."
            )
        if shuffle not in ("chunks", "rows", "none"):
            raise ConfigError(f'shuffle must be "chunks", "rows" or "none"; got {shuffle!r}.')
        store = TokenStore.open(path)
        if model is not None and store.header.layout is None:
            raise InputError(
                f"{path} keeps the shapes of images: their chunks do not stack. Tokenize with --size."
            )
        self.path, self.batch_size, self.shuffle, self.seed = Path(path), batch_size, shuffle, seed
        self.chunk_rows, self.chunks_mixed, self.drop_last, self.model = (
            chunk_rows,
            chunks_mixed,
            drop_last,
            model,
        )
        self.rank = distributed.rank() if rank is None else rank
        self.world_size = distributed.world_size() if world_size is None else world_size
        self.epoch = self.first_batch = 0
        self.num_rows, self.classes = len(store), store.classes()
        self._store: TokenStore | None = store
        self._process = os.getpid()

    def __len__(self) -> int:
        """Batches per epoch of one process."""
        own = self.num_rows // self.world_size
        return own // self.batch_size if self.drop_last else -(-own // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        number, of = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        mine = range(self.first_batch + number, len(self), of)
        read = self._by_rows if self.shuffle == "rows" else self._by_chunks
        for rows in read(mine):
            yield self._batch(rows)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_store": None}  # opened anew in the worker

    def _opened(self) -> TokenStore:
        if self._store is None:
            self._store, self._process = TokenStore.open(self.path), os.getpid()
        if self._process != os.getpid():
            raise InputError(
                "this process was forked from the one that opened the store, and Lance would hang in it. Use smalto.TokenLoader(dataset, "
                'workers=N), or DataLoader(dataset, batch_size=None, num_workers=N, multiprocessing_context="spawn").'
            )
        if len(self._store) < self.num_rows:
            raise InputError(
                f"{self.path} had {self.num_rows:,} rows when this began, and has {len(self._store):,} now."
            )
        return self._store

    def _share(self) -> tuple[int, int]:
        """The part of the epoch's sequence that is this process's."""
        own = self.num_rows // self.world_size
        return self.rank * own, (self.rank + 1) * own

    def _random(self, *what: int) -> numpy.random.Generator:
        return numpy.random.default_rng((self.seed, self.epoch, *what))

    def _by_rows(self, mine: range) -> Iterator[Rows]:
        store, (start, stop) = self._opened(), self._share()
        order = self._random(2).permutation(self.num_rows)[start:stop]
        for batch in mine:
            yield Rows(
                [
                    store.tokens_at(
                        order[batch * self.batch_size : (batch + 1) * self.batch_size], self.classes
                    )
                ]
            )

    def _by_chunks(self, mine: range) -> Iterator[Rows]:
        """Groups of chunks are read whole and mixed; a batch may begin in one and end in the next."""
        first, (start, stop), begun = 0, self._share(), Rows([])
        for number, spans in enumerate(self._groups()):
            last = first + sum(high - low for low, high in spans)
            wanted = [
                batch
                for batch in range(first // self.batch_size, -(-last // self.batch_size))
                if batch in mine
            ]
            if wanted:
                rows = Rows([self._opened().tokens(low, high, self.classes) for low, high in spans])
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
        """The spans of rows that are read and mixed together, in order, cut to this process's share."""
        start, stop = self._share()
        number = -(-self.num_rows // self.chunk_rows)
        order = (
            self._random(0).permutation(number)
            if self.shuffle == "chunks"
            else numpy.arange(number)
        )
        spans, position = [], 0
        for chunk in order.tolist():
            low = chunk * self.chunk_rows
            length = min(self.chunk_rows, self.num_rows - low)
            begin, end = max(start - position, 0), min(stop - position, length)
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
    """Tokens ([n, L], or n arrays [L_i] as an array of objects) and label numbers [n] of some rows."""

    def __init__(self, parts: list[tuple[numpy.ndarray, numpy.ndarray]]) -> None:
        tokens, labels = zip(*parts, strict=True) if parts else ((), ())
        self.tokens: numpy.ndarray = numpy.concatenate(tokens) if tokens else numpy.zeros(0)
        self.labels: numpy.ndarray = (
            numpy.concatenate(labels) if labels else numpy.zeros(0, numpy.int64)
        )

    def and_of(self, others: Rows, chosen: numpy.ndarray) -> Rows:
        """These rows, and the chosen ones of others."""
        more = (others.tokens[chosen], others.labels[chosen])
        return Rows([(self.tokens, self.labels), more] if len(self.labels) else [more])


class TokenLoader:
    """Epochs of a TokenDataset, one after the other, with a position that can be saved.

    Each ``for batch in loader`` runs to the end of an epoch, from the position on; the next one begins the next epoch. Put
    ``state_dict()`` into the checkpoint of what is trained: after ``load_state_dict`` the batches go on with the one that would have come,
    also with another number of workers.

    Args:
        dataset: what to read.
        workers: processes that read ahead; 0 reads in this one, which is fast enough for most models.
    """

    def __init__(self, dataset: TokenDataset, workers: int = 0) -> None:
        self.dataset, self.workers = dataset, workers
        self._epoch = self._batches = 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.dataset.epoch, self.dataset.first_batch = self._epoch, self._batches
        context = multiprocessing.get_context("spawn") if self.workers else None
        loader: DataLoader[dict[str, Any]] = DataLoader(
            self.dataset, batch_size=None, num_workers=self.workers, multiprocessing_context=context
        )
        for batch in loader:
            self._batches += 1
            yield batch
        self._epoch, self._batches = self._epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Where the loader is, and what decided the order so far: plain numbers and a word."""
        return {
            "epoch": self._epoch,
            "batches": self._batches,
            **{name: getattr(self.dataset, name) for name in _DECIDE_THE_ORDER},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there.

        Raises:
            InputError: the number of rows or of processes, or a setting of the dataset, has changed since, so that the order is another.
        """
        if missing := {"epoch", "batches", *_DECIDE_THE_ORDER} - set(state):
            raise InputError(
                f"this is no position of a TokenLoader: {', '.join(sorted(missing))} missing."
            )
        for key in _DECIDE_THE_ORDER:
            if state[key] != (now := getattr(self.dataset, key)):
                raise InputError(
                    f"the position was saved with {key} {state[key]}; it is {now} now, and the order of rows with it."
                )
        self._epoch, self._batches = state["epoch"], state["batches"]
