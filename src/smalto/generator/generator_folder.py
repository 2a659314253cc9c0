"""The folder of a generator: its two files, and the folder ``tokenizer`` of its tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch

from smalto.core.errors import RunError
from smalto.core.model_files import has_model, read_config, read_weights_into, write_model
from smalto.core.weight_files import weight_problem
from smalto.generator.config import GeneratorConfig
from smalto.generator.generator import Generator
from smalto.generator.transformer import Transformer
from smalto.pretrained import TOKENIZER_FOLDER, is_in_package, model_folder
from smalto.tokenizer import ImageTokenizer, load

_CONFIGS = {"generator": GeneratorConfig}


def holds_generator(folder: Path) -> bool:
    """Return whether a folder is that of a generator."""
    return has_model(folder) and (folder / TOKENIZER_FOLDER).is_dir()


def save_generator(generator: Generator, folder: str | Path) -> None:
    """Write a generator and its tokenizer into a folder, which is created.

    Raises:
        RunError: weights are not finite; nothing was written.
    """
    folder = Path(folder)
    for state in (generator.tokenizer.state_dict(), generator.transformer.state_dict()):
        if problem := weight_problem(state):
            raise RunError(
                f"{folder} was not saved: {problem}. Lower the learning rate and resume."
            )
    save_tokenizer(generator.tokenizer, folder)
    write_model(folder, generator.config, generator.transformer.state_dict())


def save_tokenizer(tokenizer: ImageTokenizer, folder: Path) -> None:
    """Write the tokenizer of a generator into the generator's folder."""
    (folder / TOKENIZER_FOLDER).mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder / TOKENIZER_FOLDER)


def load_generator(folder: str | Path) -> Generator:
    """Read a generator and its tokenizer, in evaluation mode on the CPU.

    Args:
        folder: of a generator or a run, or the name of a generator in this package.

    Raises:
        RunError: the folder or one of its files is missing or damaged, weights and configuration do
            not fit, or weights are not finite.
        ConfigError: a configuration is of another format or kind, has unknown keys, or the
            tokenizer does not fit.
    """
    folder = model_folder(folder)
    if not holds_generator(folder):
        raise RunError(
            f"{folder} does not hold a generator; expected a folder with config.json, "
            f"model.safetensors and {TOKENIZER_FOLDER}/. "
            "Convert a transformer of VAR with `smalto convert FILE --to smalto "
            "--tokenizer TOKENIZER --out FOLDER`."
        )
    return Generator(load_transformer(folder), load(folder / TOKENIZER_FOLDER)).eval()


@torch.inference_mode(False)  # what is loaded inside such a block can be trained later
def load_transformer(folder: Path) -> Transformer:
    """Read the transformer alone. Raises like ``load_generator``."""
    config = read_config(folder, _CONFIGS)
    with torch.device("meta"):  # weights come from the file: nothing to initialize
        transformer = Transformer(config)
    read_weights_into(transformer, config, folder, _CONFIGS)
    if is_in_package(folder):
        transformer.float()
    return transformer.eval()
