"""Arithmetic in full float32 precision, independent of autocast and global settings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from smalto.core.process_wide import ProcessWideSetting

_SETTING = "fp32_precision"
_saved: list[tuple[Any, str]] = []
_saved_legacy: list[str] = []


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context that disables autocast on ``device``."""
    if torch.amp.autocast_mode.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


@contextmanager
def plain_float32() -> Iterator[None]:
    """Disable TF32 and bfloat16 in float32 matrix products, for the whole process."""
    with _plain.hold():
        yield


def _switches() -> list[Any]:
    backends = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
    return [backend for backend in backends if hasattr(backend, _SETTING)]


def _switch_off() -> None:
    _saved[:] = [(switch, getattr(switch, _SETTING)) for switch in _switches()]
    for switch, _ in _saved:
        setattr(switch, _SETTING, "ieee")
    if not _saved:  # torch before 2.9 has one setting for all backends
        _saved_legacy[:] = [torch.get_float32_matmul_precision()]
        torch.set_float32_matmul_precision("highest")


def _switch_back() -> None:
    for switch, setting in _saved:
        setattr(switch, _SETTING, setting)
    for legacy in _saved_legacy:
        torch.set_float32_matmul_precision(legacy)


_plain = ProcessWideSetting(_switch_off, _switch_back)
