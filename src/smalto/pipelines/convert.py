"""Conversion of tokenizers to the files of other projects, and back."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from smalto.core.errors import ConfigError, RunError
from smalto.core.files import (
    atomic_path,
    check_writable,
    named_path,
    remove_leftovers,
    sync_tree,
    write_atomic,
)
from smalto.core.layout import TokenLayout
from smalto.interop import var
from smalto.quantizers import MultiScaleVQ
from smalto.tokenizer import ImageTokenizer, load
from smalto.tokenizer.token_blocks import PatchHws

Target = Literal["var", "smalto"]


@dataclass(frozen=True)
class Converted:
    """Result of ``convert``.

    Attributes:
        path: the file or folder that was written.
        notes: what the result holds, or what must be edited in the other project's code to load it.
    """

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
        source: with ``to="var"`` the folder or name of a tokenizer; with ``to="smalto"`` a ``.pth``
            or ``.safetensors`` file of VAR.
        out: the file (``.pth``, plain tensors) or folder to write.
        to: ``"var"`` for a file that VAR's ``build_vae_var`` loads; ``"smalto"`` for a tokenizer
            folder.
        overwrite: whether to replace an existing ``out``.
        patch_nums, using_znorm, quant_resi: with ``to="smalto"``, the arguments with which the
            tokenizer of the file was built.

    Raises:
        ConfigError: VAR cannot hold the tokenizer, or the file does not fit the arguments.
        DataError: the file of VAR cannot be read.
        RunError: ``source`` is not a tokenizer, or ``out`` exists and ``overwrite`` is off.
    """
    path = named_path(out, "the result")
    if to == "var":
        return _to_var(load(source), path, overwrite)
    if to == "smalto":
        return _to_smalto(
            var.load_tokenizer(source, patch_nums, using_znorm, quant_resi), path, overwrite
        )
    raise ConfigError(f'got to={to!r}; to must be "var" or "smalto".')


def _to_var(tokenizer: ImageTokenizer, path: Path, overwrite: bool) -> Converted:
    state = var.tokenizer_state_dict(tokenizer)
    if path.suffix != ".pth":
        raise RunError(f"got {path}; expected a file name that ends with .pth, such as vae.pth.")
    _check_free(path, overwrite)
    if path.is_dir():
        raise RunError(f"{path} is a folder; expected a file that ends with .pth. Change --out.")
    data = io.BytesIO()  # in memory: on a full disk torch.save would raise a RuntimeError
    torch.save(state, data)
    write_atomic(path, data.getvalue())
    return Converted(path, edits_of_var(var.var_settings(tokenizer), path.resolve()))


def edits_of_var(settings: var.VARSettings, checkpoint: Path) -> list[str]:
    """Return what to edit in VAR's code; its lines are those of commit 78b9539."""
    name = f"train.py, line 93: set vae_ckpt = {str(checkpoint)!r}."
    if settings.are_published:
        return [f"VAR builds this tokenizer by default. {name}"]
    shared = f"share_quant_resi={settings.share_quant_resi}"
    sizes = f"V={settings.vocab_size}, Cvae={settings.z_channels}, ch={settings.ch}"
    flags = "--pn=" + "_".join(map(str, settings.patch_nums))
    if settings.patch_size != 16:
        flags += f" --patch_size={settings.patch_size}"
    edits = [
        "VAR builds this tokenizer with "
        f"build_vae_var({sizes}, patch_nums={settings.patch_nums}, {shared}, ...).",
        f"train.py, line 86: set {sizes}, {shared}. Keep patch_nums=args.patch_nums.",
        name,
        f"Run train.py with {flags}.",
    ]
    if settings.vqvae:
        edits.append(
            f"models/__init__.py, line 28: add {_arguments(settings.vqvae)} to VQVAE(...), "
            "because build_vae_var has no such arguments."
        )
    if settings.ddconfig:
        edits.append(
            f"models/vqvae.py, lines 32-36: set {_arguments(settings.ddconfig)} "
            "in ddconfig = dict(...)."
        )
    return edits


def _to_smalto(tokenizer: ImageTokenizer, path: Path, overwrite: bool) -> Converted:
    _check_free(path, overwrite)
    if path.is_file() or (
        path.is_dir() and {p.name for p in path.iterdir()} - {"config.json", "model.safetensors"}
    ):
        found = "a file" if path.is_file() else "a folder with other files in it"
        raise RunError(
            f"{path} is {found}; expected a tokenizer folder or a new one. Change --out."
        )
    with atomic_path(path) as new:
        tokenizer.save(new)
        sync_tree(new)
        if path.is_dir():
            # The old folder is deleted with the temporary one, after the new one replaced it.
            os.replace(path, new.parent / "old")
    assert isinstance(tokenizer.quantize, MultiScaleVQ)
    scales = TokenLayout(tokenizer.quantize.scales)
    return Converted(path, [f"{tokenizer.quantize.codebook_size:,} codes, scales {scales}"])


def _check_free(path: Path, overwrite: bool) -> None:
    check_writable(path)
    remove_leftovers(path.parent, path.name)
    if path.exists() and not overwrite:
        raise RunError(
            f"{path} exists already. Name another --out, or replace it with --overwrite."
        )


def _arguments(values: dict[str, var.VARValue]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())
