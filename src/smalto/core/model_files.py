"""The two files of a model, ``config.json`` and ``model.safetensors``, and its fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from smalto.core.config import Config, ConfigT, parse_config
from smalto.core.errors import ConfigError, RunError
from smalto.core.files import parse_json, read_regular, write_atomic
from smalto.core.weight_files import weight_problem

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
FORMAT_VERSION = 1


def has_model(folder: Path) -> bool:
    """Return whether both files are there."""
    return (folder / CONFIG_FILE).is_file() and (folder / WEIGHTS_FILE).is_file()


def write_model(folder: Path, config: Config, state: Mapping[str, Tensor]) -> None:
    """Write ``model.safetensors`` and ``config.json`` into ``folder``.

    Raises:
        RunError: weights are not finite; nothing was written.
    """
    if problem := weight_problem(state):
        raise RunError(f"{folder} was not saved: {problem}. Lower the learning rate and resume.")
    saved = {"format_version": FORMAT_VERSION, **config.model_dump(mode="json")}
    metadata = {"smalto": json.dumps(saved, sort_keys=True)}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    write_atomic(folder / WEIGHTS_FILE, safetensors.torch.save(tensors, metadata))
    write_atomic(folder / CONFIG_FILE, json.dumps(saved, indent=2, sort_keys=True) + "\n")


def read_config(folder: Path, kinds: Mapping[str, type[ConfigT]]) -> ConfigT:
    """Read the configuration of a model.

    Args:
        folder: of the model.
        kinds: the type of its configuration for each ``kind``.

    Raises:
        ConfigError: the file cannot be read, or is of another format or kind, or has unknown keys.
    """
    try:
        text = read_regular(folder / CONFIG_FILE).decode()
        return _parse(text, str(folder / CONFIG_FILE), kinds)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{folder / CONFIG_FILE} cannot be read ({error}); expected JSON in UTF-8. Restore "
            "it from a checkpoint of the run."
        ) from None


def read_weights_into(
    model: nn.Module, config: ConfigT, folder: Path, kinds: Mapping[str, type[ConfigT]]
) -> None:
    """Read the weights of a model, in the precision that was saved.

    Args:
        model: built from ``config``, on any device.
        config: from ``read_config``.
        folder, kinds: as for ``read_config``.

    Raises:
        RunError: the file is damaged, does not fit the configuration, or weights are not finite.
    """
    path = folder / WEIGHTS_FILE
    try:
        state = safetensors.torch.load_file(path)
        with safetensors.safe_open(path, "pt") as file:
            beside = (file.metadata() or {}).get("smalto")
    except (safetensors.SafetensorError, OSError) as error:
        raise RunError(
            f"{path} cannot be read ({error}). Restore it from a checkpoint of the run."
        ) from None
    if problem := weight_problem(state):
        raise RunError(f"{path}: {problem}. Use an earlier checkpoint of the run.")
    if beside is not None and _parse(beside, WEIGHTS_FILE, kinds) != config:
        raise RunError(
            f"{path} does not fit config.json beside it: it was written with another one. Copy "
            "both files again from the same checkpoint."
        )
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise RunError(
            f"{path} does not fit config.json beside it. Copy both files again from the same "
            f"checkpoint. {' '.join(str(error).split())[:500]}"
        ) from None


def fingerprint(config: Config, state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of configuration and weights, in hexadecimal."""
    digest = hashlib.sha256(json.dumps(config.model_dump(mode="json"), sort_keys=True).encode())
    for name, tensor in sorted(state.items()):
        digest.update(f"\0{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(
            tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()


def _parse(text: str, source: str, kinds: Mapping[str, type[ConfigT]]) -> ConfigT:
    try:
        data: Any = parse_json(text)
    except ValueError as error:
        raise ConfigError(
            f"{source} is not valid JSON ({error}). Restore it from a checkpoint of the run."
        ) from None
    version = data.pop("format_version", None) if isinstance(data, dict) else None
    if version != FORMAT_VERSION:
        raise ConfigError(
            f"{source}: got format_version {version!r}; this version of smalto reads "
            f"{FORMAT_VERSION}. Install the version of smalto that wrote the file."
        )
    if not isinstance(data.get("kind"), str) or data["kind"] not in kinds:
        raise ConfigError(
            f"{source}: got kind {data.get('kind')!r}; expected one of {sorted(kinds)}. "
            "Read the file with the version of smalto that wrote it."
        )
    return parse_config(kinds[data["kind"]], data, source)
