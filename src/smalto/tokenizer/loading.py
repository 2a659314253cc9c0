"""Reading of a tokenizer from a folder."""

from __future__ import annotations

from pathlib import Path

import torch

from smalto.core.errors import RunError
from smalto.core.model_files import has_model, read_config, read_weights_into
from smalto.pretrained import is_in_package, pretrained_names, tokenizer_folder
from smalto.tokenizer.model import AnyTokenizerConfig, ImageTokenizer, TokenizerConfig
from smalto.tokenizer.presets import SimpleVQVAEConfig

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
    if not has_model(folder):
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
    config = read_config(folder, _CONFIGS)
    with torch.device("meta"):  # weights come from the file: nothing to initialize
        tokenizer = config.build()
    read_weights_into(tokenizer, config, folder, _CONFIGS)
    if is_in_package(folder):
        tokenizer.float()
    return tokenizer.eval()


ImageTokenizer.read_folder = staticmethod(load)  # loading knows all kinds, the model does not
