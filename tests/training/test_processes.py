"""Training in several processes: equal to one process with the same batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

from smalto.training.recipe import Recipe, change_recipe
from smalto.training.tokenizer_task import TokenizerTask
from tests.conftest import TINY
from tests.contract.test_processes import in_processes, join

pytestmark = pytest.mark.skipif(not distributed.is_gloo_available(), reason="torch without gloo")

STEPS = 20
ADVERSARIAL = {
    "losses.l1.weight": 0.5,
    "losses.adversarial.weight": 0.3,
    "losses.adversarial.start": 8,
    "losses.adversarial.lead": 4,
    "losses.adversarial.layers": 2,
    "losses.adversarial.width": 4,
    "optimizer.clip": 0.1,
}
SCALES = {
    "tokenizer.quantizer.kind": "multiscale",
    "tokenizer.quantizer.scales": [2, 4],  # of four phi two serve no scale
    "tokenizer.quantizer.scale.codebook_size": 16,
    "tokenizer.quantizer.scale.latent_dim": 8,
}
KINDS: dict[str, dict[str, Any]] = {
    "simple": {},
    "adversarial": ADVERSARIAL,
    "learned codes": {"tokenizer.quantizer.codebook": "learned", "optimizer.average": 0.9},
    "accumulated": {"optimizer.accumulate": 2, "optimizer.clip": 0.1},
    "multi-scale": SCALES,
    "decoder only": {"finetune.learn": "decoder"},
}


def recipe(kind: str) -> Recipe:
    settings = {key: value for key, value in TINY.items() if "multi" not in kind or "quantizer" not in key}
    return change_recipe(Recipe(), settings | {"data.batch": 8, "steps": STEPS} | KINDS[kind])


def trained(kind: str, rank: int, world: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """State after training on this process's rows of fixed batches, from the k-means start on."""
    chosen = recipe(kind)
    torch.manual_seed(0)
    tokenizer = chosen.tokenizer.build().to(dtype)
    generator = torch.Generator().manual_seed(1)
    batches = [torch.rand(8, 3, 16, 16, generator=generator, dtype=dtype) * 2 - 1 for _ in range(STEPS)]
    torch.manual_seed(rank)  # processes may differ in their own randomness: the discriminator's start is the first one's
    task = TokenizerTask(tokenizer, chosen, batches[0])
    task.start([batch.chunk(world)[rank] for batch in batches[:4]])
    for step, batch in enumerate(batches, start=1):
        figures = task.train_step(batch.chunk(world)[rank], step)
    state = {f"result.{name}": tensor for name, tensor in task.result.state_dict().items()}
    state |= {f"tokenizer.{name}": tensor for name, tensor in task.tokenizer.state_dict().items()}
    state["loss"] = torch.tensor(figures["loss"], dtype=torch.float64).round(decimals=5)
    return {name: tensor.clone() for name, tensor in state.items()}


def all_kinds(rank: int, world: int, meeting: str) -> dict[str, dict[str, Tensor]]:
    join(rank, world, meeting)
    return {f"{kind} {dtype}": trained(kind, rank, world, dtype) for kind in KINDS for dtype in (torch.float32, torch.float64)}


def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    first, second = in_processes(2, all_kinds, tmp_path)
    assert isinstance(first, dict)
    assert isinstance(second, dict)
    for kind in KINDS:
        for dtype, rtol, atol in ((torch.float32, 1e-4, 1e-6), (torch.float64, 1e-10, 1e-10)):
            alone = trained(kind, 0, 1, dtype)
            for name, tensor in first[f"{kind} {dtype}"].items():
                where = f"{kind} {dtype} {name}"
                assert torch.equal(tensor, second[f"{kind} {dtype}"][name]), where
                torch.testing.assert_close(tensor, alone[name], rtol=rtol, atol=atol, msg=lambda text, where=where: f"{where}: {text}")
