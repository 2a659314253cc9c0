"""The demo fine-tunes a tokenizer of the package, and its report shows it beside the others."""

from __future__ import annotations

from pathlib import Path

import pytest

import smalto
from smalto.images.bundled import HELD_OUT
from smalto.store.token_store import TokenStore
from smalto.training.run_folder import read_jsonl

SETTINGS = {"steps": 2, "data.batch": 2, "checkpoint.every": 1}


def test_it_trains_tokenizes_decodes_and_reports(tmp_path: Path) -> None:
    done = smalto.demo(tmp_path, settings=SETTINGS, device="cpu", workers=0)
    run = done.run.path
    assert run == tmp_path / "demo"
    assert smalto.load_recipe(run / "recipe.toml").finetune.tokenizer == "photos-f4"
    assert smalto.load(run / "start").fingerprint() == smalto.load("photos-f4").fingerprint()
    assert done.metrics is not None
    assert done.metrics.num_images == len(HELD_OUT)
    assert done.metrics.psnr > 25
    assert len(TokenStore.open(run / "tokens.lance")) == len(list((run / "decoded").iterdir())) == 3
    report = (run / "report.html").read_text(encoding="utf-8")
    for name, bits in (("photos-f4", "0.562"), ("photos-f8", "0.203")):
        assert report.count(f"{name}, as it comes with smalto") == 2 * len(HELD_OUT)
        assert f"at {bits} bits per pixel" in report


def test_an_unfinished_demo_is_resumed_and_a_finished_one_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    smalto.SimpleVQVAE().save(tmp_path / "photos-f4")  # the demo starts from that of the package
    first = smalto.demo(tmp_path, settings=SETTINGS, device="cpu", workers=0)
    recipe = smalto.load_recipe(first.run.path / "recipe.toml")
    assert recipe.losses.perceptual.weight == 0.04
    (first.run.path / "metrics.json").unlink()  # the last file that a run gets
    again = smalto.demo(tmp_path, settings=SETTINGS | {"steps": 3}, device="cpu", workers=0)
    assert again.run.path == first.run.path
    assert [row["step"] for row in read_jsonl(again.run.path / "log.jsonl")] == [1, 2, 3]
    before = again.tokenizer.fingerprint()
    other = smalto.demo(tmp_path, settings=SETTINGS, device="cpu", workers=0)
    assert other.run.path == tmp_path / "demo-2"
    assert smalto.load(again.run.path).fingerprint() == before
