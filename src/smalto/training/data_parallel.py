"""One network in several processes, each with its part of the batch."""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from smalto.core import distributed


def data_parallel(network: nn.Module, some_unused: bool = False) -> nn.Module:
    """Return the network with gradients averaged over processes, if there are several.

    Buffers are not synchronized: they must be equal from the start, or their owner does it.

    Args:
        network: to train.
        some_unused: whether a step may leave parameters without a gradient.
    """
    if distributed.world_size() == 1:
        return network
    # ``broadcast_buffers`` is ``forward_sync_buffers`` since torch 2.13.
    is_new = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    buffers: dict[str, Any] = {"forward_sync_buffers" if is_new else "broadcast_buffers": False}
    return DistributedDataParallel(network, find_unused_parameters=some_unused, **buffers)


def no_gradient_sync(network: nn.Module, stay: bool) -> contextlib.AbstractContextManager[Any]:
    """Accumulate gradients in this process only if ``stay``: all but the last part of a batch."""
    return (
        network.no_sync()
        if stay and isinstance(network, DistributedDataParallel)
        else contextlib.nullcontext()
    )
