"""Claims: a store of 1,000,000 rows of 680 tokens opens in under 0.2 s and gives a random batch of
256 rows in under 10 ms; a full chunk-shuffled pass is at least 15 times as fast as one .npy file
a row (as LlamaGen writes codes) and twice as fast as LMDB of pickled rows (as vq-vae-2 writes
them), both on samples of 50,000 rows; at most 2.1 bytes a token on disk; the time to append and
to open does not grow with the number of rows. And where it bends: up to 100,000 fragments, in
commits of 1,000.

    python benchmarks/store.py [FOLDER]

Files of all contenders were written shortly before they are read, so all read from the memory of
the system: what is compared is the work of reading, not the disk.
"""

from __future__ import annotations

import argparse
import json
import pickle
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import lmdb
import numpy
import torch
from machine import store as store_result

from smalto.store.check import check_store
from smalto.store.dataset import TokenDataset
from smalto.store.lance_table import LanceTable
from smalto.store.schema import StoreHeader, TokenRow, rows_to_table
from smalto.store.token_store import TokenStore
from smalto.store.writer import MANY_SMALL_FILES

ROWS, SAMPLE, LENGTH, CODES, BATCH = 1_000_000, 50_000, 680, 4096, 256
COMMIT = 4096
SCALES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
FRAGMENTS, FRAGMENTS_PER_COMMIT = 100_000, 1000
ROUNDS = 5


def header() -> StoreHeader:
    grids = tuple((n, n) for n in SCALES)
    return StoreHeader(
        fingerprint="0" * 64,
        kind="multiscale",
        codebook_size=CODES,
        grids=grids,
        transform="random",
        precision="float32",
    )


def tokens(start: int, stop: int) -> numpy.ndarray:
    return numpy.random.default_rng(start).integers(
        0, CODES, (stop - start, LENGTH), dtype=numpy.uint16
    )


def rows(start: int, stop: int) -> list[TokenRow]:
    """As of ImageNet: 1,300 images a class."""
    return [
        TokenRow(
            f"n{i // 1300:08d}/n{i // 1300:08d}_{i}.JPEG",
            row,
            None,
            f"n{i // 1300:08d}",
            375,
            500,
            (0, 62, 375, 375),
            110_000,
            i,
            b"x",
        )
        for i, row in zip(range(start, stop), tokens(start, stop), strict=True)
    ]


def median_of(action: Callable[[], Any], times: int) -> float:
    seconds = []
    for _ in range(times):
        begun = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def build(folder: Path) -> dict[str, Any]:
    """Write a million rows as a job does: commits of 4,096 rows, small files joined now and
    then.
    """
    store, appends, opens, begun = TokenStore.create(folder, header()), [], [], time.perf_counter()
    compacting = 0.0
    for start in range(0, ROWS, COMMIT):
        batch = rows(start, min(start + COMMIT, ROWS))
        first = time.perf_counter()
        store.append(batch)
        second = time.perf_counter()
        TokenStore.open(folder)
        appends.append(second - first)
        opens.append(time.perf_counter() - second)
        if store.num_small_files > MANY_SMALL_FILES:
            first = time.perf_counter()
            store.compact(timedelta(0), lazily=True)
            compacting += time.perf_counter() - first
    seconds = time.perf_counter() - begun
    first = time.perf_counter()
    store.compact(timedelta(0))
    tenth = len(appends) // 10
    milliseconds = {
        name: {
            "first tenth": 1000 * statistics.median(seconds[:tenth]),
            "last tenth": 1000 * statistics.median(seconds[-tenth:]),
        }
        for name, seconds in (("append_4096_rows_ms", appends), ("open_while_growing_ms", opens))
    }
    return {
        "rows": len(store),
        "seconds_to_write": seconds,
        "seconds_joining_files": compacting + time.perf_counter() - first,
        **milliseconds,
        "bytes_per_token": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        / (len(store) * LENGTH),
    }


def read(folder: Path) -> dict[str, Any]:
    random, store = numpy.random.default_rng(0), TokenStore.open(folder)
    draw = lambda: random.choice(len(store), BATCH, replace=False)  # noqa: E731
    names = [row.id for row in rows(500_000, 504_096)]
    return {
        "open_ms": 1000 * median_of(lambda: TokenStore.open(folder), 50),
        "open_and_first_batch_ms": 1000
        * median_of(lambda: TokenStore.open(folder).tokens_at(draw(), store.classes()[:1]), 5),
        "random_batch_of_256_ms": 1000 * median_of(lambda: store.tokens_at(draw(), []), 100),
        "random_batch_of_256_all_columns_ms": 1000 * median_of(lambda: store.batch(draw()), 100),
        "look_up_4096_ids_ms": 1000 * median_of(lambda: store.known(names), 20),
        "second_job_look_up_rows_per_second": 4096 / median_of(lambda: store.known(names), 20),
    }


def ours(folder: Path) -> Callable[[], Iterator[torch.Tensor]]:
    dataset = TokenDataset(folder, BATCH)

    def run() -> Iterator[torch.Tensor]:
        dataset.epoch += 1
        for batch in dataset:
            yield batch["tokens"]

    return run


