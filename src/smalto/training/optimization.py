"""Around the optimizer: which weights decay, the learning rate schedule, averaged weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

FIRST_LR = 0.005  # the first and last factors, and the share of steps at 1, of VAR's schedule
LAST_LR = 0.01
CONSTANT_LR = 0.05


def parameter_groups(
    model: nn.Module, weight_decay: float, no_decay: Iterable[Tensor] = ()
) -> list[dict[str, Any]]:
    """Return the trained parameters in two groups: weights of layers decay; norms and biases do
    not.

    Args:
        model: its parameters that require gradients are trained.
        weight_decay: of the first group.
        no_decay: parameters that do not decay either, such as codes.
    """
    excluded = {id(parameter) for parameter in no_decay}
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim > 1 and id(p) not in excluded]
    others = [p for p in trained if p.ndim <= 1 or id(p) in excluded]
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def cosine_schedule(step: int, steps: int, warmup: int, decay: bool = True) -> float:
    """Return the factor of the learning rate at ``step``, counted from 1.

    Linear warm-up, then a cosine to zero at the last step.
    """
    factor = min(1.0, step / warmup) if warmup else 1.0
    if decay:
        progress = min(1.0, (step - 1) / max(steps, 1))
        factor *= 0.5 * (1 + math.cos(math.pi * progress))
    return factor


def linear_schedule(step: int, steps: int, warmup: int, decay: bool = True) -> float:
    """Return the factor of the learning rate at ``step``, counted from 1, as VAR's "lin0".

    Linear warm-up from 0.5 %, then constant for 5 % of the other steps, then linear to 1 % at the
    last step.
    """
    if step <= warmup:
        return FIRST_LR + (1 - FIRST_LR) * (step - 1) / warmup
    progress = (step - 1 - warmup) / max(1, steps - 1 - warmup)
    if not decay or progress < CONSTANT_LR:
        return 1.0
    return LAST_LR + (1 - LAST_LR) * (1 - progress) / (1 - CONSTANT_LR)


class WeightAverage:
    """A copy of a model whose trained weights are moving averages (Polyak and Juditsky 1992).

    Args:
        model: the one that is trained.
        decay: of the average. The first steps use a smaller one, so that the start counts little.

    Attributes:
        model: the copy, in evaluation mode; everything that is not trained by gradient is equal.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._source = model
        self._decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.num_steps = 0

    @torch.no_grad()
    def step(self) -> None:
        """Add the present weights to the average."""
        self.num_steps += 1
        decay = min(self._decay, (1 + self.num_steps) / (10 + self.num_steps))
        averages: list[Tensor] = []
        present: list[Tensor] = []
        copies = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        sources = {**dict(self._source.named_parameters()), **dict(self._source.named_buffers())}
        for name, tensor in copies.items():
            source: Tensor = sources[name]
            if source.requires_grad:
                averages.append(tensor)
                present.append(source.detach())
            else:  # codes that the updater moves are averages already
                tensor.copy_(source)
        torch._foreach_lerp_(averages, present, 1 - decay)


def clip_gradients(optimizer: torch.optim.Optimizer, most: float) -> Tensor:
    """Shorten the gradient of an optimizer's parameters to a norm; return the norm before.

    Args:
        optimizer: of the parameters.
        most: the norm; 0: no clipping.
    """
    learning = [p for group in optimizer.param_groups for p in group["params"]]
    return nn.utils.clip_grad_norm_(learning, most or math.inf)


def load_moments(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the state of an optimizer but keep its settings, which a resumed run may change."""
    settings = [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
