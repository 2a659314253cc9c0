"""Hugging Face diffusers: ``VQModel``, in memory, as a weight file or as a folder.

Code: https://github.com/huggingface/diffusers (models/autoencoders/vq_model.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from smalto.core.errors import ConfigError, DataError
from smalto.core.files import read_json
from smalto.core.weight_files import State, find_state
from smalto.interop.state_dicts import open_checkpoint
from smalto.interop.vqgan import VQGANKeys, state_dict_of, tokenizer_of
from smalto.tokenizer import ImageTokenizer

KEYS = VQGANKeys(
    project="diffusers",
    table=(
        (r"^quantize\.project_in", "quant_conv"),
        (r"^quantize\.project_out", "post_quant_conv"),
        (r"^encoder\.quant_conv", "quant_conv"),
        (r"^decoder\.post_quant_conv", "post_quant_conv"),
        (r"^encoder\.down\.", "encoder.down_blocks."),
        (r"^decoder\.up\.", "decoder.up_blocks."),
        (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
        (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
        (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
        (r"\.block\.(\d+)\.", r".resnets.\1."),
        (r"\.attn\.(\d+)\.", r".attentions.\1."),
        (r"\.nin_shortcut\.", ".conv_shortcut."),
        (r"\.downsample\.conv\.", ".downsamplers.0.conv."),
        (r"\.upsample\.conv\.", ".upsamplers.0.conv."),
        (r"\.norm_out\.", ".conv_norm_out."),
        (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
        (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
        (r"(attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
    ),
    up_is_reversed=True,
    settings={"metric": "l2", "unit_codes": False},
    attention_is_linear=True,
)
MARK = "encoder.down_blocks.0.resnets.0.norm1.weight"
CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
_MARKS = ("quantize.embedding.weight", MARK)
# What the weights do not show, with the only value that this network has.
_FIXED = {
    "_class_name": "VQModel",
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_type": "group",
    "lookup_from_codebook": False,
}


def load_tokenizer(path_or_state_dict: str | Path | State, beta: float = 0.25) -> ImageTokenizer:
    """Read a ``VQModel`` of diffusers with equal tokens.

    Args:
        path_or_state_dict: the folder that ``save_pretrained`` wrote, a weight file, or the state
            dict of a model.
        beta: weight of the commitment loss, for fine-tuning.

    Returns:
        ImageTokenizer: in evaluation mode on the CPU, in the dtype of the weights.

    Raises:
        DataError: a file cannot be read without running code from it, or holds no ``VQModel``.
        ConfigError: the configuration has a setting that this network lacks, or a key is missing,
            unexpected or of another shape.
    """
    if isinstance(path_or_state_dict, (str, Path)) and Path(path_or_state_dict).is_dir():
        folder = Path(path_or_state_dict)
        _check_config(folder)
        path_or_state_dict = folder / WEIGHTS
    checkpoint, source = open_checkpoint(path_or_state_dict)
    state = find_state(checkpoint, _MARKS, "VQModel of diffusers")
    return tokenizer_of(state, KEYS, source, beta)


def tokenizer_state_dict(tokenizer: ImageTokenizer) -> dict[str, Tensor]:
    """Return the weights under the keys and in the shapes of diffusers' ``VQModel``.

    Raises:
        ConfigError: ``VQModel`` cannot hold this tokenizer; the message gives the reasons.
    """
    return state_dict_of(tokenizer, KEYS)


def is_folder(folder: Path) -> bool:
    """Return whether a folder holds a model of diffusers."""
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def _check_config(folder: Path) -> None:
    try:
        config: Any = read_json(folder / CONFIG)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{folder / CONFIG} cannot be read ({error}); expected the JSON of a model of "
            "diffusers. Restore it from a copy."
        ) from None
    if not isinstance(config, dict):
        raise DataError(f"{folder / CONFIG}: got {type(config).__name__}; expected a table.")
    for name, expected in _FIXED.items():
        got = config.get(name, expected)
        if got != expected:
            raise ConfigError(
                f"{folder / CONFIG}: got {name} {json.dumps(got)}; expected "
                f"{json.dumps(expected)}, the only one that smalto's network has."
            )