def npy(folder: Path) -> Callable[[], Iterator[torch.Tensor]]:
    """LlamaGen: one .npy file a row (and one for its label, which is left out here)."""
    folder.mkdir(parents=True)
    for i, row in enumerate(tokens(0, SAMPLE)):
        numpy.save(folder / f"{i}.npy", row)

    def run() -> Iterator[torch.Tensor]:
        order = numpy.random.permutation(SAMPLE)
        for start in range(0, SAMPLE, BATCH):
            yield torch.from_numpy(
                numpy.stack(
                    [numpy.load(folder / f"{i}.npy") for i in order[start : start + BATCH]]
                ).astype(numpy.int64)
            )

    return run


def pickled(folder: Path) -> Callable[[], Iterator[torch.Tensor]]:
    """vq-vae-2: pickled rows in LMDB, in random order."""
    environment = lmdb.open(str(folder), map_size=2**32)
    with environment.begin(write=True) as transaction:
        for i, row in enumerate(tokens(0, SAMPLE)):
            transaction.put(str(i).encode(), pickle.dumps(row))

    def run() -> Iterator[torch.Tensor]:
        order = numpy.random.permutation(SAMPLE)
        with environment.begin() as transaction:
            for start in range(0, SAMPLE, BATCH):
                batch = [
                    pickle.loads(transaction.get(str(i).encode()))
                    for i in order[start : start + BATCH]
                ]
                yield torch.from_numpy(numpy.stack(batch).astype(numpy.int64))

    return run


def passes(folder: Path, large: Path) -> dict[str, Any]:
    """Microseconds a row of full shuffled passes that end in int64 tensors; the contenders take
    turns.
    """
    small = TokenStore.create(folder / "small", header())
    for start in range(0, SAMPLE, COMMIT):
        small.append(rows(start, min(start + COMMIT, SAMPLE)))
    small.compact(timedelta(0))
    contenders = {
        "smalto, 1,000,000 rows": (ours(large), ROWS),
        "smalto": (ours(folder / "small"), SAMPLE),
        "one .npy file a row": (npy(folder / "npy"), SAMPLE),
        "LMDB of pickled rows": (pickled(folder / "lmdb"), SAMPLE),
    }
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(ROUNDS):
        for name, (run, number) in contenders.items():
            begun = time.perf_counter()
            counted = sum(len(batch) for batch in run())
            found[name].append(1e6 * (time.perf_counter() - begun) / number)
            assert counted == number
    middle = {name: statistics.median(values) for name, values in found.items()}
    ratios = {
        name: statistics.median(
            peer / own for peer, own in zip(found[name], found["smalto"], strict=True)
        )
        for name in list(contenders)[2:]
    }
    return {
        "sample": SAMPLE,
        "rounds": ROUNDS,
        "microseconds_a_row": middle,
        "times_as_fast_as": ratios,
    }


def fragments(folder: Path) -> list[dict[str, Any]]:
    """Stores of many small files that are never compacted: one row per fragment, 1,000 fragments
    per commit.
    """
    table = TokenStore.create(folder, header())._table
    batch, found = [rows(i, i + 1) for i in range(FRAGMENTS_PER_COMMIT)], []
    written = [table.write(rows_to_table(one, header()))[0] for one in batch]
    for number in range(FRAGMENTS // FRAGMENTS_PER_COMMIT):
        begun = time.perf_counter()
        table.commit(written)  # the same files again and again: what is measured is the manifest
        seconds = time.perf_counter() - begun
        if number + 1 in (1, 3, 10, 30, 100):
            found.append(
                {
                    "fragments": (number + 1) * FRAGMENTS_PER_COMMIT,
                    "commit_ms": 1000 * seconds,
                    "open_ms": 1000 * median_of(lambda: LanceTable.open(folder), 5),
                    "manifest_mib": max(
                        file.stat().st_size for file in (folder / "_versions").iterdir()
                    )
                    / 2**20,
                    "metadata_mib": sum(
                        file.stat().st_size for file in (folder / "_versions").iterdir()
                    )
                    / 2**20,
                    "random_batch_of_256_ms": 1000 * median_of(lambda: _random_take(table), 3),
                }
            )
            print(found[-1], flush=True)
    return found


def _random_take(table: LanceTable) -> Any:
    return table.take(
        numpy.sort(numpy.random.default_rng(0).choice(len(table), BATCH, replace=False)).tolist(),
        ["tokens"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder",
        nargs="?",
        type=Path,
        default=Path("runs/bench-store"),
        help="for the stores; 6 GB; removed afterwards",
    )
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True)
    try:
        result: dict[str, Any] = {"tokens_a_row": LENGTH, "writing": build(folder / "large")}
        print(json.dumps(result, indent=2), flush=True)
        result["reading"] = read(folder / "large")
        print(json.dumps(result["reading"], indent=2), flush=True)
        result["passes"] = passes(folder, folder / "large")
        print(json.dumps(result["passes"], indent=2), flush=True)
        begun = time.perf_counter()
        assert check_store(TokenStore.open(folder / "large")).ok
        result["verify_rows_per_second"] = ROWS / (time.perf_counter() - begun)
        result["many_fragments"] = fragments(folder / "fragments")
    finally:
        shutil.rmtree(folder)
    print("stored in", store_result("store", result))


if __name__ == "__main__":
    main()
