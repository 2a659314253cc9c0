"""The log as TensorBoard reads it, where TensorBoard is installed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import smalto
from smalto.training.run_folder import read_jsonl
from smalto.training.tokenizer_recipe import TokenizerRecipe

# TensorBoard's own reader leaves files open and uses what NumPy and protobuf deprecate.
pytestmark = pytest.mark.filterwarnings("ignore")


def curve(run: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run / "tensorboard"))
    found.Reload()
    return [(event.step, event.value) for event in found.Scalars(tag)]


def test_curves_are_the_logs_and_a_resumed_run_goes_on_in_them(
    image_folder: Path, tiny_recipe: TokenizerRecipe, tmp_path: Path
) -> None:
    smalto.train(image_folder, tiny_recipe, out=tmp_path / "run", device="cpu", workers=0)
    smalto.resume(tmp_path / "run", settings={"steps": 9}, device="cpu", workers=0)
    log = read_jsonl(tmp_path / "run" / "log.jsonl")
    assert [step for step, _ in curve(tmp_path / "run", "loss")] == list(range(1, 10))
    for (_, value), row in zip(curve(tmp_path / "run", "psnr"), log, strict=True):
        assert value == pytest.approx(row["psnr"], rel=1e-6)
    assert all(value > 0 for _, value in curve(tmp_path / "run", "images_per_second"))


def test_without_tensorboard_nothing_is_missing(
    image_folder: Path,
    tiny_recipe: TokenizerRecipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    smalto.train(image_folder, tiny_recipe, out=tmp_path / "run", device="cpu", workers=0)
    assert not (tmp_path / "run" / "tensorboard").exists()
    assert len(read_jsonl(tmp_path / "run" / "log.jsonl")) == 6
