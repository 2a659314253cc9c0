"""Conversion of tokenizers and generators to the files of other projects, and back."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from smalto.core.errors import ConfigError, RunError
from smalto.core.files import (
    atomic_path,
    check_writable,
    named_path,
    remove_leftovers,
    sync_tree,
    write_atomic,
)
from smalto.core.model_files import CONFIG_FILE, WEIGHTS_FILE
from smalto.generator import Generator, load_generator, save_generator
from smalto.generator.generator_folder import holds_generator
from smalto.interop import diffusers, llamagen, maskgit, taming, var
from smalto.interop.onnx import DECODER, ENCODER, OPSET, SETTINGS, write_onnx
from smalto.interop.open_tokenizer import FormatName, load, recognize
from smalto.pretrained import TOKENIZER_FOLDER
from smalto.tokenizer import ImageTokenizer
from smalto.tokenizer.token_blocks import PatchHws

Target = Literal["var", "llamagen", "taming", "diffusers", "maskgit", "onnx", "smalto"]
OTHERS: dict[str, tuple[str, Callable[[ImageTokenizer], dict[str, Tensor]]]] = {
    "llamagen": (llamagen.KEYS.project, llamagen.tokenizer_state_dict),
    "taming": (taming.KEYS.project, taming.tokenizer_state_dict),
    "diffusers": (diffusers.KEYS.project, diffusers.tokenizer_state_dict),
    "maskgit": (maskgit.PROJECT, maskgit.tokenizer_state_dict),
}


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
    tokenizer: str | Path | None = None,
    num_heads: int | None = None,
    format: FormatName | None = None,
) -> Converted:
    """Write a tokenizer or generator as a file of another project, or such a file as one of ours.

    Args:
        source: the folder of a tokenizer or generator, or the name of a tokenizer; with
            ``to="smalto"`` a weight file or folder of another project, as for ``load``.
        out: the file (``.pth``, plain tensors) or folder to write.
        to: ``"var"`` for a file that VAR's ``build_vae_var`` loads, ``"llamagen"``, ``"taming"``,
            ``"diffusers"`` or ``"maskgit"`` for one of their models; ``"onnx"`` for a folder of
            two ONNX files; ``"smalto"`` for a folder.
        overwrite: whether to replace an existing ``out``.
        patch_nums, using_znorm, quant_resi: with ``to="smalto"``, the arguments with which VAR's
            tokenizer of the file was built.
        tokenizer: with ``to="smalto"``, the folder of VAR's tokenizer if ``source`` is a
            transformer of VAR.
        num_heads: of such a transformer, if its weights do not show them.
        format: the project of ``source``, if its keys could be those of two.

    Raises:
        ConfigError: the project cannot hold the model, or the file does not fit the arguments.
        DataError: the file cannot be read, or is of another project.
        RunError: ``source`` is not a model, or ``out`` exists and ``overwrite`` is off.
    """
    path = named_path(out, "the result")
    if to == "var":
        if holds_generator(Path(source)):
            return _generator_to_var(load_generator(source), path, overwrite)
        return _to_var(load(source, format), path, overwrite)
    if to in OTHERS:
        project, state_dict = OTHERS[to]
        _write_pth(state_dict(load(source, format)), path, overwrite)
        return Converted(path, [f"The model of {project} loads it with load_state_dict."])
    if to == "onnx":
        return _to_onnx(load(source, format), path, overwrite)
    if to == "smalto":
        if tokenizer is None and num_heads is not None:
            raise ConfigError(
                f"got num_heads {num_heads} without a tokenizer; it is for a transformer of VAR. "
                "Name the folder of its tokenizer: --tokenizer."
            )
        if tokenizer is not None:
            generator = var.load_generator(source, load(tokenizer), num_heads)
            return _generator_to_smalto(generator, path, overwrite)
        read = partial(var.load_tokenizer, source, patch_nums, using_znorm, quant_resi)
        is_of_var = format == "var" or (
            format is None and Path(source).is_file() and recognize(source).project == "VAR"
        )
        return _to_smalto(read() if is_of_var else load(source, format), path, overwrite)
    raise ConfigError(f"got to={to!r}; expected one of {', '.join(get_args(Target))}.")


def _to_var(tokenizer: ImageTokenizer, path: Path, overwrite: bool) -> Converted:
    state = var.tokenizer_state_dict(tokenizer)
    _write_pth(state, path, overwrite)
    return Converted(path, edits_of_var(var.var_settings(tokenizer), path.resolve()))


def _generator_to_var(generator: Generator, path: Path, overwrite: bool) -> Converted:
    state = var.generator_state_dict(generator)
    if reasons := var.obstacles(generator.tokenizer):
        raise ConfigError(f"VAR cannot hold the generator's tokenizer: {'; '.join(reasons)}.")
    _write_pth(state, path, overwrite)
    config = generator.config
    arguments: dict[str, var.VARValue] = {
        "depth": config.depth,
        "embed_dim": config.width,
        "num_heads": config.num_heads,
        "num_classes": config.num_classes,
        "mlp_ratio": config.mlp_ratio,
        "cond_drop_rate": config.label_drop,
        "shared_aln": config.shared_adaln,
        "attn_l2_norm": config.l2_attention,
        "patch_nums": tuple(h for h, _ in config.grids),
    }
    return Converted(path, [f"VAR builds this transformer with VAR(vae, {_arguments(arguments)})."])


def _write_pth(state: dict[str, Tensor], path: Path, overwrite: bool) -> None:
    if path.suffix != ".pth":
        raise RunError(f"got {path}; expected a file name that ends with .pth, such as model.pth.")
    _check_free(path, overwrite)
    if path.is_dir():
        raise RunError(f"{path} is a folder; expected a file that ends with .pth. Change --out.")
    data = io.BytesIO()  # in memory: on a full disk torch.save would raise a RuntimeError
    torch.save(state, data)
    write_atomic(path, data.getvalue())


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


def _to_onnx(tokenizer: ImageTokenizer, path: Path, overwrite: bool) -> Converted:
    _write_folder(partial(write_onnx, tokenizer), path, overwrite, {ENCODER, DECODER, SETTINGS})
    size = 4 * tokenizer.quantize.codebook_size
    return Converted(
        path,
        [
            f"{ENCODER}: images float32 [B, {tokenizer.in_channels}, H, W] in [-1, 1] -> token "
            f"maps int64 [B, h, w]; {DECODER}: back.",
            f"Opset {OPSET}; the search needs {size:,} bytes per token.",
        ],
    )


def _to_smalto(tokenizer: ImageTokenizer, path: Path, overwrite: bool) -> Converted:
    _write_folder(tokenizer.save, path, overwrite, {CONFIG_FILE, WEIGHTS_FILE})
    note = f"{tokenizer.quantize.codebook_size:,} codes"
    layout = tokenizer.quantize.configured_layout
    return Converted(path, [note if layout is None else f"{note}, scales {layout}"])


def _generator_to_smalto(generator: Generator, path: Path, overwrite: bool) -> Converted:
    own = {CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FOLDER}
    _write_folder(partial(save_generator, generator), path, overwrite, own)
    config = generator.config
    note = f"{config.depth} blocks of width {config.width}, {config.num_classes} classes"
    return Converted(path, [f"{note}, scales {config.layout}"])


def _write_folder(save: Callable[[Path], None], path: Path, overwrite: bool, own: set[str]) -> None:
    """Write a model's folder at once.

    Args:
        save: writes the model into a folder.
        path: of the folder.
        overwrite: replace a folder that holds nothing but ``own``.
        own: names in a folder of such a model.
    """
    _check_free(path, overwrite)
    if path.is_file() or (path.is_dir() and {p.name for p in path.iterdir()} - own):
        found = "a file" if path.is_file() else "a folder with other files in it"
        raise RunError(
            f"{path} is {found}; expected a folder of a model or a new one. Change --out."
        )
    with atomic_path(path) as new:
        save(new)
        sync_tree(new)
        if path.is_dir():
            # The old folder is deleted with the temporary one, after the new one replaced it.
            os.replace(path, new.parent / "old")


def _check_free(path: Path, overwrite: bool) -> None:
    check_writable(path)
    remove_leftovers(path.parent, path.name)
    if path.exists() and not overwrite:
        raise RunError(
            f"{path} exists already. Name another --out, or replace it with --overwrite."
        )


def _arguments(values: Mapping[str, var.VARValue]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())
