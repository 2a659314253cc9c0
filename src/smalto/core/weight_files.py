"""Reading the weight files of other projects without running any code from them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from smalto.core.errors import DataError

State = Mapping[str, Tensor]


def read_checkpoint(path: str | Path) -> Any:
    """What a ``.pth`` (by torch's ``weights_only`` reader) or ``.safetensors`` file holds, on the CPU.

    Raises:
        DataError: not there, damaged, or it holds Python objects that only running code from it would rebuild.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(
            f"{path} {'is a folder' if path.is_dir() else 'does not exist'}: name a .pth or .safetensors file of weights."
        )
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError) as error:
            raise DataError(f"{path} cannot be read ({error}).") from None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the reader stumbles over in a damaged file
        if foreign := re.search(r"GLOBAL (\S+)", str(error)):
            raise DataError(
                f"{path} holds a {foreign[1]} beside its tensors, and smalto runs no code from files. Where you trust that type, read it "
                "with weights_only=True inside torch.serialization.safe_globals([the type]), and pass the weights as a state dict."
            ) from None
        raise DataError(
            f"{path} is damaged or no checkpoint of torch ({type(error).__name__})."
        ) from None


def find_state(checkpoint: Any, marks: tuple[str, ...], what: str) -> dict[str, Any]:
    """The one state in a checkpoint that has the keys ``marks``, wherever it is nested and whatever stands before its keys.

    Raises:
        DataError: there is none, or several: then it names the key of each.
    """
    found = list(_states(checkpoint, marks, ""))
    if len(found) == 1:
        return found[0][1]
    if found:
        places = "; ".join(place or "those at the top" for place, _ in found)
        raise DataError(
            f"the checkpoint holds {len(found)} sets of weights of {what}: {places}. "
            "Take one out of torch.load(path, weights_only=True) and pass it as a state dict."
        )
    keys = (
        ", ".join(map(str, list(checkpoint)[:6]))
        if isinstance(checkpoint, Mapping)
        else type(checkpoint).__name__
    )
    missing = [
        mark for mark in marks if not isinstance(checkpoint, Mapping) or mark not in checkpoint
    ]
    raise DataError(f"this is no {what}: it has no {' and '.join(missing)}. It holds {keys}, ...")


def _states(
    value: Any, marks: tuple[str, ...], place: str, depth: int = 0
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, state) of every state inside nested dictionaries."""
    if not isinstance(value, Mapping) or depth > 16:
        return
    # A value that should be a tensor and is none is left in: who compares keys and shapes will name it.
    weights = {
        key: inner
        for key, inner in value.items()
        if isinstance(key, str) and (isinstance(inner, Tensor) or "." in key)
    }
    for prefix in [key.removesuffix(marks[0]) for key in weights if key.endswith(marks[0])]:
        if all(prefix + mark in weights for mark in marks):
            own = {
                key.removeprefix(prefix): inner
                for key, inner in weights.items()
                if key.startswith(prefix)
            }
            yield f"{place} keys that begin with {prefix!r}".strip() if prefix else place, own
    for key, inner in value.items():
        yield from _states(inner, marks, f"{place}[{key!r}]", depth + 1)
