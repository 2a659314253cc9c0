"""Decoding a token store to PNG images."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from smalto.core.allocator import retain_freed_memory
from smalto.core.device import Precision
from smalto.core.errors import RunError
from smalto.core.files import check_writable, named_path, remove_leftovers
from smalto.core.layout import TokenLayout
from smalto.core.progress import Progress
from smalto.images.image_reader import default_workers
from smalto.images.single_image import write_png
from smalto.inference.inference_tokenizer import InferenceTokenizer
from smalto.interop.open_tokenizer import open_tokenizer
from smalto.pretrained import folder_of_recorded
from smalto.store.schema import split_id
from smalto.store.token_store import TokenStore

_READ_AT_ONCE = 1024


@retain_freed_memory()
def decode(
    tokens: str | Path,
    out: str | Path,
    tokenizer: str | Path | None = None,
    *,
    overwrite: bool = False,
    batch: int = 8,
    device: str = "auto",
    precision: Precision = "float32",
    workers: int | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Decode a token store to PNG images, under the names of the original images.

    Args:
        tokens: the token store that ``tokenize`` wrote.
        out: folder for the images.
        tokenizer: the folder or name of the tokenizer; None: the recorded one.
        overwrite: replace existing images.
        batch: images per batch.
        device, precision: of the model.
        workers: threads that write PNG files while the model decodes; 0: none.
        progress: receives images and messages.

    Returns:
        The paths of the images, in the order of the store.

    Raises:
        RunError: the tokenizer does not exist, it is not the one that wrote these tokens, or an
            image would be overwritten.
    """
    progress = progress or Progress()
    store = TokenStore.open(tokens)
    folder = named_path(out, "the images")
    inference = InferenceTokenizer.of(
        open_tokenizer(recorded_tokenizer(store, tokenizer), progress),
        device,
        precision,
        batch,
        progress,
    )
    check_tokenizer(store, inference.identity.fingerprint, tokenizer)
    paths = image_paths(folder, [image_name(id) for id in store.ids()])
    in_the_way = [path for path in paths if path.exists()]
    if in_the_way and not overwrite:
        others = f" and {len(in_the_way) - 1} others exist" if len(in_the_way) > 1 else " exists"
        raise RunError(
            f"{in_the_way[0]}{others} already. Name another --out, or replace them with "
            "--overwrite."
        )
    check_writable(folder / "image.png")
    for place in {path.parent for path in paths if path.parent.is_dir()}:
        remove_leftovers(place)
    progress.start("decoding", len(paths), "images")
    number = default_workers(workers)
    with ThreadPoolExecutor(max(1, number)) as writers:
        writing: list[Future[None]] = []
        for start, rows, layout in _batches(store, batch):
            images = inference.decode(rows, layout)
            _wait_for(writing)  # of the previous batch: at most two batches are in memory
            writing = [
                writers.submit(write_png, path, image)
                for path, image in zip(paths[start:], images, strict=False)
            ]
            if not number:
                _wait_for(writing)
            progress.advance(len(rows))
        _wait_for(writing)
    progress.finish()
    return paths


def recorded_tokenizer(store: TokenStore, tokenizer: str | Path | None) -> str | Path:
    """Return the tokenizer's folder or name: ``tokenizer``, or else the one of the store.

    Raises:
        RunError: ``tokenizer`` is None, and the recorded one no longer exists.
    """
    recorded = store.header.tokenizer
    if tokenizer is not None:
        return tokenizer
    if not (recorded and folder_of_recorded(recorded).exists()):
        place = f"{recorded}, which no longer exists" if recorded else "a tokenizer without a path"
        raise RunError(
            f"{store.path} was written by {place}. Name the folder of the tokenizer with "
            "--tokenizer."
        )
    return folder_of_recorded(recorded)


def check_tokenizer(store: TokenStore, fingerprint: str, tokenizer: str | Path | None) -> None:
    """Raise RunError if a tokenizer is not the one that wrote the store."""
    if fingerprint != store.header.fingerprint:
        raise RunError(
            f"the tokenizer {tokenizer or store.header.tokenizer} is not the one that wrote "
            f"{store.path}: its fingerprint is {fingerprint[:12]}, the store's "
            f"{store.header.fingerprint[:12]}. If it was trained further, name the checkpoint that "
            "wrote the store with --tokenizer: the checkpoints of a run are tokenizers too."
        )


def image_name(id: str) -> str:
    """Return the file name of a row's image, with its view before the suffix."""
    name, view = split_id(id)
    path = PurePosixPath(name)
    if not path.name:  # an id from elsewhere may name no file
        path /= "image"
    return str(path.with_name(f"{path.stem}.{view}{path.suffix}")) if view else name


def image_paths(folder: Path, names: list[str]) -> list[Path]:
    """Return the paths of decoded images: below ``folder`` for any name, as .png, all different."""
    relative = [
        PurePosixPath(
            *[part for part in PurePosixPath(name).parts if part not in ("/", "..")] or ["image"]
        )
        for name in names
    ]
    # Folders count as taken too: a.jpg may lie beside a folder a.png/.
    taken = {str(parent).lower() for path in relative for parent in path.parents}
    chosen = []
    for path in relative:
        stem = path.stem.encode("utf-8", "surrogateescape")[:200].decode("utf-8", "surrogateescape")
        # a.jpg becomes a.png; a second a.* keeps its suffix: a.webp.png. Names are compared in
        # lower case, because some file systems ignore case.
        with_suffix = (f"{path.suffix}{n or ''}.png" for n in itertools.count())
        candidates = (
            path.with_name(stem + ending) for ending in itertools.chain([".png"], with_suffix)
        )
        free = next(name for name in candidates if str(name).lower() not in taken)
        taken.add(str(free).lower())
        chosen.append(folder / free)
    return chosen


def _batches(store: TokenStore, batch: int) -> Iterator[tuple[int, Tensor, TokenLayout]]:
    """Yield (index of the first row, tokens [B, L], layout) of consecutive rows of one layout."""
    for start in range(0, len(store), _READ_AT_ONCE):
        rows: dict[str, Any] = store.rows(start, start + _READ_AT_ONCE)
        tokens, layouts = rows["tokens"], rows["layout"]
        first = 0
        for end in range(1, len(layouts) + 1):
            if end == len(layouts) or layouts[end] != layouts[first] or end - first == batch:
                yield start + first, torch.stack(list(tokens[first:end])), layouts[first]
                first = end


def _wait_for(jobs: list[Future[None]]) -> None:
    for job in jobs:
        job.result()
