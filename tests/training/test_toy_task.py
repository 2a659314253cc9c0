"""The real trainer with a task that has nothing to do with images: a linear model on random
batches.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from smalto.core import distributed
from smalto.core.errors import RunError
from smalto.core.progress import Progress
from smalto.training.random_state import seeded
from smalto.training.recipe import Recipe, change_recipe, recipe_toml
from smalto.training.run_folder import RunFolder, Split, read_jsonl
from smalto.training.task import MonitoredMetric
from smalto.training.trainer import Interrupted, Trainer
from tests.conftest import ENVIRONMENT
from tests.contract.test_processes import in_processes, join

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


class ToyRecipe(Recipe):
    kind: Literal["toy"] = "toy"


class RandomBatches:
    """Inputs [8, 3] and what a fixed linear map makes of them; the position is the number of
    batches.
    """

    def __init__(self, fails_at: int = 0) -> None:
        self.number = 0
        self.fails_at = fails_at

    def __next__(self) -> tuple[Tensor, Tensor]:
        self.number += 1
        if self.number == self.fails_at:
            raise OSError("the drive is away")
        inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(self.number))
        return inputs, inputs @ torch.tensor([[1.0], [-2.0], [0.5]])

    def state_dict(self) -> int:
        return self.number

    def load_state_dict(self, states: list[int]) -> None:
        self.number = states[0]


class LinearTask:
    device = CPU
    batch_size = 8

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(3, 1)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.05)
        self.monitored = [
            MonitoredMetric(
                "loss",
                lambda average, best: f"loss rose to {average:.2f}" if average > 2 * best else None,
                higher_is_better=False,
            )
        ]

    def train_step(self, batch: tuple[Tensor, Tensor], step: int) -> dict[str, float]:
        inputs, targets = batch
        loss = nn.functional.mse_loss(self.model(inputs) + 1e-3 * torch.randn(8, 1), targets)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"loss": float(loss.detach())}

    def evaluate(self) -> dict[str, float]:
        return {"held_out": float(self.model.weight.detach().sum())}

    def back_off(self) -> None:
        raise AssertionError("nothing goes wrong here")

    def save(self, folder: Path) -> None:
        safetensors.torch.save_file(dict(self.model.state_dict()), folder / "model.safetensors")

    def load(self, folder: Path) -> None:
        self.model.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"))

    def state(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])


def train(
    path: Path,
    steps: int,
    pause: float = 0.0,
    fails_at: int = 0,
    progress: Progress | None = None,
) -> LinearTask:
    """Start the run, or resume it if it exists."""
    settings = {"steps": steps, "checkpoint.every": 5, "evaluate.every": 10}
    recipe = change_recipe(ToyRecipe(), settings)
    task, batches = LinearTask(), RandomBatches(fails_at)
    with seeded(0, CPU):
        trainer = Trainer(task, batches, path, recipe, progress or Slow(pause))
        if path.exists():
            run = RunFolder(path)
            checkpoint = run.restore(
                lambda folder: safetensors.torch.load_file(folder / "model.safetensors")
            )
            run.continue_from(checkpoint, recipe_toml(recipe), run.split(), steps)
            trainer.load(checkpoint)
        else:
            split = Split("random numbers", 0, "", [])
            state = trainer.state()
            if distributed.rank() == 0:
                RunFolder.create(path, recipe_toml(recipe), split, task.save, state)
            distributed.broadcast_object("the run exists", CPU)
        trainer.train()
    return task


class Slow(Progress):
    def __init__(self, pause: float) -> None:
        self.pause = pause

    def advance(self, number: int = 1, **metrics: float) -> None:
        time.sleep(self.pause)


def test_a_linear_model_is_trained(tmp_path: Path) -> None:
    train(tmp_path / "run", 200)
    log = read_jsonl(tmp_path / "run" / "log.jsonl")
    assert [row["step"] for row in log] == list(range(1, 201))
    assert log[-1]["loss"] < 0.01 * log[0]["loss"]
    assert [row["step"] for row in log if "held_out" in row] == list(range(10, 201, 10))
    assert RunFolder(tmp_path / "run").steps() == [195, 200]


def test_it_is_killed_and_resumed_bitwise(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", 60)
    script = (
        f"from tests.training.test_toy_task import *; "
        f"train(Path({str(tmp_path / 'run')!r}), 60, 0.05)"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env=ENVIRONMENT)
    log = tmp_path / "run" / "log.jsonl"
    deadline = time.monotonic() + 60
    while (len(read_jsonl(log)) < 12 and time.monotonic() < deadline) and process.poll() is None:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    killed_after = len(read_jsonl(log))
    assert 12 <= killed_after < 60
    resumed = train(tmp_path / "run", 60)
    assert torch.equal(resumed.model.weight, whole.model.weight)
    assert read_jsonl(log) == read_jsonl(tmp_path / "whole" / "log.jsonl")
    assert [row["event"] for row in read_jsonl(log.with_name("events.jsonl"))] == ["resumed"]


def test_a_batch_that_cannot_be_made_loses_no_step(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", 20)
    with pytest.raises(OSError, match="the drive is away"):
        train(tmp_path / "run", 20, fails_at=9)
    assert RunFolder(tmp_path / "run").steps() == [5, 8]
    resumed = train(tmp_path / "run", 20)
    assert torch.equal(resumed.model.weight, whole.model.weight)
    log = [read_jsonl(tmp_path / name / "log.jsonl") for name in ("run", "whole")]
    assert log[0] == log[1]


def fail_on_one_rank(rank: int, world: int, meeting: str, path: Path) -> str:
    join(rank, world, meeting)
    with pytest.raises((OSError, RunError)) as failed:
        train(path, 20, fails_at=9 * rank)
    return str(failed.value)


def test_all_processes_stop_when_one_cannot_make_its_batch(tmp_path: Path) -> None:
    (tmp_path / "meet").mkdir()
    first, second = in_processes(2, fail_on_one_rank, tmp_path / "meet", tmp_path / "run")
    assert "another process could not make its part of the batch" in str(first)
    assert second == "the drive is away"
    assert RunFolder(tmp_path / "run").steps() == [5, 8]


class StopAtTheEnd(Slow):
    """Sends SIGTERM during the last of 20 steps."""

    def __init__(self) -> None:
        super().__init__(0.0)
        self.steps = 0

    def advance(self, number: int = 1, **metrics: float) -> None:
        self.steps += number
        if self.steps == 20:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_during_the_last_step_stops_what_follows(tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match="stopped after step 20"):
        train(tmp_path / "run", 20, progress=StopAtTheEnd())
    assert RunFolder(tmp_path / "run").steps()[-1] == 20
