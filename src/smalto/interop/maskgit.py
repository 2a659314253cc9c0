"""MaskGIT-VQGAN as in open-muse and 1d-tokenizer, for images in [0, 1] there.

Paper: Chang et al. 2022, arXiv 2202.04200. Code: https://github.com/huggingface/open-muse
(muse/modeling_maskgit_vqgan.py, commit 64e1afe) and https://github.com/bytedance/1d-tokenizer.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from smalto.autoencoders import MaskGITAutoencoderConfig
from smalto.core.config import parse_config
from smalto.core.errors import ConfigError, InputError, describe
from smalto.core.weight_files import State, find_state, weight_problem
from smalto.interop.state_dicts import (
    check_tensors,
    compare,
    count_of,
    open_checkpoint,
    shape_of,
)
from smalto.quantizers import VectorQuantizerConfig
from smalto.tokenizer import ImageTokenizer, TokenizerConfig

PROJECT = "MaskGIT"
MARKS = (
    "quantize.embedding.weight",
    "encoder.down.0.block.0.norm1.weight",
    "encoder.mid.0.norm1.weight",
)
_UPSAMPLE = r"\.upsample\.conv\."  # .upsample_conv. there; all other keys are equal


@torch.inference_mode(False)  # what is loaded inside such a block can be trained later
def load_tokenizer(path_or_state_dict: str | Path | State, beta: float = 0.25) -> ImageTokenizer:
    """Read MaskGIT's tokenizer, such as ``maskgit-vqgan-imagenet-f16-256.bin``, with equal tokens.

    Args:
        path_or_state_dict: a ``.bin``, ``.pth`` or ``.safetensors`` file, or its content.
        beta: weight of the commitment loss, for fine-tuning.

    Returns:
        ImageTokenizer: in evaluation mode on the CPU, in the dtype of the weights. Its images are
        in [-1, 1] like those of every tokenizer; the conversion from and to [0, 1] is part of it.

    Raises:
        DataError: the file cannot be read without running code from it, or holds no tokenizer, or
            several of them.
        ConfigError: a key is missing, unexpected or of another shape.
    """
    checkpoint, source = open_checkpoint(path_or_state_dict)
    state = find_state(checkpoint, MARKS, "tokenizer of MaskGIT").state
    check_tensors(state, MARKS[1], source)
    config = _read_config(state, source, beta)
    with torch.device("meta"):
        tokenizer = config.build()
    names = _names(tokenizer)
    expected = {names[key]: tensor.shape for key, tensor in tokenizer.state_dict().items()}
    compare(expected, state, source, "this tokenizer of MaskGIT")
    if problem := weight_problem(state):
        raise ConfigError(f"{source}: {problem}. Use another checkpoint.")
    tokenizer.load_state_dict(
        {key: state[name].detach().clone() for key, name in names.items()}, assign=True
    )
    return tokenizer.eval()


def tokenizer_state_dict(tokenizer: ImageTokenizer) -> dict[str, Tensor]:
    """Return the weights under the keys and in the shapes of ``MaskGitVQGAN``, copied to the CPU.

    Raises:
        ConfigError: its code cannot hold this tokenizer; the message gives the reasons.
    """
    if not isinstance(tokenizer, ImageTokenizer):
        raise InputError(
            f"got {describe(tokenizer)}; expected an ImageTokenizer. Load one with smalto.load."
        )
    tokenizer = tokenizer.folded()
    autoencoder = getattr(tokenizer.config, "autoencoder", None)
    quantizer = getattr(tokenizer.config, "quantizer", None)
    is_plain = isinstance(quantizer, VectorQuantizerConfig) and (
        quantizer.metric,
        quantizer.code_dim,
    ) == ("l2", None)
    if not isinstance(autoencoder, MaskGITAutoencoderConfig) or not is_plain:
        kinds = [getattr(part, "kind", "simple") for part in (autoencoder, quantizer)]
        raise ConfigError(
            f"MaskGIT cannot hold this tokenizer: got autoencoder.kind {kinds[0]!r} and "
            f'quantizer.kind {kinds[1]!r}; expected "maskgit" and "vector", with metric "l2" and '
            "without code_dim."
        )
    own = tokenizer.state_dict()
    return {name: own[key].detach().cpu().clone() for key, name in _names(tokenizer).items()}


def _names(tokenizer: ImageTokenizer) -> dict[str, str]:
    """Return MaskGIT's key for each of ours that it has."""
    return {
        key: re.sub(_UPSAMPLE, ".upsample_conv.", key)
        for key in tokenizer.state_dict()
        if not key.startswith("quantize.embedding.ema_")  # needed in training only
    }


def _read_config(state: State, source: str, beta: float) -> TokenizerConfig:
    """Return the settings of a tokenizer from the keys and shapes of its weights."""
    ch, in_channels = shape_of(state, "encoder.conv_in.weight", 4, source)[:2]
    num_levels = count_of(state, r"encoder\.down\.(\d+)\.block\.0\.conv1\.weight")
    widths = [
        shape_of(state, f"encoder.down.{level}.block.0.conv1.weight", 4, source)[0]
        for level in range(num_levels)
    ]
    if ch < 1 or any(width % ch for width in widths):
        raise ConfigError(
            f"{source}: got levels of {widths} channels; expected multiples of the {ch} of the "
            "first convolution. Convert the weights with the project's code."
        )
    codebook_size, latent_dim = shape_of(state, "quantize.embedding.weight", 2, source)
    return parse_config(
        TokenizerConfig,
        {
            "autoencoder": {
                "kind": "maskgit",
                "in_channels": in_channels,
                "latent_dim": latent_dim,
                "ch": ch,
                "ch_mult": tuple(width // ch for width in widths),
                "num_res_blocks": count_of(state, r"encoder\.mid\.(\d+)\.conv1\.weight"),
            },
            "quantizer": {
                "kind": "vector",
                "codebook_size": codebook_size,
                "latent_dim": latent_dim,
                "beta": beta,
            },
        },
        source,
    )
