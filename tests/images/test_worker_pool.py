"""Worker processes: what comes back through shared memory, and what is left when a process dies."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest

from smalto.core.allocator import glibc
from smalto.images import worker_pool
from smalto.images.image_file import ImageFile
from smalto.images.reading import BadImage
from smalto.images.shared_memory import BYTES
from smalto.images.worker_pool import ReaderPool

NUMBER = 60


def files(number: int = NUMBER) -> list[ImageFile]:
    return [ImageFile(f"{i:03d}", Path("unused")) for i in range(number)]


def noise(file: ImageFile) -> tuple[numpy.ndarray, str, numpy.ndarray]:
    """Arrays of many sizes: most find room beside each other, every tenth is larger than a slot,
    some are empty.
    """
    i = int(file.name)
    length = 2 * BYTES if i % 10 == 9 else 7919 * (i % 7)
    return (
        numpy.random.default_rng(i).integers(0, 256, length, dtype=numpy.uint8),
        file.name,
        numpy.arange(i, dtype=numpy.int32),
    )


def noise_with_a_death(file: ImageFile) -> tuple[numpy.ndarray, str, numpy.ndarray]:
    if file.name == "030":
        os._exit(9)
    return noise(file)


@pytest.mark.parametrize("together", [1, 8])
def test_arrays_come_back_whole_and_are_the_receivers_own(
    together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    with ReaderPool(2, noise) as decoder:
        found = list(
            decoder.in_order(files(), together)
        )  # all are kept: a slot that is used again must not change them
    assert [file.name for file, _ in found] == [file.name for file in files()]
    for file, outcome in found:
        assert isinstance(outcome, tuple)
        for one, other in zip(outcome, noise(file), strict=True):
            assert numpy.array_equal(one, other)
        assert outcome[0].flags.writeable


def pages_cleared(file: ImageFile) -> int:
    """Page faults of a worker that ten times takes and frees the memory of an image on its way."""
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        steps = [numpy.ones(600_000, numpy.uint8) for _ in range(4)]
        del steps
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(glibc() is None, reason="no glibc, or somebody tuned it")
def test_workers_keep_the_memory_of_a_image_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    with ReaderPool(1, pages_cleared) as decoder:
        *_, (_, last) = decoder.in_order(files(20))
    assert isinstance(last, int)
    assert last < 200  # they have 5,860 pages


def test_the_death_of_a_worker_mixes_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    with ReaderPool(2, noise_with_a_death) as decoder:
        found = list(decoder.in_order(files(), 4))
    for file, outcome in found:
        if file.name == "030":
            assert "crashed" in str(outcome)
        else:
            assert isinstance(outcome, tuple)
            assert outcome[1] == file.name
            assert numpy.array_equal(outcome[0], noise(file)[0])


def test_a_crash_starts_few_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    started: list[int] = []
    start = worker_pool._start_workers

    def count(number: int, shared: Any) -> Any:
        started.append(number)
        return start(number, shared)

    monkeypatch.setattr(worker_pool, "_start_workers", count)
    files = [ImageFile(f"{n}", "crash" if n == 5 else "") for n in range(40)]
    with ReaderPool(2, crash_or_name) as pool:
        outcomes = [outcome for _, outcome in pool.in_order(files, 4)]
    assert [outcome for outcome in outcomes if not isinstance(outcome, BadImage)] == [
        f"{n}" for n in range(40) if n != 5
    ]
    assert sorted(started) in ([1, 1, 2, 2], [1, 2, 2])


def crash_or_name(file: ImageFile) -> str:
    if file.path == "crash":
        os._exit(1)
    return file.name


JOB = """
import os, sys, time
from smalto.images.worker_pool import ReaderPool

def wait(seconds):
    print(os.getpid(), flush=True)
    time.sleep(seconds)

if __name__ == "__main__":
    with ReaderPool(1, wait) as decoder:
        list(decoder.in_order([60]))
"""


def test_workers_end_with_a_job_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(JOB)
    job = subprocess.Popen([sys.executable, tmp_path / "job.py"], stdout=subprocess.PIPE, text=True)
    assert job.stdout is not None
    assert int(job.stdout.readline()) != job.pid  # the worker is at work
    job.kill()
    job.communicate(timeout=30)  # ends when all who could write to that pipe have ended
