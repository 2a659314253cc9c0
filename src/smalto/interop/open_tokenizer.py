"""Tokenizers by folder, by name or from a weight file of another project."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smalto.core.errors import DataError
from smalto.core.progress import Progress
from smalto.core.weight_files import read_weights
from smalto.interop import diffusers, llamagen, taming, var
from smalto.pretrained import is_pretrained
from smalto.tokenizer import ImageTokenizer
from smalto.tokenizer import load as load_folder

_VQGAN = "encoder.mid.block_1.norm1.weight"


@dataclass(frozen=True)
class Format:
    """A project's weight files.

    Attributes:
        project: its name.
        needs: parts of keys, of which at least one occurs.
        lacks: parts of keys that it does not have.
        load: the content of a file -> a tokenizer.
    """

    project: str
    needs: tuple[str, ...]
    lacks: tuple[str, ...]
    load: Callable[[Any], ImageTokenizer]

    def fits(self, keys: list[str]) -> bool:
        """Return whether the keys of a file are those of the project."""

        def occurs(parts: tuple[str, ...]) -> bool:
            return any(part in key for key in keys for part in parts)

        return occurs(self.needs) and not occurs(self.lacks)


_OF_VAR = ("quantize.ema_vocab_hit_SV", "quantize.quant_resi.", "pos_1LC")
FORMATS = (
    Format("VAR", _OF_VAR, (), var.load_tokenizer),  # which names a transformer as such
    Format("LlamaGen", ("encoder.conv_blocks.0.res.0.norm1.weight",), (), llamagen.load_tokenizer),
    Format("diffusers", (diffusers.MARK,), (), diffusers.load_tokenizer),
    Format("taming-transformers", (_VQGAN,), _OF_VAR, taming.load_tokenizer),
)


def load(model: str | Path) -> ImageTokenizer:
    """Load a tokenizer in evaluation mode on the CPU.

    Args:
        model: the folder of a tokenizer, run or generator, the name of one in this package, the
            folder of a ``VQModel`` of diffusers, or a weight file of VAR, LlamaGen, diffusers or
            taming-transformers, whose format is recognized.

    Raises:
        RunError: the folder or one of its two files is missing or damaged, or does not fit.
        ConfigError: the configuration is of another format, or a key of a weight file is missing,
            unexpected or of another shape.
        DataError: a weight file cannot be read without running code from it, or is of none of these
            projects.
    """
    return open_tokenizer(model, Progress())


def open_tokenizer(model: ImageTokenizer | str | Path, progress: Progress) -> ImageTokenizer:
    """Return a tokenizer, or load it like ``load`` and report what a weight file holds."""
    if isinstance(model, ImageTokenizer):
        return model
    if is_pretrained(model):
        return load_folder(model)
    if diffusers.is_folder(Path(model)):
        project, tokenizer = diffusers.KEYS.project, diffusers.load_tokenizer(model)
    elif Path(model).is_file():
        checkpoint = read_weights(model)
        format = _format_of(checkpoint, str(model))
        project, tokenizer = format.project, format.load(checkpoint)
    else:
        return load_folder(model)
    side = tokenizer.stride
    progress.message(
        f"{model}: {project}, {tokenizer.quantize.codebook_size:,} codes, {side} x {side} "
        "pixels per token"
    )
    return tokenizer


def recognize(path: str | Path) -> Format:
    """Return the format of a weight file.

    Raises:
        DataError: it cannot be read without running code from it, or is of no known project.
    """
    return _format_of(read_weights(path), str(path))


def _format_of(checkpoint: Any, source: str) -> Format:
    """Return the format of a weight file; raise DataError if it is none, or several."""
    keys = list(_keys(checkpoint))
    found = [format for format in FORMATS if format.fits(keys)]
    if len(found) == 1:
        return found[0]
    projects = ", ".join(format.project for format in FORMATS)
    if not found:
        shown = ", ".join(keys[:6]) or type(checkpoint).__name__
        raise DataError(
            f"{source}: got the keys {shown}, ...; expected a tokenizer of {projects}. Convert "
            "other weights to one of these layouts."
        )
    raise DataError(
        f"{source}: got weights that {' and '.join(f.project for f in found)} could have written; "
        "expected those of one project. Load them with load_tokenizer of its module in "
        "smalto.interop."
    )


def _keys(value: Any, depth: int = 0) -> Iterator[str]:
    """Yield all keys inside nested dictionaries."""
    if isinstance(value, Mapping) and depth <= 16:
        for key, inner in value.items():
            yield str(key)
            yield from _keys(inner, depth + 1)
