"""Terms, their schedules, and the one backward pass that they share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalto.core.errors import ConfigError
from smalto.losses import (
    AdversarialConfig,
    LossesConfig,
    Objective,
    PatchDiscriminator,
    PerceptualConfig,
    Weight,
)
from smalto.losses.adversarial import fooling, hinge
from smalto.training.recipe import change_recipe
from smalto.training.tokenizer_recipe import TokenizerRecipe

CPU = torch.device("cpu")


def test_a_weight_begins_late_and_grows() -> None:
    weight = Weight(weight=2.0, start=10, ramp=4)
    assert [weight.at(step) for step in (1, 10, 11, 12, 14, 15, 1000)] == [
        0,
        0,
        0.5,
        1.0,
        2.0,
        2.0,
        2.0,
    ]
    assert Weight(weight=2.0).at(1) == 2.0
    adversarial = AdversarialConfig(weight=0.1, start=10, lead=4, ramp=2)
    assert [adversarial.learns_at(step) for step in (6, 7, 10, 11)] == [False, True, True, True]
    assert not AdversarialConfig(start=10, lead=4).learns_at(20)


def test_hinge_is_two_for_who_knows_nothing_and_zero_for_who_is_certain() -> None:
    zeros, sure = torch.zeros(4, 1, 3, 3), torch.full((4, 1, 3, 3), 1.5)
    assert hinge(zeros, zeros) == 2
    assert hinge(sure, -sure) == 0
    assert hinge(-sure, sure) == 5
    assert fooling(sure) == -1.5


def test_the_discriminator_answers_patch_by_patch_and_changes_slowly() -> None:
    torch.manual_seed(0)
    judge = PatchDiscriminator(3, 16, 3)
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    for _ in range(30):  # every call brings the estimates of the largest singular values nearer
        answers = judge(images)
    assert answers.shape == (2, 1, 6, 6)
    for layer in judge.body:
        if isinstance(layer, nn.Conv2d):
            assert float(
                torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2)
            ) == pytest.approx(1, abs=0.05)
    patch = images.clone()
    patch[:, :, :8, :8] = 0  # what one answer looks at is 70 pixels wide at most
    assert not torch.equal(judge.eval()(patch)[:, :, 0, 0], answers[:, :, 0, 0])


class ReaderPool(nn.Module):
    """A stand-in for a tokenizer: a layer, and a last layer."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.last = (
            nn.Conv2d(3, 4, 3, padding=1).double(),
            nn.Conv2d(4, 3, 3, padding=1).double(),
        )
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.2

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.first(x).relu()
        return self.last(hidden), hidden.square().mean()


