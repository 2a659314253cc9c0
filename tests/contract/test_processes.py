"""Upkeep in several processes: equal to one process that sees everything."""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from smalto.quantizers import CodebookUpdater, Quantizer
from tests.contract.kinds import C, build, latents

pytestmark = pytest.mark.skipif(not distributed.is_gloo_available(), reason="torch without gloo")

KINDS = [
    "learned",
    "ema",
    "ema-cosine",
    "ema-code_dim-rotation",
    "projected",
    "residual-ema",
    "product-ema",
    "product-shared",
]
STEPS = 12


def batch(step: int) -> Tensor:
    """What all processes together see at a step, [12, C, 3, 2]: shards of a dozen images."""
    return latents(batch=12, height=3, width=2, seed=step, dtype=torch.float64) * (1 + step)


SHARDS: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "equal": lambda z, rank, world: z.chunk(world)[rank],
    "unequal": lambda z, rank, world: z[:1] if rank == 0 else z[1:].chunk(world - 1)[rank - 1],
    "empty": lambda z, rank, world: z[:0] if rank == 0 else z.chunk(world - 1)[rank - 1],
    "all NaN": lambda z, rank, world: (
        torch.full_like(z[:2], torch.nan) if rank == 0 else z.chunk(world - 1)[rank - 1]
    ),
}


def upkeep(
    quantizer: Quantizer,
    rank: int = 0,
    world: int = 1,
    shards: str = "equal",
    steps: int = STEPS,
    **settings: object,
) -> list[Tensor]:
    """Train the codebooks alone, from the k-means start on; returns all state."""
    updater = CodebookUpdater(quantizer, decay_tokens=0.5, **settings)  # type: ignore[arg-type]
    for step in range(steps):
        quantizer(SHARDS[shards](batch(step), rank, world))
        updater.step()
    trackers = [
        tracker[key]
        for tracker in updater.state_dict()["trackers"].values()
        for key in ("idle", "use")
    ]
    return [tensor.clone() for tensor in (*quantizer.state_dict().values(), *trackers)]


def in_processes(
    world: int, job: Callable[..., object], tmp_path: Path, *arguments: object
) -> list[object]:
    """Run ``job(rank, world, *arguments)`` in ``world`` processes joined by gloo; what each one
    returned.
    """
    try:
        torch.multiprocessing.spawn(
            _process, (world, str(tmp_path), job, arguments), nprocs=world, join=True
        )
    except (
        torch.multiprocessing.ProcessExitedException
    ):  # now and then gloo's own threads abort after the last result is there
        if not all((tmp_path / f"{rank}.pt").is_file() for rank in range(world)):
            raise
    return [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]


