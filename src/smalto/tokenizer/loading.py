"""Reading of a tokenizer from a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from smalto.core.config import parse_config
from smalto.core.errors import ConfigError, RunError
from smalto.core.files import parse_json, read_regular
from smalto.core.weight_files import weight_problem
from smalto.pretrained import PRETRAINED_FOLDER, pretrained_names, tokenizer_folder
from smalto.tokenizer.model import AnyTokenizerConfig, ImageTokenizer, TokenizerConfig
from smalto.tokenizer.presets import SimpleVQVAEConfig
from smalto.tokenizer.saving import FORMAT_VERSION

_CONFIGS: dict[str, type[AnyTokenizerConfig]] = {
    "image-tokenizer": TokenizerConfig,
    "simple-vqvae": SimpleVQVAEConfig,
}


@torch.inference_mode(False)  # what is loaded inside such a block can be trained later
def load(folder: str | Path) -> ImageTokenizer:
    """Read a tokenizer from its folder, or from a run, in evaluation mode on the CPU.

    Args:
        folder: its path, or the name of a tokenizer in this package, such as ``"photos-f8"``; the
            weights of those become float32.

    Raises:
        RunError: the folder or one of its two files is missing or damaged, weights and
            configuration do not fit, or weights are not finite.
        ConfigError: the configuration is of another format or has unknown keys.
    """
    folder = tokenizer_folder(folder)
    if not (folder / "config.json").is_file() or not (folder / "model.safetensors").is_file():
        there = (
            "does not hold a tokenizer"
            if folder.is_dir()
            else "is a file"
            if folder.is_file()
            else "does not exist"
        )
        raise RunError(
            f"{folder} {there}; expected a folder with config.json and model.safetensors, such as "
            f"a run of `smalto train`, or a name: {', '.join(pretrained_names())}. Convert a "
            "checkpoint of VAR with `smalto convert FILE --to smalto --out FOLDER`."
        )
    try:
        text = read_regular(folder / "config.json").decode()
        config = _parse(text, str(folder / "config.json"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{folder / 'config.json'} cannot be read ({error}); expected JSON in UTF-8. Restore "
            "it from a checkpoint of the run."
        ) from None
    with torch.device("meta"):  # weights come from the file: nothing to initialize
        tokenizer = config.build()
    try:
        state = safetensors.torch.load_file(folder / "model.safetensors")
        with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
            beside = (file.metadata() or {}).get("smalto")
    except (safetensors.SafetensorError, OSError) as error:
        raise RunError(
            f"{folder / 'model.safetensors'} cannot be read ({error}). Restore it from a "
            "checkpoint of the run."
        ) from None
    if problem := weight_problem(state):
        raise RunError(
            f"{folder / 'model.safetensors'}: {problem}. Use an earlier checkpoint of the run."
        )
    if beside is not None and _parse(beside, "model.safetensors") != config:
        raise RunError(
            f"{folder / 'model.safetensors'} does not fit config.json beside it: it was written "
            "with another one. Copy both files again from the same checkpoint."
        )
    try:
        tokenizer.load_state_dict(state, assign=True)  # in the precision that was saved
    except RuntimeError as error:
        raise RunError(
            f"{folder / 'model.safetensors'} does not fit config.json beside it. Copy both files "
            f"again from the same checkpoint. {' '.join(str(error).split())[:500]}"
        ) from None
    if folder.parent == PRETRAINED_FOLDER:
        tokenizer.float()
    return tokenizer.eval()


def _parse(text: str, source: str) -> AnyTokenizerConfig:
    try:
        data: Any = parse_json(text)
    except ValueError as error:
        raise ConfigError(
            f"{source} is not valid JSON ({error}). Restore it from a checkpoint of the run."
        ) from None
    version = data.pop("format_version", None) if isinstance(data, dict) else None
    if version != FORMAT_VERSION:
        raise ConfigError(
            f"{source}: got format_version {version!r}; this version of smalto reads "
            f"{FORMAT_VERSION}. Install the version of smalto that wrote the file."
        )
    if not isinstance(data.get("kind"), str) or data["kind"] not in _CONFIGS:
        raise ConfigError(
            f"{source}: got kind {data.get('kind')!r}; expected one of {sorted(_CONFIGS)}. "
            "Read the file with the version of smalto that wrote it."
        )
    return parse_config(_CONFIGS[data["kind"]], data, source)
