"""Tokenizers by folder, by name or from a weight file of another project."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from smalto.core.errors import ConfigError, DataError
from smalto.core.progress import Progress
from smalto.core.weight_files import all_keys, find_state, read_weights
from smalto.interop import diffusers, llamagen, maskgit, taming, transformers, var
from smalto.pretrained import is_pretrained
from smalto.tokenizer import ImageTokenizer
from smalto.tokenizer import load as load_folder

FormatName = Literal["var", "llamagen", "taming", "diffusers", "transformers", "maskgit"]
Keys = Collection[str]


@dataclass(frozen=True)
class Format:
    """The weight files of a project.

    Attributes:
        project: its name.
        marks: keys of a tokenizer's weights, of which one tuple occurs as a whole.
        fits: whether the keys of a file are those of the project.
        load: the content of a file -> a tokenizer.
        beside: beginnings of keys that training puts beside the weights.
        preferred: key of the weights to use, if a checkpoint holds several.
        is_folder: whether a folder is one of the project's.
    """

    project: str
    marks: tuple[tuple[str, ...], ...]
    fits: Callable[[Keys], bool]
    load: Callable[[Any], ImageTokenizer]
    beside: tuple[str, ...] = ()
    preferred: str = ""
    is_folder: Callable[[Path], bool] = lambda folder: False


def _has(keys: Keys, *parts: str) -> bool:
    """Return whether each part occurs in some key."""
    return all(any(part in key for key in keys) for part in parts)


def _is_var(keys: Keys) -> bool:
    parts = ("quantize.ema_vocab_hit_SV", "quantize.quant_resi.", "pos_1LC")  # or a transformer
    return any(_has(keys, part) for part in parts)


def _is_vqgan(keys: Keys) -> bool:
    return _has(keys, taming.MARKS[1]) and not _is_var(keys)


def _is_taming(keys: Keys) -> bool:
    # Level 0 of the decoder is the highest resolution, behind which nothing is upsampled.
    lowest_first = _has(keys, "decoder.up.0.upsample.")
    return _is_vqgan(keys) and _has(keys, "decoder.conv_in.weight") and not lowest_first


def _is_of_transformers(keys: Keys) -> bool:
    if _has(keys, transformers.EMU3_MARK):
        return True
    is_plain = _is_vqgan(keys) and not _has(keys, taming.GUMBEL_MARKS[0])
    highest_first = _has(keys, ".upsample.") and not _has(keys, "decoder.up.0.upsample.")
    has_decoder = _has(keys, "decoder.conv_in.weight")  # Chameleon's has none
    return is_plain and (not has_decoder or not highest_first)


FORMATS: dict[FormatName, Format] = {
    "var": Format("VAR", (var.MARKS,), _is_var, var.load_tokenizer),
    "llamagen": Format(
        "LlamaGen",
        (llamagen.MARKS,),
        lambda keys: _has(keys, llamagen.MARKS[1]),
        llamagen.load_tokenizer,
        preferred=llamagen.PREFERRED,
    ),
    "taming": Format(
        "taming-transformers",
        (taming.MARKS, taming.GUMBEL_MARKS),
        _is_taming,
        taming.load_tokenizer,
        beside=taming.BESIDE,
    ),
    "diffusers": Format(
        "diffusers",
        (diffusers.MARKS,),
        lambda keys: _has(keys, diffusers.MARKS[1]),
        diffusers.load_tokenizer,
        is_folder=diffusers.is_folder,
    ),
    "transformers": Format(
        "transformers",
        (transformers.MARKS, transformers.EMU3_MARKS),
        _is_of_transformers,
        transformers.load_tokenizer,
        is_folder=transformers.is_folder,
    ),
    "maskgit": Format(
        "MaskGIT",
        (maskgit.MARKS,),
        lambda keys: _has(keys, *maskgit.MARKS[1:]) and not _has(keys, "quant_conv."),
        maskgit.load_tokenizer,
    ),
}


def load(model: str | Path, format: FormatName | None = None) -> ImageTokenizer:
    """Load a tokenizer in evaluation mode on the CPU.

    Args:
        model: the folder of a tokenizer, run or generator, the name of one in this package, the
            folder of a model of diffusers or transformers, or a weight file of VAR, LlamaGen,
            taming-transformers, diffusers, transformers or MaskGIT.
        format: the project of a weight file or folder; None: recognized from its keys.

    Raises:
        RunError: the folder or one of its two files is missing or damaged, or does not fit.
        ConfigError: the configuration is of another format, or a key of a weight file is missing,
            unexpected or of another shape.
        DataError: a weight file cannot be read without running code from it, or is of none of these
            projects, or could be of two of them.
    """
    return open_tokenizer(model, Progress(), format)


def open_tokenizer(
    model: ImageTokenizer | str | Path, progress: Progress, format: FormatName | None = None
) -> ImageTokenizer:
    """Return a tokenizer, or load it like ``load`` and report what a weight file holds."""
    if isinstance(model, ImageTokenizer):
        return model
    if format is not None and format not in FORMATS:
        raise ConfigError(f"got format {format!r}; expected one of {', '.join(FORMATS)}.")
    path = Path(model)
    if format is None and is_pretrained(model):
        return load_folder(model)
    if path.is_file():
        checkpoint = read_weights(path)
        project = FORMATS[format] if format else _format_of(checkpoint, str(path))
        # diffusers reads a file beside the weights
        tokenizer = project.load(path if project.project == "diffusers" else checkpoint)
        where = _taken(checkpoint, project)
    else:
        found = [f for name, f in FORMATS.items() if f.is_folder(path) and format in (None, name)]
        if not found:
            return load_folder(model)
        project = found[0]
        tokenizer, where = project.load(path), ""
    progress.message(f"{path}: {project.project}, {_described(tokenizer)}{where}")
    return tokenizer


def _described(tokenizer: ImageTokenizer) -> str:
    side = tokenizer.stride
    return f"{tokenizer.quantize.codebook_size:,} codes, {side} x {side} pixels per token"


def _taken(checkpoint: Any, format: Format) -> str:
    """Return which of the weights in a checkpoint were taken, in words; empty if all."""
    keys = list(all_keys(checkpoint))
    marks = next(m for m in format.marks if _has(keys, *m))
    found = find_state(checkpoint, marks, format.project, format.preferred)
    beside = [name for name in format.beside if any(key.startswith(name) for key in found.state)]
    words = f"; weights of {found.place}" if found.place else ""
    return words + (f"; without {' and '.join(n.rstrip('.') for n in beside)}" if beside else "")


def recognize(path: str | Path) -> Format:
    """Return the format of a weight file.

    Raises:
        DataError: it cannot be read without running code from it, or is of no known project.
    """
    return _format_of(read_weights(path), str(path))


def _format_of(checkpoint: Any, source: str) -> Format:
    """Return the format of a weight file; raise DataError if it is none, or several."""
    keys = list(all_keys(checkpoint))
    found = {name: format for name, format in FORMATS.items() if format.fits(keys)}
    if len(found) == 1:
        return next(iter(found.values()))
    if not found:
        projects = ", ".join(format.project for format in FORMATS.values())
        shown = ", ".join(keys[:6]) or type(checkpoint).__name__
        raise DataError(
            f"{source}: got the keys {shown}, ...; expected a tokenizer of {projects}. Convert "
            "other weights to one of these layouts."
        )
    projects = " and ".join(format.project for format in found.values())
    raise DataError(
        f"{source}: got weights that {projects} could have written; expected those of one project. "
        f"Convert them with smalto convert --to smalto --format {next(iter(found))} or "
        f"{' or '.join(list(found)[1:])}."
    )