def _process(
    rank: int, world: int, folder: str, job: Callable[..., object], arguments: tuple[object, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    result = job(rank, world, f"file://{folder}/meeting", *arguments)
    distributed.barrier()
    torch.save(result, f"{folder}/{rank}.pt")
    # Whoever leaves first resets connections that gloo's own threads of the others still watch, and
    # now and then they abort.
    end = time.monotonic() + 30
    while len(list(Path(folder).glob("*.pt"))) < world and time.monotonic() < end:
        time.sleep(0.01)
    distributed.destroy_process_group()


def join(rank: int, world: int, meeting: str) -> None:
    distributed.init_process_group(
        "gloo",
        init_method=meeting,
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )


def all_kinds_and_shards(rank: int, world: int, meeting: str) -> dict[str, list[Tensor]]:
    join(rank, world, meeting)
    return {
        f"{kind}, {shards}": upkeep(build(kind).double(), rank, world, shards)
        for kind in KINDS
        for shards in SHARDS
    }


@pytest.mark.parametrize("world", [2, 3])
def test_several_processes_are_one(world: int, tmp_path: Path) -> None:
    expected = {kind: upkeep(build(kind).double()) for kind in KINDS}
    results = in_processes(world, all_kinds_and_shards, tmp_path)
    for result in results:
        assert isinstance(result, dict)
        for name, tensors in result.items():
            for ours, first, reference in zip(
                tensors, results[0][name], expected[name.split(", ")[0]], strict=True
            ):  # type: ignore[index]
                assert torch.equal(ours, first), name
                torch.testing.assert_close(
                    ours,
                    reference,
                    rtol=1e-10,
                    atol=1e-10,
                    msg=lambda text, name=name: f"{name}: {text}",
                )


def many_steps(rank: int, world: int, meeting: str, built_before: bool) -> list[Tensor]:
    if not built_before:
        join(rank, world, meeting)
    quantizer = build(
        "ema", seed=rank
    )  # of different beginnings, as without DistributedDataParallel
    updater = CodebookUpdater(quantizer, decay_tokens=0.2)  # short, so that codes die and come back
    if built_before:
        join(rank, world, meeting)
    calls = []
    all_reduce = distributed.all_reduce

    def counting(tensor: Tensor, *rest: object, **more: object) -> object:
        calls.append(tensor.numel())
        return all_reduce(tensor, *rest, **more)

    distributed.all_reduce = counting
    codes, placed = None, 0
    for step in range(50):
        quantizer(latents(batch=2 + rank, seed=step * world + rank) + step * 0.2)
        updater.step()
        tracker = quantizer.codebook().clone()
        placed += 0 if codes is None else int(((tracker - codes).norm(dim=1) > 1.0).any())
        codes = tracker
    assert len(calls) == 50  # one collective a step ...
    assert len(set(calls[1:])) == 1  # ... of one size, once the codes are placed
    assert placed > 5, placed
    return [*quantizer.state_dict().values(), torch.tensor(updater.num_steps)]


@pytest.mark.parametrize("built_before", [True, False])
def test_codebooks_stay_identical_through_50_steps_of_revival(
    built_before: bool, tmp_path: Path
) -> None:
    first, *others = in_processes(3, many_steps, tmp_path, built_before)
    for other in others:
        for ours, reference in zip(other, first, strict=True):  # type: ignore[call-overload]
            assert torch.equal(ours, reference)


def start_and_mistakes(rank: int, world: int, meeting: str) -> list[Tensor]:
    join(rank, world, meeting)
    quantizer = build("residual-ema").double()
    updater = CodebookUpdater(quantizer)
    updater.start(SHARDS["unequal"](batch(0), rank, world))
    with pytest.raises(
        RuntimeError, match="saw no forward pass"
    ):  # in all processes at once: none waits for another
        updater.step()
    if rank == 0:
        quantizer(batch(1))
    updater.step()  # what one process saw is enough
    with pytest.raises(ValueError, match="no finite latents"):
        updater.start(torch.full((1, C, 2, 2), torch.nan, dtype=torch.float64))
    return list(quantizer.state_dict().values())


def test_start_is_shared_and_mistakes_do_not_hang(tmp_path: Path) -> None:
    quantizer = build("residual-ema").double()
    updater = CodebookUpdater(quantizer)
    updater.start(batch(0))
    quantizer(batch(1))
    updater.step()
    for result in in_processes(2, start_and_mistakes, tmp_path):
        for ours, reference in zip(result, quantizer.state_dict().values(), strict=True):  # type: ignore[call-overload]
            torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-10)


class Autoencoder(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.encoder, self.decoder = nn.Conv2d(C, C, 1), nn.Conv2d(C, C, 1)
        self.quantizer = build(kind)

    def forward(self, images: Tensor) -> Tensor:
        quantized, loss, _ = self.quantizer(self.encoder(images))
        return loss + (self.decoder(quantized) - images).square().mean()


def train(model: nn.Module, rank: int = 0, world: int = 1) -> list[Tensor]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02)
    updater = CodebookUpdater(model, optimizer, decay_tokens=1.0)
    for step in range(10):
        optimizer.zero_grad()
        model(batch(step % 3).chunk(world)[rank]).backward()
        optimizer.step()
        updater.step()
    return [tensor.detach().clone() for tensor in model.state_dict().values()]


def train_in_parallel(rank: int, world: int, meeting: str, kind: str) -> list[Tensor]:
    join(rank, world, meeting)
    return train(DistributedDataParallel(Autoencoder(kind).double()), rank, world)


@pytest.mark.parametrize("kind", ["learned", "ema", "residual-ema"])
def test_data_parallel_training_is_training(kind: str, tmp_path: Path) -> None:
    expected = train(Autoencoder(kind).double())
    for result in in_processes(2, train_in_parallel, tmp_path, kind):
        for ours, reference in zip(result, expected, strict=True):  # type: ignore[call-overload]
            torch.testing.assert_close(ours, reference, rtol=1e-8, atol=1e-8)
