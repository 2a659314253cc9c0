"""MaskGIT-VQGAN: the same weights give the tokens and images of open-muse's code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import smalto
from smalto.core.errors import ConfigError
from smalto.interop.maskgit import load_tokenizer, tokenizer_state_dict
from smalto.interop.open_tokenizer import recognize
from tests.parity.golden import near, read, weights


def test_tokens_and_images() -> None:
    config, expected = read("maskgit_a")
    tokenizer = load_tokenizer(weights(config))
    images = expected["image"] * 2 - 1  # [0, 1] there
    with torch.no_grad():
        near(tokenizer.encoder(images), expected["feature"])
        tokens = tokenizer.encode(images)
        assert torch.equal(tokens, expected["indices"])
        image = tokenizer.decode(tokens, tokenizer.layout(32, 48), clamp=False)
    near(image / 2 + 0.5, expected["reconstruction"])


def test_there_and_back_is_bitwise_the_same(tmp_path: Path) -> None:
    state = weights(read("maskgit_a")[0])
    torch.save(state, tmp_path / "maskgit.bin")
    assert recognize(tmp_path / "maskgit.bin").project == "MaskGIT"
    smalto.load(tmp_path / "maskgit.bin").save(tmp_path / "own")
    back = smalto.convert(tmp_path / "own", tmp_path / "back.pth", "maskgit")
    again = torch.load(back.path, weights_only=True)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in state.items())


def test_what_does_not_fit_is_named() -> None:
    state = weights(read("maskgit_a")[0])
    key = "encoder.down.1.block.0.nin_shortcut.weight"
    with pytest.raises(ConfigError, match=r"nin_shortcut\.weight' is missing \(expected \[64, 64"):
        load_tokenizer({k: v for k, v in state.items() if k != key})
    with pytest.raises(ConfigError, match='expected "maskgit" and "vector"'):
        tokenizer_state_dict(smalto.load("photos-f8"))
