"""Which device and precision a model runs with."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from smalto.core.errors import ConfigError, SmaltoError

Precision = Literal["float32", "bf16"]


def resolve_device(name: str = "auto") -> torch.device:
    """``"auto"`` takes CUDA, else Apple's MPS, else the CPU; another name is checked. Under torchrun each process takes its own GPU.

    Raises:
        ConfigError: no such device here.
    """
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(kind for kind, available in there.items() if available)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f'device must be "auto", "cpu", "cuda" or "mps"; got {name!r}.') from None
    if not there.get(device.type, False):
        raise ConfigError(
            f"device {name!r} is not available here; there is {', '.join(k for k, a in there.items() if a)}."
        )
    if device.type == "cuda" and device.index is None:
        return torch.device(
            "cuda", int(os.environ.get("LOCAL_RANK", "0"))
        )  # under torchrun every process has its own
    return device


@contextmanager
def computing(device: torch.device, precision: Precision, batch: int) -> Iterator[None]:
    """Train a model: autocast for bf16, and ``memory_errors``."""
    with (
        memory_errors(device, batch),
        torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"),
    ):
        yield


@contextmanager
def memory_errors(device: torch.device, batch: int) -> Iterator[None]:
    """An error that names a smaller batch where the memory does not suffice."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        advice = (
            f"Try --batch {max(1, batch // 2)}."
            if batch > 1
            else "Try smaller images or --device cpu."
        )
        raise SmaltoError(f"{device} ran out of memory with a batch of {batch}. {advice}") from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; on the CPU torch raises a plain RuntimeError for it."""
    return isinstance(
        error, (torch.OutOfMemoryError, MemoryError)
    ) or "can't allocate memory" in str(error)


def peak_memory(device: torch.device) -> int:
    """The most memory in use so far, in bytes: by tensors on a GPU, by the whole process on a CPU; 0 where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
