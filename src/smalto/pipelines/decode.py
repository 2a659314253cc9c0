"""A token store back to images."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from smalto.core.allocator import retain_freed_memory
from smalto.core.device import Precision
from smalto.core.errors import RunError
from smalto.core.files import atomic_path, check_writable
from smalto.core.layout import TokenLayout
from smalto.core.progress import Progress
from smalto.images.image_reader import default_workers
from smalto.images.tensors import to_uint8
from smalto.inference.inference_tokenizer import InferenceTokenizer
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
    """Turn a token store back into PNG images, under the names that the images had.

    Args:
        tokens: what ``tokenize`` wrote.
        out: folder for the images.
        tokenizer: the folder of the tokenizer; None takes the recorded one.
        overwrite: replace images that are there.
        workers: threads that write PNG files beside the model (0: none).

    Returns:
        The files, in the order of the store.

    Raises:
        RunError: there is no such tokenizer, it is not the one that wrote these tokens, or an image would be overwritten.
    """
    progress, store, folder = progress or Progress(), TokenStore.open(tokens), Path(out)
    inference = InferenceTokenizer.of(
        recorded_tokenizer(store, tokenizer), device, precision, batch, progress
    )
    check_tokenizer(store, inference.fingerprint, tokenizer)
    paths = image_paths(folder, [image_name(id) for id in store.ids()])
    in_the_way = [path for path in paths if path.exists()]
    if in_the_way and not overwrite:
        others = f" and {len(in_the_way) - 1} others exist" if len(in_the_way) > 1 else " exists"
        raise RunError(
            f"{in_the_way[0]}{others} already. Replace them with --overwrite, or name another --out."
        )
    check_writable(folder / "image.png")
    progress.start("decoding", len(paths), "images")
    number = default_workers(workers)
    with ThreadPoolExecutor(max(1, number)) as writers:
        writing: list[Future[None]] = []
        for start, rows, layout in _batches(store, batch):
            images = inference.decode(rows, layout)
            _wait_for(writing)  # those of the batch before: no more than two batches are in memory
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
    """The folder of the tokenizer: the one that is named, or else the one that wrote the store.

    Raises:
        RunError: that one is not there any more.
    """
    recorded = store.header.tokenizer
    if tokenizer is None and not (recorded and Path(recorded).exists()):
        where = (
            f"{recorded}, which is not there any more" if recorded else "one that it does not name"
        )
        raise RunError(
            f"{store.path} was written by the tokenizer {where}. Name it with --tokenizer."
        )
    return tokenizer or recorded


def check_tokenizer(store: TokenStore, fingerprint: str, tokenizer: str | Path | None) -> None:
    """Raises RunError where a tokenizer is not the one that wrote the store."""
    if fingerprint != store.header.fingerprint:
        raise RunError(
            f"the tokenizer {tokenizer or store.header.tokenizer} is not the one that wrote {store.path}: its fingerprint is "
            f"{fingerprint[:12]}, the store's {store.header.fingerprint[:12]}. Has it been trained further? "
            "Checkpoints of a run are tokenizers too."
        )


def write_png(path: Path, image: Tensor) -> None:
    """Write an image [3, H, W] in [-1, 1] as PNG, in one step."""
    with atomic_path(path) as temporary:
        Image.fromarray(to_uint8(image).permute(1, 2, 0).numpy()).save(temporary, "PNG")


def image_name(id: str) -> str:
    """The name of a row's image as a file: the view before the suffix."""
    name, view = split_id(id)
    path = PurePosixPath(name)
    return str(path.with_name(f"{path.stem}.{view}{path.suffix}")) if view else name


def image_paths(folder: Path, names: list[str]) -> list[Path]:
    """Where the decoded images go: below ``folder`` whatever the names say, as .png, and no two alike."""
    relative = [
        PurePosixPath(
            *[part for part in PurePosixPath(name).parts if part not in ("/", "..")] or ["image"]
        )
        for name in names
    ]
    taken = {
        str(parent).lower() for path in relative for parent in path.parents
    }  # a.jpg beside a folder a.png/
    chosen = []
    for path in relative:
        stem = path.stem.encode("utf-8", "surrogateescape")[:200].decode("utf-8", "surrogateescape")
        # a.jpg becomes a.png; a second a.* keeps its suffix: a.webp.png. Case does not tell files apart everywhere.
        endings = itertools.chain(
            [".png"], (f"{path.suffix}{n or ''}.png" for n in itertools.count())
        )
        free = next(
            c
            for c in (path.with_name(stem + ending) for ending in endings)
            if str(c).lower() not in taken
        )
        taken.add(str(free).lower())
        chosen.append(folder / free)
    return chosen


def _batches(store: TokenStore, batch: int) -> Iterator[tuple[int, Tensor, TokenLayout]]:
    """(number of the first row, tokens [B, L], their layout) of rows that follow one another and share a layout."""
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
