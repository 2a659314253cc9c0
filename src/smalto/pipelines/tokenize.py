"""Pictures to a token file, and back to pictures."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from PIL import Image
from torch import Tensor

from smalto.data.archives import PictureFile, Skipped
from smalto.data.images import LONGER_SIDE, find_pictures, summary
from smalto.data.pictures import to_uint8, to_unit_range
from smalto.data.sources import open_source
from smalto.data.token_file import TokenFile
from smalto.device import Precision
from smalto.errors import DataError, RunError
from smalto.files import aside, check_writable
from smalto.layout import TokenLayout
from smalto.memory import reused_memory
from smalto.metrics import psnr
from smalto.pipelines.running import PictureReader, Runner, batches_of_one_shape, default_workers
from smalto.progress import Progress
from smalto.tokenizer import ImageTokenizer


@dataclass(frozen=True)
class Tokenized:
    """What ``tokenize`` wrote, and which files it left out."""

    path: Path
    num_images: int
    num_tokens: int
    skipped: list[Skipped]


@reused_memory()
def tokenize(
    source: str | Path | list[PictureFile],
    tokenizer: str | Path,
    out: str | Path,
    *,
    longer_side: int | None = LONGER_SIDE,
    size: int | None = None,
    overwrite: bool = False,
    batch: int = 8,
    device: str = "auto",
    precision: Precision = "float32",
    workers: int | None = None,
    progress: Progress | None = None,
) -> Tokenized:
    """Write the tokens of pictures to one file.

    Args:
        source: a folder, one picture, ``"bundled"``, or a list of files.
        tokenizer: the folder of a tokenizer or run; its place and fingerprint are recorded.
        out: the token file (safetensors).
        longer_side: larger pictures are reduced to this; None or 0 keeps their size.
        size: cut a square of this side from the middle; None keeps the shape.

    Raises:
        DataError: nothing can be read.
        RunError: ``out`` exists, or there is no tokenizer.
    """
    progress, out = progress or Progress(), Path(out)
    if out.exists() and not overwrite:
        raise RunError(f"{out} exists already. Replace it with --overwrite, or name another --out.")
    if out.is_dir():
        raise RunError(f"{out} is a folder. Name a file for --out.")
    check_writable(out)
    runner = Runner.of(tokenizer, device, precision, batch, progress)
    opened = None if isinstance(source, list) else open_source(source)
    files = source if isinstance(source, list) else opened.files if opened else []
    reader = PictureReader(files, runner.tokenizer.stride, progress, longer_side=longer_side, size=size, workers=workers)
    reader.skipped += opened.skipped if opened else []
    progress.begin("tokenizing", len(files), "pictures")
    found: dict[str, tuple[Tensor, TokenLayout]] = {}
    for names, images in batches_of_one_shape(reader, batch):
        tokens = runner.encode(to_unit_range(images))
        layout = runner.tokenizer.layout(*images.shape[2:])
        found |= {name: (row, layout) for name, row in zip(names, tokens, strict=True)}
    progress.end()
    if not found:
        raise DataError(f"none of the {len(files)} pictures can be read. {summary(reader.skipped)}")
    names = sorted(found)
    TokenFile(
        names=names,
        tokens=[found[name][0] for name in names],
        layouts=[found[name][1] for name in names],
        codebook_size=runner.tokenizer.quantize.codebook_size,
        tokenizer=str(Path(tokenizer).resolve()),
        fingerprint=runner.fingerprint,
        transform=reader.transform,
        precision=precision,
    ).save(out)
    return Tokenized(out, len(names), sum(len(tokens) for tokens, _ in found.values()), reader.skipped)


@reused_memory()
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
    """Turn a token file back into PNG pictures, under the names that the pictures had.

    Args:
        tokens: what ``tokenize`` wrote.
        out: folder for the pictures.
        tokenizer: the folder of the tokenizer; None takes the recorded one.
        overwrite: replace pictures that are there.
        workers: threads that write PNG files beside the model (0: none).

    Returns:
        The files, in the order of the token file.

    Raises:
        RunError: there is no such tokenizer, it is not the one that wrote these tokens, or a picture would be overwritten.
    """
    progress, file, folder = progress or Progress(), TokenFile.load(tokens), Path(out)
    if tokenizer is None and not Path(file.tokenizer).exists():
        raise RunError(f"{tokens} was written by the tokenizer {file.tokenizer}, which is not there any more. Name it with --tokenizer.")
    runner = Runner.of(tokenizer or file.tokenizer, device, precision, batch, progress)
    if runner.fingerprint != file.fingerprint:
        raise RunError(
            f"the tokenizer {tokenizer or file.tokenizer} is not the one that wrote {tokens}: its fingerprint is "
            f"{runner.fingerprint[:12]}, the file's {file.fingerprint[:12]}. Has it been trained further? "
            "Checkpoints of a run are tokenizers too."
        )
    paths = picture_paths(folder, file.names)
    in_the_way = [path for path in paths if path.exists()]
    if in_the_way and not overwrite:
        others = f" and {len(in_the_way) - 1} others exist" if len(in_the_way) > 1 else " exists"
        raise RunError(f"{in_the_way[0]}{others} already. Replace them with --overwrite, or name another --out.")
    check_writable(paths[0])
    progress.begin("decoding", len(file.names), "pictures")
    number = default_workers(workers)
    with ThreadPoolExecutor(max(1, number)) as writers:
        writing: list[Future[None]] = []
        for start, stop in _runs_of_one_layout(file.layouts, batch):
            images = runner.decode(torch.stack(file.tokens[start:stop]), file.layouts[start])
            _wait_for(writing)  # those of the batch before: no more than two batches are in memory
            writing = [writers.submit(write_png, path, image) for path, image in zip(paths[start:stop], images, strict=True)]
            if not number:
                _wait_for(writing)
            progress.advance(stop - start)
        _wait_for(writing)
    progress.end()
    return paths


@dataclass(frozen=True)
class Reconstructed:
    """What came back of one picture."""

    path: Path
    psnr: float
    num_tokens: int
    bytes: int


def reconstruct(
    photo: str | Path,
    tokenizer: ImageTokenizer | str | Path,
    out: str | Path | None = None,
    *,
    overwrite: bool = False,
    longer_side: int | None = LONGER_SIDE,
    device: str = "auto",
    precision: Precision = "float32",
    progress: Progress | None = None,
) -> Reconstructed:
    """Encode one picture, decode it again and write what came back to ``out`` (default: ``NAME-reconstruction.png`` in this folder).

    Raises:
        DataError: the picture cannot be read.
        RunError: ``out`` exists and ``overwrite`` is off.
    """
    path = Path(out) if out else Path(f"{Path(photo).stem}-reconstruction.png")
    if path.exists() and not overwrite:
        raise RunError(f"{path} exists already. Replace it with --overwrite, or name another --out.")
    check_writable(path)
    files, _ = find_pictures(photo)
    if Path(photo).is_dir():
        raise DataError(f"{photo} is a folder; name one picture, or use `smalto tokenize` and `smalto decode`.")
    progress = progress or Progress()
    runner = Runner.of(tokenizer, device, precision, 1, progress)
    reader = PictureReader(files, runner.tokenizer.stride, progress, longer_side=longer_side, workers=0)
    progress.begin("reconstructing", 1, "pictures")
    pictures = list(reader)
    progress.end()
    if not pictures:
        raise DataError(f"{photo} cannot be read: {reader.skipped[0].reason}.")
    images = to_unit_range(pictures[0][1])[None]
    tokens = runner.encode(images)
    image = runner.decode(tokens, runner.tokenizer.layout(*images.shape[2:]))
    write_png(path, image[0])
    bits = (runner.tokenizer.quantize.codebook_size - 1).bit_length()
    return Reconstructed(path, float(psnr(image, images)), tokens.numel(), -(-tokens.numel() * bits // 8))


def write_png(path: Path, image: Tensor) -> None:
    """Write an image [3, H, W] in [-1, 1] as PNG, in one step."""
    with aside(path) as temporary:
        Image.fromarray(to_uint8(image).permute(1, 2, 0).numpy()).save(temporary, "PNG")


def picture_paths(folder: Path, names: list[str]) -> list[Path]:
    """Where the decoded pictures go: below ``folder`` whatever the names say, as .png, and no two alike."""
    relative = [PurePosixPath(*[part for part in PurePosixPath(name).parts if part not in ("/", "..")] or ["picture"]) for name in names]
    taken = {str(parent).lower() for path in relative for parent in path.parents}  # a.jpg beside a folder a.png/
    chosen = []
    for path in relative:
        stem = path.stem.encode("utf-8", "surrogateescape")[:200].decode("utf-8", "surrogateescape")
        # a.jpg becomes a.png; a second a.* keeps its suffix: a.webp.png. Case does not tell files apart everywhere.
        endings = itertools.chain([".png"], (f"{path.suffix}{n or ''}.png" for n in itertools.count()))
        free = next(c for c in (path.with_name(stem + ending) for ending in endings) if str(c).lower() not in taken)
        taken.add(str(free).lower())
        chosen.append(folder / free)
    return chosen


def _wait_for(jobs: list[Future[None]]) -> None:
    for job in jobs:
        job.result()


def _runs_of_one_layout(layouts: list[TokenLayout], batch: int) -> Iterator[tuple[int, int]]:
    start = 0
    for stop in range(1, len(layouts) + 1):
        if stop == len(layouts) or layouts[stop] != layouts[start] or stop - start == batch:
            yield start, stop
            start = stop
