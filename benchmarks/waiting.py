"""Claim: the command line's setting for threads that wait is near the best one, both if a process
has the cores for itself and if another one shares them.

OpenMP's threads spin before they sleep. Without a setting they spin for so long that two processes
on the same cores wait for each other; with none at all (PASSIVE) they must be woken each time.
Every setting is measured in fresh processes: one alone, then two at once.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

SETTINGS: dict[str, dict[str, str]] = {
    "default": {},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "GOMP_SPINCOUNT=100": {"GOMP_SPINCOUNT": "100"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
}
SECONDS = 6.0  # for each of the two jobs
ROUNDS = 2


def main() -> None:
    from machine import store

    found: dict[str, dict[str, list[float]]] = {name: {} for name in SETTINGS}
    for _ in range(ROUNDS):
        for name, variables in SETTINGS.items():
            for number, situation in ((1, "alone"), (2, "beside another")):
                for times in run(variables, number):
                    for job, milliseconds in times.items():
                        found[name].setdefault(f"{job}, {situation}", []).append(milliseconds)
            print(name, {k: round(statistics.mean(v), 1) for k, v in found[name].items()})
    result = {
        name: {key: round(statistics.mean(values), 2) for key, values in times.items()}
        for name, times in found.items()
    }
    print("stored in", store("waiting", {"milliseconds": result, "rounds": ROUNDS}))


def run(variables: dict[str, str], number: int) -> list[dict[str, float]]:
    """Run ``number`` processes at once; return the median times of each, in ms."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("OMP_", "GOMP_", "KMP_"))
    }
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "--job"],
            env=environment | variables,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(number)
    ]
    return [json.loads(process.communicate()[0].splitlines()[-1]) for process in processes]


def job() -> None:
    """Time training steps of the default recipe, then searches for the nearest codes."""
    import torch

    import smalto
    from smalto.search import nearest_codes

    torch.manual_seed(0)
    tokenizer = smalto.default_tokenizer()
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=1e-3)
    updater = smalto.CodebookUpdater(tokenizer, optimizer)
    images = torch.rand(16, 3, 64, 64) * 2 - 1
    updater.start([images])

    def train_step() -> None:
        optimizer.zero_grad()
        reconstruction, vq_loss, _ = tokenizer(images)
        ((reconstruction - images).square().mean() + vq_loss).backward()
        optimizer.step()
        updater.step()

    vectors = torch.randn(16384, 32)
    codebook = torch.randn(4096, 32)
    times = {
        "training step": median_time(train_step),
        "search": median_time(lambda: nearest_codes(vectors, codebook)),
    }
    print(json.dumps(times))


def median_time(function: Callable[[], object]) -> float:
    """Return the median time of a call in ms, after a second of warming up."""
    times: list[float] = []
    begun = time.perf_counter()
    while (now := time.perf_counter()) < begun + SECONDS:
        function()
        if now > begun + 1:
            times.append(1000 * (time.perf_counter() - now))
    return statistics.median(times)


if __name__ == "__main__":
    job() if "--job" in sys.argv else main()
