"""A checkpoint: one step's model and training state, in a folder with checksums."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from smalto.core.errors import RunError
from smalto.core.files import atomic_path, file_sha256, parse_json, write_atomic
from smalto.training.earlier_formats import upgrade_state

STATE_FILE = "state.safetensors"
SUMS_FILE = "SHA256SUMS"  # as `sha256sum --check` reads it


@dataclass(frozen=True)
class Checkpoint:
    """What was saved at one step.

    Attributes:
        step: number of the last update in it, from 1; 0 before the first.
        folder: where the model lies, for ``Task.load``.
        state: what the trainer needs besides the model.
    """

    step: int
    folder: Path
    state: dict[str, Any]

    def model_files(self) -> list[Path]:
        """Return the files of the model, relative to the folder."""
        files = [path for path in sorted(self.folder.rglob("*")) if path.is_file()]
        relative = [path.relative_to(self.folder) for path in files]
        return [path for path in relative if path.name not in (STATE_FILE, SUMS_FILE)]


def write_checkpoint(
    folder: Path, step: int, save_model: Callable[[Path], None], state: dict[str, Any]
) -> None:
    """Write a checkpoint; the folder appears whole, by one rename."""
    with atomic_path(folder) as new:
        new.mkdir()
        save_model(new)
        tensors: dict[str, Tensor] = {}
        plain = _take_tensors(state, "", tensors)
        metadata = {"smalto": json.dumps({"step": step, "state": plain}, sort_keys=True)}
        write_atomic(new / STATE_FILE, safetensors.torch.save(tensors, metadata))
        names = sorted(str(path.relative_to(new)) for path in new.rglob("*") if path.is_file())
        sums = [f"{file_sha256(new / name)}  {name}\n" for name in names]
        write_atomic(new / SUMS_FILE, "".join(sums))


def is_checkpoint(folder: Path) -> bool:
    """Return whether a folder was written as a checkpoint, even if it is damaged by now."""
    return any((folder / name).exists() for name in (SUMS_FILE, STATE_FILE, "model.safetensors"))


def read_checkpoint(folder: Path, step: int) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        RunError: it is damaged: a file is missing, differs from its checksum, or has no meaning.
    """
    _check_sums(folder)
    try:
        with safetensors.safe_open(folder / STATE_FILE, "pt") as file:
            header = parse_json(file.metadata()["smalto"])
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
        state = upgrade_state(_put_tensors(header["state"], tensors))
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{folder.name}: {error}") from None
    return Checkpoint(step, folder, state)


def _check_sums(folder: Path) -> None:
    """Raise RunError unless every file of a checkpoint is what was written."""
    try:
        lines = (folder / SUMS_FILE).read_text(encoding="utf-8").splitlines()
        sums = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
        wrong = [name for name, digest in sums.items() if file_sha256(folder / name) != digest]
    except (OSError, ValueError) as error:
        raise RunError(f"{folder.name}: a file is missing or cannot be read ({error}).") from None
    if wrong or STATE_FILE not in sums:
        damaged = ", ".join(wrong) or SUMS_FILE
        raise RunError(f"{folder.name}: {damaged} is damaged: its checksum differs.")


def _take_tensors(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Replace every tensor inside dicts and lists by its name, and collect them; the rest is
    JSON.
    """
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, dict):
        # Pairs, because JSON would turn an optimizer's integer keys into text.
        items = value.items()
        return {"items": [[key, _take_tensors(v, f"{name}/{key}", tensors)] for key, v in items]}
    if isinstance(value, (list, tuple)):
        return [_take_tensors(inner, f"{name}/{i}", tensors) for i, inner in enumerate(value)]
    return value


def _put_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]]
        return {key: _put_tensors(inner, tensors) for key, inner in value["items"]}
    if isinstance(value, list):
        return [_put_tensors(inner, tensors) for inner in value]
    return value
