"""The demo fine-tunes a tokenizer of the package, and its report shows it beside the others."""

from __future__ import annotations

from pathlib import Path

import smalto
from smalto.images.bundled import HELD_OUT
from smalto.store.token_store import TokenStore

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


def test_a_finished_demo_is_not_touched_and_an_unfinished_one_is_resumed(tmp_path: Path) -> None:
    first = smalto.demo(tmp_path, settings=SETTINGS, device="cpu", workers=0)
    (first.run.path / "metrics.json").unlink()  # the last file that a run gets
    again = smalto.demo(tmp_path, settings=SETTINGS, device="cpu", workers=0)
    assert again.run.path == first.run.path
    assert again.tokenizer.fingerprint() == first.tokenizer.fingerprint()
    other = smalto.demo(tmp_path, settings=SETTINGS, device="cpu", workers=0)
    assert other.run.path == tmp_path / "demo-2"
