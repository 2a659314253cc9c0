"""Writing of a tokenizer to a folder, and its fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from smalto.core.config import Config
from smalto.core.errors import RunError
from smalto.core.files import write_atomic
from smalto.core.weight_files import weight_problem

FORMAT_VERSION = 1


def write_tokenizer(folder: Path, config: Config, state: Mapping[str, Tensor]) -> None:
    """Write ``model.safetensors`` and ``config.json`` into ``folder``.

    Raises:
        RunError: weights are not finite; nothing was written.
    """
    if problem := weight_problem(state):
        raise RunError(f"{folder} was not saved: {problem}. Lower the learning rate and resume.")
    saved = {"format_version": FORMAT_VERSION, **config.model_dump(mode="json")}
    metadata = {"smalto": json.dumps(saved, sort_keys=True)}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    write_atomic(folder / "model.safetensors", safetensors.torch.save(tensors, metadata))
    write_atomic(folder / "config.json", json.dumps(saved, indent=2, sort_keys=True) + "\n")


def fingerprint(config: Config, state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of configuration and weights, in hexadecimal."""
    digest = hashlib.sha256(json.dumps(config.model_dump(mode="json"), sort_keys=True).encode())
    for name, tensor in sorted(state.items()):
        digest.update(f"\0{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(
            tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()
