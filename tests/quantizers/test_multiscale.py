"""MultiScaleVQ beyond what every quantizer promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smalto.core.config import parse_config
from smalto.core.errors import ConfigError, InputError
from smalto.core.layout import TokenLayout
from smalto.quantizers import (
    CodebookUpdater,
    MultiScaleVQ,
    MultiScaleVQConfig,
    VectorQuantizerConfig,
    multiscale,
)

SCALE: dict[str, Any] = {"codebook_size": 24, "latent_dim": 5}


def build(scales: tuple[Any, ...] = (1, 2, 4), **given: Any) -> MultiScaleVQ:
    torch.manual_seed(0)
    scale = VectorQuantizerConfig(**SCALE | given.pop("scale", {}))
    quantizer = MultiScaleVQConfig(scales=scales, scale=scale, **given).build()
    for phi in quantizer.phis:
        torch.nn.Conv2d.reset_parameters(phi)  # as far from the identity as any convolution
    return quantizer


def latents(batch: int = 2, height: int = 4, width: int = 4) -> Tensor:
    return torch.randn(batch, 5, height, width, generator=torch.Generator().manual_seed(1))


def plain(
    quantizer: MultiScaleVQ, z: Tensor, grids: list[tuple[int, int]], phis: list[int]
) -> tuple[list[Tensor], Tensor]:
    """The method written out, in float64 with brute force: tokens of each scale and the result."""
    z, codes = z.double(), quantizer.scale.codes().detach().double()
    result, tokens = torch.zeros_like(z), []
    for number, grid in enumerate(grids):
        pooled = F.interpolate(z - result, size=grid, mode="area").flatten(2).transpose(1, 2)
        if quantizer.scale.nearest.metric == "cosine":
            block = (pooled @ F.normalize(codes, dim=1).T).argmax(dim=2)
        else:
            block = (pooled[:, :, None] - codes).square().sum(dim=-1).argmin(dim=2)
        tokens.append(block)
        added = codes[block].transpose(1, 2).unflatten(2, grid)
        if number < len(grids) - 1:
            added = F.interpolate(added, size=grids[-1], mode="bicubic")
        if len(quantizer.phis):
            phi = quantizer.phis[phis[number]]
            smooth = F.conv2d(added, phi.weight.double(), phi.bias.double(), padding=1)
            added = (1 - phi.ratio) * added + phi.ratio * smooth
        result = result + added
    return tokens, result


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize(
    ("num_phis", "order"), [(4, [0, 2, 3]), (1, [0, 0, 0]), (None, [0, 1, 2]), (2, [0, 0, 1])]
)
@pytest.mark.parametrize("size", [(4, 4), (6, 3), (8, 12)])
def test_against_the_method_written_out(
    metric: str, num_phis: int | None, order: list[int], size: tuple[int, int]
) -> None:
    quantizer, z = build(num_phis=num_phis, scale={"metric": metric}), latents(3, *size)
    layout = quantizer.layout(*size)
    tokens, result = plain(quantizer, z, list(layout.grids), order)
    assert torch.equal(quantizer.encode(z), torch.cat(tokens, dim=1))
    torch.testing.assert_close(quantizer(z).quantized.double(), result, rtol=1e-5, atol=1e-5)


def test_layouts_are_in_proportion_rounded_half_up() -> None:
    quantizer = build((1, 2, 3, 4))
    assert quantizer.layout(4, 4).grids == ((1, 1), (2, 2), (3, 3), (4, 4))
    assert quantizer.layout(4, 6).grids == ((1, 2), (2, 3), (3, 5), (4, 6))
    assert quantizer.layout(1, 2).grids == ((1, 1), (1, 1), (1, 2), (1, 2))
    assert build(((1, 2), (3, 4))).layout(6, 8).grids == ((2, 4), (6, 8))


@settings(max_examples=30, deadline=None)
@given(height=st.integers(1, 40), width=st.integers(1, 40))
def test_layouts_end_with_the_whole_map_and_never_exceed_it(height: int, width: int) -> None:
    grids = build((1, 2, (3, 2), 4)).layout(height, width).grids
    assert grids[-1] == (height, width)
    assert all(1 <= h <= height and 1 <= w <= width for h, w in grids)


def test_one_scale_without_phi_is_ordinary_vq() -> None:
    quantizer, z = build((4,), phi_ratio=0.0), latents()
    single = VectorQuantizerConfig(**SCALE).build()
    single.load_state_dict(quantizer.scale.state_dict())
    own, other = quantizer(z), single(z)
    assert torch.equal(own.indices, other.indices)
    assert torch.equal(own.quantized, other.quantized)
    torch.testing.assert_close(own.loss, other.loss)
    assert quantizer.generator_input([quantizer.encode(z)], quantizer.layout(4, 4)).shape == (
        2,
        0,
        5,
    )
    with_phi = build((4,))
    tokens, result = plain(with_phi, z, [(4, 4)], [0])
    assert torch.equal(with_phi.encode(z), tokens[0])
    torch.testing.assert_close(with_phi(z).quantized.double(), result, rtol=1e-5, atol=1e-5)


def test_scales_chosen_for_one_call() -> None:
    quantizer, z = build(), latents(2, 4, 6)
    layout = TokenLayout(((1, 1), (2, 3), (3, 4), (2, 2), (4, 6)))
    tokens = quantizer.encode(z, layout)
    expected, result = plain(quantizer, z, list(layout.grids), [0, 1, 2, 2, 3])
    assert torch.equal(tokens, torch.cat(expected, dim=1))
    torch.testing.assert_close(
        quantizer.decode(tokens, layout).double(), result, rtol=1e-5, atol=1e-5
    )
    with pytest.raises(InputError, match="whole latent map"):
        quantizer.encode(z, TokenLayout(((1, 1), (4, 4))))


def test_the_input_of_the_model_that_follows() -> None:
    quantizer, z = build(), latents(2, 4, 6)
    layout, tokens = quantizer.layout(4, 6), quantizer.encode(z)
    inputs = quantizer.generator_input([tokens], layout).split(layout.lengths[1:], dim=1)
    for number, (own, grid) in enumerate(zip(inputs, layout.grids[1:], strict=True), start=1):
        coarse = quantizer.decode(tokens[:, : sum(layout.lengths[:number])], layout)
        expected = F.interpolate(coarse, size=grid, mode="area").flatten(2).transpose(1, 2)
        torch.testing.assert_close(own, expected)
    # While generating, only the first scales are there: the input of the next one is.
    first = quantizer.generator_input([tokens[:, : layout.lengths[0]]], layout)
    assert torch.equal(first, inputs[0])


def test_an_ema_codebook_teaches_phi_all_the_same() -> None:
    quantizer = build(scale={"codebook": "ema"})
    quantizer(latents().requires_grad_()).loss.backward()
    assert float(quantizer.phis[0].weight.grad.abs().sum()) > 0
    assert quantizer.scale.embedding.weight.grad is None


def test_the_residual_keeps_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, pooled = multiscale.area_pool, []
    monkeypatch.setattr(
        multiscale,
        "area_pool",
        lambda latent_map, grid: (pooled.append(latent_map), pool(latent_map, grid))[1],
    )
    quantizer, z = build(tuple(range(1, 9))), latents(1, 8, 8).requires_grad_()
    seen: list[Tensor] = []
    nearest = quantizer.scale.nearest
    nearest.observer = lambda module, vectors, codes, indices, valid: seen.append(vectors)
    out = quantizer(z)
    assert len(seen) == 8
    assert (
        len(pooled) == 2 * 7
    )  # what is left, and which of it is usable, on all scales but the last
    assert not any(tensor.requires_grad for tensor in [*seen, *pooled])
    gradient = torch.autograd.grad(out.quantized.sum(), z)[0]
    assert torch.equal(gradient, torch.ones_like(z))


def test_the_start_uses_the_vectors_of_all_scales() -> None:
    quantizer, z = build((1, 2, 4), phi_ratio=0.0, scale={"codebook": "ema"}), latents(64) * 0.1 + 3
    seen = []
    updater = CodebookUpdater(quantizer)
    observer = quantizer.scale.nearest.observer
    assert observer is not None

    def listen(module: Any, vectors: Tensor, *rest: Tensor) -> None:
        seen.append(len(vectors))
        observer(module, vectors, *rest)

    quantizer.scale.nearest.observer = listen
    updater.start(z)
    assert seen[:3] == [64, 64 * 4, 64 * 16]
    quantizer.train()
    out = quantizer(z)
    updater.step()
    tokens = out.indices.view(64, -1)
    # The coarsest scale takes the mean of 3, the others what lies around it: codes for both must be
    # there.
    lengths = quantizer.scale.codes().norm(dim=1)
    assert float(lengths[tokens[:, 0]].min()) > 4
    assert float(lengths[tokens[:, 5:].flatten()].mean()) < 1
    assert float((out.quantized - z).square().mean()) < 0.7 * float((z - 3).square().mean())


def test_updater_counts_all_scales_as_one_codebook() -> None:
    quantizer, z = build((1, 2, 4), scale={"codebook": "ema"}), latents(8)
    updater = CodebookUpdater(quantizer, keep_codes=True)
    quantizer.train()
    quantizer(z)
    (tracker,) = updater.trackers.values()
    assert int(tracker.statistics.counts.sum()) == 8 * (1 + 4 + 16)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"scales": ()}, "at least 1"),
        ({"scales": (1, 0)}, "greater than or equal to 1"),
        ({"scales": (8, 4)}, "finer than the last"),
        ({"num_phis": 0}, "greater than or equal to 1"),
        ({"phi_ratio": 1.5}, "less than or equal to 1"),
        ({"scale": {"metric": "cosine", "unit_codes": True}}, "unit_codes must be false"),
    ],
)
def test_settings_that_do_not_fit(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_config(MultiScaleVQConfig, given, "test")


def test_prefixes_that_end_inside_a_scale_are_errors() -> None:
    quantizer = build()
    layout = quantizer.layout(4, 4)
    for length in (0, 2, 4, 6, 20):
        with pytest.raises(InputError, match=r"\[B, 21\]"):
            quantizer.decode(torch.zeros(1, length, dtype=torch.int64), layout)
