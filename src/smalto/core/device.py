"""Device and precision that a model runs with, and its use of memory."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch

from smalto.core.errors import ConfigError, SmaltoError

Precision = Literal["float32", "bf16"]


def resolve_device(name: str = "auto") -> torch.device:
    """Return a device by name, after a check that it is available.

    ``"auto"`` selects CUDA, else Apple's MPS, else the CPU. Under torchrun, CUDA without an index
    is the GPU of the process's local rank.

    Raises:
        ConfigError: the device is unknown or not available.
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
        raise ConfigError(
            f'got the device {name!r}; expected "auto", "cpu", "cuda" or "mps". Use "auto".'
        ) from None
    if not there.get(device.type, False):
        available = ", ".join(kind for kind, is_available in there.items() if is_available)
        raise ConfigError(
            f"got the device {name!r}, which is not available; expected one of {available}. "
            'Use "auto".'
        )
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return device


def fastest_precision(device: torch.device) -> Precision:
    """Return "bf16" if the device multiplies matrices faster in bfloat16, else "float32"."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if device.type != "cpu":
        return "float32"
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # of x86; absent elsewhere
    has_bf16 = any(getattr(torch.cpu, name, lambda: False)() for name in checks)
    return "bf16" if has_bf16 else "float32"


@contextmanager
def computing(
    device: torch.device, precision: Precision, batch: int, advice: str = ""
) -> Iterator[None]:
    """Run a model's computations with autocast for bf16, and with ``memory_errors``."""
    with (
        memory_errors(device, batch, advice),
        torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"),
    ):
        yield


@contextmanager
def memory_errors(device: torch.device, batch: int, advice: str = "") -> Iterator[None]:
    """Replace out-of-memory errors by one with ``advice``; by default it suggests a smaller batch.

    Raises:
        SmaltoError: the device ran out of memory.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        advice = advice or (
            f"Try --batch {max(1, batch // 2)}."
            if batch > 1
            else "Try smaller images or --device cpu."
        )
        raise SmaltoError(f"{device} ran out of memory with a batch of {batch}. {advice}") from None


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out.

    On the CPU torch raises a plain RuntimeError for it.
    """
    return isinstance(
        error, (torch.OutOfMemoryError, MemoryError)
    ) or "can't allocate memory" in str(error)


def peak_memory(device: torch.device) -> int:
    """Return the peak memory so far in bytes.

    On a GPU this is the memory of tensors, on a CPU that of the whole process. It is 0 on systems
    that do not report it.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


class PeakMemory:
    """Largest memory from the creation of this object on.

    Args:
        device: a GPU, whose memory of tensors is measured, or the CPU, for that of the process.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
        else:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # Linux forgets the peak so far
                self._before = _status("VmRSS") or 0

    def growth(self) -> int | None:
        """Return by how many bytes the memory grew at most; None if the system hides it."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before
        peak = _status("VmHWM") if self._before else None
        return None if peak is None else max(0, peak - self._before)


def _status(name: str) -> int | None:
    """Return a size in bytes from Linux' table of this process."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    sizes = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return int(sizes[0]) * 1024 if sizes else None
