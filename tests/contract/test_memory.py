"""No matrix of N x K anywhere: in forward, backward or upkeep."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from smalto.quantizers import (
    CodebookUpdater,
    ProductVQConfig,
    QuantizerConfig,
    ResidualVQConfig,
    VectorQuantizerConfig,
)
from smalto.quantizers.statistics import add_op
from smalto.search import code_sums, tiled
from smalto.search.code_sums import code_sums_op
from smalto.search.nearest import nearest_op, search

N, K, C = 4096, 2048, 4  # N·K is a thousand times what a step needs


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operation made. A custom op hides what it does inside,
    so its body is run openly.
    """

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        bodies = {nearest_op: search} | {
            op._opoverload: op._init_fn for op in (code_sums_op, add_op)
        }
        if func in bodies:
            with self:
                return bodies[func](*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def vector(**settings: object) -> VectorQuantizerConfig:
    return VectorQuantizerConfig(codebook_size=K, latent_dim=C, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "config",
    [
        vector(),
        vector(codebook="ema"),
        vector(codebook="ema", metric="cosine", unit_codes=True, estimator="rotation"),
        vector(codebook="projected", estimator="diveq", code_dim=3),
        ResidualVQConfig(num_stages=2, stage=vector(codebook="ema")),
        ProductVQConfig(num_heads=2, head=VectorQuantizerConfig(codebook_size=K, latent_dim=2)),
    ],
    ids=lambda config: config.kind,
)
def test_no_n_by_k_matrix_in_forward_backward_or_upkeep(
    config: QuantizerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiled, "BUFFER_FLOATS", 2**18)
    quantizer = config.build()
    updater = CodebookUpdater(quantizer)
    z = torch.randn(1, C, 64, 64, requires_grad=True)
    with LargestTensor() as monitor:
        for _ in range(2):  # the k-means start, then averages and revival
            out = quantizer(z)
            (out.loss + out.quantized.sum()).backward()
            updater.step()
        quantizer.decode(quantizer.encode(z), quantizer.layout(64, 64))
    assert N * C <= monitor.elements < N * K / 8


def test_the_guard_sees_what_is_inside_an_operator() -> None:
    with LargestTensor() as monitor:
        code_sums(torch.randn(10, 3), torch.zeros(10, dtype=torch.int64), 1000)
        assert monitor.elements == 3000
        (torch.randn(100, 4) @ torch.randn(4, 200)).sum()
    assert monitor.elements == 20_000


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_65536_vectors_and_codes_stay_under_a_gigabyte() -> None:
    script = """
import torch
from smalto.quantizers import CodebookUpdater, VectorQuantizer
torch.set_num_threads(1)
quantizer = VectorQuantizer(65536, 4, codebook="ema")
updater = CodebookUpdater(quantizer, keep_codes=True)
for _ in range(2):
    out = quantizer(torch.randn(1, 4, 256, 256, requires_grad=True))
    (out.loss + out.quantized.sum()).backward()
    updater.step()
lines = open("/proc/self/status").read().splitlines()
print(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert 100 < float(done.stdout) < 1024  # MiB; one matrix of N x K would be 16 GiB
