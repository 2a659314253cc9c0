"""Training task of a tokenizer: losses, optimizers, codebook updates, averaged weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # the first optimizer imports it anyway; here Ctrl-C can exit at once
from torch import Tensor, nn

from smalto.autoencoders import CheckpointedNetwork
from smalto.core import distributed
from smalto.core.device import computing
from smalto.core.errors import RunError
from smalto.losses import Objective, PatchDiscriminator
from smalto.losses.adversarial import hinge
from smalto.losses.reconstruction import Perceptual
from smalto.metrics import psnr
from smalto.quantizers import CodebookUpdater
from smalto.tokenizer import ImageTokenizer, load
from smalto.training.data_parallel import data_parallel, no_gradient_sync
from smalto.training.optimization import (
    WeightAverage,
    clip_gradients,
    cosine_schedule,
    load_moments,
    parameter_groups,
)
from smalto.training.task import MonitoredMetric
from smalto.training.tokenizer_recipe import TokenizerMonitorConfig, TokenizerRecipe

LR_BACK_OFF = 0.5  # each rollback multiplies learning rates and the adversarial weight by this
SATURATED = 0.05  # of the discriminator's hinge loss, which is 2 for a discriminator that guesses


class TokenizerTask:
    """Training of a tokenizer, step by step.

    Contains the losses, the discriminator, the optimizers, the codebook updater and the averaged
    weights.

    Args:
        tokenizer: to train, on its device.
        recipe: all settings.
        held_out: fixed crops [N, C, size, size] in [-1, 1], for ``evaluate``.
        keep_codes: whether the tokenizer is trained already, so that k-means must not move its
            codes.

    Attributes:
        tokenizer: the one that is trained.
        device: of the tokenizer.
        batch_size: crops per step, over all processes.
        monitored: metrics that the trainer watches.
    """

    def __init__(
        self,
        tokenizer: ImageTokenizer,
        recipe: TokenizerRecipe,
        held_out: Tensor,
        keep_codes: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self._recipe = recipe
        self._held_out = held_out
        self.device = next(tokenizer.parameters()).device
        self.batch_size = recipe.data.batch
        self.monitored: Sequence[MonitoredMetric] = monitored_metrics(recipe.monitor)
        self._frozen = _freeze(tokenizer, recipe.finetune.learn)
        self._set_up_networks()
        settings = recipe.optimizer
        adversarial = recipe.losses.adversarial
        self._discriminator: PatchDiscriminator | None = None
        if adversarial.weight:
            self._discriminator = adversarial.build(tokenizer.in_channels).to(
                next(tokenizer.parameters())
            )
            distributed.broadcast(
                [*self._discriminator.parameters(), *self._discriminator.buffers()]
            )
            self._discriminator_network = data_parallel(self._discriminator)
            self._discriminator_optimizer = torch.optim.AdamW(
                parameter_groups(self._discriminator, settings.weight_decay),
                lr=adversarial.lr,
                betas=adversarial.betas,
            )
        self._objective = Objective(
            recipe.losses, _last_layer(tokenizer.decoder), self._discriminator, self.device
        )
        self.optimizer = torch.optim.AdamW(
            parameter_groups(
                tokenizer, settings.weight_decay, tokenizer.quantize.codebook_parameters()
            ),
            lr=settings.lr,
            betas=settings.betas,
        )
        self._updater: CodebookUpdater | None = None
        if recipe.finetune.learn == "everything" and tokenizer.quantize.codebook_parameters():
            codebook = recipe.codebook
            self._updater = CodebookUpdater(
                tokenizer,
                self.optimizer,
                codebook.revive(),
                decay_tokens=codebook.decay_tokens,
                seed=recipe.seed,
                keep_codes=keep_codes,
            )
        self._average = WeightAverage(tokenizer, settings.ema_decay) if settings.ema_decay else None
        self._lr_scale = 1.0

    @property
    def result(self) -> ImageTokenizer:
        """Tokenizer to save: with averaged weights if ``optimizer.ema_decay`` is set."""
        if self._average is None:
            return self.tokenizer
        average = self._average.model
        assert isinstance(average, ImageTokenizer)
        return average

    @property
    def num_start_images(self) -> int:
        """Crops for the k-means initialization: 8 latents per code; 0 without a codebook."""
        if self._updater is None:
            return 0
        layout = self.tokenizer.layout(self._recipe.data.size, self._recipe.data.size)
        return math.ceil(8 * self.tokenizer.quantize.codebook_size / max(layout.lengths))

    def start(self, batches: list[Tensor]) -> None:
        """Initialize the codebook, by k-means on crops [B, C, size, size], and the averages."""
        if self._updater is not None:
            self._updater.start(batch.to(self.device) for batch in batches)
        self._average = (
            WeightAverage(self.tokenizer, self._recipe.optimizer.ema_decay)
            if self._average
            else None
        )

    def train_step(self, batch: Tensor, step: int) -> dict[str, float]:
        """Train on this rank's part of a batch [B, C, size, size] in [-1, 1]; return metrics."""
        self.tokenizer.train()
        for part in self._frozen:
            part.eval()
        self._set_learning_rates(step)
        self.optimizer.zero_grad(set_to_none=True)
        parts = batch.to(self.device).chunk(self._recipe.optimizer.accumulate)
        metrics: dict[str, Tensor] = {}
        fakes = []
        for number, images in enumerate(parts):
            share = len(images) / len(batch)
            last = number == len(parts) - 1
            with (
                computing(self.device, self._recipe.precision, len(images)),
                no_gradient_sync(self._network, not last),
            ):
                reconstruction, vq_loss, _ = self._network(self._as_laid_out(images))
                values = self._objective.backward(
                    reconstruction,
                    vq_loss,
                    images,
                    step,
                    share=share,
                    adversarial_scale=self._lr_scale,
                )
            fakes.append(reconstruction.detach())
            values["psnr"] = psnr(fakes[-1], images).mean()
            for name, value in values.items():
                metrics[name] = metrics.get(name, 0.0) + share * value.to(reconstruction.dtype)
        metrics["gradient_norm"] = self._update()
        if self._recipe.losses.adversarial.learns_at(step):
            metrics["discriminator_loss"] = self._teach_discriminator(parts, fakes)
        return self._to_log(metrics)

    def _update(self) -> Tensor:
        """Step the optimizer, the codebook and the averages; return the gradient norm.

        If the gradient is not finite, nothing is changed.
        """
        norm = clip_gradients(self.optimizer, self._recipe.optimizer.clip)
        # The gradient is the same in all processes, so all take the same branch.
        if math.isfinite(float(norm)):
            self.optimizer.step()
            if self._updater is not None:
                self._updater.step()
            if self._average is not None:
                self._average.step()
        elif self._updater is not None:
            self._updater.discard()
        return norm

    def _teach_discriminator(self, parts: tuple[Tensor, ...], fakes: list[Tensor]) -> Tensor:
        """Train the discriminator one step on images and reconstructions; return its loss."""
        assert self._discriminator is not None
        self._discriminator_optimizer.zero_grad(set_to_none=True)
        num_images = sum(map(len, parts))
        total = torch.zeros((), device=self.device)
        for number, (images, fake) in enumerate(zip(parts, fakes, strict=True)):
            with (
                computing(self.device, self._recipe.precision, len(images)),
                no_gradient_sync(self._discriminator_network, number < len(parts) - 1),
            ):
                both = self._as_laid_out(torch.cat([images, fake]))
                logits = self._discriminator_network(both).chunk(2)
                loss = hinge(*logits) * (len(images) / num_images)
                loss.backward()
            total += loss.detach()
        norm = clip_gradients(self._discriminator_optimizer, self._recipe.optimizer.clip)
        if math.isfinite(float(norm)):
            self._discriminator_optimizer.step()
        return total

    def _to_log(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        """Return the metrics as floats: means over all processes; not finite ones are left out."""
        dtype = metrics["loss"].dtype
        values = torch.stack([value.detach().to(dtype) for value in metrics.values()])
        means = distributed.all_reduce(values) / distributed.world_size()
        log = {name: round(value, 7) for name, value in zip(metrics, means.tolist(), strict=True)}
        if self._updater is not None:
            log["usage"] = round(min(self._updater.usage().values()), 5)
            log["not_finite"] = self._updater.num_not_finite
        log["lr"] = self.optimizer.param_groups[0]["lr"]
        if not math.isfinite(log["gradient_norm"]):
            log["skipped"] = 1
        return {name: value for name, value in log.items() if math.isfinite(value)}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return PSNR in dB and, if there is one, the perceptual loss of the held-out crops."""
        model = self.result.eval()
        perceptual = self._objective.terms.get("perceptual")
        own = distributed.rank_range(len(self._held_out))
        sums = torch.zeros(2, device=self.device)
        for images in self._held_out[own.start : own.stop].split(self._recipe.data.batch):
            with computing(self.device, self._recipe.precision, len(images)):
                images = images.to(self.device)
                reconstruction = model(self._as_laid_out(images)).reconstruction.clamp(-1, 1)
                sums[0] += psnr(reconstruction, images).sum()
                if perceptual is not None:
                    sums[1] += perceptual(reconstruction, images) * len(images)
        if not len(self._held_out):
            return {}
        means = (distributed.all_reduce(sums) / len(self._held_out)).tolist()
        metrics = {"held_out_psnr": round(means[0], 4)}
        if isinstance(perceptual, Perceptual):
            metrics["held_out_distance"] = round(means[1], 6)
        return metrics

    def back_off(self) -> None:
        """Halve the learning rates and the adversarial weight."""
        self._lr_scale *= LR_BACK_OFF

    def save(self, folder: Path) -> None:
        """Write ``result`` into a folder."""
        self.result.save(folder)

    def load(self, folder: Path) -> None:
        """Load the weights of ``result`` that ``save`` wrote.

        Raises:
            RunError: the folder cannot be read, or its tokenizer has another configuration.
        """
        saved = load(folder)
        if saved.config != self.tokenizer.config:
            raise RunError(
                f"{folder}: got a tokenizer of another configuration; expected that of the run. "
                "Delete this checkpoint and resume from an earlier one."
            )
        self.result.load_state_dict(saved.state_dict())

    def state(self) -> dict[str, Any]:
        """Return the state that resuming needs besides ``result``."""
        state: dict[str, Any] = {
            "optimizer": self.optimizer.state_dict(),
            "lr_scale": self._lr_scale,
        }
        if self._updater is not None:
            state["updater"] = self._updater.state_dict()
        if self._average is not None:
            state["weights"] = dict(self.tokenizer.state_dict())
            state["averaged_steps"] = self._average.num_steps
        if self._discriminator is not None:
            state["discriminator"] = dict(self._discriminator.state_dict())
            state["discriminator_optimizer"] = self._discriminator_optimizer.state_dict()
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore a state that ``state`` returned; the settings remain those of the recipe."""
        if self._average is not None:
            self._average.num_steps = state.get("averaged_steps", 0)
            weights = state.get("weights", self._average.model.state_dict())
            self.tokenizer.load_state_dict(weights)
        elif "weights" in state:  # ema_decay was set when the state was saved
            self.tokenizer.load_state_dict(state["weights"])
        load_moments(self.optimizer, state["optimizer"])
        if self._updater is not None:
            self._updater.load_state_dict(state["updater"])
        if self._discriminator is not None and "discriminator" in state:
            self._discriminator.load_state_dict(state["discriminator"])
            load_moments(self._discriminator_optimizer, state["discriminator_optimizer"])
        self._lr_scale = state["lr_scale"]

    def _set_up_networks(self) -> None:
        """Set memory layout, gradient checkpointing, compilation and data parallelism."""
        for part in (self.tokenizer.encoder, self.tokenizer.decoder):
            if isinstance(part, CheckpointedNetwork):
                part.gradient_checkpointing = self._recipe.gradient_checkpointing
            if self._recipe.channels_last:
                part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        network: nn.Module = self.tokenizer
        if self._recipe.compile:
            network = torch.compile(network)  # type: ignore[assignment]
        # A multi-scale quantizer may have a phi that is used by none of its scales.
        self._network = data_parallel(
            network, some_unused=self.tokenizer.quantize.may_leave_parameters_unused
        )

    def _as_laid_out(self, images: Tensor) -> Tensor:
        return (
            images.contiguous(memory_format=torch.channels_last)
            if self._recipe.channels_last
            else images
        )

    def _set_learning_rates(self, step: int) -> None:
        settings = self._recipe.optimizer
        share = self._lr_scale * cosine_schedule(
            step, self._recipe.steps, settings.warmup, settings.decay
        )
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr * share
        if self._discriminator is not None:
            for group in self._discriminator_optimizer.param_groups:
                group["lr"] = self._recipe.losses.adversarial.lr * share


def _freeze(tokenizer: ImageTokenizer, learn: str) -> list[nn.Module]:
    """Freeze the modules that fine-tuning does not train; return those to keep in eval mode."""
    if learn == "decoder":
        for part in (tokenizer.encoder, tokenizer.quantize):
            part.requires_grad_(False)
        return [tokenizer.encoder, tokenizer.quantize]
    if learn == "all-but-codebook":
        for parameter in tokenizer.quantize.codebook_parameters():
            parameter.requires_grad_(False)
    return []


def _last_layer(decoder: nn.Module) -> Tensor:
    """Return the weight of the decoder's last layer."""
    return [p for p in decoder.parameters() if p.ndim > 1][-1]


def monitored_metrics(config: TokenizerMonitorConfig) -> list[MonitoredMetric]:
    """Return the metrics that show whether the training of a tokenizer fails."""

    def psnr_fault(average: float, best: float) -> str | None:
        if average >= best - config.psnr_drop:
            return None
        return f"PSNR of the training crops has dropped from {best:.2f} to {average:.2f} dB"

    def usage_fault(average: float, best: float) -> str | None:
        if average >= best * (1 - config.usage_drop):
            return None
        return f"codes in use have dropped from {best:.1%} to {average:.1%}"

    def saturation(average: float, best: float) -> str | None:
        if average >= SATURATED:
            return None
        return (
            "the discriminator tells all reconstructions from images, so that its gradient is "
            "hardly useful. Lower losses.adversarial.lr or raise losses.perceptual.weight"
        )

    return [
        MonitoredMetric("psnr", psnr_fault),
        MonitoredMetric("usage", usage_fault),
        MonitoredMetric("discriminator_loss", saturation),
    ]
