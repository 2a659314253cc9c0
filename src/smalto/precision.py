"""Keeping arithmetic in full precision, whatever the surroundings ask for."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """No autocast on ``device`` inside."""
    if torch.amp.autocast_mode.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


@contextmanager
def plain_float32() -> Iterator[None]:
    """No TF32 or bfloat16 inside float32 products. The settings are the process's: the last thread to leave gives them back."""
    with _lock:
        if not _inside:
            _saved[:] = [(switch, getattr(switch, _SETTING)) for switch in _switches()]
            for switch, _ in _saved:
                setattr(switch, _SETTING, "ieee")
            if not _saved:  # torch before 2.9 has one switch for all
                _saved_legacy[:] = [torch.get_float32_matmul_precision()]
                torch.set_float32_matmul_precision("highest")
        _inside.append(None)
    try:
        yield
    finally:
        with _lock:
            _inside.pop()
            if not _inside:
                for switch, setting in _saved:
                    setattr(switch, _SETTING, setting)
                for legacy in _saved_legacy:
                    torch.set_float32_matmul_precision(legacy)


_SETTING = "fp32_precision"
_lock = threading.Lock()
_inside: list[None] = []
_saved: list[tuple[Any, str]] = []
_saved_legacy: list[str] = []


def _switches() -> list[Any]:
    backends = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
    return [backend for backend in backends if hasattr(backend, _SETTING)]
