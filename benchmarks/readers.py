"""Is a pool of our own worth keeping beside `torch.utils.data.DataLoader` with spawned workers?

    python benchmarks/readers.py [FOLDER]

Both read the same JPEG files by the same `Transform.prepare` in as many worker processes, eight
files a job, two jobs ahead of each worker, and hand over uint8 arrays in the order of the files.
Each pass is a process of its own; the two take turns. The start of the workers counts apart. Then
a file that kills its worker lies among them: who still delivers the others?
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from machine import store
from tokenization import SHAPES, SIDE, write_images

from smalto.images.finding import find_images
from smalto.images.image_file import ImageFile
from smalto.images.reading import BadImage
from smalto.images.transforms import Prepared, Transform
from smalto.images.worker_pool import ReaderPool

NUMBER, TOGETHER, AHEAD, ROUNDS = 6000, 8, 2, 5
DEADLY = "999999.jpg"


class Prepare:
    """`Transform.prepare`, but for the one file that ends its process, as a broken decoder does."""

    def __init__(self) -> None:
        self.transform = Transform(stride=4, size=SIDE)

    def __call__(self, file: ImageFile) -> Prepared:
        if file.name.endswith(DEADLY):
            os.kill(os.getpid(), signal.SIGKILL)
        return self.transform.prepare(file)


class Files(torch.utils.data.Dataset[Any]):
    """The same files as a data set of torch; arrays become tensors, which it shares."""

    def __init__(self, files: list[ImageFile]) -> None:
        self.files, self.prepare = files, Prepare()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        prepared = self.prepare(self.files[index])
        return torch.from_numpy(prepared.views), prepared._replace(views=None)  # type: ignore[arg-type]


def ours(files: list[ImageFile], workers: int) -> Iterator[int]:
    with ReaderPool(workers, Prepare()) as pool:
        for _, image in pool.in_order(files, TOGETHER):
            yield 0 if isinstance(image, BadImage) else int(image.views[0, 0, 0, 0])


def torchs(files: list[ImageFile], workers: int) -> Iterator[int]:
    loader = torch.utils.data.DataLoader(
        Files(files),
        batch_size=TOGETHER,
        num_workers=workers,
        prefetch_factor=AHEAD,
        collate_fn=list,
        multiprocessing_context="spawn",
    )
    for group in loader:
        for views, _ in group:
            yield int(views[0, 0, 0, 0])


READERS = {"ReaderPool": ours, "DataLoader": torchs}


def run(reader: str, folder: str, workers: int) -> dict[str, Any]:
    """One pass: images a second from the second group on, and seconds until the first image."""
    files, _ = find_images(folder)
    begun, delivered, failure = time.perf_counter(), 0, ""
    first = begun
    try:
        for delivered, _ in enumerate(READERS[reader](files, workers), start=1):
            if delivered == 4 * TOGETHER * workers:  # all workers run
                first = time.perf_counter()
    except RuntimeError as error:
        failure = str(error)
    seconds = time.perf_counter() - first
    return {
        "files": len(files),
        "delivered": delivered,
        "start_seconds": first - begun,
        "images_per_second": (delivered - 4 * TOGETHER * workers) / seconds,
        "failure": failure,
    }


def in_a_process(reader: str, folder: Path, workers: int) -> dict[str, Any]:
    command = [sys.executable, __file__, str(folder), "--pass", reader, "--workers", str(workers)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def compare(folder: Path, workers: int) -> dict[str, Any]:
    passes: dict[str, list[dict[str, Any]]] = {reader: [] for reader in READERS}
    for _ in range(ROUNDS):
        for reader in READERS:
            passes[reader].append(in_a_process(reader, folder, workers))
    row: dict[str, Any] = {"workers": workers}
    for key in ("images_per_second", "start_seconds"):
        median = {r: statistics.median(p[key] for p in done) for r, done in passes.items()}
        row[key] = median | {"ratio": median["ReaderPool"] / median["DataLoader"]}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder",
        nargs="?",
        type=Path,
        default=Path("runs/bench-readers"),
        help="for the images; 1 GB; removed afterwards",
    )
    parser.add_argument("--pass", dest="reader", choices=READERS, help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, default=2, help="worker processes (default: 2)")
    arguments = parser.parse_args()
    if arguments.reader:
        print(json.dumps(run(arguments.reader, str(arguments.folder), arguments.workers)))
        return
    folder: Path = arguments.folder
    shutil.rmtree(folder, ignore_errors=True)
    rows = []
    for name, (width, height) in SHAPES.items():
        write_images(folder / name, NUMBER, width, height)
        row = {"jpeg": name, **compare(folder / name, arguments.workers)}
        rows.append(row)
        speed, start = row["images_per_second"], row["start_seconds"]
        print(
            f"{name}: ReaderPool {speed['ReaderPool']:.0f} images/s, DataLoader "
            f"{speed['DataLoader']:.0f}: {speed['ratio']:.2f} times; first images after "
            f"{start['ReaderPool']:.1f} s and {start['DataLoader']:.1f} s",
            flush=True,
        )
    deadly = folder / "deadly"
    write_images(deadly, 400, *SHAPES["256 x 256"])
    (deadly / "000" / "000200.jpg").rename(deadly / "000" / f"000200-{DEADLY}")
    crash = {reader: in_a_process(reader, deadly, arguments.workers) for reader in READERS}
    for reader, result in crash.items():
        print(f"a file kills its worker: {reader} hands over {result['delivered']} of 400")
    shutil.rmtree(folder)
    print(store("readers", {"side": SIDE, "rounds": ROUNDS, "rows": rows, "crash": crash}))


if __name__ == "__main__":
    main()
