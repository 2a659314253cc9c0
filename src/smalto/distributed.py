"""Several processes, or one: what the rest needs of torch.distributed. In a single process all of it does nothing."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, distributed


def world_size() -> int:
    """How many processes work together; asked anew each time, so that what is built before the process group works too."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return distributed.get_rank() if world_size() > 1 else 0


def all_reduce(tensor: Tensor) -> Tensor:
    """Replace ``tensor`` by its sum over all processes; returns it."""
    if world_size() > 1:
        distributed.all_reduce(tensor)
    return tensor


@torch.no_grad()
def broadcast(tensors: Iterable[Tensor]) -> None:
    """Give every process the first one's values."""
    if world_size() > 1:
        for tensor in tensors:
            distributed.broadcast(tensor, 0)
