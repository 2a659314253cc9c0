"""Verification tells ties from damage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

import smalto
from smalto.inference.inference_tokenizer import InferenceTokenizer
from smalto.quantizers import MultiScaleVQ, ResidualVQ, ResidualVQConfig, VectorQuantizerConfig
from smalto.store.lance_table import LanceTable
from smalto.store.schema import rows_to_table
from smalto.store.token_store import TokenStore
from smalto.tokenizer import TokenizerConfig
from tests.contract.kinds import KINDS, build, latents


@pytest.mark.parametrize("kind", KINDS)
def test_encoded_tokens_have_no_gap_and_others_do(kind: str) -> None:
    quantizer, z = build(kind), latents(batch=2, height=3, width=4)
    tokens, layout = quantizer.encode(z), quantizer.layout(3, 4)
    gaps = quantizer.token_gaps(z, tokens, layout)
    assert gaps.shape == tokens.shape
    assert gaps.dtype == torch.float64
    assert float(gaps.max()) < 1e-5
    wrong = tokens.clone()
    wrong[:, -1] = (wrong[:, -1] + 7) % quantizer.codebook_size
    assert float(quantizer.token_gaps(z, wrong, layout)[:, -1].min()) > 1e-4


@pytest.mark.parametrize("kind", ["residual-ema", "multiscale-learned"])
def test_a_token_that_differs_early_does_not_condemn_the_later_ones(kind: str) -> None:
    quantizer, z = build(kind), latents(batch=1, height=4, width=4)
    assert isinstance(quantizer, (MultiScaleVQ, ResidualVQ))
    layout = quantizer.layout(4, 4)
    first = layout.lengths[0]
    tokens = quantizer.encode(z)
    tokens[:, :first] = (tokens[:, :first] + 1) % quantizer.codebook_size
    # What an encoder that decided otherwise in the first grid writes from there on: greedily, the
    # token without a gap at each position.
    for position in range(first, layout.num_tokens):
        candidates = tokens.repeat(quantizer.codebook_size, 1)
        candidates[:, position] = torch.arange(quantizer.codebook_size)
        repeated = z.expand(quantizer.codebook_size, -1, -1, -1)
        gaps = quantizer.token_gaps(repeated, candidates, layout)[:, position]
        tokens[0, position] = int(gaps.argmin())
    gaps = quantizer.token_gaps(z, tokens, layout)[0]
    assert float(gaps[:first].max()) > 1e-4
    assert float(gaps[first:].max()) < 1e-5
    again = quantizer.encode(z)[0, first:]
    assert not torch.equal(again, tokens[0, first:])  # they differ, and are not damaged


def test_a_tie_is_reported_apart_and_is_not_damage(image_folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = smalto.SimpleVQVAE(16, hidden_dim=8)
    with torch.no_grad():
        tokenizer.quantize.embedding.weight[8:] = tokenizer.quantize.embedding.weight[:8]
    tokenizer.save(tmp_path / "tokenizer")
    smalto.tokenize(
        image_folder, tmp_path / "tokenizer", tmp_path / "t", size=32, device="cpu", workers=0
    )
    store = TokenStore.open(tmp_path / "t")
    (row,) = store.token_rows(0, 1)
    tokens = numpy.asarray(row.tokens).copy()
    assert tokens.max() < 8  # of equal codes the search takes the lowest
    tokens[5] += 8  # the equal code: a tie that was decided otherwise
    store.append([row._replace(tokens=tokens)], replace=True)
    found = smalto.verify(tmp_path / "t", 6, device="cpu")
    assert found.ok
    (tie,) = found.sample.ties
    assert (tie.id, tie.num_tokens, tie.first) == (row.id, 1, 5)
    tokens[5] = (tokens[5] + 1) % 8
    store.append([row._replace(tokens=tokens)], replace=True)
    found = smalto.verify(tmp_path / "t", 6, device="cpu")
    assert not found.ok
    assert [difference.id for difference in found.sample.damaged] == [row.id]


@pytest.mark.parametrize("quantizer", [VectorQuantizerConfig, ResidualVQConfig])
def test_a_token_that_is_no_code_is_damage(
    quantizer: type[Any], image_folder: Path, tmp_path: Path
) -> None:
    TokenizerConfig(quantizer=quantizer()).build().save(tmp_path / "tokenizer")
    smalto.tokenize(
        image_folder, tmp_path / "tokenizer", tmp_path / "t", size=32, device="cpu", workers=0
    )
    store = TokenStore.open(tmp_path / "t")
    (row,) = store.token_rows(0, 1)
    tokens = numpy.asarray(row.tokens).copy()
    tokens[5] = store.header.codebook_size + 3
    larger = store.header.model_copy(update={"codebook_size": 2 * store.header.codebook_size})
    table = rows_to_table([row._replace(tokens=tokens)], larger)
    LanceTable.open(tmp_path / "t").upsert(table)
    found = smalto.verify(tmp_path / "t", 6, device="cpu")
    assert not found.ok
    assert [difference.id for difference in found.sample.damaged] == [row.id]


def test_tokens_do_not_depend_on_the_images_beside_it_at_batch_1(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smalto.default_tokenizer(64).save(tmp_path / "tokenizer")
    encode, batches = InferenceTokenizer.encode_finite, []

    def recorded(
        self: InferenceTokenizer, images: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        batches.append(len(images))
        return encode(self, images)

    monkeypatch.setattr(InferenceTokenizer, "encode_finite", recorded)
    smalto.tokenize(
        image_folder,
        tmp_path / "tokenizer",
        tmp_path / "all",
        size=32,
        crops=5,
        batch=1,
        device="cpu",
        workers=0,
    )
    assert batches == [1] * 30
    verified = smalto.verify(tmp_path / "all", 30, device="cpu")
    assert (verified.sample.ties, verified.sample.damaged) == ([], [])
