"""VectorQuantizer keeps the promises of every quantizer."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from smalto.core.errors import ConfigError, InputError
from smalto.core.layout import TokenLayout
from smalto.quantizers import Codebook, EMACodebook, VectorQuantizer
from smalto.quantizers.estimators import straight_through

KINDS = [
    dict(zip(("codebook", "metric", "code_dim"), values, strict=True))
    for values in itertools.product(["learned", "ema"], ["l2", "cosine"], [None, 3])
]


@pytest.fixture(params=KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
def quantizer(request: pytest.FixtureRequest) -> VectorQuantizer:
    torch.manual_seed(0)
    return VectorQuantizer(20, 6, **request.param)


def test_forward_encode_and_decode_agree_bitwise(quantizer: VectorQuantizer) -> None:
    latents = torch.randn(3, 6, 4, 5)
    out = quantizer(latents)
    tokens = quantizer.encode(latents)
    assert out.quantized.shape == latents.shape
    assert out.indices.shape == (60,)
    assert torch.equal(out.indices.view(3, -1), tokens)
    assert torch.equal(quantizer.decode(tokens, quantizer.layout(4, 5)), out.quantized)


def test_the_value_is_the_nearest_code_at_its_place(quantizer: VectorQuantizer) -> None:
    latents = torch.randn(2, 6, 3, 4)
    out = quantizer(latents)
    b, row, column = 1, 2, 3
    code = quantizer.codebook()[out.indices.view(2, 3, 4)[b, row, column]]
    torch.testing.assert_close(out.quantized[b, :, row, column], code)


def test_forward_changes_nothing(quantizer: VectorQuantizer) -> None:
    before, random = copy.deepcopy(quantizer.state_dict()), torch.get_rng_state()
    for training in (True, False):
        quantizer.train(training)
        quantizer(torch.randn(2, 6, 3, 3, generator=torch.Generator().manual_seed(1)))
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_loss_is_the_same_in_training_and_evaluation(quantizer: VectorQuantizer) -> None:
    latents = torch.randn(2, 6, 3, 3)
    assert torch.equal(quantizer.train()(latents).loss, quantizer.eval()(latents).loss)


def test_learned_loss_is_codebook_plus_beta_commitment() -> None:
    quantizer = VectorQuantizer(8, 4, beta=0.7)
    latents = torch.randn(2, 4, 3, 3, requires_grad=True)
    out = quantizer(latents)
    codes = (
        F.embedding(out.indices, quantizer.embedding.weight).view(2, 3, 3, 4).permute(0, 3, 1, 2)
    )
    expected = F.mse_loss(codes, latents.detach()) + 0.7 * F.mse_loss(latents, codes.detach())
    torch.testing.assert_close(out.loss, expected)
    got = torch.autograd.grad(out.loss, [latents, quantizer.embedding.weight], retain_graph=True)
    want = torch.autograd.grad(expected, [latents, quantizer.embedding.weight])
    torch.testing.assert_close(got, want)


def test_ema_loss_is_beta_commitment_and_the_codes_get_no_gradient() -> None:
    quantizer = VectorQuantizer(8, 4, beta=0.7, codebook="ema")
    latents = torch.randn(2, 4, 3, 3, requires_grad=True)
    out = quantizer(latents)
    torch.testing.assert_close(out.loss, 0.7 * F.mse_loss(latents, out.quantized.detach()))
    (out.loss + out.quantized.sum()).backward()
    assert quantizer.embedding.weight.grad is None
    assert isinstance(quantizer.embedding, EMACodebook)


def test_losses_pass_gradcheck() -> None:
    # The gradient of a stop-gradient is not that of its value, so the two terms are checked against
    # what each one lets move.
    quantizer = VectorQuantizer(5, 3, beta=0.5).double()
    latents = torch.randn(1, 3, 2, 2, dtype=torch.float64)
    out = quantizer(latents)
    assert out.loss.dtype == torch.float64

    def commitment(z: torch.Tensor) -> torch.Tensor:
        codes = (
            quantizer.embedding.weight.detach()[out.indices].view(1, 2, 2, 3).permute(0, 3, 1, 2)
        )
        return 0.5 * F.mse_loss(z, codes)

    moving = latents.clone().requires_grad_()
    assert torch.autograd.gradcheck(commitment, (moving,))
    (ours,) = torch.autograd.grad(quantizer(moving).loss, moving)
    (reference,) = torch.autograd.grad(commitment(moving), moving)
    torch.testing.assert_close(ours, reference)


def test_straight_through_gives_the_code_bitwise_and_the_identity_gradient() -> None:
    latents, codes = torch.randn(200, requires_grad=True), torch.randn(200)
    value = straight_through(latents, codes)
    assert torch.equal(value, codes)
    assert not torch.equal(
        latents + (codes - latents).detach(), codes
    )  # the usual order rounds: this is why ours differs
    (gradient,) = torch.autograd.grad(value.sum(), latents)
    assert torch.equal(gradient, torch.ones(200))


def test_gradient_of_quantized_reaches_the_latents(quantizer: VectorQuantizer) -> None:
    latents = torch.randn(1, 6, 2, 2, requires_grad=True)
    quantizer(latents).quantized.square().sum().backward()
    assert latents.grad is not None
    assert float(latents.grad.abs().sum()) > 0


def test_rows_that_are_not_finite_take_code_0_and_harm_nothing(quantizer: VectorQuantizer) -> None:
    latents = torch.randn(1, 6, 2, 3)
    broken = latents.clone()
    broken[0, 1, 0, 1], broken[0, 0, 1, 2] = math.nan, math.inf
    broken.requires_grad_()
    out = quantizer(broken)
    indices = quantizer(latents).indices
    indices[[1, 5]] = 0
    assert torch.equal(out.indices, indices)
    finite = latents.permute(0, 2, 3, 1).reshape(1, 6, 1, 6)[:, [0, 2, 3, 4]].permute(0, 3, 1, 2)
    torch.testing.assert_close(out.loss, quantizer(finite).loss)
    (out.loss + out.quantized.sum()).backward()
    assert broken.grad is not None
    assert all(
        bool(p.grad.isfinite().all())
        for p in [broken, *quantizer.parameters()]
        if p.grad is not None
    )
    assert float(broken.grad[0, :, 0, 1].abs().sum()) == 0


def test_an_empty_batch_gives_finite_empty_results(quantizer: VectorQuantizer) -> None:
    out = quantizer(torch.zeros(0, 6, 4, 4))
    assert out.quantized.shape == (0, 6, 4, 4)
    assert out.indices.shape == (0,)
    assert out.loss.item() == 0
    assert quantizer.encode(torch.zeros(0, 6, 4, 4)).shape == (0, 16)
    assert quantizer.decode(
        torch.zeros(0, 16, dtype=torch.int64), TokenLayout.single(4, 4)
    ).shape == (0, 6, 4, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_quantized_keeps_the_dtype_and_the_loss_is_at_least_float32(
    quantizer: VectorQuantizer, dtype: torch.dtype
) -> None:
    if dtype is torch.float64:
        quantizer = copy.deepcopy(quantizer).double()
    out = quantizer(torch.randn(1, 6, 2, 2).to(dtype))
    assert out.quantized.dtype == dtype
    assert out.loss.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(
        out.quantized, quantizer.decode(out.indices.view(1, -1), quantizer.layout(2, 2)).to(dtype)
    )


@pytest.mark.parametrize("module", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("latents", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_mix_of_precisions_works(
    quantizer: VectorQuantizer, module: torch.dtype, latents: torch.dtype
) -> None:
    mixed = copy.deepcopy(quantizer).to(module)
    out = mixed(torch.randn(2, 6, 3, 3).to(latents) * 20)
    assert out.quantized.dtype == latents
    assert out.loss.dtype == torch.promote_types(
        torch.promote_types(latents, module), torch.float32
    )
    assert bool(out.loss.isfinite())
    decoded = mixed.decode(out.indices.view(2, -1), mixed.layout(3, 3))
    torch.testing.assert_close(decoded.to(latents), out.quantized, rtol=1e-2, atol=1e-2)


def test_it_compiles_in_one_graph(quantizer: VectorQuantizer) -> None:
    latents = torch.randn(2, 6, 3, 4)
    compiled = torch.compile(quantizer, backend="aot_eager", fullgraph=True)
    assert all(
        torch.equal(a, b) for a, b in zip(compiled(latents), quantizer(latents), strict=True)
    )


def test_autocast_changes_nothing(quantizer: VectorQuantizer) -> None:
    latents = torch.randn(1, 6, 3, 3)
    plain = quantizer(latents)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = quantizer(latents)
        decoded = quantizer.decode(cast.indices.view(1, -1), quantizer.layout(3, 3))
    assert torch.equal(plain.quantized, cast.quantized)
    assert torch.equal(plain.loss, cast.loss)
    assert torch.equal(decoded, plain.quantized)


@settings(max_examples=30, deadline=None)
@given(tokens=st.lists(st.integers(0, 19), min_size=6, max_size=6))
def test_encoding_decoded_tokens_gives_them_back(tokens: list[int]) -> None:
    quantizer = VectorQuantizer(20, 6)
    with torch.no_grad():
        quantizer.embedding.weight.copy_(
            torch.eye(20, 6).cumsum(0) * 3 + torch.arange(20.0)[:, None]
        )
    indices = torch.tensor([tokens])
    assert torch.equal(
        quantizer.encode(quantizer.decode(indices, TokenLayout.single(2, 3))), indices
    )


def test_encode_is_independent_of_the_batch_split(quantizer: VectorQuantizer) -> None:
    latents = torch.randn(5, 6, 3, 3)
    assert torch.equal(
        quantizer.encode(latents), torch.cat([quantizer.encode(part) for part in latents.split(2)])
    )


def test_a_learned_quantizer_has_one_parameter_and_no_other_state() -> None:
    quantizer = VectorQuantizer(16, 4)
    assert list(quantizer.state_dict()) == ["embedding.weight"]
    assert isinstance(quantizer.embedding, Codebook)
    assert isinstance(quantizer.embedding, torch.nn.Embedding)
    assert torch.equal(quantizer.codebook(), quantizer.embedding.weight)
    assert (quantizer.num_embeddings, quantizer.embedding_dim, quantizer.beta) == (16, 4, 0.25)


@pytest.mark.parametrize(
    "latents",
    [torch.zeros(6, 2, 2), torch.zeros(1, 5, 2, 2), torch.zeros(1, 6, 2, 2, dtype=torch.int64)],
    ids=["rank", "channels", "integers"],
)
def test_wrong_latents_are_named(quantizer: VectorQuantizer, latents: torch.Tensor) -> None:
    for call in (quantizer, quantizer.encode):
        with pytest.raises(InputError, match=r"latents must be floating point \[B, 6, h, w\]; got"):
            call(latents)


@pytest.mark.parametrize(
    ("indices", "says"),
    [
        (torch.tensor([[0, 1, 2, -1]]), "from -1 to 2"),
        (torch.tensor([[0, 1, 2, 20]]), r"in \[0, 20\)"),
        (torch.tensor([[0, 1, 2]]), r"\[B, 4\]"),
        (torch.tensor([0, 1, 2, 3]), r"\[B, 4\]"),
        (torch.zeros(1, 4), "must be integers"),
        (torch.zeros(1, 4, dtype=torch.bool), "must be integers"),
    ],
)
def test_wrong_indices_are_named(
    quantizer: VectorQuantizer, indices: torch.Tensor, says: str
) -> None:
    with pytest.raises(InputError, match=says):
        quantizer.decode(indices, TokenLayout.single(2, 2))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"codebook": "neural"}, "codebook: .*'learned', 'ema' or 'projected'"),
        ({"metric": "dot"}, "metric: .*'l2' or 'cosine'"),
        ({"estimator": "gumbel"}, "estimator: .*'diveq'"),
        ({"code_dim": 0}, "code_dim: .*greater than or equal to 1"),
        ({"beta": -1.0}, "beta: .*greater than or equal to 0"),
        ({"beta": math.nan}, "beta: .*finite"),
        ({"unit_codes": True}, 'unit_codes .* metric="cosine"'),
        (
            {"codebook": "ema", "estimator": "diveq"},
            "'diveq' trains codes by gradient",
        ),
    ],
)
def test_wrong_settings_are_named(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        VectorQuantizer(8, 4, **arguments)
