"""What every quantizer promises, checked on every quantizer."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from smalto.core.errors import InputError
from smalto.core.layout import TokenLayout
from smalto.quantizers import (
    CodebookUpdater,
    MultiScaleVQ,
    ProductVQ,
    ProjectedCodebook,
    Quantizer,
    ResidualVQ,
    VectorQuantizer,
    fold,
)
from smalto.quantizers.code_space import ExplicitCodes
from smalto.quantizers.estimators import ESTIMATORS
from smalto.quantizers.latents import to_vectors
from smalto.quantizers.multiscale import phi_of_scale
from smalto.search import nearest_codes
from tests.contract.kinds import KINDS, TEACHING_BY_GRADIENT, C, build, latents, shapes

every_kind = pytest.mark.parametrize("kind", KINDS)
quick = settings(max_examples=8, deadline=None)


def codebooks(quantizer: nn.Module) -> list[ExplicitCodes]:
    return [module for module in quantizer.modules() if isinstance(module, ExplicitCodes)]


def vectors_of(quantizer: VectorQuantizer, z: Tensor) -> Tensor:
    """The vectors [N, D] that are compared with codes."""
    vectors, _ = to_vectors(z, quantizer.dtype, quantizer.project_in)
    return quantizer.prepare(vectors)


def estimator(quantizer: nn.Module) -> str:
    owner = quantizer.heads[0] if isinstance(quantizer, ProductVQ) else quantizer
    return owner.estimator


@every_kind
@quick
@given(shape=shapes, seed=st.integers(0, 2**16), scale=st.sampled_from([1e-3, 1.0, 50.0]))
def test_decoding_gives_bitwise_what_forward_gives(
    kind: str, shape: tuple[int, int, int], seed: int, scale: float
) -> None:
    quantizer, z = build(kind, seed), latents(*shape, seed=seed, scale=scale)
    out, tokens, layout = quantizer(z), quantizer.encode(z), quantizer.layout(*shape[1:])
    assert out.quantized.shape == z.shape
    assert out.indices.dtype == tokens.dtype == torch.int64
    assert tokens.shape == (shape[0], layout.num_tokens)
    assert torch.equal(out.indices, tokens.flatten())
    assert torch.equal(quantizer.decode(tokens, layout), out.quantized)
    assert out.loss.shape == ()
    assert bool(out.loss.isfinite())


PROGRESSIVE = [kind for kind in KINDS if kind.startswith(("residual", "multiscale"))]


@pytest.mark.parametrize("kind", PROGRESSIVE)
def test_the_first_tokens_alone_are_the_image_of_the_first_stages(kind: str) -> None:
    quantizer, z = build(kind), latents()
    tokens, layout = quantizer.encode(z), quantizer.layout(3, 4)
    for stages in range(1, len(layout.grids) + 1):
        out, first = quantizer(z, num_stages=stages), sum(layout.lengths[:stages])
        assert torch.equal(out.indices.view(2, -1), tokens[:, :first])
        assert torch.equal(quantizer.decode(tokens[:, :first], layout), out.quantized)
        if kind.startswith("residual"):
            assert torch.equal(
                quantizer.decode(tokens[:, :first], layout.prefix(stages)), out.quantized
            )
    assert torch.equal(quantizer(z).quantized, quantizer(z, num_stages=len(layout.grids)).quantized)
    for stages in (0, -1, len(layout.grids) + 1):
        with pytest.raises(InputError, match="stages"):
            quantizer(z, num_stages=stages)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in PROGRESSIVE])
def test_a_quantizer_without_stages_takes_one(kind: str) -> None:
    quantizer, z = build(kind), latents()
    assert torch.equal(quantizer(z, num_stages=1).quantized, quantizer(z).quantized)
    with pytest.raises(InputError, match="has one stage"):
        quantizer(z, num_stages=2)


@pytest.mark.parametrize(
    "kind", ["learned", "learned-cosine", "ema", "projected", "product-ema", "product-shared"]
)
def test_codes_encode_to_themselves(kind: str) -> None:
    quantizer = build(kind)
    for part in codebooks(quantizer):  # further apart than the search can mistake
        assert float(torch.pdist(part.codes().detach()).min()) > 1e-3
    grid = quantizer.layout(4, 5)
    tokens = torch.randint(20, (3, grid.num_tokens), generator=torch.Generator().manual_seed(1))
    assert torch.equal(quantizer.encode(quantizer.decode(tokens, grid).detach()), tokens)


@every_kind
@pytest.mark.parametrize("wrong", [-1, 20, 2**31])
def test_an_index_that_is_no_codes_is_an_error(kind: str, wrong: int) -> None:
    quantizer = build(kind)
    layout = quantizer.layout(2, 2)
    tokens = torch.zeros(1, layout.num_tokens, dtype=torch.int64)
    tokens[0, -1] = wrong
    with pytest.raises(InputError, match=r"\[0, 20\)"):
        quantizer.decode(tokens, layout)
    with pytest.raises(InputError, match=r"\[0, 20\)"):
        quantizer.lookup(list(tokens.split(layout.lengths, dim=1)))


@every_kind
def test_wrong_input_says_what_is_expected(kind: str) -> None:
    quantizer = build(kind)
    for wrong in (
        torch.zeros(2, C + 1, 3, 3),
        torch.zeros(C, 3, 3),
        torch.zeros(2, C, 3, 3, dtype=torch.int64),
        None,
    ):
        with pytest.raises(InputError, match=r"floating point \[B, 6, h, w\]"):
            quantizer(wrong)
        with pytest.raises(InputError, match=r"floating point \[B, 6, h, w\]"):
            quantizer.encode(wrong)
    layout = quantizer.layout(2, 3)
    with pytest.raises(InputError, match="this layout"):
        quantizer.decode(torch.zeros(1, layout.num_tokens + 1, dtype=torch.int64), layout)
    with pytest.raises(InputError, match="must be integers"):
        quantizer.decode(torch.zeros(1, layout.num_tokens), layout)
    for foreign in (TokenLayout(((1, 2), (4, 5))), TokenLayout(((2, 3),) * 9), None):
        with pytest.raises(InputError):
            quantizer.decode(torch.zeros(1, 13, dtype=torch.int64), foreign)  # type: ignore[arg-type]


@every_kind
def test_lookup_gives_the_codes_in_order(kind: str) -> None:
    quantizer = build(kind)
    layout = quantizer.layout(2, 3)
    tokens = torch.randint(20, (2, layout.num_tokens), generator=torch.Generator().manual_seed(0))
    codes = quantizer.lookup(list(tokens.split(layout.lengths, dim=1)))
    trackers = quantizer.codebook()
    trackers = trackers if trackers.ndim == 3 else trackers.expand(len(layout.grids), -1, -1)
    expected = torch.cat(
        [
            tracker[block]
            for tracker, block in zip(trackers, tokens.split(layout.lengths, dim=1), strict=True)
        ],
        dim=1,
    )
    torch.testing.assert_close(codes, expected)


@every_kind
@pytest.mark.parametrize("training", [True, False])
def test_forward_changes_nothing(kind: str, training: bool) -> None:
    quantizer = build(kind).train(training)
    before, random = copy.deepcopy(quantizer.state_dict()), torch.get_rng_state()
    z = latents().requires_grad_()
    out = quantizer(z)
    (out.loss + out.quantized.sum()).backward()
    quantizer.decode(quantizer.encode(z), quantizer.layout(3, 4))
    assert before.keys() == quantizer.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    again = quantizer(z)
    assert torch.equal(out.quantized, again.quantized)
    assert torch.equal(out.loss, again.loss)


@every_kind
def test_loss_and_value_are_the_same_in_training_and_evaluation(kind: str) -> None:
    quantizer, z = build(kind), latents()
    training, evaluation = quantizer.train()(z), quantizer.eval()(z)
    assert torch.equal(training.loss, evaluation.loss)
    assert torch.equal(training.quantized, evaluation.quantized)


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@every_kind
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", DTYPES)
def test_every_precision(kind: str, dtype: torch.dtype, weights: torch.dtype) -> None:
    quantizer = build(kind).to(weights)
    z = latents(dtype=dtype).requires_grad_()
    out = quantizer(z)
    assert out.quantized.dtype == dtype
    assert out.loss.dtype == (torch.float64 if torch.float64 in (dtype, weights) else torch.float32)
    decoded = quantizer.decode(quantizer.encode(z), quantizer.layout(3, 4))
    assert decoded.dtype == weights
    assert torch.equal(decoded.to(dtype), out.quantized)
    (out.loss + out.quantized.sum()).backward()
    assert z.grad is not None
    assert z.grad.dtype == dtype
    assert bool(z.grad.isfinite().all())


@every_kind
def test_autocast_is_off_inside(kind: str) -> None:
    quantizer, z = build(kind), latents()
    plain = quantizer(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = quantizer(z)
        tokens = quantizer.encode(z)
        decoded = quantizer.decode(tokens, quantizer.layout(3, 4))
        codes = quantizer.lookup(tokens.split(quantizer.layout(3, 4).lengths, dim=1))
    uncast = quantizer.lookup(tokens.split(quantizer.layout(3, 4).lengths, dim=1))
    assert torch.equal(codes, uncast)
    assert torch.equal(plain.quantized, cast.quantized)
    assert torch.equal(plain.loss, cast.loss)
    assert torch.equal(tokens.flatten(), plain.indices)
    assert torch.equal(decoded, plain.quantized)


@pytest.mark.parametrize(
    "kind",
    [kind for kind in KINDS if kind != "multiscale-one-scale" and kind.startswith("multiscale")],
)
def test_coarse_scales_average_what_is_usable(kind: str) -> None:
    quantizer, z = build(kind), latents(batch=3)
    reference = quantizer(z)
    z[1, 2, 1, 3] = math.nan
    z[2] = math.inf
    z.requires_grad_()
    out, layout = quantizer(z), quantizer.layout(3, 4)
    tokens = out.indices.view(3, -1)
    assert torch.equal(tokens[0], reference.indices.view(3, -1)[0])
    assert torch.equal(out.quantized[0], reference.quantized[0])
    assert int(tokens[1, sum(layout.lengths[:-1]) + 1 * 4 + 3]) == 0
    assert int(tokens[2].abs().sum()) == 0
    assert bool(out.quantized.isfinite().all())
    # The coarsest scale is the mean of the others.
    vectors = z.detach()[1].flatten(1).T[[i for i in range(12) if i != 7]]
    mean = (
        quantizer.project_in(vectors).mean(dim=0, keepdim=True)
        if layout.grids[0] == (1, 1)
        else None
    )
    if mean is not None:
        (tracker,) = codebooks(quantizer)
        assert int(tokens[1, 0]) == int(
            nearest_codes(mean, tracker.codes(), tracker.nearest.metric)
        )
    (out.loss + (out.quantized * torch.randn(3, C, 3, 4)).sum()).backward()
    assert z.grad is not None
    assert bool(z.grad.isfinite().all())
    assert float(z.grad[1, :, 1, 3].abs().sum() + z.grad[2].abs().sum()) == 0
    assert all(bool(p.grad.isfinite().all()) for p in quantizer.parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("multiscale")])
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_broken_vector_stays_alone(kind: str, broken: float) -> None:
    quantizer, z = build(kind), latents()
    z[1, 2, 1, 3] = broken
    clean = z.clone()
    clean[1, :, 1, 3] = 0
    z.requires_grad_()
    out, reference = quantizer(z), quantizer(clean)
    layout = quantizer.layout(3, 4)
    position = [index for grid in range(len(layout.grids)) for index in [grid * 12 + 1 * 4 + 3]]
    tokens = out.indices.view(2, -1)
    assert bool((tokens[1, position] == 0).all())
    others = torch.ones(2, 3, 4, dtype=torch.bool)
    others[1, 1, 3] = False
    assert torch.equal(
        out.quantized.permute(0, 2, 3, 1)[others], reference.quantized.permute(0, 2, 3, 1)[others]
    )
    zero = quantizer.decode(
        torch.zeros(1, quantizer.layout(1, 1).num_tokens, dtype=torch.int64), quantizer.layout(1, 1)
    )
    torch.testing.assert_close(
        out.quantized[1, :, 1, 3], zero[0, :, 0, 0]
    )  # behind projections, sums of another batch size
    # The loss is the mean over the others.
    kept = latents().permute(0, 2, 3, 1)[others][None].permute(0, 2, 1)[..., None]
    torch.testing.assert_close(out.loss, quantizer(kept).loss)
    (out.loss + (out.quantized * torch.randn(2, C, 3, 4)).sum()).backward()
    assert z.grad is not None
    assert bool(z.grad.isfinite().all())
    assert float(z.grad[1, :, 1, 3].abs().sum()) == 0
    assert all(bool(p.grad.isfinite().all()) for p in quantizer.parameters() if p.grad is not None)


@every_kind
def test_a_broken_vector_teaches_nothing(kind: str) -> None:
    quantizer = build(kind)
    z = torch.full((1, C, 2, 2), math.nan, requires_grad=True)
    out = quantizer(z)
    assert out.loss.item() == 0
    (out.loss + out.quantized.square().sum()).backward()
    for name, parameter in quantizer.named_parameters():
        if (
            parameter.grad is not None and "project_out" not in name
        ):  # the decoder's side does show code 0
            assert float(parameter.grad.abs().sum()) == 0, name


@every_kind
def test_an_empty_batch_is_no_special_case(kind: str) -> None:
    quantizer = build(kind)
    z = latents(batch=0).requires_grad_()
    out = quantizer(z)
    assert out.quantized.shape == (0, C, 3, 4)
    assert out.loss.item() == 0
    (out.loss + out.quantized.sum()).backward()


@every_kind
@quick
@given(seed=st.integers(0, 2**16))
def test_images_do_not_see_each_other(kind: str, seed: int) -> None:
    quantizer, z = build(kind), latents(batch=5, seed=seed)
    tokens = quantizer.encode(z)
    assert torch.equal(torch.cat([quantizer.encode(part) for part in z.split(2)]), tokens)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(quantizer.encode(z[order]), tokens[order])


@pytest.mark.parametrize("kind", ["learned", "ema", "projected", "learned-cosine"])
def test_renumbered_codes_renumber_the_tokens(kind: str) -> None:
    quantizer, z = build(kind), latents(batch=8)
    before, order = quantizer(z), torch.randperm(20)
    (tracker,) = codebooks(quantizer)
    with torch.no_grad():
        tracker.embedding.weight.copy_(tracker.embedding.weight[order])
    after = quantizer(z)
    assert torch.equal(order[after.indices], before.indices)
    assert torch.equal(after.quantized, before.quantized)


@pytest.mark.parametrize("kind", ["learned", "ema"])
def test_data_and_codes_that_move_together_keep_their_tokens(kind: str) -> None:
    quantizer, z = build(kind), latents(batch=8)
    tokens = quantizer.encode(z)
    with torch.no_grad():
        codebooks(quantizer)[0].embedding.weight.add_(64.0)
    assert torch.equal(quantizer.encode(z + 64.0), tokens)


@every_kind
def test_state_goes_round(kind: str) -> None:
    quantizer, other, z = build(kind), build(kind, seed=1), latents()
    assert not torch.equal(quantizer(z).quantized, other(z).quantized)
    other.load_state_dict(quantizer.state_dict())
    assert torch.equal(quantizer(z).quantized, other(z).quantized)


def test_the_plain_quantizer_has_one_tensor() -> None:
    assert list(VectorQuantizer(8, 4).state_dict()) == ["embedding.weight"]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "projected" in kind])
def test_a_projected_codebook_folds_to_a_plain_one(kind: str) -> None:
    quantizer, z = build(kind), latents(batch=6)
    with torch.no_grad():
        for part in codebooks(quantizer):
            assert isinstance(part.embedding, ProjectedCodebook)
            part.embedding.projection.add_(0.2 * torch.randn_like(part.embedding.projection))
    folded = fold(quantizer)
    assert not any("projection" in name for name in folded.state_dict())
    assert torch.equal(folded.encode(z), quantizer.encode(z))
    assert torch.equal(folded(z).quantized, quantizer(z).quantized)
    plain = KINDS[kind].folded().build()
    plain.load_state_dict(folded.state_dict())
    assert torch.equal(plain.encode(z), quantizer.encode(z))


@every_kind
def test_settings_go_round(kind: str) -> None:
    config = KINDS[kind]
    assert type(config).model_validate_json(config.model_dump_json()) == config
    assert len(type(config).model_fields) <= 12


# --- gradients ------------------------------------------------------------------------------------
# -------------------------


@pytest.mark.parametrize("depth", range(1, 9))
def test_straight_through_is_the_identity_at_any_depth(depth: int) -> None:
    quantizer = KINDS["residual-ema"].model_copy(update={"num_stages": depth}).build().double()
    z = latents(batch=1, height=1, width=2, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(
        lambda x: quantizer(x).quantized.flatten(), z
    ).view(12, 12)
    assert torch.equal(jacobian, torch.eye(12, dtype=torch.float64))


# Projections and normalization have gradients of their own.
@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if "code_dim" not in kind and "unit" not in kind]
)
def test_the_gradient_of_the_value_is_the_estimators(kind: str) -> None:
    quantizer = build(kind).double()
    z = latents(batch=1, height=1, width=1, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(
        lambda x: quantizer(x).quantized.flatten(), z
    ).view(C, C)
    parts = quantizer.num_heads if isinstance(quantizer, ProductVQ) else 1
    width, value = C // parts, quantizer(z).quantized.detach().flatten()
    expected = torch.zeros(C, C, dtype=torch.float64)
    for part in range(parts):
        own = slice(part * width, (part + 1) * width)
        expected[own, own] = explicit_jacobian(estimator(quantizer), z.flatten()[own], value[own])
    torch.testing.assert_close(jacobian, expected)


def explicit_jacobian(name: str, z: Tensor, c: Tensor) -> Tensor:
    """d quantized / d z, written out as the papers have it."""
    eye = torch.eye(len(z), dtype=z.dtype)
    if name == "straight_through":
        return eye
    if name == "diveq":  # z + |c - z| u: the length falls by one where z moves along u
        u = (c - z) / (c - z).norm()
        return eye - torch.outer(u, u)
    assert name == "rotation"
    # In the plane of z and c: the rotation that takes z's direction to c's, as a matrix.
    a = z / z.norm()
    b = c / c.norm()
    cosine = float(a @ b)
    across = b - cosine * a
    across = across / across.norm()
    angle = math.acos(cosine)
    plane = torch.outer(across, a) - torch.outer(a, across)
    turn = eye + math.sin(angle) * plane + (1 - math.cos(angle)) * plane @ plane
    torch.testing.assert_close(turn @ a, b)
    return c.norm() / z.norm() * turn


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_survive_degenerate_vectors(name: str) -> None:
    zero, one = torch.zeros(4), torch.tensor([1.0, 0, 0, 0])
    vectors = torch.stack([zero, zero, one, one, one, -one]).requires_grad_()
    codes = torch.stack([zero, one, zero, one, -one, one]).requires_grad_()
    out = ESTIMATORS[name].apply(vectors, codes, None)
    assert torch.equal(out, codes)
    out.square().sum().backward()
    assert vectors.grad is not None
    assert bool(vectors.grad.isfinite().all())
    assert codes.grad is None or bool(codes.grad.isfinite().all())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "diveq" in kind])
def test_noise_moves_the_value_in_training_only(kind: str) -> None:
    quantizer, z = build(kind), latents()
    assert not ESTIMATORS["diveq"].exact
    width = (
        sum(part.embedding.embedding_dim for part in codebooks(quantizer))
        if isinstance(quantizer, ProductVQ)
        else None
    )
    width = width or codebooks(quantizer)[0].embedding.embedding_dim
    noise = 0.1 * torch.randn(2, width, 3, 4, generator=torch.Generator().manual_seed(0))
    plain, moved = quantizer(z).quantized, quantizer(z, noise=noise).quantized
    assert not torch.equal(plain, moved)
    assert torch.equal(quantizer(z, noise=noise).quantized, moved)
    assert torch.equal(quantizer.eval()(z, noise=noise).quantized, plain)
    # The step keeps its length, so what is decoded lies as far from the vector as the code does.
    if width == C and not isinstance(quantizer, ProductVQ):
        torch.testing.assert_close((moved - z).norm(dim=1), (plain - z).norm(dim=1))
    with pytest.raises(InputError, match="noise must"):
        quantizer.train()(z, noise=noise[:, :1])


def test_noise_for_an_estimator_that_takes_none_is_an_error() -> None:
    with pytest.raises(InputError, match="diveq"):
        build("ema")(latents(), noise=latents())


def reference_loss(quantizer: Quantizer, z: Tensor, fixed: Quantizer, fixed_z: Tensor) -> Tensor:
    """The loss written out; ``fixed`` and ``fixed_z`` hold the same values, and are what a stop-
    gradient gives.
    """
    layout = quantizer.layout(*z.shape[2:])
    tokens = fixed.encode(fixed_z)
    if isinstance(quantizer, ProductVQ):
        assert isinstance(fixed, ProductVQ)
        parts, fixed_parts = z.chunk(quantizer.num_heads, 1), fixed_z.chunk(quantizer.num_heads, 1)
        heads = zip(quantizer.all_heads(), parts, fixed.all_heads(), fixed_parts, strict=True)
        return torch.stack([reference_loss(*head) for head in heads]).mean()
    if isinstance(quantizer, MultiScaleVQ):
        assert isinstance(fixed, MultiScaleVQ)
        return multiscale_loss(quantizer, z, fixed, fixed_z)
    flat, fixed_flat = (x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]) for x in (z, fixed_z))
    stages = list(quantizer.stages) if isinstance(quantizer, ResidualVQ) else [quantizer]
    stopped = list(fixed.stages) if isinstance(fixed, ResidualVQ) else [fixed]

    def space(owner: Any, vectors: Tensor) -> Tensor:
        vectors = owner.project_in(vectors)
        return (
            nn.functional.normalize(vectors, dim=1)
            if getattr(owner, "unit_codes", False)
            else vectors
        )

    moving, still = space(quantizer, flat), space(fixed, fixed_flat).detach()
    blocks = [block.reshape(-1) for block in tokens.split(layout.lengths, dim=1)]
    done = torch.zeros_like(still)
    losses = []
    for own, stop, block in zip(stages, stopped, blocks, strict=True):
        stop_codes = stop.codes()[block].detach()
        loss = own.beta * (moving - done - stop_codes).square().mean()
        if type(own.embedding).__name__ != "EMACodebook" and not own.codes_learn_by_task:
            loss = loss + (own.codes()[block] - (still - done)).square().mean()
        losses.append(loss)
        done = done + stop_codes
    return torch.stack(losses).mean()


def multiscale_loss(
    quantizer: MultiScaleVQ, z: Tensor, fixed: MultiScaleVQ, fixed_z: Tensor
) -> Tensor:
    """Mean over scales of mse(f_k, sg f) + beta mse(sg f_k, f), with images one by one."""
    layout = quantizer.layout(*z.shape[2:])
    tokens = fixed.encode(fixed_z).split(layout.lengths, dim=1)

    def target(owner: MultiScaleVQ, latent: Tensor) -> Tensor:
        return owner.project_in(latent.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def results(owner: MultiScaleVQ) -> list[Tensor]:
        total, found = torch.zeros(()), []
        for number, (block, grid) in enumerate(zip(tokens, layout.grids, strict=True)):
            codes = owner.scale.codes()[block].transpose(1, 2).unflatten(2, grid)
            if number < len(layout.grids) - 1:
                codes = nn.functional.interpolate(codes, size=layout.grids[-1], mode="bicubic")
            if len(owner.phis):
                phi = owner.phis[phi_of_scale(len(layout.grids), len(owner.phis))[number]]
                smoothed = nn.functional.conv2d(codes, phi.weight, phi.bias, padding=1)
                codes = (1 - phi.ratio) * codes + phi.ratio * smoothed
            total = total + codes
            found.append(total)
        return found

    moving, still = target(quantizer, z), target(fixed, fixed_z).detach()
    losses = [
        quantizer.beta * (moving - result.detach()).square().mean() for result in results(fixed)
    ]
    if quantizer.estimator != "diveq":
        losses += [(result - still).square().mean() for result in results(quantizer)]
    return torch.stack(losses).sum() / len(layout.grids)


@every_kind
def test_the_loss_is_the_papers_and_passes_gradcheck(kind: str) -> None:
    quantizer = build(kind).double()
    fixed = copy.deepcopy(quantizer)
    z = latents(batch=1, height=2, width=2, dtype=torch.float64).requires_grad_()
    out = quantizer(z)
    expected = reference_loss(quantizer, z, fixed, z.detach().clone())
    torch.testing.assert_close(out.loss, expected)
    parameters = [p for p in quantizer.parameters() if p.requires_grad]
    got = torch.autograd.grad(out.loss, [z, *parameters], allow_unused=True)
    want = torch.autograd.grad(expected, [z, *parameters], allow_unused=True)
    for ours, reference in zip(got, want, strict=True):
        if reference is None:
            assert ours is None or float(ours.abs().sum()) == 0
        else:
            torch.testing.assert_close(ours, reference)
    # What a stop-gradient holds is no longer a function of z, so the written-out loss is what
    # finite differences can check.
    values = [p.detach().clone().requires_grad_() for p in parameters]

    names = [f"own.{name}" for name, p in quantizer.named_parameters() if p.requires_grad]
    holder = _Loss(quantizer, fixed, z.detach().clone())

    def loss(moved: Tensor, *weights: Tensor) -> Tensor:
        return torch.func.functional_call(holder, dict(zip(names, weights, strict=True)), (moved,))

    assert torch.autograd.gradcheck(loss, (z, *values), atol=1e-6)


class _Loss(nn.Module):
    def __init__(self, own: Quantizer, fixed: Quantizer, fixed_z: Tensor) -> None:
        super().__init__()
        self.own, self.fixed, self.fixed_z = own, fixed, fixed_z

    def forward(self, z: Tensor) -> Tensor:
        return reference_loss(self.own, z, self.fixed, self.fixed_z)


@pytest.mark.parametrize("kind", TEACHING_BY_GRADIENT)
def test_codes_that_learn_by_gradient_get_one(kind: str) -> None:
    quantizer, z = build(kind), latents(batch=4).requires_grad_()
    out = quantizer(z)
    (out.loss + (out.quantized - 1).square().mean()).backward()
    for name, parameter in quantizer.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert float(parameter.grad.abs().sum()) > 0, name


# --- the search inside ----------------------------------------------------------------------------
# --------------------------


@pytest.mark.parametrize("kind", ["learned", "ema-cosine", "projected", "learned-unit"])
@quick
@given(seed=st.integers(0, 2**16))
def test_the_code_is_the_best_in_float64(kind: str, seed: int) -> None:
    quantizer, z = build(kind), latents(batch=4, seed=seed)
    (tracker,) = codebooks(quantizer)
    vectors = vectors_of(tracker, z).detach().double()
    codes, indices = tracker.codes().detach().double(), quantizer.encode(z).flatten()
    if tracker.nearest.metric == "cosine":
        scores = vectors @ nn.functional.normalize(codes, dim=1).T
        assert bool(
            (
                scores.max(1).values - scores.gather(1, indices[:, None])[:, 0]
                <= 1e-6 * vectors.norm(dim=1)
            ).all()
        )
    else:
        distances = (vectors[:, None] - codes[None]).square().sum(-1)
        excess = distances.gather(1, indices[:, None])[:, 0] - distances.min(1).values
        bound = 4 * 2**-24 * math.sqrt(C) * (vectors.norm(dim=1) + codes.norm(dim=1).max()).square()
        assert bool((excess <= bound).all())
    assert torch.equal(
        indices,
        nearest_codes(
            vectors_of(tracker, z), tracker.codes(), tracker.nearest.metric, backend="tiled"
        ),
    )


# --- with the updater -----------------------------------------------------------------------------
# --------------------------


@every_kind
def test_upkeep_brings_codes_to_the_data(kind: str) -> None:
    quantizer = build(kind)
    z = latents(batch=64, scale=3.0) + 5
    before = (quantizer(z).quantized - z).square().mean().item()
    updater = CodebookUpdater(quantizer)
    updater.start(z)
    for _ in range(3):
        quantizer(z)
        updater.step()
    after = (quantizer(z).quantized - z).square().mean().item()
    if "unit" in kind or "projected" in kind:
        assert math.isfinite(
            after
        )  # lengths are not theirs to choose; a map without an offset reaches no offset
    else:
        assert after < 0.8 * before
    assert all(0 < share <= 1 for share in updater.usage().values())


@every_kind
def test_state_of_upkeep_goes_on_bit_for_bit(kind: str) -> None:
    def run(stop: int | None) -> list[Tensor]:
        quantizer = build(kind)
        optimizer = torch.optim.Adam(
            [p for p in quantizer.parameters() if p.requires_grad]
            or [nn.Parameter(torch.zeros(1))],
            lr=0.01,
        )
        updater = CodebookUpdater(quantizer, optimizer, decay_tokens=2.0, seed=3)
        for step in range(6):
            if step == stop:
                saved = copy.deepcopy(
                    (quantizer.state_dict(), optimizer.state_dict(), updater.state_dict())
                )
                quantizer = build(kind, seed=9)
                quantizer.load_state_dict(saved[0])
                optimizer = torch.optim.Adam(
                    [p for p in quantizer.parameters() if p.requires_grad]
                    or [nn.Parameter(torch.zeros(1))],
                    lr=0.01,
                )
                optimizer.load_state_dict(saved[1])
                updater = CodebookUpdater(quantizer, optimizer, decay_tokens=2.0, seed=99)
                updater.load_state_dict(saved[2])
            out = quantizer(latents(seed=step).requires_grad_())
            optimizer.zero_grad()
            (out.loss + out.quantized.square().mean()).backward()
            optimizer.step()
            updater.step()
        return [tensor.detach() for tensor in quantizer.state_dict().values()]

    for whole, resumed in zip(run(None), run(4), strict=True):
        assert torch.equal(whole, resumed)
