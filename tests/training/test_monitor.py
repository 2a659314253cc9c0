"""What the monitor reports, and what the trainer does about it."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from smalto.core.errors import RunError
from smalto.core.progress import Progress
from smalto.images.crops import CropStream
from smalto.images.image_set import DatasetImages
from smalto.training.monitor import MAX_SKIPPED, SETTLED_AFTER, WINDOW, TrainingMonitor
from smalto.training.random_state import random_state, seeded, set_random_state
from smalto.training.recipe import change_recipe, recipe_toml
from smalto.training.run_folder import RunFolder, Split, read_jsonl
from smalto.training.tokenizer_recipe import TokenizerMonitorConfig, TokenizerRecipe
from smalto.training.tokenizer_task import monitored_metrics
from smalto.training.trainer import MAX_ROLLBACKS, Trainer
from tests.conftest import TINY

CPU = torch.device("cpu")


def watch(metrics: list[dict[str, float]], **settings: Any) -> dict[int, list[str]]:
    """Steps at which the monitor reported something, and what."""
    monitor = TrainingMonitor(monitored_metrics(TokenizerMonitorConfig(**settings)))
    said = {step: monitor.check(step, row) for step, row in enumerate(metrics, start=1)}
    return {step: texts for step, texts in said.items() if texts}


def test_a_run_that_goes_well_is_left_alone() -> None:
    noise = random.Random(0)
    rows = [
        {
            "psnr": 20 + 8 * (1 - math.exp(-step / 300)) + noise.gauss(0, 2),
            "usage": min(1.0, 0.2 + step / 400),
            "discriminator_loss": 1.2,
        }
        for step in range(1500)
    ]
    assert not watch(rows)


def test_the_dip_of_a_codebook_that_has_just_been_started_is_no_fault() -> None:
    assert not watch(
        [{"psnr": 20.0, "usage": 1.0}] * 20 + [{"psnr": 20.0, "usage": 0.2}] * (SETTLED_AFTER - 20)
    )


def test_falls_of_psnr_and_usage_are_told_once_and_again_after_recovery() -> None:
    good, bad = [{"psnr": 26.0, "usage": 0.9}], [{"psnr": 20.0, "usage": 0.1}]
    said = watch(good * 400 + bad * 300 + good * 400 + bad * 300)
    texts = [text for texts in said.values() for text in texts]
    assert len(texts) == 4
    assert "PSNR of the training crops has dropped from 26.00" in texts[0]
    assert any("codes in use have dropped from 90.0%" in text for text in texts)
    assert min(said) < 400 + 2 * WINDOW
    assert not watch(good * 400 + bad * 300, psnr_drop=7.0, usage_drop=0.95)


def test_a_discriminator_that_tells_all_apart_is_told() -> None:
    said = watch(
        [{"psnr": 20.0, "discriminator_loss": 1.0}] * 50
        + [{"psnr": 20.0, "discriminator_loss": 0.0}] * 300
    )
    (texts,) = said.values()
    assert "the discriminator tells all reconstructions from images" in texts[0]


def test_skipped_steps_are_a_fault_after_a_while() -> None:
    row: dict[str, float] = {"psnr": 20.0}
    broken = {**row, "skipped": 1}
    assert not watch([row] * 10 + [broken] * (MAX_SKIPPED - 1) + [row])
    (texts,) = watch([row] * 10 + [broken] * 100).values()
    assert "had no finite gradient" in texts[0]


def test_the_guards_memory_is_saved() -> None:
    rows = [{"psnr": 26.0, "usage": 0.9}] * 400 + [{"psnr": 20.0, "usage": 0.1}] * 300
    whole, first, second = (
        TrainingMonitor(monitored_metrics(TokenizerMonitorConfig())) for _ in range(3)
    )
    expected = [whole.check(step, row) for step, row in enumerate(rows, start=1)]
    got = [first.check(step, row) for step, row in enumerate(rows[:410], start=1)]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert (
        got + [second.check(step, row) for step, row in enumerate(rows[410:], start=411)]
        == expected
    )


class ScriptedTask:
    """Trains nothing, and goes wrong after some steps until it has backed off often enough."""

    device = CPU
    batch_size = 2
    monitored = monitored_metrics(TokenizerMonitorConfig())

    def __init__(self, wrong_from: int, cured_by: int) -> None:
        self.wrong_from = wrong_from
        self.cured_by = cured_by
        self.num_back_offs = 0

    def train_step(self, batch: Any, step: int) -> dict[str, float]:
        is_wrong = step >= self.wrong_from and self.num_back_offs < self.cured_by
        return {"psnr": 10.0 if is_wrong else 25.0, "loss": float(batch.mean())}

    def evaluate(self) -> dict[str, float]:
        return {}

    def back_off(self) -> None:
        self.num_back_offs += 1

    def save(self, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"")

    def load(self, folder: Path) -> None:
        assert (folder / "model.safetensors").is_file()

    def state(self) -> dict[str, Any]:
        return {"num_back_offs": self.num_back_offs}

    def load_state(self, state: dict[str, Any]) -> None:
        self.num_back_offs = state["num_back_offs"]


def trainer(tmp_path: Path, task: ScriptedTask, action: str) -> Trainer:
    settings = {
        "steps": 500,
        "checkpoint.every": 100,
        "monitor.action": action,
        "evaluate.every": 1000,
        "data.batch": 2,
    }
    recipe = change_recipe(TokenizerRecipe(), TINY | settings)
    images = DatasetImages([torch.full((3, 16, 16), i, dtype=torch.uint8) for i in range(9)])  # type: ignore[arg-type]
    batches = CropStream(images, list(range(9)), size=16, batch=2, seed=0)
    made = Trainer(task, batches, tmp_path / "run", recipe, Progress())
    split = Split("a dataset", 9, "", [])
    RunFolder.create(tmp_path / "run", recipe_toml(recipe), split, task.save, made.state())
    return made


def test_a_run_that_goes_wrong_goes_back_to_a_good_checkpoint_and_on_more_carefully(
    tmp_path: Path,
) -> None:
    task = ScriptedTask(wrong_from=320, cured_by=2)
    made = trainer(tmp_path, task, "rollback")
    with seeded(0, CPU):
        made.train()
    log = read_jsonl(tmp_path / "run" / "log.jsonl")
    assert [row["step"] for row in log] == list(range(1, 501))  # what went wrong is not in it
    assert all(row["psnr"] == 25 for row in log)
    events = [
        (row["event"], row.get("to")) for row in read_jsonl(tmp_path / "run" / "events.jsonl")
    ]
    assert events.count(("rollback", 200)) == 2
    assert task.num_back_offs == 2
    twice = [row["loss"] for row in log]
    calm = ScriptedTask(wrong_from=10**9, cured_by=0)
    with seeded(0, CPU):
        trainer(tmp_path / "calm", calm, "rollback").train()
    assert twice == [
        row["loss"] for row in read_jsonl(tmp_path / "calm" / "run" / "log.jsonl")
    ]  # the data went back too


def test_going_back_in_vain_ends(tmp_path: Path) -> None:
    task = ScriptedTask(wrong_from=320, cured_by=100)
    with pytest.raises(RunError, match=f"after {MAX_ROLLBACKS} rollbacks to step 200"):
        trainer(tmp_path, task, "rollback").train()
    assert 200 in RunFolder(tmp_path / "run").steps()


def test_by_default_it_warns_and_goes_on(tmp_path: Path) -> None:
    task = ScriptedTask(wrong_from=320, cured_by=100)
    trainer(tmp_path, task, "warn").train()
    (warning,) = [
        row for row in read_jsonl(tmp_path / "run" / "events.jsonl") if row["event"] == "warning"
    ]
    assert "has dropped" in warning["text"]
    off = tmp_path / "off"
    trainer(off, ScriptedTask(wrong_from=320, cured_by=100), "off").train()
    assert not read_jsonl(off / "run" / "events.jsonl")


def test_all_random_generators_go_on_where_they_were_and_are_given_back() -> None:
    def draw() -> list[float]:
        return [
            random.random(),
            float(numpy.random.rand()),
            float(torch.rand(())),
            float(torch.nn.functional.dropout(torch.ones(9)).sum()),
        ]

    before = random_state(CPU)
    with seeded(5, CPU):
        draw()
        saved = json.loads(json.dumps(random_state(CPU)))
        expected = draw()
    assert random_state(CPU) == before
    with seeded(6, CPU):
        set_random_state(saved, CPU)
        assert draw() == expected
