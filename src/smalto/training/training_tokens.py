"""The token stores of a generator's run: which rows are trained on, which are held out, and batches
of them.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from smalto.core import distributed
from smalto.core.errors import ConfigError, InputError, RunError
from smalto.core.layout import TokenLayout
from smalto.images.sources import credits_of, held_out_rule
from smalto.images.splits import split_names
from smalto.store.dataset import TokenDataset, TokenLoader
from smalto.store.joined_stores import JoinedStores
from smalto.store.schema import split_id
from smalto.training.generator_recipe import GeneratorRecipe
from smalto.training.run_folder import Split

TokenData = str | Path | Sequence[str | Path]
Source = str | tuple[str, ...]
READ_AT_ONCE = 8192  # rows


@dataclass(frozen=True)
class TokenBatch:
    """Tokens of images, with their labels.

    Attributes:
        tokens: int64 [n, L].
        labels: int64 [n], numbers of the classes; -1: no label.
    """

    tokens: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice) -> TokenBatch:
        return TokenBatch(self.tokens[rows], self.labels[rows])

    def to(self, device: torch.device) -> TokenBatch:
        """Return the batch on a device."""
        return TokenBatch(self.tokens.to(device), self.labels.to(device))

    def without_labels(self, chosen: Tensor) -> TokenBatch:
        """Return the batch without the labels of the chosen rows, bool [n]."""
        return TokenBatch(self.tokens, self.labels.masked_fill(chosen, -1))

    def chunk(self, number: int) -> list[TokenBatch]:
        """Return the rows in at most ``number`` parts of equal size."""
        return self.split(-(-len(self) // number))

    def split(self, size: int) -> list[TokenBatch]:
        """Return the rows in parts of ``size``."""
        return [self[start : start + size] for start in range(0, len(self), size)]


@dataclass(frozen=True)
class TrainingTokens:
    """The rows of a run.

    Attributes:
        stores: all of them.
        source: where they are, as runs record it.
        digest: SHA-256 of the ids of all rows.
        training: indices of the rows to train on, increasing.
        held_out: indices of the rows that training never sees, increasing.
        class_names: names of the labels, sorted; empty: unconditional.
    """

    stores: JoinedStores
    source: Source
    digest: str
    training: numpy.ndarray
    held_out: numpy.ndarray
    class_names: list[str]

    @classmethod
    def open(
        cls, path: TokenData, recipe: GeneratorRecipe, before: Split | None = None
    ) -> TrainingTokens:
        """Open the stores and split their rows by image: all views of an image are on one side.

        The images are those that a tokenizer's training holds out, if they are the same.

        Args:
            path: a store, a folder of stores, or a list of these.
            recipe: of the run.
            before: the split of the run that is resumed; rows that were added since are left out.

        Raises:
            DataError, InputError: a store does not exist, or they do not fit together.
            ConfigError: there are fewer rows than in a batch.
            RunError: the rows are not those of the run that is resumed.
        """
        stores = JoinedStores.open(path)
        if before is not None and len(stores.stores) == 1 and len(stores) > before.num_images:
            stores = JoinedStores(stores.stores, [before.num_images])
        if stores.header.layout is None:
            raise InputError(
                f"got {stores}, whose images keep their shapes; expected images of one shape. "
                "Tokenize with --size."
            )
        is_held_out, digest = _split_rows(stores)
        if before is not None and before.digest != digest:
            raise RunError(
                f"got {len(stores):,} rows in {stores}; expected the {before.num_images:,} with "
                "which the run was started, in their order. Restore them, or start a new run."
            )
        rows = numpy.arange(len(is_held_out))
        training = rows[~is_held_out]
        if len(training) < recipe.data.batch:
            raise ConfigError(
                f"got {len(training)} rows to train on; data.batch is {recipe.data.batch}. Set "
                "data.batch to at most the number of rows, or tokenize more images."
            )
        if recipe.data.batch % distributed.world_size():
            raise ConfigError(
                f"data.batch is {recipe.data.batch}, the rows of all {distributed.world_size()} "
                "processes together: it must be a multiple of their number."
            )
        class_names = stores.classes() if recipe.data.labels else []
        return cls(stores, _recorded(path), digest, training, rows[is_held_out], class_names)

    @property
    def layout(self) -> TokenLayout:
        """Return the layout of every image."""
        layout = self.stores.header.layout
        assert layout is not None
        return layout

    @property
    def measured_on(self) -> str:
        """What the evaluation measures, in words."""
        return "held-out rows" if len(self.held_out) else "training rows"

    @property
    def credits(self) -> str:
        """Return the authors of images that come with packages; empty for others."""
        sources = sorted({store.header.source for store in self.stores.stores})
        return "; ".join(filter(None, map(credits_of, sources)))

    def split(self) -> Split:
        """Return what the run remembers of its rows."""
        source = self.source if isinstance(self.source, str) else ", ".join(self.source)
        return Split(source, len(self.stores), self.digest, [])

    def describe(self) -> str:
        """Return the numbers of rows in one sentence."""
        held_out = f"{len(self.held_out):,} held out"
        if not len(self.held_out):
            held_out = "none held out (fewer than 4 images, so metrics are on training rows)"
        classes = f"{len(self.class_names)} classes" if self.class_names else "no labels"
        return (
            f"{len(self.training):,} rows to train on, {held_out}; {self.layout.num_tokens} tokens "
            f"per row, {classes}"
        )

    def batches(self, recipe: GeneratorRecipe) -> TokenBatches:
        """Return this rank's rows of the training batches."""
        dataset = TokenDataset(
            self.stores.paths,
            recipe.data.batch,
            seed=recipe.seed,
            drop_last=True,
            rows=self.training,
            lengths=self.stores.lengths,
            rank=0,  # every rank reads the whole batch, so that their number changes nothing
            world_size=1,
        )
        return TokenBatches(TokenLoader(dataset), has_labels=bool(self.class_names))

    def some_training_rows(self, number: int) -> TokenBatch:
        """Return at most ``number`` training rows, evenly spaced."""
        return self._read(_spaced(self.training, number))

    def some_held_out_rows(self, number: int) -> TokenBatch:
        """Return at most ``number`` held-out rows, evenly spaced; training rows if there are
        none.
        """
        rows = self.held_out if len(self.held_out) else self.training
        return self._read(_spaced(rows, number))

    def some_training_tokens(self, share: Callable[[int], range]) -> Iterator[numpy.ndarray]:
        """Yield the tokens of training rows in the stored dtype, [n, L] at a time.

        Args:
            share: the number of training rows -> the range of those to read.
        """
        chosen = share(len(self.training))
        for start in range(chosen.start, chosen.stop, READ_AT_ONCE):
            rows = self.training[start : min(start + READ_AT_ONCE, chosen.stop)]
            first, last = int(rows[0]), int(rows[-1])
            tokens, _ = self.stores.tokens(first, last + 1, [])
            yield tokens[rows - first]

    def _read(self, rows: numpy.ndarray) -> TokenBatch:
        tokens, labels = self.stores.tokens_at(rows, self.class_names)
        return TokenBatch(torch.from_numpy(tokens.astype(numpy.int64)), torch.from_numpy(labels))


