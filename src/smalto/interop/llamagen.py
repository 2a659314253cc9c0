"""FoundationVision/LlamaGen: VQGAN with codes of length 1 in few dimensions. Janus uses it too.

Paper: Sun et al. 2024, arXiv 2406.06525. Code: https://github.com/FoundationVision/LlamaGen
(tokenizer/tokenizer_image/vq_model.py), whose published files nest the weights under ``model``.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from smalto.core.weight_files import State, find_state
from smalto.interop.state_dicts import open_checkpoint
from smalto.interop.vqgan import VQGANKeys, state_dict_of, tokenizer_of
from smalto.tokenizer import ImageTokenizer

USED = "quantize.codebook_used"  # statistics of LlamaGen's training, unused in inference
NUM_USED = 65536
KEYS = VQGANKeys(
    project="LlamaGen",
    table=(
        (r"^quantize\.project_in", "quant_conv"),
        (r"^quantize\.project_out", "post_quant_conv"),
        (r"^encoder\.quant_conv", "quant_conv"),
        (r"^decoder\.post_quant_conv", "post_quant_conv"),
        (r"^encoder\.down\.", "encoder.conv_blocks."),
        (r"^decoder\.up\.", "decoder.conv_blocks."),
        (r"conv_blocks\.(\d+)\.block\.", r"conv_blocks.\1.res."),
        (r"mid\.block_1\.", "mid.0."),
        (r"mid\.attn_1\.", "mid.1."),
        (r"mid\.block_2\.", "mid.2."),
    ),
    up_is_reversed=True,
    settings={"metric": "cosine", "unit_codes": True},
    unused=(USED,),
)
MARKS = ("quantize.embedding.weight", "encoder.conv_blocks.0.res.0.norm1.weight")
PREFERRED = "ema"  # LlamaGen evaluates with the averages, if training kept them


def load_tokenizer(path_or_state_dict: str | Path | State, beta: float = 0.25) -> ImageTokenizer:
    """Read a tokenizer of LlamaGen, such as ``vq_ds16_c2i.pt``, with equal tokens.

    Args:
        path_or_state_dict: a ``.pt`` or ``.safetensors`` file, or its content. Weights nested in a
            training checkpoint are found: the averages (``ema``) if there are any.
        beta: weight of the commitment loss, for fine-tuning.

    Returns:
        ImageTokenizer: in evaluation mode on the CPU, in the dtype of the weights. Its
        ``save(folder)`` writes it as a tokenizer of smalto.

    Raises:
        DataError: the file cannot be read without running code from it, or holds no tokenizer, or
            several of them.
        ConfigError: a key is missing, unexpected or of another shape.
    """
    checkpoint, source = open_checkpoint(path_or_state_dict)
    state = find_state(checkpoint, MARKS, "tokenizer of LlamaGen", PREFERRED).state
    return tokenizer_of(state, KEYS, source, beta)


def tokenizer_state_dict(tokenizer: ImageTokenizer) -> dict[str, Tensor]:
    """Return the weights under the keys and in the shapes of LlamaGen's ``VQModel``.

    ``quantize.codebook_used`` is zero: it counts codes during LlamaGen's own training.

    Raises:
        ConfigError: LlamaGen's code cannot hold this tokenizer; the message gives the reasons.
    """
    return state_dict_of(tokenizer, KEYS) | {USED: torch.zeros(NUM_USED)}
