"""Checks of the keys, shapes and types of foreign weights."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from smalto.core.errors import ConfigError, describe
from smalto.core.weight_files import State


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
