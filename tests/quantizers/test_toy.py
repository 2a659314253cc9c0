"""A quantizer that the project has never seen: two sign bits, no codebook in memory.

It lives in this file alone and goes through trainer, report, evaluate, info, tokenize, store and
export.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy
import pytest
import torch
from torch import Tensor

import smalto
from smalto.core.layout import TokenLayout
from smalto.quantizers.base import BaseQuantizerConfig, Quantizer, QuantizerOutput
from smalto.quantizers.estimators import straight_through
from smalto.quantizers.latents import as_map, as_vectors
from smalto.tokenizer import loading
from smalto.tokenizer.model import TokenizerConfig
from smalto.training import recipe_file
from smalto.training.recipe import change_recipe
from smalto.training.tokenizer_recipe import TokenizerRecipe
from tests.conftest import TINY


class SignConfig(BaseQuantizerConfig):
    kind: Literal["toy-sign"] = "toy-sign"
    latent_dim: int = 2

    @property
    def codebook_size(self) -> int:
        return 4

    def build(self) -> SignQuantizer:
        return SignQuantizer()


class SignQuantizer(Quantizer):
    """Index = two sign bits; code = ±1 for each."""

    codebook_size = 4
    latent_dim = 2
    code_dim = 2

    def forward(
        self, latents: Tensor, *, num_stages: int | None = None, noise: Tensor | None = None
    ) -> QuantizerOutput:
        self.check_latents(latents)
        vectors = as_vectors(latents)
        indices = self.encode(latents).flatten()
        codes = self.lookup([indices[None]])[0]
        loss = (vectors - codes).square().mean()
        quantized = as_map(straight_through(vectors, codes), latents)
        return QuantizerOutput(quantized, loss, indices)

    @torch.no_grad()
    def encode(self, latents: Tensor, layout: TokenLayout | None = None) -> Tensor:
        self.check_layout(latents, layout)
        bits = (as_vectors(latents) > 0).long()
        return (bits[:, 0] + 2 * bits[:, 1]).view(len(latents), -1)

    def decode(self, indices: Tensor, layout: TokenLayout) -> Tensor:
        codes = self.lookup([self.check_indices(indices, layout.num_tokens)])
        return codes.view(len(indices), *layout.grids[0], 2).permute(0, 3, 1, 2).contiguous()

    def lookup(self, blocks: Sequence[Tensor]) -> Tensor:
        indices = torch.cat(list(blocks), dim=1)
        return torch.stack([indices % 2, indices // 2], dim=-1).float() * 2 - 1

    def layout(self, height: int, width: int) -> TokenLayout:
        return TokenLayout.single(height, width)

    def token_gaps(self, latents: Tensor, tokens: Tensor, layout: TokenLayout) -> Tensor:
        return (tokens != self.encode(latents)).double()


class ToyTokenizerConfig(TokenizerConfig):
    kind: Literal["toy-tokenizer"] = "toy-tokenizer"  # type: ignore[assignment]
    quantizer: SignConfig = SignConfig()  # type: ignore[assignment]


class ToyRecipe(TokenizerRecipe):
    kind: Literal["toy"] = "toy"  # type: ignore[assignment]
    tokenizer: ToyTokenizerConfig = ToyTokenizerConfig.model_validate(
        {"autoencoder": {"latent_dim": 2, "hidden_dim": 8}}
    )


@pytest.fixture
def run(tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(loading._CONFIGS, "toy-tokenizer", ToyTokenizerConfig)
    monkeypatch.setitem(recipe_file.RECIPES, "toy", ToyRecipe)
    settings = {key: value for key, value in TINY.items() if not key.startswith("tokenizer.")}
    recipe = change_recipe(ToyRecipe(), settings)
    smalto.train(image_folder, recipe, out=tmp_path / "run", device="cpu", workers=0)
    return tmp_path / "run"


def test_it_is_trained_resumed_and_reported(run: Path) -> None:
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [1, 2, 3, 4, 5, 6]
    assert "usage" not in log[0]  # there is no codebook to learn
    assert (run / "report.html").read_text().count("data:image/webp;base64,") >= 4
    again = smalto.resume(run, settings={"steps": 8}, device="cpu", workers=0)
    assert again.tokenizer.get_codebook() is None
    assert again.metrics is not None
    assert again.metrics.codebook_size == 4


def test_it_is_measured_described_tokenized_verified_and_exported(
    run: Path, image_folder: Path, tmp_path: Path
) -> None:
    metrics = smalto.evaluate(image_folder, run, device="cpu", workers=0).metrics
    assert metrics.bits_per_pixel == pytest.approx(2 / 16)
    assert smalto.info(run)["codebook size"] == 4
    smalto.tokenize(image_folder, run, tmp_path / "t.lance", size=32, device="cpu", workers=0)
    store = smalto.TokenStore.open(tmp_path / "t.lance")
    assert (len(store), store.header.kind, store.header.codebook_size) == (6, "toy-sign", 4)
    assert smalto.verify(tmp_path / "t.lance", 6, device="cpu").ok
    out = smalto.export_store(store, "numpy", tmp_path / "numpy")
    tokens = numpy.load(out / "tokens.npy")
    assert tokens.shape == (6, 64)
    assert tokens.max() < 4
    paths = smalto.decode(tmp_path / "t.lance", tmp_path / "decoded", device="cpu", workers=0)
    assert len(paths) == 6
