"""Claim: a training step of an EMA quantizer (forward, backward, update) is many times faster than
vector-quantize-pytorch's and needs a tenth of its memory where the codebook is large.

Both run in one process, interleaved in random order; medians. Peak memory is taken in a fresh
process each (Linux).
"""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from machine import peak_mib, store
from torch import Tensor
from vector_quantize_pytorch import VectorQuantize

from smalto import CodebookUpdater, VectorQuantizer

# (N, K, D), how many times faster it should be, and how many steps are measured
SHAPES = [((16384, 16384, 8), 20, 5), ((16384, 4096, 32), 8, 7), ((16384, 1024, 64), 4, 11)]
LARGE = (4096, 262144, 16)
SIDE = 64


def ours(shape: tuple[int, int, int]) -> Callable[[Tensor], None]:
    quantizer = VectorQuantizer(shape[1], shape[2], codebook="ema")
    updater = CodebookUpdater(quantizer, keep_codes=True)

    def step(latents: Tensor) -> None:
        out = quantizer(latents)
        (out.loss + out.quantized.square().mean()).backward()
        updater.step()

    return step


def peer(shape: tuple[int, int, int]) -> Callable[[Tensor], None]:
    quantizer = VectorQuantize(
        dim=shape[2], codebook_size=shape[1], accept_image_fmap=True
    )  # as it comes: without revival, which ours has

    def step(latents: Tensor) -> None:
        quantized, _, loss = quantizer(latents)
        (loss.sum() + quantized.square().mean()).backward()

    return step


CONTENDERS = {"smalto": ours, "vector-quantize-pytorch": peer}


def latents(shape: tuple[int, int, int], seed: int) -> Tensor:
    """A map [B, D, 64, 64] of N vectors."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(
        shape[0] // SIDE**2, shape[2], SIDE, SIDE, generator=generator
    ).requires_grad_()


def memory(name: str, shape: tuple[int, int, int]) -> tuple[float, float]:
    """MiB of a fresh process: what three steps add to its peak, and the peak itself."""
    arguments = [sys.executable, __file__, "memory", name, *map(str, shape)]
    printed = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout.split()
    return float(printed[0]), float(printed[1])


def print_memory(name: str, shape: tuple[int, int, int]) -> None:
    small = (SIDE**2, 64, shape[2])
    CONTENDERS[name](small)(latents(small, 0))  # libraries are loaded and threads made
    before = peak_mib()
    step = CONTENDERS[name](shape)
    for seed in range(3):
        step(latents(shape, seed))
    print(peak_mib() - before, peak_mib())


def main() -> None:
    rows = []
    for shape, wanted, repeats in SHAPES:
        steps = {name: make(shape) for name, make in CONTENDERS.items()}
        seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
        for repeat in range(repeats + 2):
            for name, step in random.sample(list(steps.items()), len(steps)):
                z = latents(shape, repeat)
                time.sleep(0.05)  # the threads of the one before stop spinning
                begun = time.perf_counter()
                step(z)
                if repeat > 1:  # the first ones are a warm-up
                    seconds[name].append(time.perf_counter() - begun)
        mine, theirs = (statistics.median(seconds[name]) for name in CONTENDERS)
        extra = {name: memory(name, shape)[0] for name in CONTENDERS}
        row = {
            "shape": "x".join(map(str, shape)),
            "smalto_ms": round(1000 * mine, 1),
            "peer_ms": round(1000 * theirs, 1),
            "ratio": round(theirs / mine, 1),
            "wanted": wanted,
            "smalto_extra_mib": round(extra["smalto"], 1),
            "peer_extra_mib": round(extra["vector-quantize-pytorch"], 1),
            "memory_share": round(extra["smalto"] / extra["vector-quantize-pytorch"], 3),
        }
        rows.append(row)
        print(row, flush=True)
    large = {
        "shape": "x".join(map(str, LARGE)),
        "process_mib": round(memory("smalto", LARGE)[1], 1),
    }
    print(large)
    print("stored in", store("step", {"rows": rows, "large": large}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["memory"]:
        n, k, d = map(int, sys.argv[3:6])
        print_memory(sys.argv[2], (n, k, d))
    else:
        main()
