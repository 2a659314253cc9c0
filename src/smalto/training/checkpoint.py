"""What a run saves of one step, and how it is written and read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smalto.core.errors import RunError
from smalto.core.files import file_sha256
from smalto.tokenizer import ImageTokenizer

STATE_FILE = "state.safetensors"
SUMS_FILE = "SHA256SUMS"  # as `sha256sum --check` reads it


@dataclass(frozen=True)
class Checkpoint:
    """What was saved at one step."""

    step: int
    tokenizer: ImageTokenizer
    state: dict[str, Any]


def _check_sums(folder: Path) -> None:
    """Raise RunError unless every file of a checkpoint is what was written."""
    try:
        lines = (folder / SUMS_FILE).read_text(encoding="utf-8").splitlines()
        sums = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
        wrong = [name for name, digest in sums.items() if file_sha256(folder / name) != digest]
        if wrong or STATE_FILE not in sums:
            raise RunError(
                f"{folder.name}: {', '.join(wrong) or SUMS_FILE} is damaged: its checksum differs."
            )
    except (OSError, ValueError) as error:
        raise RunError(f"{folder.name}: a file is missing or cannot be read ({error}).") from None


def _take_tensors(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Replace every tensor inside dicts and lists by its name, and collect them. What is left is JSON."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, dict):
        # Pairs, because JSON would turn an optimizer's whole-number keys into text.
        return {
            "items": [
                [key, _take_tensors(inner, f"{name}/{key}", tensors)]
                for key, inner in value.items()
            ]
        }
    if isinstance(value, (list, tuple)):
        return [_take_tensors(inner, f"{name}/{i}", tensors) for i, inner in enumerate(value)]
    return value


def _put_tensors(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]]
        return {key: _put_tensors(inner, tensors) for key, inner in value["items"]}
    if isinstance(value, list):
        return [_put_tensors(inner, tensors) for inner in value]
    return value
