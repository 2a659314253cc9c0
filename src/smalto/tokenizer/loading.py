"""Reading a tokenizer from a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch

from smalto.core.config import parse_config
from smalto.core.errors import ConfigError, RunError
from smalto.tokenizer.model import AnyTokenizerConfig, ImageTokenizer, TokenizerConfig
from smalto.tokenizer.presets import SimpleVQVAEConfig
from smalto.tokenizer.saving import FORMAT_VERSION

_CONFIGS: dict[str, type[AnyTokenizerConfig]] = {
    "image-tokenizer": TokenizerConfig,
    "simple-vqvae": SimpleVQVAEConfig,
}


def load(folder: str | Path) -> ImageTokenizer:
    """Read a tokenizer (or a run, which is one too) from a folder, in evaluation mode on the CPU.

    Raises:
        RunError: the folder or one of its two files is missing or damaged, or weights and configuration do not fit.
        ConfigError: the configuration is of another format or has unknown keys.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file() or not (folder / "model.safetensors").is_file():
        there = (
            "holds no tokenizer"
            if folder.is_dir()
            else "is a file"
            if folder.is_file()
            else "does not exist"
        )
        raise RunError(
            f"{folder} {there}: a tokenizer is a folder with config.json and model.safetensors, such as a run of `smalto train`. "
            "A file of VAR becomes one by `smalto convert FILE --to smalto --out FOLDER`."
        )
    try:
        config = _parse(
            (folder / "config.json").read_text(encoding="utf-8"), str(folder / "config.json")
        )
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{folder / 'config.json'} is not readable JSON ({error}).") from None
    tokenizer = config.build()
    try:
        state = safetensors.torch.load_file(folder / "model.safetensors")
        with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
            beside = (file.metadata() or {}).get("smalto")
    except (safetensors.SafetensorError, OSError) as error:
        raise RunError(
            f"{folder / 'model.safetensors'} cannot be read ({error}). Take the one of an older checkpoint."
        ) from None
    if beside is not None and _parse(beside, "model.safetensors") != config:
        raise RunError(
            f"{folder / 'model.safetensors'} does not fit config.json beside it: it was written with another one. Take both anew."
        )
    try:
        tokenizer.load_state_dict(state, assign=True)  # in the precision that was saved
    except RuntimeError as error:
        raise RunError(
            f"{folder / 'model.safetensors'} does not fit config.json beside it: {error}"
        ) from None
    return tokenizer.eval()


def _parse(text: str, source: str) -> AnyTokenizerConfig:
    try:
        data: Any = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{source} is not readable JSON ({error}).") from None
    version = data.pop("format_version", None) if isinstance(data, dict) else None
    if version != FORMAT_VERSION:
        raise ConfigError(
            f"{source} has format_version {version!r}; this smalto reads {FORMAT_VERSION}."
        )
    if not isinstance(data.get("kind"), str) or data["kind"] not in _CONFIGS:
        raise ConfigError(
            f"{source}: kind must be one of {sorted(_CONFIGS)}; got {data.get('kind')!r}."
        )
    return parse_config(_CONFIGS[data["kind"]], data, source)
