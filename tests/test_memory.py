"""Memory that stays with the process, and goes back afterwards."""

from __future__ import annotations

import subprocess
import sys

import pytest

from smalto import memory
from tests.conftest import ENVIRONMENT

_FAULTS = """
import resource, sys
from contextlib import nullcontext
import torch
from smalto.memory import reused_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

with reused_memory() if sys.argv[1] == "on" else nullcontext():
    for _ in range(20):  # until the heap has settled
        torch.ones(12_000_000)
    before = faults()
    for _ in range(10):
        torch.ones(12_000_000)
    print(faults() - before)
before = faults()
for _ in range(10):
    torch.ones(12_000_000)
print(faults() - before)
"""


@pytest.mark.skipif(memory._glibc() is None, reason="no glibc, or somebody tuned it")
def test_pages_are_asked_for_once() -> None:
    def run(mode: str) -> list[int]:
        done = subprocess.run([sys.executable, "-c", _FAULTS, mode], capture_output=True, text=True, check=True, env=ENVIRONMENT)
        return [int(line) for line in done.stdout.split()]

    inside, after = run("on")
    plain, _ = run("off")
    assert inside < plain / 5
    assert after > plain / 2


def test_settings_of_the_user_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX_", "1")
    assert memory._glibc() is None
    with memory.reused_memory():
        pass


def test_it_nests_and_survives_exceptions() -> None:
    with pytest.raises(RuntimeError), memory.reused_memory(), memory.reused_memory():
        assert len(memory._inside) == 2
        raise RuntimeError
    assert not memory._inside
