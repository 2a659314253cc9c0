"""Helpers around torch.distributed that also work in a single process."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed

from smalto.core.errors import ConfigError, RunError

_LOST_CONNECTION = (
    "connection closed",
    "connection reset",
    "connection refused",
    "broken pipe",
    "timed out",
    "nccl",
    "gloo",
    "peer",
)


def world_size() -> int:
    """Return the number of processes.

    It is read at every call, so objects that are created before the process group work too.
    """
    return (
        distributed.get_world_size()
        if distributed.is_available() and distributed.is_initialized()
        else 1
    )


def rank() -> int:
    """Return the rank of this process, from 0."""
    return distributed.get_rank() if world_size() > 1 else 0


def local_world_size() -> int:
    """Return the number of processes that torchrun has started on this machine."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def all_reduce(tensor: Tensor) -> Tensor:
    """Replace ``tensor`` by its sum over all processes, and return it."""
    if world_size() > 1:
        distributed.all_reduce(tensor)
    return tensor


@torch.no_grad()
def broadcast(tensors: Iterable[Tensor]) -> None:
    """Copy the values of rank 0 to every process."""
    if world_size() > 1:
        for tensor in tensors:
            distributed.broadcast(tensor, 0)


def rank_range(total: int) -> range:
    """Return this process's share of ``total`` indices."""
    size = world_size()
    number = rank()
    return range(total * number // size, total * (number + 1) // size)


def gather_objects(value: Any, device: torch.device) -> list[Any]:
    """Return the ``value`` of every process, ordered by rank. Values must be JSON."""
    if world_size() == 1:
        return [value]
    own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    lengths = torch.zeros(world_size(), dtype=torch.int64, device=device)
    lengths[rank()] = len(own)
    distributed.all_reduce(lengths)
    padded = own.new_zeros(int(lengths.max()))
    padded[: len(own)] = own
    found = [torch.empty_like(padded) for _ in lengths]
    distributed.all_gather(found, padded)
    return [
        json.loads(bytes(text[:length].cpu().numpy()))
        for text, length in zip(found, lengths.tolist(), strict=True)
    ]


def broadcast_object(value: Any, device: torch.device) -> Any:
    """Return the ``value`` of rank 0 in every process. It must be JSON."""
    return gather_objects(value if rank() == 0 else None, device)[0]


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Open the process group of torchrun for the duration of the block.

    The backend is NCCL on GPUs and gloo elsewhere. Does nothing in a single process, or if there is
    a process group already.

    Raises:
        ConfigError: torch was built without torch.distributed.
        RunError: another process has ended.
    """
    if (
        int(os.environ.get("WORLD_SIZE", "1")) < 2
        or "RANK" not in os.environ
        or distributed.is_initialized()
    ):
        yield
        return
    if not distributed.is_available():
        raise ConfigError(
            f"got {os.environ['WORLD_SIZE']} processes and a torch without torch.distributed; "
            "expected one process. Start the command without torchrun."
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    except RuntimeError as error:
        if not _lost_another(error):
            raise
        raise RunError(
            f"process {os.environ['RANK']} lost the connection to another process of this run, "
            "which has ended; the error message of that process gives the reason. Saved "
            "checkpoints are complete: resume with the same command and --resume."
        ) from None
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def leave_process_group() -> None:
    """Close the process group in all processes at the same moment.

    A process that left it alone would look to the others as if it had died.
    """
    if world_size() > 1:
        distributed.barrier()
        distributed.destroy_process_group()


def _lost_another(error: RuntimeError) -> bool:
    return any(word in str(error).lower() for word in _LOST_CONNECTION)
