"""Memory that stays with the process, and goes back afterwards."""

from __future__ import annotations

import subprocess
import sys

import pytest

from smalto.core import allocator as memory
from smalto.core.process_wide import ProcessWideSetting
from tests.conftest import ENVIRONMENT

_PAGES = """
import resource, sys
from contextlib import nullcontext
from pathlib import Path
import torch
from smalto.core.allocator import retain_freed_memory

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith("VmRSS"))
    return int(line.split()[1]) // 1024

with retain_freed_memory() if sys.argv[1] == "on" else nullcontext():
    for _ in range(30):  # until the heap has settled
        torch.ones(12_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(12_000_000)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    inside = resident()
print(inside - resident())
"""


@pytest.mark.skipif(memory.glibc() is None, reason="no glibc, or somebody tuned it")
def test_pages_are_asked_for_once_and_given_back() -> None:
    def run(mode: str) -> list[int]:
        done = subprocess.run(
            [sys.executable, "-c", _PAGES, mode],
            capture_output=True,
            text=True,
            check=True,
            env=ENVIRONMENT,
        )
        return [int(line) for line in done.stdout.split()]

    faults, given_back = run("on")
    plain, _ = run("off")
    assert faults < plain / 2
    assert given_back > 30  # MiB, of one tensor of 46


_LAYERS = """
import resource
from concurrent.futures import ThreadPoolExecutor
import torch
from smalto.core.allocator import retain_freed_memory

def layers():
    for megabytes in ((12, 33, 33, 33, 8, 2), (3, 30, 30, 15), (3, 16, 33, 33)):
        for layer in megabytes:  # two at a time are more than the 64 MiB of a thread's heap
            activations = torch.ones(layer * 250_000)

def faults():
    for _ in range(10):
        layers()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        layers()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with retain_freed_memory(), ThreadPoolExecutor(1) as threads:
    print(threads.submit(faults).result())
"""


@pytest.mark.skipif(memory.glibc() is None, reason="no glibc, or somebody tuned it")
def test_threads_keep_their_heaps() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _LAYERS], capture_output=True, text=True, check=True, env=ENVIRONMENT
    )
    assert int(done.stdout) < 1000  # hundreds of thousands if each pass maps its heaps again


_RETURNED = """
from pathlib import Path
import numpy
from smalto.core.allocator import release_freed_memory, retain_freed_memory

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith("VmRSS"))
    return int(line.split()[1]) // 1024

with retain_freed_memory():
    def held():
        before = resident()
        # 50 MiB; the last one keeps a heap from shrinking
        blocks = [numpy.ones(2**17, numpy.uint8) for _ in range(400)]
        last = blocks.pop()
        del blocks
        return resident() - before, last

    with release_freed_memory():
        returned, _ = held()
    kept, _ = held()
print(returned, kept)
"""


@pytest.mark.skipif(memory.glibc() is None, reason="no glibc, or somebody tuned it")
def test_memory_is_returned_at_once_where_it_is_asked_for() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _RETURNED],
        capture_output=True,
        text=True,
        check=True,
        env=ENVIRONMENT,
    )
    returned, kept = map(int, done.stdout.split())
    assert returned < 10
    assert kept > 40


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_settings_of_the_user_stay(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    assert memory.glibc() is None
    with memory.retain_freed_memory():
        pass


def test_it_nests_and_survives_exceptions() -> None:
    calls: list[str] = []
    setting = ProcessWideSetting(lambda: calls.append("begin"), lambda: calls.append("end"))
    with pytest.raises(RuntimeError), setting.hold():
        with setting.hold():
            pass
        assert calls == ["begin"]
        raise RuntimeError
    assert calls == ["begin", "end"]
