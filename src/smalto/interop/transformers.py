"""Hugging Face transformers: ``JanusVQVAE``, ``Emu3VQVAE`` for images, ``ChameleonVQVAE``.

Code: https://github.com/huggingface/transformers (models/janus, models/emu3, models/chameleon).
Papers: Janus arXiv 2410.13848, Emu3 arXiv 2409.18869, Chameleon arXiv 2405.09818. A weight file or
folder of the whole language model serves too: its tokenizer is found under ``vqmodel``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smalto.core.errors import ConfigError, DataError
from smalto.core.weight_files import State, find_state, holds_key, read_tensors, read_weights
from smalto.interop.state_dicts import (
    check_tensors,
    count_of,
    open_checkpoint,
    read_settings,
    shape_of,
)
from smalto.interop.vqgan import VQGANKeys, tokenizer_of
from smalto.tokenizer import ImageTokenizer

CHAMELEON_KEYS = VQGANKeys(
    project="transformers (Chameleon)",
    table=(
        (r"^encoder\.quant_conv", "quant_conv"),
        (r"^decoder\.post_quant_conv", "post_quant_conv"),
        (r"^quantize\.project_in", "quant_conv"),
        (r"^quantize\.project_out", "post_quant_conv"),
    ),
    up_is_reversed=False,
    settings={"metric": "l2", "unit_codes": False},
)
JANUS_KEYS = replace(
    CHAMELEON_KEYS,
    project="transformers (Janus)",
    up_is_reversed=True,
    settings={},
    quantizer="logit",
)
EMU3_KEYS = replace(
    CHAMELEON_KEYS,
    project="transformers (Emu3)",
    table=(
        *CHAMELEON_KEYS.table,
        (r"^encoder\.down\.", "encoder.down_block.down."),
        (r"^decoder\.up\.", "decoder.up_block.up."),
        (r"\.mid\.", ".middle_block."),
        (r"\.attn_1\.norm\.", ".attn_norm."),
        (r"\.attn\.(\d+)\.norm\.", r".attn_norms.\1."),
        (r"(attn_1|attn\.\d+)\.([qkv])\.", r"\1.\2_proj."),
        (r"(attn_1|attn\.\d+)\.proj_out\.", r"\1.out_proj."),
    ),
    attention_is_linear=True,
)
_EMBEDDING = "quantize.embedding.weight"
EMU3_MARK = "encoder.down_block.down.0.block.0.norm1.weight"
EMU3_MARKS = (_EMBEDDING, EMU3_MARK)
MARKS = (_EMBEDDING, "encoder.mid.block_1.norm1.weight")
CONFIG = "config.json"
MODEL_TYPES = ("chameleon", "janus", "emu3")
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_INDEX = "model.safetensors.index.json"
_IN_MODEL = "vqmodel."  # keys of the tokenizer inside a language model
_BATCH_NORM_EPS = 1e-5


def load_tokenizer(path_or_state_dict: str | Path | State, beta: float = 0.25) -> ImageTokenizer:
    """Read the tokenizer of Janus, Emu3 or Chameleon as transformers has it, with equal tokens.

    Emu3 tokenizes videos; this is its result for one image. transformers has no decoder for
    Chameleon: its tokens cannot be decoded here either. The original file of Chameleon,
    ``vqgan.ckpt``, has one: load it with ``smalto.interop.taming``. transformers searches Janus'
    codes by distance, DeepSeek's own code by angle: load the original weights for the latter.

    Args:
        path_or_state_dict: the folder of a model, a weight file, or the state dict of a model.
        beta: weight of the commitment loss, for fine-tuning.

    Returns:
        ImageTokenizer: in evaluation mode on the CPU, in the dtype of the weights.

    Raises:
        DataError: a file cannot be read without running code from it, or holds no such tokenizer.
        ConfigError: the configuration has a setting that this network lacks, or a key is missing,
            unexpected or of another shape.
    """
    if isinstance(path_or_state_dict, (str, Path)) and Path(path_or_state_dict).is_dir():
        source = str(path_or_state_dict)
        _check_settings(Path(path_or_state_dict))
        checkpoint = _read_folder(Path(path_or_state_dict))
    else:
        checkpoint, source = open_checkpoint(path_or_state_dict)
    is_emu3 = holds_key(checkpoint, EMU3_MARK)
    marks = EMU3_MARKS if is_emu3 else MARKS
    found = find_state(checkpoint, marks, "VQVAE of transformers").state
    state = {k: t for k, t in found.items() if not k.endswith(".num_batches_tracked")}
    check_tensors(state, _EMBEDDING, source)
    if is_emu3:
        return tokenizer_of(for_one_image(state, source), EMU3_KEYS, source, beta)
    if any(key.startswith("decoder.") for key in state):
        return tokenizer_of(with_logits(state, source), JANUS_KEYS, source, beta)
    return tokenizer_of(state, CHAMELEON_KEYS, source, beta)


def is_folder(folder: Path) -> bool:
    """Return whether a folder holds one of these models of transformers."""
    if not (folder / CONFIG).is_file() or not any(
        (folder / name).is_file() for name in (*_WEIGHTS, _INDEX)
    ):
        return False
    try:
        settings = read_settings(folder / CONFIG)
    except DataError:
        return False
    return str(settings.get("model_type", "")).startswith(MODEL_TYPES)


def _check_settings(folder: Path) -> None:
    settings = read_settings(folder / CONFIG)
    vq_settings = settings.get("vq_config", settings)
    if not isinstance(vq_settings, dict):
        raise DataError(f"{folder / CONFIG}: got vq_config {vq_settings!r}; expected a table.")
    num_heads = vq_settings.get("num_attention_heads", 1)
    if str(vq_settings.get("model_type", "")).startswith("emu3") and num_heads != 1:
        raise ConfigError(
            f"{folder / CONFIG}: got num_attention_heads {num_heads}; expected 1, the only number "
            "that smalto's network has."
        )


def _read_folder(folder: Path) -> State:
    """Return the tensors of a folder's tokenizer, without those of a language model around it."""
    if (folder / _INDEX).is_file():
        weight_map: Any = read_settings(folder / _INDEX).get("weight_map")
        files = weight_map if isinstance(weight_map, dict) else {}
        names = sorted({str(file) for key, file in files.items() if _IN_MODEL in key})
        if not names or any(Path(name).name != name for name in names):
            raise DataError(
                f"{folder / _INDEX} names no file with keys that contain {_IN_MODEL!r}; expected "
                "the index of a language model with a tokenizer of images."
            )
        return {k: t for name in names for k, t in read_tensors(folder / name, _IN_MODEL).items()}
    path = next(folder / name for name in _WEIGHTS if (folder / name).is_file())
    if path.suffix == ".safetensors":
        return read_tensors(path, _IN_MODEL) or read_tensors(path)
    weights: State = read_weights(path)
    return weights


