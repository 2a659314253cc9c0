"""Reading of foreign weights, and checks of their keys, shapes and types."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smalto.core.errors import ConfigError, DataError, describe
from smalto.core.files import read_json
from smalto.core.weight_files import State, read_weights


def open_checkpoint(path_or_state_dict: str | Path | State) -> tuple[Any, str]:
    """Return the content of a weight file, or of what was read already, and its name for errors.

    Raises:
        DataError: the file cannot be read without running code from it.
    """
    if isinstance(path_or_state_dict, (str, Path)):
        return read_weights(path_or_state_dict), str(path_or_state_dict)
    return path_or_state_dict, "the state dict"


def read_settings(path: Path) -> dict[str, Any]:
    """Return the table in a JSON file beside foreign weights.

    Raises:
        DataError: it cannot be read, or is not a table.
    """
    try:
        settings: Any = read_json(path)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read ({error}); expected JSON. Restore it from a copy."
        ) from None
    if not isinstance(settings, dict):
        raise DataError(f"{path}: got {type(settings).__name__}; expected a table.")
    return settings


def shape_of(state: State, key: str, rank: int, source: str) -> tuple[int, ...]:
    """Return the shape of a tensor; raise ConfigError if it is missing or of another rank."""
    if key not in state:
        raise ConfigError(f"{source}: the key {key!r} is missing.")
    if state[key].ndim != rank:
        raise ConfigError(
            f"{source}: got {key!r} of shape {list(state[key].shape)}; expected {rank} dimensions."
        )
    return tuple(state[key].shape)


def count_of(state: State, pattern: str) -> int:
    """Return one more than the largest index in the keys that match a pattern, or 0."""
    numbers = [int(match[1]) for key in state if (match := re.fullmatch(pattern, key))]
    return max(numbers, default=-1) + 1


def check_tensors(state: State, mark: str, source: str, exempt: Collection[str] = ()) -> None:
    """Raise ConfigError unless all values are dense floating-point tensors of one dtype.

    Args:
        state: the weights.
        mark: the key whose dtype all others must have.
        source: where the weights come from.
        exempt: keys of another floating-point dtype.
    """
    dtype = state[mark].dtype if isinstance(state[mark], Tensor) else None
    for key, tensor in state.items():
        plain = isinstance(tensor, Tensor) and tensor.layout == torch.strided
        plain = plain and not tensor.is_meta and not tensor.is_nested
        is_other = key not in exempt and plain and tensor.dtype != dtype
        if not plain or not tensor.is_floating_point() or is_other:
            raise ConfigError(
                f"{source}: {key!r} is {describe(tensor)}, expected a plain tensor of {dtype}, "
                f"the dtype of {mark!r}."
            )


def compare(expected: Mapping[str, torch.Size], state: State, source: str, what: str) -> None:
    """Raise ConfigError unless a state has exactly the expected keys and shapes."""
    problems = [
        f"{key!r} is {list(state[key].shape)}, expected {list(size)}"
        for key, size in expected.items()
        if key in state and state[key].shape != size
    ]
    problems += [
        f"{key!r} is missing (expected {list(size)})"
        for key, size in expected.items()
        if key not in state
    ]
    problems += [
        f"{key!r} {list(tensor.shape)} is not expected"
        for key, tensor in state.items()
        if key not in expected
    ]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ConfigError(f"{source} is not {what}: {'; '.join(problems[:5])}{more}.")
