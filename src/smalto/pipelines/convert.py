"""Tokenizers to the files of other projects, and back."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from smalto.core.errors import ConfigError, RunError
from smalto.core.files import atomic_path, check_writable, sync_tree
from smalto.core.layout import TokenLayout
from smalto.interop import var
from smalto.quantizers import MultiScaleVQ
from smalto.tokenizer import ImageTokenizer, load
from smalto.tokenizer.token_blocks import PatchHws

Target = Literal["var", "smalto"]


@dataclass(frozen=True)
class Converted:
    """What ``convert`` wrote, and what a reader of it must know."""

    path: Path
    notes: list[str]


def convert(
    source: str | Path,
    out: str | Path,
    to: Target = "var",
    *,
    overwrite: bool = False,
    patch_nums: PatchHws = var.PATCH_NUMS,
    using_znorm: bool = False,
    quant_resi: float = 0.5,
) -> Converted:
    """Write a tokenizer as a file of another project, or such a file as a tokenizer.

    Args:
        source: with ``to="var"`` the folder of a tokenizer or run; with ``to="smalto"`` a ``.pth`` or ``.safetensors`` file of VAR.
        out: the file (``.pth``, plain tensors) or folder to make.
        to: ``"var"``: what VAR's ``VQVAE`` loads; ``"smalto"``: a tokenizer folder.
        patch_nums, using_znorm, quant_resi: with ``to="smalto"``: what the file's tokenizer was built with.

    Raises:
        ConfigError: VAR cannot hold the tokenizer, or the file is of another one than the settings say.
        RunError: ``out`` exists and ``overwrite`` is off.
    """
    path = Path(out)
    if to == "var":
        return _to_var(load(source), path, overwrite)
    if to == "smalto":
        return _to_smalto(
            var.load_tokenizer(source, patch_nums, using_znorm, quant_resi), path, overwrite
        )
    raise ConfigError(f'to must be "var" or "smalto"; got {to!r}.')


def _to_var(tokenizer: ImageTokenizer, path: Path, overwrite: bool) -> Converted:
    state = var.tokenizer_state_dict(tokenizer)
    if path.suffix != ".pth":
        raise RunError(f"{path} must be a file that ends with .pth, such as vae_ch160v4096z32.pth.")
    _check_free(path, overwrite)
    if path.is_dir():
        raise RunError(f"{path} is a folder. Name a file that ends with .pth for --out.")
    with atomic_path(path) as temporary:
        torch.save(state, temporary)
    arguments, fixed = var.constructor_values(tokenizer)
    if arguments == {"ch": 160} and not fixed:
        return Converted(
            path,
            [
                "VAR loads this file as it is: build_vae_var(...) with its own values, load_state_dict(..., strict=True)."
            ],
        )
    notes = []
    if arguments:
        notes.append(
            f"VAR must build its tokenizer with VQVAE({_arguments(arguments)}); build_vae_var has other values."
        )
    if fixed:
        notes.append(
            f"VAR writes these into its code: in models/vqvae.py set ddconfig = dict(..., {_arguments(fixed)})."
        )
    return Converted(path, notes)


def _to_smalto(tokenizer: ImageTokenizer, path: Path, overwrite: bool) -> Converted:
    _check_free(path, overwrite)
    if path.is_file() or (
        path.is_dir() and {p.name for p in path.iterdir()} - {"config.json", "model.safetensors"}
    ):
        raise RunError(
            f"{path} is {'a file' if path.is_file() else 'a folder with other things in it'}. Name another folder for --out."
        )
    with atomic_path(path) as new:
        tokenizer.save(new)
        sync_tree(new)
        if path.is_dir():
            os.replace(
                path, new.parent / "old"
            )  # goes with the temporary folder, once the new one is in its place
    assert isinstance(tokenizer.quantize, MultiScaleVQ)
    scales = TokenLayout(tokenizer.quantize.scales)
    return Converted(path, [f"{tokenizer.quantize.codebook_size:,} codes, scales {scales}"])


def _check_free(path: Path, overwrite: bool) -> None:
    check_writable(path)
    if path.exists() and not overwrite:
        raise RunError(
            f"{path} exists already. Replace it with --overwrite, or name another --out."
        )


def _arguments(values: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())