def with_logits(state: State, source: str) -> dict[str, Tensor]:
    """Return Janus' weights with its search written as logits.

    transformers compares latents with the stored codes, and decodes codes of length 1. The nearest
    code has the highest ``z·c - |c|²/2``.
    """
    shape_of(state, _EMBEDDING, 2, source)
    codes = state[_EMBEDDING]
    return dict(state) | {
        "quantize.proj.weight": codes[:, :, None, None],
        "quantize.proj.bias": (codes.double().square().sum(dim=1) / -2).to(codes.dtype),
        _EMBEDDING: torch.nn.functional.normalize(codes, dim=1),
    }


def for_one_image(state: State, source: str) -> dict[str, Tensor]:
    """Return Emu3's weights with convolutions over time as 2D convolutions for one image.

    An image enters as equal frames behind frames of zeros; see ``autoencoders/video.py``.
    """
    fused = {
        key: tensor
        for key, tensor in state.items()
        if ".time_" not in key and not key.startswith(("quant_conv.", "post_quant_conv."))
    }

    def tensor(key: str, rank: int) -> Tensor:
        shape_of(state, key, rank, source)
        return state[key]

    def put_last(name: str, key: str) -> None:
        """Keep the weights that meet the only frame, or the first of several."""
        fused[f"{name}.weight"] = tensor(f"{key}.weight", 5)[:, :, -1]
        fused[f"{name}.bias"] = tensor(f"{key}.bias", 1)

    def put_block(name: str, key: str) -> None:
        for number in (1, 2):
            norm = f"{key}.norm{number}"
            parts = [f"{norm}.{part}" for part in ("weight", "bias", "running_mean", "running_var")]
            if len({shape_of(state, part, 1, source) for part in parts}) > 1:
                shapes = ", ".join(f"{part!r} is {list(state[part].shape)}" for part in parts)
                raise ConfigError(f"{source}: {shapes}; expected equal shapes.")
            scale = tensor(f"{norm}.weight", 1).double()
            scale = scale / (tensor(f"{norm}.running_var", 1).double() + _BATCH_NORM_EPS).sqrt()
            shift = tensor(f"{norm}.bias", 1) - tensor(f"{norm}.running_mean", 1) * scale
            dtype = state[f"{norm}.weight"].dtype
            fused[f"{name}.norm{number}.weight"] = scale.to(dtype)
            fused[f"{name}.norm{number}.bias"] = shift.to(dtype)
            put_last(f"{name}.conv{number}", f"{key}.conv{number}.conv")

    for name in ("quant_conv", "post_quant_conv"):
        put_last(name, f"{name}.conv")
    num_blocks = count_of(state, r"encoder\.time_res_stack\.(\d+)\.norm1\.weight")
    num_halvings = count_of(state, r"encoder\.time_conv\.(\d+)\.conv\.conv\.weight")
    for number in range(num_halvings):
        key = f"encoder.time_conv.{number}.conv.conv"
        frames = 2 ** (num_halvings - number)
        weight = _over_frames(tensor(f"{key}.weight", 5), frames, are_equal=number == 0)
        fused[f"encoder.video.{2 * number}.weight"] = weight
        fused[f"encoder.video.{2 * number}.bias"] = tensor(f"{key}.bias", 1).repeat(frames // 2)
        put_last(
            f"decoder.video.{num_blocks + 2 * number}", f"decoder.time_conv.{number}.conv.conv"
        )
    for number in range(num_blocks):
        put_block(f"encoder.video.{2 * num_halvings + number}", f"encoder.time_res_stack.{number}")
        put_block(f"decoder.video.{number}", f"decoder.time_res_stack.{number}")
    return fused


def _over_frames(weight: Tensor, frames: int, are_equal: bool) -> Tensor:
    """Return a convolution of stride 2 over time as one whose channels are those of all frames.

    Args:
        weight: [O, I, 4, 3, 3]; two frames of zeros lie before the first.
        frames: number of input frames.
        are_equal: the input is one frame that stands for all.

    Returns:
        [frames/2·O, I or frames·I, 3, 3].
    """
    rows = []
    for output in range(frames // 2):
        taps = [torch.zeros_like(weight[:, :, 0]) for _ in range(frames)]
        for tap in range(weight.shape[2]):
            if 0 <= (frame := 2 * output - 2 + tap) < frames:
                taps[frame] = weight[:, :, tap]
        rows.append(torch.stack(taps).sum(0) if are_equal else torch.cat(taps, dim=1))
    return torch.cat(rows)
