"""Weighted sum of all loss terms, with one backward pass through the tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from smalto.losses.adversarial import PatchDiscriminator, adaptive_factor, fooling
from smalto.losses.config import LossesConfig


class Objective:
    """Weighted sum of all terms of a recipe.

    Every term is differentiated with respect to the reconstruction only. One backward pass then
    propagates the sum of these gradients through the tokenizer. The adaptive weight needs the
    gradients of the terms at the decoder's last layer, which therefore cost almost nothing.

    Args:
        config: weights and schedules.
        last_layer: weights of the decoder's last layer.
        discriminator: the discriminator, if there is an adversarial term.
        device: device of the images.

    Attributes:
        terms: the terms that compare a reconstruction with its image, by name.
    """

    def __init__(
        self,
        config: LossesConfig,
        last_layer: Tensor,
        discriminator: PatchDiscriminator | None,
        device: torch.device,
    ) -> None:
        self._config = config
        self._last_layer = last_layer
        self._discriminator = discriminator
        self.terms = {name: term.to(device) for name, term in config.build_terms().items()}

    def backward(
        self,
        reconstruction: Tensor,
        vq_loss: Tensor,
        images: Tensor,
        step: int,
        *,
        share: float = 1.0,
        adversarial_scale: float = 1.0,
    ) -> dict[str, Tensor]:
        """Add the gradients of the objective to the parameters.

        Args:
            reconstruction: [B, C, H, W], with its graph.
            vq_loss: scalar, with its graph.
            images: [B, C, H, W].
            step: training step, counted from 1, for the schedules of the weights.
            share: factor of all gradients.
            adversarial_scale: factor of the adversarial weight.

        Returns:
            Metrics for logging: the values of all terms without their weights; the weighted sum of
            ``terms`` as ``reconstruction_loss``; and ``loss``, its sum with the weighted
            ``vq_loss``. The adversarial term is not part of ``loss``.
        """
        seen = reconstruction.detach().requires_grad_()
        gradient, metrics = self._compare(seen, images, step)
        adversarial_weight = self._config.adversarial.at(step) * adversarial_scale
        if adversarial_weight:
            adversarial, more = self._fool(seen, reconstruction, gradient, adversarial_weight)
            gradient = gradient + adversarial
            metrics |= more
        quantizer_weight = self._config.quantizer.at(step)
        metrics["vq_loss"] = vq_loss.detach()
        metrics["loss"] = metrics["reconstruction_loss"] + quantizer_weight * metrics["vq_loss"]
        roots = [(reconstruction, gradient * share)]
        if vq_loss.requires_grad:
            roots.append((vq_loss, torch.full_like(vq_loss, quantizer_weight * share)))
        torch.autograd.backward([root for root, _ in roots], [gradient for _, gradient in roots])
        return metrics

    def _compare(self, seen: Tensor, images: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the gradient of ``terms`` with respect to the reconstruction, and their values."""
        total = seen.new_zeros(())
        metrics: dict[str, Tensor] = {}
        for name, term in self.terms.items():
            weight = getattr(self._config, name).at(step)
            if weight:
                value = term(seen, images)
                metrics[name] = value.detach()
                total = total + weight * value
        metrics["reconstruction_loss"] = total.detach()
        gradient = (
            torch.autograd.grad(total, seen)[0] if total.requires_grad else torch.zeros_like(seen)
        )
        return gradient, metrics

    def _fool(
        self, seen: Tensor, reconstruction: Tensor, gradient: Tensor, weight: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted gradient of the adversarial term, and metrics for logging."""
        assert self._discriminator is not None
        with frozen(self._discriminator):
            value = fooling(self._discriminator(seen))
        (adversarial,) = torch.autograd.grad(value, seen)
        (of_reconstruction,) = torch.autograd.grad(
            reconstruction, self._last_layer, gradient, retain_graph=True
        )
        (of_adversarial,) = torch.autograd.grad(
            reconstruction, self._last_layer, adversarial, retain_graph=True
        )
        factor, length = adaptive_factor(
            of_reconstruction, of_adversarial, self._config.adversarial.max_factor
        )
        scale = (
            weight * factor
            if self._config.adversarial.adaptive
            else torch.full_like(factor, weight)
        )
        metrics = {
            "adversarial_loss": value.detach(),
            "adversarial_weight": scale,
            "adversarial_gradient": scale * length,
        }
        return adversarial * scale, metrics


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Freeze a module's parameters and set it to evaluation for the duration of the block."""
    training = module.training
    module.eval().requires_grad_(False)
    try:
        yield
    finally:
        module.train(training).requires_grad_(True)
