"""Hugging Face diffusers: ``VQModel``, in memory, as a weight file or as a folder.

Code: https://github.com/huggingface/diffusers (models/autoencoders/vq_model.py).
"""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from smalto.core.errors import ConfigError
from smalto.core.weight_files import State, find_state
from smalto.interop.state_dicts import open_checkpoint, read_settings
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
        (r"(attentions\.\d+)\.norm\.(norm_layer|conv_[yb])\.", r"\1.spatial_norm.\2."),
        (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
        (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
        (r"(attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
    ),
    up_is_reversed=True,
    settings={"metric": "l2", "unit_codes": False},
    attention_is_linear=True,
    norms=("group", "spatial"),
)
MARKS = ("quantize.embedding.weight", "encoder.down_blocks.0.resnets.0.norm1.weight")
CONFIG = "config.json"
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
# What the weights do not show, with the only value that this network has.
_FIXED = {"_class_name": "VQModel", "act_fn": "silu"}
NUM_GROUPS = 32


def load_tokenizer(path_or_state_dict: str | Path | State, beta: float = 0.25) -> ImageTokenizer:
    """Read a ``VQModel`` of diffusers with equal tokens.

    Args:
        path_or_state_dict: the folder that ``save_pretrained`` wrote, a weight file, or the state
            dict of a model. ``norm_num_groups`` is read from the ``config.json`` beside the
            weights; it is 32 without one.
        beta: weight of the commitment loss, for fine-tuning.

    Returns:
        ImageTokenizer: in evaluation mode on the CPU, in the dtype of the weights.

    Raises:
        DataError: a file cannot be read without running code from it, or holds no ``VQModel``.
        ConfigError: the configuration has a setting that this network lacks, or a key is missing,
            unexpected or of another shape.
    """
    num_groups = NUM_GROUPS
    if isinstance(path_or_state_dict, (str, Path)):
        path = Path(path_or_state_dict)
        if path.is_dir():
            path = next((path / n for n in WEIGHTS if (path / n).is_file()), path / WEIGHTS[0])
        if path.name in WEIGHTS and (path.parent / CONFIG).is_file():
            num_groups = _num_groups(path.parent / CONFIG)
        path_or_state_dict = path
    checkpoint, source = open_checkpoint(path_or_state_dict)
    state = find_state(checkpoint, MARKS, "VQModel of diffusers").state
    return tokenizer_of(state, KEYS, source, beta, num_groups)


def tokenizer_state_dict(tokenizer: ImageTokenizer) -> dict[str, Tensor]:
    """Return the weights under the keys and in the shapes of diffusers' ``VQModel``.

    Raises:
        ConfigError: ``VQModel`` cannot hold this tokenizer; the message gives the reasons.
    """
    return state_dict_of(tokenizer, KEYS)


def is_folder(folder: Path) -> bool:
    """Return whether a folder holds a model of diffusers."""
    return (folder / CONFIG).is_file() and any((folder / name).is_file() for name in WEIGHTS)


def _num_groups(settings: Path) -> int:
    """Return the number of groups of the normalization in a model's configuration.

    Raises:
        DataError: the file cannot be read.
        ConfigError: it has a setting that this network lacks.
    """
    config = read_settings(settings)
    for name, expected in _FIXED.items():
        if (got := config.get(name, expected)) != expected:
            raise ConfigError(
                f"{settings}: got {name} {json.dumps(got)}; expected "
                f"{json.dumps(expected)}, the only one that smalto's network has."
            )
    groups = config.get("norm_num_groups", NUM_GROUPS)
    if not isinstance(groups, int) or isinstance(groups, bool) or groups < 1:
        raise ConfigError(f"{settings}: got norm_num_groups {groups!r}; expected an integer.")
    return groups
