"""Runs, tokenizers and stores that the code wrote before its modules, names and settings moved.

``earlier/`` was made once, in the first format, and is never written again. ``photos`` are the
images, ``expected.json`` holds fingerprints and tokens.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import smalto
from smalto.training.earlier_formats import upgrade_state

EARLIER = Path(__file__).parent / "earlier"
EXPECTED: dict[str, Any] = json.loads((EARLIER / "expected.json").read_text(encoding="utf-8"))
KINDS = sorted(EXPECTED.keys() - {"stores"})


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """A copy that a test may write to."""
    return Path(shutil.copytree(EARLIER, tmp_path / "earlier"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_keeps_its_fingerprint_and_its_tokens(kind: str) -> None:
    tokenizer = smalto.load(EARLIER / "tokenizers" / kind)
    images = (torch.arange(3 * 16 * 24).float() * 0.37).sin().view(1, 3, 16, 24)
    assert tokenizer.fingerprint() == EXPECTED[kind]["fingerprint"]
    assert tokenizer.encode(images)[0].tolist() == EXPECTED[kind]["tokens"]


@pytest.mark.parametrize("name", ["squares.lance", "shapes.lance"])
def test_a_store_keeps_its_rows_and_takes_more(name: str, earlier: Path) -> None:
    store = smalto.TokenStore.open(earlier / name)
    rows = store.rows()
    assert {
        id: tokens.tolist() for id, tokens in zip(rows["id"], rows["tokens"], strict=True)
    } == EXPECTED["stores"][name]
    assert list(store.errors()) == ["bad.png"]
    (earlier / "photos" / "sea" / "0.png").rename(earlier / "photos" / "new.png")
    settings: dict[str, Any] = {"size": 16, "flip": True} if name == "squares.lance" else {}
    done = smalto.tokenize(
        earlier / "photos", earlier / "run", earlier / name, workers=0, **settings
    )
    assert (done.num_images, done.num_known) == (1, 5)


def test_a_run_is_described_resumed_and_decoded(earlier: Path) -> None:
    with pytest.warns(FutureWarning, match="data.colour is now data.color"):
        assert smalto.info(earlier / "run")["steps"] == "4 of 4"
    with pytest.warns(FutureWarning, match="guard.psnr_fall is now monitor.psnr_drop"):
        done = smalto.resume(
            earlier / "run", earlier / "photos", settings={"steps": 6}, device="cpu", workers=0
        )
    recipe = smalto.load_recipe(earlier / "run" / "recipe.toml")  # written again: no warning
    assert (recipe.data.color, recipe.codebook.decay_tokens) == (0.1, 50)
    assert (recipe.data.crops_per_image, recipe.evaluate.images) == (4, 4)
    assert recipe.optimizer.ema_decay == 0.9
    assert recipe.monitor.action == "rollback"
    assert (recipe.monitor.psnr_drop, recipe.monitor.usage_drop) == (4, 0.6)
    log = [
        json.loads(line)
        for line in (earlier / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [row["step"] for row in log] == [1, 2, 3, 4, 5, 6]
    assert done.tokenizer.fingerprint() != smalto.load(EARLIER / "run").fingerprint()
    paths = smalto.decode(
        earlier / "squares.lance", earlier / "decoded", EARLIER / "run", device="cpu", workers=0
    )
    assert len(paths) == 12


def test_what_an_earlier_monitor_reported_is_not_reported_again() -> None:
    monitor = {"averages": {}, "best": {}, "told": ["psnr", "saturated"]}
    state = upgrade_state({"guard": monitor, "task": {}})
    assert state["monitor"]["reported"] == ["psnr", "discriminator_loss"]
