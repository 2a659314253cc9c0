"""Checking a token store with the tokenizer that wrote it."""

from __future__ import annotations

from pathlib import Path

import numpy
import torch

from smalto.core.allocator import retain_freed_memory
from smalto.core.device import resolve_device
from smalto.core.errors import InputError
from smalto.core.progress import Progress
from smalto.images.reading import BadImage
from smalto.images.sources import locate
from smalto.images.tensors import to_unit_range, views_of
from smalto.images.transforms import Transform
from smalto.pipelines.decode import check_tokenizer, recorded_tokenizer
from smalto.store.check import Verification, check_store
from smalto.store.schema import TokenRow, split_id
from smalto.store.token_store import TokenStore
from smalto.tokenizer import ImageTokenizer, load


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
    """Check every row of a store for damage, then encode ``sample`` rows again.

    Args:
        sample: how many rows to encode again, drawn by ``seed``.
        tokenizer: the folder of the tokenizer; None: the recorded one.
        source: where the images are now; None: where they were.

    Raises:
        RunError: the tokenizer is not there, or it is not the one that wrote the store.
        InputError: a sample of tokens that no Transform of smalto made.
    """
    store, progress = TokenStore.open(path), progress or Progress()
    if not sample:
        return check_store(store, progress)
    model = load(recorded_tokenizer(store, tokenizer)).to(resolve_device(device))
    check_tokenizer(store, model.fingerprint(), tokenizer)
    found = check_store(store, progress)
    if (
        found.num_checked and found.num_checked == found.num_rows
    ):  # else what cannot be read comes first
        _encode_again(store, sample, model, source or store.header.source, seed, found, progress)
    return found


@torch.no_grad()
def _encode_again(
    store: TokenStore,
    sample: int,
    tokenizer: ImageTokenizer,
    source: str | Path,
    seed: int,
    found: Verification,
    progress: Progress,
) -> None:
    header = store.header
    if not isinstance(header.transform, Transform):
        raise InputError(
            f"the images became tokens by {header.transform!r}, which smalto cannot repeat: verify without a sample."
        )
    chosen = numpy.sort(
        numpy.random.default_rng(seed).choice(len(store), min(sample, len(store)), replace=False)
    )
    rows: dict[str, list[tuple[str, TokenRow]]] = {}  # image: (view, row) of each of its rows
    for row in store.token_rows_at(chosen):
        name, view = split_id(row.id)
        rows.setdefault(name, []).append((view, row))
    inference = tokenizer.for_inference(header.precision)
    device = next(tokenizer.parameters()).device
    names = header.transform.view_names()
    progress.start("encoding again", len(rows), "images")
    for file in locate(source, rows) if source else ():
        progress.advance()
        of_file = rows.pop(file.name)
        try:
            prepared = header.transform.prepare(file)
        except BadImage:
            found.not_found.append(file.name)
            continue
        if any(row.digest not in (b"", prepared.digest) for _, row in of_file):
            found.changed.append(file.name)
            continue
        images = views_of(prepared.views, header.transform.flip)
        for view, row in of_file:
            again = (
                inference.encode(to_unit_range(images[names.index(view)][None]).to(device))
                .cpu()[0]
                .numpy()
            )
            found.num_sampled += 1
            found.num_tokens_sampled += len(again)
            different = (
                numpy.flatnonzero(again != row.tokens)
                if len(again) == len(row.tokens)
                else numpy.arange(len(row.tokens))
            )
            if len(different):
                found.differing.append((row.id, len(different), int(different[0])))
    progress.finish()
    found.not_found += sorted(rows)
