"""The demo fine-tunes a tokenizer of the package, and its report shows it beside others."""

from __future__ import annotations

from pathlib import Path

import pytest

import smalto
from smalto.images import bundled
from smalto.images.bundled import HELD_OUT
from smalto.store.token_store import TokenStore
from smalto.training.run_folder import read_jsonl
from tests.conftest import write_small_photographs

SETTINGS = {"steps": 2, "data.batch": 2, "checkpoint.every": 1}


def test_it_trains_tokenizes_decodes_reports_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    photographs = write_small_photographs(tmp_path / "packages", 320)
    monkeypatch.setattr(bundled, "package_folder", lambda name, *rest: photographs / name)
    smalto.SimpleVQVAE().save(tmp_path / "photos-f4")  # the demo starts from that of the package
    done = smalto.demo(tmp_path, settings=SETTINGS, device="cpu", workers=0)
    run = done.run.path
    assert run == tmp_path / "demo"
    recipe = smalto.load_recipe(run / "recipe.toml")
    assert recipe.finetune.tokenizer == "photos-f4"
    assert recipe.losses.perceptual.weight == 0.04
    assert done.metrics is not None
    assert done.metrics.num_images == len(HELD_OUT)
    assert done.metrics.psnr > 25
    assert len(TokenStore.open(run / "tokens.lance")) == len(list((run / "decoded").iterdir())) == 3
    report = (run / "report.html").read_text(encoding="utf-8")
    for name, bits in (("photos-f4", "0.562"), ("photos-f8", "0.203")):
        assert report.count(f"{name}, as it comes with smalto") == 2 * len(HELD_OUT)
        assert f"at {bits} bits per pixel" in report
    (run / "metrics.json").unlink()  # the last file that a run gets
    again = smalto.demo(tmp_path, settings=SETTINGS | {"steps": 3}, device="cpu", workers=0)
    assert again.run.path == run
    assert [row["step"] for row in read_jsonl(run / "log.jsonl")] == [1, 2, 3]