class TokenBatches:
    """Endless batches of a loader: this rank's rows, with a position that can be saved."""

    def __init__(self, loader: TokenLoader, has_labels: bool) -> None:
        self._loader = loader
        self._has_labels = has_labels
        self._epoch: Iterator[dict[str, Any]] | None = None

    def __next__(self) -> TokenBatch:
        while True:
            if self._epoch is None:
                self._epoch = iter(self._loader)
            batch = next(self._epoch, None)
            if batch is not None:
                own = distributed.rank_range(len(batch["tokens"]))
                labels = batch["label"] if self._has_labels else torch.full_like(batch["label"], -1)
                whole = TokenBatch(batch["tokens"], labels)
                return whole[own.start : own.stop]
            self._epoch = None

    def state_dict(self) -> dict[str, Any]:
        """Return the position, which is the same on all ranks."""
        return self._loader.state_dict()

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Continue from a position, with any number of processes.

        Raises:
            InputError: rows were added or removed since, or data.batch has changed.
        """
        self._loader.load_state_dict(states[0])
        self._epoch = None


def _spaced(rows: numpy.ndarray, number: int) -> numpy.ndarray:
    """Return at most ``number`` of the rows, evenly spaced."""
    if len(rows) <= number:
        return rows
    return rows[numpy.arange(number) * len(rows) // number]


def _split_rows(stores: JoinedStores) -> tuple[numpy.ndarray, str]:
    """Return whether each row is held out, bool [n], and the SHA-256 of all ids.

    The rule is that of the source of each store; stores of one rule are split together.
    """
    digest = hashlib.sha256()

    def names(number: int) -> Iterator[str]:
        for id in stores.ids_of(number):
            digest.update(f"{id}\n".encode())
            yield split_id(id)[0]

    masks = []
    rules = [held_out_rule(store.header.source) for store in stores.stores]
    for rule, group in itertools.groupby(range(len(rules)), key=rules.__getitem__):
        masks.append(split_names(itertools.chain.from_iterable(map(names, group)), rule))
    return numpy.concatenate(masks), digest.hexdigest()


def _recorded(path: TokenData) -> Source:
    if isinstance(path, (str, Path)):
        return str(Path(path).resolve())
    return tuple(str(Path(store).resolve()) for store in path)
