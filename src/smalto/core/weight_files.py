"""Readers of weight files from other projects that run no code from them."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from torch import Tensor

from smalto.core.errors import DataError, describe

State = Mapping[str, Tensor]
_LARGEST = 1e15  # a quantizer ignores vectors with such values, so all tokens would be 0
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def read_weights(path: str | Path) -> Any:
    """Return the content of a ``.pth`` or ``.safetensors`` file, on the CPU.

    ``.pth`` files are read with ``torch.load(weights_only=True)``.

    Raises:
        DataError: the file does not exist, is damaged, or holds Python objects that can only be
            rebuilt by running code from it.
    """
    path = Path(path)
    if not path.is_file():
        problem = (
            "is a folder"
            if path.is_dir()
            else "is not a regular file"
            if path.exists()
            else "does not exist"
        )
        raise DataError(
            f"{path} {problem}; expected a .pth or .safetensors file of weights. Name such a file."
        )
    if path.suffix == ".safetensors":
        return read_tensors(path)
    if zipfile.is_zipfile(path):  # torch does not compress; a compressed file may be a bomb
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
        if unpacked > path.stat().st_size + 2**24:
            raise DataError(
                f"{path} is compressed and unpacks to {unpacked:,} bytes; expected a file that "
                "torch.save wrote. Restore the file from a copy."
            )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # torch.load raises many types for damaged files
        if foreign := re.search(r"GLOBAL (\S+)", str(error)):
            raise DataError(
                f"{path} holds a {foreign[1]} beside its tensors, and smalto runs no code from "
                "files. If you trust that type, pass the weights as a state dict from: with "
                f"torch.serialization.safe_globals([{foreign[1]}]): "
                "torch.load(path, weights_only=True)"
            ) from None
        raise DataError(
            f"{path} is damaged or not a checkpoint of torch ({type(error).__name__}). "
            "Restore the file from a copy, or name another one."
        ) from None


def read_tensors(path: Path, part: str = "") -> dict[str, Tensor]:
    """Return the tensors of a ``.safetensors`` file whose keys contain ``part``, on the CPU.

    Raises:
        DataError: the file does not exist or is damaged.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            keys = [key for key in file.keys() if part in key]  # noqa: SIM118
            return {key: file.get_tensor(key) for key in keys}
    except (safetensors.SafetensorError, OSError) as error:
        raise DataError(f"{path} cannot be read: {error}. Restore the file from a copy.") from None


def weight_problem(state: State) -> str:
    """Return what makes the weights of a model unusable; empty if nothing."""
    for name, tensor in state.items():
        if tensor.dtype.is_complex or (tensor.is_floating_point() and tensor.dtype not in _FLOATS):
            return f"{name!r} is {describe(tensor)}; expected float32, float64, float16 or bfloat16"
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            return f"{name!r} holds NaN or infinite values; expected finite weights"
        if tensor.is_floating_point() and bool((tensor.abs() >= _LARGEST).any()):
            return f"{name!r} holds values of {_LARGEST:g} or more; expected weights of a network"
    for part in ("encoder.", "decoder."):
        dtypes = {t.dtype: name for name, t in state.items() if name.startswith(part)}
        if len(dtypes) > 1:
            others = ", ".join(f"{name} in {dtype}" for dtype, name in dtypes.items())
            return f"got {others}; expected one type in all of the {part[:-1]}"
    return ""


class FoundState(NamedTuple):
    """State dict inside a checkpoint.

    Attributes:
        state: the weights, without a common prefix of their keys.
        place: where in the checkpoint they lie; empty: the checkpoint is the state dict.
    """

    state: dict[str, Any]
    place: str


def find_state(
    checkpoint: Any, marks: tuple[str, ...], what: str, preferred: str = ""
) -> FoundState:
    """Return the one state dict in a checkpoint that has the keys ``marks``.

    It may be nested in dictionaries, and its keys may have a common prefix, which is removed.

    Args:
        checkpoint: the content of a file.
        marks: keys.
        what: the kind of model, for errors.
        preferred: if there are several, use the one under this key.

    Raises:
        DataError: the checkpoint has no such state dict, or several; the message gives their keys.
    """
    found = list(_states(checkpoint, marks, ""))
    better = [state for state in found if preferred and f"[{preferred!r}]" in state.place]
    if len(found) == 1 or len(better) == 1:
        return (better or found)[0]
    if found:
        places = "; ".join(state.place or "the top level" for state in found)
        raise DataError(
            f"got a checkpoint with {len(found)} sets of weights of a {what}: {places}; "
            "expected one. Load it with torch.load(path, weights_only=True), and pass one of them "
            "as a state dict."
        )
    keys = (
        ", ".join(map(str, list(checkpoint)[:6]))
        if isinstance(checkpoint, Mapping)
        else type(checkpoint).__name__
    )
    missing = [
        mark for mark in marks if not isinstance(checkpoint, Mapping) or mark not in checkpoint
    ]
    raise DataError(
        f"got a checkpoint with {keys}, ...; expected the weights of a {what}, which have "
        f"{' and '.join(missing)}. Name another file."
    )


def all_keys(checkpoint: Any, depth: int = 0) -> Iterator[str]:
    """Yield all keys inside nested dictionaries."""
    if isinstance(checkpoint, Mapping) and depth <= 16:
        for key, inner in checkpoint.items():
            yield str(key)
            yield from all_keys(inner, depth + 1)


def holds_key(checkpoint: Any, end: str) -> bool:
    """Return whether a key inside nested dictionaries ends with ``end``."""
    return any(key.endswith(end) for key in all_keys(checkpoint))


def _states(value: Any, marks: tuple[str, ...], place: str, depth: int = 0) -> Iterator[FoundState]:
    """Yield every state dict inside nested dictionaries."""
    if not isinstance(value, Mapping) or depth > 16:
        return
    # Values under dotted keys that are not tensors are kept: the comparison of keys and shapes
    # reports them.
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
            begin = f"{place} keys that begin with {prefix!r}".strip()
            yield FoundState(own, begin if prefix else place)
    for key, inner in value.items():
        yield from _states(inner, marks, f"{place}[{key!r}]", depth + 1)
