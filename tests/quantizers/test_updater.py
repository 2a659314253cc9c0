"""CodebookUpdater: what counts, what moves, and that codebooks stay alive."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import smalto
from smalto.core.errors import ConfigError, InputError
from smalto.quantizers import (
    CodebookUpdater,
    EMACodebook,
    ProductVQ,
    ResidualVQ,
    Revive,
    VectorQuantizer,
)
from smalto.quantizers.kmeans import kmeans
from smalto.quantizers.updater import VECTORS_PER_CODE


def latents(number: int, dim: int = 4, seed: int = 0) -> Tensor:
    """[1, dim, number, 1]."""
    return torch.randn(1, dim, number, 1, generator=torch.Generator().manual_seed(seed))


def started(quantizer: VectorQuantizer, **settings: object) -> CodebookUpdater:
    """An updater that is past its k-means start, with the codes where they are."""
    return CodebookUpdater(quantizer, keep_codes=True, **settings)  # type: ignore[arg-type]


def test_ema_follows_its_closed_form() -> None:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(6, 4, codebook="ema")
    updater = started(quantizer, revive=None, decay_tokens=20.0)
    counts, sums = torch.ones(6), quantizer.embedding.weight.clone()
    for step in range(5):
        z = latents(30, seed=step)
        indices = quantizer(z).indices
        updater.step()
        decay = math.exp(-30 / (6 * 20.0))
        one_hot = nn.functional.one_hot(indices, 6).float()
        vectors = z[0, :, :, 0].T
        counts = decay * counts + (1 - decay) * one_hot.sum(0) * 6 / 30
        sums = decay * sums + (1 - decay) * one_hot.T @ vectors * 6 / 30
        torch.testing.assert_close(quantizer.embedding.weight, sums / counts[:, None])


def test_the_same_tokens_in_any_batch_size_decay_alike() -> None:
    torch.manual_seed(0)
    whole = VectorQuantizer(6, 4, codebook="ema")
    parts = copy.deepcopy(whole)
    together, apart = started(whole, revive=None), started(parts, revive=None)
    z = latents(40)
    whole(z)
    together.step()
    for part in z.split(20, dim=2):  # gradient accumulation: two calls, one step
        parts(part)
    apart.step()
    torch.testing.assert_close(whole.embedding.weight, parts.embedding.weight)
    assert math.isclose(math.exp(-20 / 6) ** 2, math.exp(-40 / 6))


def test_only_training_calls_with_gradients_count() -> None:
    quantizer = VectorQuantizer(6, 4, codebook="ema")
    updater = started(quantizer)
    quantizer.eval()
    quantizer(latents(10))
    quantizer.train()
    with torch.no_grad():
        quantizer(latents(10))
    quantizer.encode(latents(10))
    with pytest.raises(RuntimeError, match="saw no forward pass"):
        updater.step()


def test_activation_checkpointing_counts_once() -> None:
    torch.manual_seed(0)
    plain = VectorQuantizer(6, 4, codebook="ema")
    other = copy.deepcopy(plain)
    first, second = started(plain), started(other)
    z = latents(40).requires_grad_()
    plain(z).quantized.sum().backward()
    first.step()
    checkpoint(lambda x: other(x).quantized, z, use_reentrant=False).sum().backward()
    second.step()
    assert torch.equal(plain.embedding.weight, other.embedding.weight)


def test_rows_that_are_not_finite_leave_the_codebook_alone() -> None:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(6, 4, codebook="ema")
    other = copy.deepcopy(quantizer)
    first, second = started(quantizer), started(other)
    z = latents(30)
    broken = torch.cat([z, torch.full((1, 4, 5, 1), math.nan)], dim=2)
    quantizer(broken)
    first.step()
    other(z)
    second.step()
    torch.testing.assert_close(quantizer.embedding.weight, other.embedding.weight)
    quantizer(torch.full((1, 4, 5, 1), math.nan))
    first.step()
    assert bool(quantizer.embedding.weight.isfinite().all())


def test_the_first_step_starts_by_k_means_on_what_it_saw() -> None:
    torch.manual_seed(0)
    centers = torch.randn(8, 4) * 20
    vectors = centers.repeat_interleave(VECTORS_PER_CODE, 0)  # as many as the start samples: all
    vectors = vectors + torch.randn_like(vectors) * 0.1
    z = vectors.T[None, :, :, None]
    quantizer = VectorQuantizer(8, 4, codebook="ema")
    updater = CodebookUpdater(quantizer)
    quantizer(z)
    updater.step()
    codes, tokens = quantizer.embedding.weight.detach(), quantizer.encode(z).flatten()
    means = torch.stack([vectors[tokens == code].mean(dim=0) for code in range(8)])
    torch.testing.assert_close(codes, means, rtol=1e-4, atol=1e-3)  # none is unused: no NaN


def test_start_takes_batches_and_leaves_the_mode_alone() -> None:
    torch.manual_seed(0)
    model = smalto.SimpleVQVAE(16, 8, 8)
    updater = CodebookUpdater(model)
    before = model.get_codebook().detach().clone()
    updater.start(torch.randn(2, 3, 16, 16) for _ in range(4))
    assert model.training
    assert not torch.equal(model.get_codebook(), before)
    assert len(model.eval().encode(torch.randn(8, 3, 16, 16)).unique()) > 8
    with pytest.raises(InputError, match="saw no finite latents"):
        updater.start([])
    with pytest.raises(InputError, match="saw no finite latents"):
        updater.start(torch.full((1, 3, 16, 16), math.nan))


def test_k_means_places_a_code_on_every_distinct_vector_when_there_are_few() -> None:
    vectors = torch.tensor([[0.0, 0], [1, 0], [0, 0], [1, 0], [5, 5]])
    centers = kmeans(vectors, 8, "l2", torch.Generator().manual_seed(0))
    assert sorted(centers.tolist()) == [[0, 0], [1, 0], [5, 5]]


def test_k_means_lowers_the_error() -> None:
    vectors = torch.randn(2000, 3, generator=torch.Generator().manual_seed(0))

    def error(iterations: int) -> float:
        centers = kmeans(vectors, 20, "l2", torch.Generator().manual_seed(1), iterations)
        return float(torch.cdist(vectors, centers).min(1).values.square().mean())

    assert error(10) < 0.9 * error(0)


@pytest.mark.parametrize("kind", ["learned", "ema"])
def test_revival_touches_only_dead_rows_and_zeroes_their_moments(kind: str) -> None:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(10, 4, codebook=kind)  # type: ignore[arg-type]
    holder = nn.ModuleDict({"quantizer": quantizer, "encoder": nn.Conv2d(4, 4, 1)})
    optimizer = torch.optim.AdamW(holder.parameters(), weight_decay=0.0)
    updater = CodebookUpdater(quantizer, optimizer, Revive(0.1), decay_tokens=1.0, keep_codes=True)
    with torch.no_grad():
        quantizer.embedding.weight[7:] = (
            100.0 + torch.arange(3.0)[:, None]
        )  # out of reach of everything
    if isinstance(quantizer.embedding, EMACodebook):
        quantizer.embedding.ema_sums.copy_(quantizer.embedding.weight)
    for step in range(6):
        out = quantizer(holder["encoder"](latents(200, seed=step)))
        optimizer.zero_grad()
        (out.loss + out.quantized.square().mean()).backward()
        optimizer.step()
        before = quantizer.embedding.weight.detach().clone()
        if kind == "learned":
            optimizer.state[quantizer.embedding.weight]["exp_avg"].fill_(1.0)
        updater.step()
        moved = (quantizer.embedding.weight.detach() - before).norm(dim=1) > 50
        if moved.any():
            assert moved.nonzero().flatten().tolist() == [7, 8, 9]
            assert len(quantizer.embedding.weight.detach()[7:].unique(dim=0)) == 3
            if kind == "learned":
                moments = optimizer.state[quantizer.embedding.weight]["exp_avg"]
                assert float(moments[7:].abs().sum()) == 0
                assert bool((moments[:7] == 1).all())
                assert torch.equal(quantizer.embedding.weight[:7], before[:7])
            return
    raise AssertionError("the dead codes were never revived")


def test_no_thrash_with_fewer_vectors_than_codes() -> None:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(512, 4, codebook="ema")
    updater = CodebookUpdater(quantizer)
    updater.start(latents(4096))
    replaced = 0
    for step in range(60):
        quantizer(latents(32, seed=step))
        counts = quantizer.embedding.ema_counts.clone()
        updater.step()
        replaced += int(((quantizer.embedding.ema_counts == 1) & (counts != 1)).sum())
    # A threshold on the counts of one batch would replace 480 of 512 codes at every step.
    assert replaced < 60


def test_a_toy_that_collapses_without_revival_and_not_with_it() -> None:
    def used(revive: Revive | None) -> int:
        torch.manual_seed(0)
        quantizer = VectorQuantizer(64, 4, codebook="ema")
        updater = started(quantizer, revive=revive, decay_tokens=4.0)
        with torch.no_grad():
            quantizer.embedding.weight.mul_(0.01).add_(
                5
            )  # far from the data: the nearest few take it all
            quantizer.embedding.ema_sums.copy_(quantizer.embedding.weight)
        for step in range(100):
            quantizer(latents(512, seed=step))
            updater.step()
        return len(quantizer.encode(latents(4000, seed=999)).unique())

    assert used(None) < 20
    assert used(Revive()) > 60


def test_a_saved_updater_goes_on_bit_for_bit() -> None:
    def run(stop: int | None) -> Tensor:
        torch.manual_seed(0)
        quantizer = VectorQuantizer(32, 4, codebook="learned")
        updater = CodebookUpdater(quantizer, decay_tokens=1.0, seed=3)
        for step in range(12):
            if step == stop:
                state, weights = copy.deepcopy(updater.state_dict()), quantizer.state_dict()
                updater.close()
                quantizer = VectorQuantizer(32, 4, codebook="learned")
                quantizer.load_state_dict(weights)
                updater = CodebookUpdater(quantizer, decay_tokens=1.0, seed=99)
                updater.load_state_dict(state)
            quantizer(latents(40, seed=step))
            updater.step()
        return quantizer.embedding.weight.detach()

    assert torch.equal(run(None), run(5))


def test_usage_forgets_codes_after_32_tokens_per_code() -> None:
    quantizer = VectorQuantizer(4, 1, codebook="learned")
    updater = started(quantizer, revive=None)
    with torch.no_grad():
        quantizer.embedding.weight.copy_(torch.arange(4.0)[:, None])
    quantizer(torch.tensor([0.0, 1, 2, 3]).view(1, 1, 4, 1))
    updater.step()
    assert updater.usage() == {"": 1.0}
    for _ in range(2):
        quantizer(torch.zeros(1, 1, 64, 1))
        updater.step()
    assert updater.usage() == {"": 0.25}  # W = 32·4 = 128 tokens


def test_closing_stops_listening_and_wrong_use_is_named() -> None:
    quantizer = VectorQuantizer(4, 2)
    updater = CodebookUpdater(quantizer)
    updater.close()
    quantizer(torch.randn(1, 2, 3, 3))
    with pytest.raises(RuntimeError, match="saw no forward pass"):
        updater.step()
    with pytest.raises(InputError, match="does not hold an explicit codebook"):
        CodebookUpdater(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="decay_tokens=0; expected a positive number"):
        CodebookUpdater(quantizer, decay_tokens=0)
    with pytest.raises(ConfigError, match="share of uniform use"):
        Revive(2.0)


def test_a_plain_quantizer_learns_by_gradient_without_an_updater() -> None:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(16, 4)
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.05)
    z = latents(400)
    before = quantizer(z).loss.item()
    for _ in range(100):
        optimizer.zero_grad()
        quantizer(z).loss.backward()
        optimizer.step()
    assert quantizer(z).loss.item() < 0.8 * before


def test_a_trained_codebook_can_be_kept() -> None:
    quantizer = VectorQuantizer(32, 4, codebook="ema")
    z = latents(200)
    before = quantizer.embedding.weight.clone()
    updater = CodebookUpdater(quantizer, keep_codes=True)
    quantizer(z)
    updater.step()
    assert float((quantizer.embedding.weight - before).norm() / before.norm()) < 0.2
    CodebookUpdater(quantizer).start(z)  # but a start is a start
    assert float((quantizer.embedding.weight - before).norm() / before.norm()) > 0.5


def test_any_seed_and_any_step_count() -> None:
    quantizer = VectorQuantizer(6, 4)
    updater = CodebookUpdater(quantizer, seed=2**62)
    updater.num_steps = 10**12
    quantizer(latents(20))
    updater.step()


def test_copies_of_the_model_feed_nobody() -> None:
    import pickle

    torch.manual_seed(0)
    quantizer = VectorQuantizer(6, 4, codebook="ema")
    updater = started(quantizer)
    assert b"CodebookUpdater" not in pickle.dumps(
        quantizer
    )  # goes to another process without its updater
    copy.deepcopy(quantizer)(latents(20))
    with pytest.raises(RuntimeError, match="saw no forward pass"):
        updater.step()


def test_a_newer_updater_takes_over() -> None:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(6, 4, codebook="ema")
    alone = copy.deepcopy(quantizer)
    old, new, only = started(quantizer), started(quantizer), started(alone)
    for model in (quantizer, alone):
        model(latents(40))
    new.step()
    only.step()
    assert torch.equal(quantizer.embedding.weight, alone.embedding.weight)
    with pytest.raises(RuntimeError, match="saw no forward pass"):
        old.step()


def test_a_collapsed_encoder_does_not_end_the_run() -> None:
    model = smalto.SimpleVQVAE(16, 8, 8, encoder_relu=True)
    with torch.no_grad():
        model.encoder[2].bias.fill_(-5)  # every latent is zero
    updater = CodebookUpdater(model, decay_tokens=1.0)
    for _ in range(20):
        model(torch.randn(2, 3, 16, 16))
        updater.step()
    assert bool(model.get_codebook().isfinite().all())


def test_start_leaves_frozen_parts_frozen() -> None:
    model = smalto.SimpleVQVAE(16, 8, 8).train()
    model.encoder.eval()
    CodebookUpdater(model).start(torch.randn(2, 3, 16, 16))
    assert (model.training, model.encoder.training, model.decoder.training) == (True, False, True)


def test_a_skipped_batch_can_be_discarded() -> None:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(6, 4, codebook="ema")
    other = copy.deepcopy(quantizer)
    first, second = started(quantizer), started(other)
    quantizer(latents(20) * 1000)
    first.discard()
    for model, updater in ((quantizer, first), (other, second)):
        model(latents(20))
        updater.step()
    assert torch.equal(quantizer.embedding.weight, other.embedding.weight)
    quantizer(latents(20))
    first.load_state_dict(first.state_dict())  # what was pending is no part of the state
    with pytest.raises(RuntimeError, match="saw no forward pass"):
        first.step()


def test_the_updater_follows_its_model() -> None:
    with torch.device("meta"):
        quantizer = VectorQuantizer(6, 4, codebook="ema")
    updater = CodebookUpdater(quantizer)
    quantizer.to_empty(device="cpu")
    quantizer.embedding.reset_parameters()
    assert torch.equal(quantizer.embedding.ema_counts, torch.ones(6))
    quantizer(latents(60))
    updater.step()
    quantizer.double()(latents(60).double())
    updater.step()


def test_averages_stay_wide_in_a_narrow_model() -> None:
    quantizer = VectorQuantizer(64, 4, codebook="ema").bfloat16()
    updater = started(quantizer)
    for step in range(50):
        out = quantizer(latents(64, seed=step).bfloat16())
        updater.step()
    assert isinstance(quantizer.embedding, EMACodebook)
    assert quantizer.embedding.ema_counts.dtype == torch.float32
    assert float(quantizer.embedding.ema_counts.sum()) == pytest.approx(64, rel=0.05)
    assert out.loss.dtype == torch.float32


def test_cosine_k_means_places_codes_at_the_length_of_the_latents() -> None:
    torch.manual_seed(0)
    z = latents(2000) * 30
    quantizer = VectorQuantizer(64, 4, metric="cosine")
    CodebookUpdater(quantizer).start(z)
    norms = quantizer.embedding.weight.detach().norm(dim=1)
    assert float(norms.mean()) == pytest.approx(float(z.norm(dim=1).mean()), rel=0.2)


def test_a_state_of_another_size_is_refused() -> None:
    state = CodebookUpdater(VectorQuantizer(1, 4)).state_dict()
    with pytest.raises(InputError, match="of 1 codes; this codebook has 6"):
        CodebookUpdater(VectorQuantizer(6, 4)).load_state_dict(state)
    with pytest.raises(InputError, match="a state of the codebooks"):
        CodebookUpdater(smalto.SimpleVQVAE(1, 4)).load_state_dict(state)


def test_a_frozen_codebook_stays_as_it_is() -> None:
    quantizer = VectorQuantizer(64, 4)
    quantizer.embedding.weight.requires_grad_(False)
    before = quantizer.embedding.weight.clone()
    updater = CodebookUpdater(quantizer, decay_tokens=1.0)
    updater.start(latents(400))
    for step in range(20):
        quantizer(latents(40, seed=step) * 0.01)
        updater.step()
    assert torch.equal(quantizer.embedding.weight, before)
    assert 0 < updater.usage()[""] < 1


def test_a_start_that_fails_leaves_learned_codes_alone() -> None:
    quantizer = VectorQuantizer(32, 4, codebook="ema")
    before = quantizer.embedding.weight.clone()
    updater = CodebookUpdater(quantizer, keep_codes=True)
    with pytest.raises(InputError, match="no finite latents"):
        updater.start(latents(20) * math.nan)
    quantizer(latents(200))
    updater.step()
    assert float((quantizer.embedding.weight - before).norm() / before.norm()) < 0.2


def test_start_in_inference_mode_does_not_spoil_training() -> None:
    quantizer = VectorQuantizer(8, 4, codebook="ema")
    updater = CodebookUpdater(quantizer)
    with torch.inference_mode():
        updater.start(latents(100))
    quantizer(latents(40))
    updater.step()


@pytest.mark.parametrize("code_dim", [None, 2])
@pytest.mark.parametrize("huge", [3e38, 1e20])
def test_huge_numbers_do_not_poison_a_code(code_dim: int | None, huge: float) -> None:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(8, 4, codebook="ema", code_dim=code_dim)
    updater = started(quantizer)
    z = latents(40)
    z[0, :, 3:9, 0] = huge
    z.requires_grad_()
    out = quantizer(z)
    (out.loss + out.quantized.sum()).backward()
    updater.step()
    assert updater.num_not_finite == 6
    assert bool(out.loss.isfinite())
    assert bool(out.quantized.isfinite().all())
    assert z.grad is not None
    assert bool(z.grad.isfinite().all())
    assert bool(quantizer.embedding.weight.isfinite().all())


def test_arguments_in_the_wrong_place_are_named() -> None:
    quantizer = VectorQuantizer(8, 4)
    with pytest.raises(InputError, match="got Revive; optimizer must be a torch optimizer or None"):
        CodebookUpdater(quantizer, Revive())  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"got \['x'\]; expected a state of a CodebookUpdater"):
        CodebookUpdater(quantizer).load_state_dict({"x": 1})
    with pytest.raises(ConfigError, match=r"got dict; ResidualVQ .* a ResidualVQConfig"):
        ResidualVQ({})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"got int; ProductVQ .* a ProductVQConfig"):
        ProductVQ(4)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no tokens to look up"):
        quantizer.lookup([])
