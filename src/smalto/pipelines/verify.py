"""Checking a token store: every row for damage, and a sample by encoding its images again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy
import torch
from torch import Tensor

from smalto.core.allocator import retain_freed_memory
from smalto.core.device import resolve_device
from smalto.core.errors import ConfigError, InputError
from smalto.core.progress import Progress
from smalto.images.reading import BadImage, UnreadableImage
from smalto.images.retries import read_with_retries
from smalto.images.sources import locate
from smalto.images.tensors import to_unit_range, views_of
from smalto.images.transforms import Transform
from smalto.interop.open_tokenizer import open_tokenizer
from smalto.pipelines.decode import check_tokenizer, recorded_tokenizer
from smalto.store.check import StoreCheck, check_store
from smalto.store.schema import TokenRow, split_id
from smalto.store.token_store import TokenStore
from smalto.tokenizer import ImageTokenizer

# How much farther than the nearest code a stored token's code may be, in the unit of
# CodeSpace.vector_gaps. Rounding in the encoder differs with batch size, threads and processor;
# over 4,009 emoji the largest gap of a flipped token was 5e-5 in float32.
TIE_GAP = {"float32": 1e-4, "bf16": 1e-2}


@dataclass(frozen=True)
class Difference:
    """A row whose image gave other tokens again.

    Attributes:
        id: of the row.
        num_tokens: how many differ.
        first: position of the first.
        largest_gap: by how much the stored tokens miss the nearest codes at most.
    """

    id: str
    num_tokens: int
    first: int
    largest_gap: float


@dataclass
class SampleCheck:
    """What encoding a sample again found.

    Attributes:
        num_rows: rows that were encoded again; ``num_tokens``: their tokens.
        damaged: rows that the tokenizer would not have written.
        ties: rows that differ only at ties: two codes are equally near up to rounding.
        not_found: names of images that no longer exist in the source, or are damaged.
        unreadable: names of images that the system could not read now.
        changed: names of images whose files have changed since they were tokenized.
    """

    num_rows: int = 0
    num_tokens: int = 0
    damaged: list[Difference] = field(default_factory=list)
    ties: list[Difference] = field(default_factory=list)
    not_found: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Verification:
    """What ``verify`` found: ``rows`` of every row, ``sample`` of the images encoded again."""

    rows: StoreCheck
    sample: SampleCheck

    @property
    def ok(self) -> bool:
        """Whether nothing is damaged. Ties are not damage."""
        return self.rows.ok and not self.sample.damaged


@retain_freed_memory()
def verify(
    path: str | Path,
    sample: int = 0,
    *,
    tokenizer: str | Path | None = None,
    source: str | Path | None = None,
    seed: int = 0,
    device: str = "auto",
    progress: Progress | None = None,
) -> Verification:
    """Check every row of a store for damage, then encode the images of ``sample`` rows again.

    A token that comes out otherwise is not damage if its code is as near as the nearest one up to
    rounding: an encoder rounds differently with the batch size, the number of threads and the
    processor. Later stages and scales of such an image are compared given the stored token.

    Args:
        path: the store.
        sample: number of rows to encode again, drawn by ``seed``.
        tokenizer: the folder or name of the tokenizer; None: the recorded one.
        source: where the images are now; None: where they were.
        seed: random seed of the sample.
        device: of the model.
        progress: receives rows and images.

    Raises:
        ConfigError: ``sample`` or ``seed`` is negative.
        RunError: the tokenizer does not exist, or it is not the one that wrote the store.
        InputError: a sample of tokens that no Transform of smalto made.
    """
    if sample < 0 or seed < 0:
        raise ConfigError(f"sample and seed must be 0 or more; got {sample} and {seed}.")
    store, progress = TokenStore.open(path), progress or Progress()
    model = None
    if sample:
        model = open_tokenizer(recorded_tokenizer(store, tokenizer), progress).to(
            resolve_device(device)
        )
        check_tokenizer(store, model.fingerprint(), tokenizer)
    found = Verification(check_store(store, progress), SampleCheck())
    is_readable = found.rows.num_checked and found.rows.num_checked == found.rows.num_rows
    if model is not None and is_readable:
        rows = _draw(store, sample, seed)
        _check_sample(store, rows, model, source or store.header.source, found.sample, progress)
    return found


def _draw(store: TokenStore, sample: int, seed: int) -> dict[str, list[tuple[str, TokenRow]]]:
    """Rows drawn at random: the name of the image -> (view, row) of each."""
    random = numpy.random.default_rng(seed)
    chosen = numpy.sort(random.choice(len(store), min(sample, len(store)), replace=False))
    rows: dict[str, list[tuple[str, TokenRow]]] = {}
    for row in store.token_rows_at(chosen):
        name, view = split_id(row.id)
        rows.setdefault(name, []).append((view, row))
    return rows


def _check_sample(
    store: TokenStore,
    rows: dict[str, list[tuple[str, TokenRow]]],
    tokenizer: ImageTokenizer,
    source: str | Path,
    found: SampleCheck,
    progress: Progress,
) -> None:
    header = store.header
    if not isinstance(header.transform, Transform):
        raise InputError(
            f"got tokens made by {header.transform!r}, which smalto cannot repeat. "
            "Verify without a sample: --sample 0."
        )
    tie_gap = TIE_GAP[header.precision]
    model = tokenizer.for_inference(header.precision)
    progress.start("encoding again", len(rows), "images")
    for row, image in _images_of(rows, source, header.transform, found, progress):
        found.num_rows += 1
        found.num_tokens += len(row.tokens)
        difference = _compare(row, image, model)
        if difference is not None:
            is_tie = difference.largest_gap <= tie_gap
            (found.ties if is_tie else found.damaged).append(difference)
    progress.finish()
    found.not_found += sorted(rows)


def _images_of(
    rows: dict[str, list[tuple[str, TokenRow]]],
    source: str | Path,
    transform: Transform,
    found: SampleCheck,
    progress: Progress,
) -> Iterator[tuple[TokenRow, Tensor]]:
    """Yield each row whose image can be read, with that view float [1, 3, H, W].

    Images that are found are removed from ``rows``.
    """
    views = transform.view_names()
    for file in locate(source, rows) if source else ():
        progress.advance()
        of_file = rows.pop(file.name)
        prepared = read_with_retries(transform.prepare, file)
        if isinstance(prepared, UnreadableImage):
            found.unreadable.append(file.name)
            continue
        if isinstance(prepared, BadImage):
            found.not_found.append(file.name)
            continue
        if any(row.digest not in (b"", prepared.digest) for _, row in of_file):
            found.changed.append(file.name)
            continue
        images = views_of(prepared.views, transform.flip)
        for view, row in of_file:
            yield row, to_unit_range(images[views.index(view)][None])


@torch.no_grad()
def _compare(row: TokenRow, image: Tensor, model: ImageTokenizer) -> Difference | None:
    """Encode an image again; return how its tokens differ from the stored ones, or None."""
    device = next(model.parameters()).device
    again = model.encode(image.to(device)).cpu()[0].numpy()
    stored = numpy.asarray(row.tokens)
    if len(again) != len(stored):
        return Difference(row.id, len(stored), 0, numpy.inf)
    different = numpy.flatnonzero(again != stored)
    if not len(different):
        return None
    if stored.max() >= model.quantize.codebook_size:
        return Difference(row.id, len(different), int(different[0]), numpy.inf)
    layout = model.layout(*image.shape[2:])
    tokens = torch.from_numpy(stored.astype(numpy.int64))[None].to(device)
    gaps = model.token_gaps(image.to(device), tokens, layout)
    return Difference(row.id, len(different), int(different[0]), float(gaps.max()))
