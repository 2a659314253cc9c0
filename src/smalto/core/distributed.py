"""Several processes, or one: what the rest needs of torch.distributed. In a single process all of it does nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed

from smalto.core.errors import ConfigError, RunError


def world_size() -> int:
    """How many processes work together; asked anew each time, so that what is built before the process group works too."""
    return (
        distributed.get_world_size()
        if distributed.is_available() and distributed.is_initialized()
        else 1
    )


def rank() -> int:
    """The number of this process, from 0."""
    return distributed.get_rank() if world_size() > 1 else 0


def local_world_size() -> int:
    """How many of them torchrun has started on this machine."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


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


def rank_range(total: int) -> range:
    """This process's part of ``total`` things."""
    size, number = world_size(), rank()
    return range(total * number // size, total * (number + 1) // size)


def gather_objects(value: Any, device: torch.device) -> list[Any]:
    """``value``, plain numbers and texts, of every process, in the order of ranks."""
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
    """The first process's ``value``, plain numbers and texts, for all."""
    return gather_objects(value if rank() == 0 else None, device)[0]


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Inside, processes that torchrun started work together (NCCL on GPUs, gloo elsewhere); a process on its own stays on its own.

    Raises:
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
            "this torch was built without torch.distributed: it cannot work in several processes."
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
            f"process {os.environ['RANK']} lost touch with another process of this run, which has ended; its own message says why. "
            "What was saved is whole: resume with the same command and --resume."
        ) from None
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def leave_process_group() -> None:
    """Go on as single processes, all at the same moment: who leaves alone looks to the others as if it had died."""
    if world_size() > 1:
        distributed.barrier()
        distributed.destroy_process_group()


def _lost_another(error: RuntimeError) -> bool:
    words = (
        "connection closed",
        "connection reset",
        "connection refused",
        "broken pipe",
        "timed out",
        "nccl",
        "gloo",
        "peer",
    )
    return any(word in str(error).lower() for word in words)
