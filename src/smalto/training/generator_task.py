"""Training task of a generator: cross-entropy of the next tokens, given all tokens before."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalto.core import distributed
from smalto.core.device import computing
from smalto.core.errors import RunError
from smalto.core.model_files import write_model
from smalto.generator import Generator, Transformer
from smalto.generator.generator_folder import load_transformer
from smalto.generator.sampling import uniform
from smalto.metrics.generator_metrics import TokenLoss, TokenPrediction
from smalto.training.data_parallel import data_parallel, no_gradient_sync
from smalto.training.generator_recipe import GeneratorRecipe
from smalto.training.optimization import (
    WeightAverage,
    clip_gradients,
    linear_schedule,
    load_moments,
    parameter_groups,
)
from smalto.training.task import MonitoredMetric
from smalto.training.training_tokens import TokenBatch

MEMORY_ADVICE = "Try --set optimizer.accumulate=4 or --set gradient_checkpointing=true."
LR_BACK_OFF = 0.5  # each rollback multiplies the learning rate by this


class GeneratorTask:
    """Training of a generator's transformer, step by step.

    Args:
        generator: to train, on its device.
        recipe: all settings.
        held_out: rows for ``evaluate``.

    Attributes:
        generator: the one that is trained.
        device: of the generator.
        batch_size: rows per step, over all processes.
        monitored: metrics that the trainer watches.
    """

    def __init__(self, generator: Generator, recipe: GeneratorRecipe, held_out: TokenBatch) -> None:
        self.generator = generator
        self._recipe = recipe
        self._held_out = held_out
        transformer = generator.transformer
        self.device = transformer.head.weight.device
        self.batch_size = recipe.data.batch
        self.monitored: Sequence[MonitoredMetric] = [_monitored_loss(recipe.monitor.loss_rise)]
        transformer.gradient_checkpointing = recipe.gradient_checkpointing
        self._network = data_parallel(generator)
        settings = recipe.optimizer
        self.optimizer = torch.optim.AdamW(
            parameter_groups(transformer, settings.weight_decay, transformer.undecayed()),
            lr=recipe.lr,
            betas=settings.betas,
        )
        has_average = settings.ema_decay > 0
        self._average = WeightAverage(transformer, settings.ema_decay) if has_average else None
        self._lr_scale = 1.0

    @property
    def result(self) -> Generator:
        """Generator to save: with averaged weights if ``optimizer.ema_decay`` is set."""
        if self._average is None:
            return self.generator
        average = self._average.model
        assert isinstance(average, Transformer)
        return Generator(average, self.generator.tokenizer)

    def train_step(self, batch: TokenBatch, step: int) -> dict[str, float]:
        """Train on this rank's part of a batch; return cross-entropies in nats and accuracies."""
        self.generator.train()
        self._set_learning_rate(step)
        self.optimizer.zero_grad(set_to_none=True)
        batch = batch.to(self.device).without_labels(self._dropped_labels(step))
        sums = TokenLoss(self.generator.config.layout, self.device)
        parts = batch.chunk(self._recipe.optimizer.accumulate)
        for number, part in enumerate(parts):
            with (
                computing(self.device, self._recipe.precision, len(part), MEMORY_ADVICE),
                no_gradient_sync(self._network, number < len(parts) - 1),
            ):
                losses, hits = self._losses(self._network, part)
                (losses.mean() * (len(part) / len(batch))).backward()
            sums.add(losses.detach(), hits)
        norm = float(self._update())
        metrics = sums.over_all_ranks().means().as_log()
        metrics |= {"gradient_norm": round(norm, 7), "lr": self.optimizer.param_groups[0]["lr"]}
        if not math.isfinite(norm):
            metrics["skipped"] = 1
        return {name: value for name, value in metrics.items() if math.isfinite(value)}

    def evaluate(self) -> dict[str, float]:
        """Return cross-entropies in nats and accuracies of the held-out rows."""
        if not len(self._held_out):
            return {}
        return {f"held_out_{k}": v for k, v in self.measure(self._held_out).as_log().items()}

    @torch.no_grad()
    def measure(self, rows: TokenBatch) -> TokenPrediction:
        """Measure ``result`` in evaluation mode; the ranks share the rows."""
        model = self.result.eval()
        sums = TokenLoss(model.config.layout, self.device)
        own = distributed.rank_range(len(rows))
        for part in rows[own.start : own.stop].split(self._rows_at_once):
            with computing(self.device, self._recipe.precision, len(part), MEMORY_ADVICE):
                sums.add(*self._losses(model, part.to(self.device)))
        return sums.over_all_ranks().means()

    def back_off(self) -> None:
        """Halve the learning rate."""
        self._lr_scale *= LR_BACK_OFF

    def save(self, folder: Path) -> None:
        """Write ``result`` into a folder, without its tokenizer, which does not change.

        Raises:
            RunError: weights are not finite.
        """
        transformer = self.result.transformer
        write_model(folder, transformer.config, transformer.state_dict())

    def load(self, folder: Path) -> None:
        """Load the weights of ``result`` that ``save`` wrote.

        Raises:
            RunError: the folder cannot be read, or its generator has another configuration.
        """
        saved = load_transformer(folder)
        if saved.config != self.generator.config:
            raise RunError(
                f"{folder}: got a generator of another configuration; expected that of the run. "
                "Delete this checkpoint and resume from an earlier one."
            )
        self.result.transformer.load_state_dict(saved.state_dict())

    def state(self) -> dict[str, Any]:
        """Return the state that resuming needs besides ``result``."""
        state: dict[str, Any] = {
            "optimizer": self.optimizer.state_dict(),
            "lr_scale": self._lr_scale,
        }
        if self._average is not None:
            state["weights"] = dict(self.generator.transformer.state_dict())
            state["averaged_steps"] = self._average.num_steps
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore a state that ``state`` returned; the settings remain those of the recipe."""
        transformer = self.generator.transformer
        if self._average is not None:
            self._average.num_steps = state.get("averaged_steps", 0)
            transformer.load_state_dict(state.get("weights", self._average.model.state_dict()))
        elif "weights" in state:  # ema_decay was set when the state was saved
            transformer.load_state_dict(state["weights"])
        load_moments(self.optimizer, state["optimizer"])
        self._lr_scale = state["lr_scale"]

    def _losses(self, network: nn.Module, rows: TokenBatch) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy of each token in nats, and whether it is the likeliest one.

        Args:
            network: the generator, or what wraps it.
            rows: on the device.
        """
        generator = self.generator
        blocks = list(rows.tokens.split(generator.config.layout.lengths, dim=1))
        with torch.no_grad():
            inputs = generator.tokenizer.quantize.generator_input(blocks, generator.config.layout)
        labels = rows.labels.clamp(min=0) if generator.config.num_classes else None
        logits = network(labels, inputs, dropped=rows.labels < 0)
        losses = F.cross_entropy(logits.flatten(0, 1), rows.tokens.flatten(), reduction="none")
        return losses.view_as(rows.tokens), logits.detach().argmax(dim=-1) == rows.tokens

    @property
    def _rows_at_once(self) -> int:
        """The rows that this process computes at once in training."""
        parts = self._recipe.optimizer.accumulate * distributed.world_size()
        return max(1, self.batch_size // parts)

    def _dropped_labels(self, step: int) -> Tensor:
        """Return which of this rank's rows are trained without their label, bool [b].

        It depends on (seed, step, row), so any number of processes drops the same labels.
        """
        rows = distributed.rank_range(self.batch_size)
        numbers = torch.arange(rows.start, rows.stop) + step * self.batch_size
        drawn = uniform(torch.tensor(self._recipe.seed), numbers)  # on the CPU: MPS has no float64
        return (drawn < self.generator.config.label_drop).to(self.device)

    def _update(self) -> Tensor:
        """Step the optimizer and the averages; return the gradient norm.

        If the gradient is not finite, nothing is changed.
        """
        norm = clip_gradients(self.optimizer, self._recipe.optimizer.clip)
        # The gradient is the same in all processes, so all take the same branch.
        if math.isfinite(float(norm)):
            self.optimizer.step()
            if self._average is not None:
                self._average.step()
        return norm

    def _set_learning_rate(self, step: int) -> None:
        recipe = self._recipe
        factor = linear_schedule(step, recipe.steps, recipe.warmup, recipe.optimizer.decay)
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.lr * factor * self._lr_scale


def _monitored_loss(rise: float) -> MonitoredMetric:
    def fault(average: float, best: float) -> str | None:
        if average <= best + rise:
            return None
        return f"the loss has risen from {best:.3f} to {average:.3f} nats per token"

    return MonitoredMetric("loss", fault, higher_is_better=False)