def setting(**adversarial: Any) -> tuple[LossesConfig, ReaderPool, PatchDiscriminator, Tensor]:
    torch.manual_seed(0)
    config = LossesConfig(
        l1=Weight(weight=0.3),
        l2=Weight(weight=2.0),
        quantizer=Weight(weight=0.7),
        adversarial=AdversarialConfig(layers=2, **adversarial),
    )
    images = (
        torch.rand(4, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        * 2
        - 1
    )
    return config, ReaderPool(), PatchDiscriminator(3, 4, 2).double(), images


def backward(
    config: LossesConfig,
    network: ReaderPool,
    judge: PatchDiscriminator,
    images: Tensor,
    step: int = 1,
) -> dict[str, Tensor]:
    reconstruction, vq_loss = network(images)
    return Objective(config, network.last.weight, judge, CPU).backward(
        reconstruction, vq_loss, images, step
    )


def test_gradients_are_those_of_the_weighted_sum() -> None:
    config, network, judge, images = setting(weight=0.5, adaptive=False)
    metrics = backward(config, network, judge, images)
    assert all(
        p.grad is None for p in judge.parameters()
    )  # the tokenizer's step teaches the discriminator nothing
    assert all(p.requires_grad for p in judge.parameters())
    got = [p.grad.clone() for p in network.parameters() if p.grad is not None]
    network.zero_grad()
    reconstruction, vq_loss = network(images)
    l1, l2, fooled = (
        F.l1_loss(reconstruction, images),
        F.mse_loss(reconstruction, images),
        -judge.eval()(reconstruction).mean(),
    )
    (0.3 * l1 + 2 * l2 + 0.7 * vq_loss + 0.5 * fooled).backward()
    for ours, plain in zip(got, network.parameters(), strict=True):
        torch.testing.assert_close(ours, plain.grad, rtol=1e-10, atol=1e-12)
    assert metrics["loss"] == pytest.approx((0.3 * l1 + 2 * l2 + 0.7 * vq_loss).item())
    assert metrics["adversarial_loss"] == pytest.approx(fooled.item())


def test_an_adaptive_weight_is_a_share_of_the_reconstructions_gradient_at_the_last_layer() -> None:
    config, network, judge, images = setting(weight=0.25, max_factor=1e9)
    without = config.model_copy(update={"adversarial": AdversarialConfig(), "quantizer": Weight()})
    backward(without, network, judge, images)
    assert network.last.weight.grad is not None
    alone = network.last.weight.grad.clone()
    network.zero_grad()
    metrics = backward(config.model_copy(update={"quantizer": Weight()}), network, judge, images)
    share = (network.last.weight.grad - alone).norm() / alone.norm()
    assert float(share) == pytest.approx(0.25)
    assert float(metrics["adversarial_gradient"]) == pytest.approx(0.25)
    clamped = config.model_copy(
        update={"adversarial": AdversarialConfig(weight=0.25, layers=2, max_factor=1e-3)}
    )
    assert float(backward(clamped, network, judge, images)["adversarial_weight"]) == pytest.approx(
        0.25e-3
    )


def test_a_discriminator_without_an_opinion_is_not_listened_to_too_closely() -> None:
    """taming-transformers, issue 44: where its gradient is nearly nothing, an unbounded weight
    makes noise of it.
    """
    config, network, judge, images = setting(weight=0.5)
    last = judge.body[-1]
    assert isinstance(last, nn.Conv2d)
    judge.body[-1] = nn.Conv2d(16, 1, 4, 1, 1).double()
    nn.init.constant_(judge.body[-1].weight, 1e-12)
    metrics = backward(config, network, judge, images)
    assert float(metrics["adversarial_weight"]) == pytest.approx(0.5 * 100)
    assert float(metrics["adversarial_gradient"]) < 1e-4


def test_before_its_start_the_discriminator_is_not_even_asked() -> None:
    config, network, judge, images = setting(weight=0.5, start=10)
    calls = []
    judge.register_forward_hook(lambda *_: calls.append(1))
    assert "adversarial_loss" not in backward(config, network, judge, images, step=10)
    assert not calls
    assert "adversarial_loss" in backward(config, network, judge, images, step=11)
    assert len(calls) == 1


def test_a_share_of_the_objective_has_a_share_of_the_gradient() -> None:
    config, network, judge, images = setting(weight=0.5, adaptive=False)
    backward(config, network, judge, images)
    whole = [p.grad.clone() for p in network.parameters() if p.grad is not None]
    network.zero_grad()
    reconstruction, vq_loss = network(images)
    Objective(config, network.last.weight, judge, CPU).backward(
        reconstruction, vq_loss, images, 1, share=0.25
    )
    for a, p in zip(whole, network.parameters(), strict=True):
        torch.testing.assert_close(0.25 * a, p.grad)


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="the weight 0 for l1, l2 and perceptual"):
        LossesConfig(l2=Weight())
    with pytest.raises(ValueError, match=r"lpips\.LPIPS\(net='vgg'\)"):
        PerceptualConfig(weight=1.0, network="lpips-vgg")
    with pytest.raises(ConfigError, match="Set it to at most 2"):
        change_recipe(TokenizerRecipe(), {"losses.adversarial.weight": 0.1, "data.size": 16})
    with pytest.raises(ConfigError, match="more than the 5 steps before its start"):
        change_recipe(
            TokenizerRecipe(), {"losses.adversarial.lead": 6, "losses.adversarial.start": 5}
        )
    with pytest.raises(ConfigError, match="images of 3 channels"):
        change_recipe(
            TokenizerRecipe(),
            {"losses.perceptual.weight": 1, "tokenizer.autoencoder.in_channels": 1},
        )
