"""Faults of other libraries, each as a test that ours passes.

Those of vector-quantize-pytorch 1.32; what concerns FoundationVision/VAR is with the multi-scale
tokenizer.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from smalto.core.errors import InputError
from smalto.quantizers import (
    CodebookUpdater,
    EMACodebook,
    ResidualVQConfig,
    Revive,
    VectorQuantizer,
    VectorQuantizerConfig,
)
from tests.contract import test_memory, test_processes
from tests.contract.kinds import latents


def test_a_learned_codebook_can_be_normalized_and_has_a_beta() -> None:
    z = latents()
    losses = {}
    for beta in (0.0, 0.5):
        torch.manual_seed(0)
        quantizer = VectorQuantizer(20, 6, beta=beta, metric="cosine", unit_codes=True)
        losses[beta] = quantizer(z).loss.item()
        torch.testing.assert_close(quantizer(z).quantized.norm(dim=1), torch.ones(2, 3, 4))
        assert quantizer.embedding.weight.requires_grad
    assert losses[0.5] == pytest.approx(1.5 * losses[0.0])


def test_forward_writes_no_state_so_two_losses_have_right_gradients() -> None:
    # A forward that moves its own codes makes the graph of an earlier call wrong, or refuses
    # backward.
    quantizer = VectorQuantizer(20, 6, codebook="ema")
    updater = CodebookUpdater(quantizer, keep_codes=True)
    z = latents().requires_grad_()
    first = quantizer(z)
    second = quantizer(z * 2)
    codes = quantizer.embedding.weight.clone()
    (first.loss + second.loss).backward()
    assert z.grad is not None
    together = z.grad.clone()
    z.grad = None
    for factor in (1, 2):
        quantizer(z * factor).loss.backward()
    torch.testing.assert_close(z.grad, together)
    assert torch.equal(quantizer.embedding.weight, codes)
    updater.step()
    assert not torch.equal(quantizer.embedding.weight, codes)


def test_the_residual_gradient_does_not_grow_with_depth() -> None:
    for depth in (1, 8):
        quantizer = ResidualVQConfig(
            num_stages=depth,
            stage=VectorQuantizerConfig(codebook_size=20, latent_dim=6, codebook="ema"),
        ).build()
        z = latents().requires_grad_()
        quantizer(z).quantized.sum().backward()
        assert z.grad is not None
        assert torch.equal(z.grad, torch.ones_like(z))


def test_k_means_does_not_run_in_evaluation() -> None:
    quantizer = VectorQuantizer(20, 6, codebook="ema")
    updater = CodebookUpdater(quantizer)
    before = quantizer.embedding.weight.clone()
    quantizer.eval()(latents())
    assert torch.equal(quantizer.embedding.weight, before)
    with pytest.raises(RuntimeError):
        updater.step()
    assert torch.equal(quantizer.embedding.weight, before)


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch without gloo")
def test_a_module_built_before_the_process_group_synchronizes(tmp_path: Path) -> None:
    first, second = test_processes.in_processes(2, _built_before, tmp_path)
    assert torch.equal(first, second)  # type: ignore[arg-type]


def _built_before(rank: int, world: int, meeting: str) -> Tensor:
    quantizer = VectorQuantizer(20, 6, codebook="ema")
    updater = CodebookUpdater(quantizer)
    test_processes.join(rank, world, meeting)
    for step in range(3):
        quantizer(latents(seed=10 * step + rank))
        updater.step()
    return quantizer.embedding.weight.clone()


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch without gloo")
def test_a_process_with_nothing_valid_does_not_hang_the_others(tmp_path: Path) -> None:
    first, second = test_processes.in_processes(2, _nothing_valid, tmp_path)
    assert torch.equal(first, second)  # type: ignore[arg-type]


def _nothing_valid(rank: int, world: int, meeting: str) -> Tensor:
    test_processes.join(rank, world, meeting)
    quantizer = VectorQuantizer(20, 6, codebook="ema")
    updater = CodebookUpdater(quantizer)
    for step in range(3):
        quantizer(latents(seed=step) * (math.nan if rank else 1.0))
        updater.step()
    return quantizer.embedding.weight.clone()


def test_few_vectors_for_many_codes_do_not_replace_the_codebook() -> None:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(512, 6, codebook="ema")
    updater = CodebookUpdater(quantizer, revive=Revive())
    updater.start(latents(batch=400))
    before = quantizer.embedding.weight.clone()
    for step in range(20):
        quantizer(
            latents(batch=1, height=4, width=8, seed=1000 + step)
        )  # 32 vectors: 480 codes and more get none
        updater.step()
    moved = ((quantizer.embedding.weight - before).norm(dim=1) > 0.5).float().mean()
    assert float(moved) < 0.02


def test_memory_does_not_grow_with_n_times_k() -> None:
    quantizer = VectorQuantizer(2048, 4, codebook="ema")
    updater = CodebookUpdater(quantizer, keep_codes=True)
    with test_memory.LargestTensor() as monitor:
        quantizer(torch.randn(1, 4, 256, 256))
        updater.step()
    assert monitor.elements < 65536 * 2048 / 20


def test_minus_one_is_no_code() -> None:
    quantizer = VectorQuantizer(20, 6)
    with pytest.raises(InputError, match="from -1"):
        quantizer.decode(torch.full((1, 4), -1), quantizer.layout(2, 2))


def test_one_nan_token_does_not_poison_a_code() -> None:
    quantizer = VectorQuantizer(20, 6, codebook="ema")
    twin = copy.deepcopy(quantizer)
    updaters = [CodebookUpdater(q, keep_codes=True) for q in (quantizer, twin)]
    for step in range(5):
        z = latents(seed=step)
        broken = torch.cat([z, torch.full_like(z[:1], math.nan)])
        quantizer(broken)
        twin(z)
        for updater in updaters:
            updater.step()
        assert updaters[0].num_not_finite == 12
    assert isinstance(quantizer.embedding, EMACodebook)
    assert bool(quantizer.embedding.ema_sums.isfinite().all())
    assert torch.equal(quantizer.embedding.weight, twin.embedding.weight)
    assert F.mse_loss(quantizer(latents()).quantized, twin(latents()).quantized) == 0
