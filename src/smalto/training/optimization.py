"""Around the optimizer: who decays, how the learning rate goes, averaged weights."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from smalto.quantizers.codebook import Codebook, ProjectedCodebook
from smalto.tokenizer import ImageTokenizer
from smalto.training.recipe import OptimizerConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters that learn, in two groups: weights of layers decay; norms, biases and codes do not."""
    codes = {
        id(p)
        for module in model.modules()
        if isinstance(module, (Codebook, ProjectedCodebook))
        for p in module.parameters()
    }
    learning = [p for p in model.parameters() if p.requires_grad]
    decays = [p.ndim > 1 and id(p) not in codes for p in learning]
    groups = [
        {
            "params": [p for p, decay in zip(learning, decays, strict=True) if decay],
            "weight_decay": weight_decay,
        },
        {
            "params": [p for p, decay in zip(learning, decays, strict=True) if not decay],
            "weight_decay": 0.0,
        },
    ]
    return [group for group in groups if group["params"]]


def learning_rate_share(config: OptimizerConfig, step: int, steps: int) -> float:
    """The learning rate at ``step``, counted from 1, in units of the configured one: warm-up, then a cosine to zero at the end."""
    share = min(1.0, step / config.warmup) if config.warmup else 1.0
    if config.decay:
        share *= 0.5 * (1 + math.cos(math.pi * min(1.0, (step - 1) / max(steps, 1))))
    return share


class WeightAverage:
    """A copy of a tokenizer whose learned weights are moving averages (Polyak and Juditsky 1992); all else is as in the original.

    Args:
        tokenizer: the one that learns.
        decay: share of the past in each step. The first steps look back less far, so that the start is soon forgotten.

    Attributes:
        tokenizer: the copy, in evaluation mode.
    """

    def __init__(self, tokenizer: ImageTokenizer, decay: float) -> None:
        self._source, self._decay = tokenizer, decay
        self.tokenizer = copy.deepcopy(tokenizer).eval().requires_grad_(False)
        self.num_steps = 0

    @torch.no_grad()
    def step(self) -> None:
        """Take in the present weights."""
        self.num_steps += 1
        decay = min(self._decay, (1 + self.num_steps) / (10 + self.num_steps))
        averages, present = [], []
        copies = {**dict(self.tokenizer.named_parameters()), **dict(self.tokenizer.named_buffers())}
        sources = {**dict(self._source.named_parameters()), **dict(self._source.named_buffers())}
        for name, tensor in copies.items():
            source: Tensor = sources[name]
            if source.requires_grad:
                averages.append(tensor)
                present.append(source.detach())
            else:  # codes that the updater moves are averages already
                tensor.copy_(source)
        torch._foreach_lerp_(averages, present, 1 - decay)
