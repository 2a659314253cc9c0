"""CompVis/taming-transformers and latent-diffusion: VQGAN with a plain codebook or Gumbel's.

Paper: Esser et al. 2021, arXiv 2012.09841. Code: https://github.com/CompVis/taming-transformers
(``VQModel``, ``GumbelVQ``), whose published files nest the weights under ``state_dict`` beside
those of the loss.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from smalto.core.weight_files import State, find_state, holds_key
from smalto.interop.state_dicts import open_checkpoint
from smalto.interop.vqgan import VQGANKeys, state_dict_of, tokenizer_of
from smalto.tokenizer import ImageTokenizer

KEYS = VQGANKeys(
    project="taming-transformers",
    table=(
        (r"^encoder\.quant_conv", "quant_conv"),
        (r"^decoder\.post_quant_conv", "post_quant_conv"),
        (r"^quantize\.project_in", "quant_conv"),
        (r"^quantize\.project_out", "post_quant_conv"),
    ),
    up_is_reversed=False,
    settings={"metric": "l2", "unit_codes": False},
)
# The index of GumbelVQ is the highest of the logits that quantize.proj computes.
GUMBEL_KEYS = replace(
    KEYS,
    table=(*KEYS.table, (r"^quantize\.embedding\.", "quantize.embed.")),
    settings={},
    quantizer="logit",
)
_NETWORK = "encoder.mid.block_1.norm1.weight"
MARKS = ("quantize.embedding.weight", _NETWORK)
GUMBEL_MARKS = ("quantize.embed.weight", _NETWORK)
BESIDE = ("loss.", "model_ema.")  # discriminator, perceptual network, averages of training


def load_tokenizer(path_or_state_dict: str | Path | State, beta: float = 0.25) -> ImageTokenizer:
    """Read a VQGAN of taming-transformers or latent-diffusion, with equal tokens.

    Args:
        path_or_state_dict: a ``.ckpt``, ``.pth`` or ``.safetensors`` file, or its content. Weights
            nested in a training checkpoint are found; those of losses and averages are left out.
        beta: weight of the commitment loss, for fine-tuning. taming's own training applies it to
            the other term of the loss.

    Returns:
        ImageTokenizer: in evaluation mode on the CPU, in the dtype of the weights. Its
        ``save(folder)`` writes it as a tokenizer of smalto.

    Raises:
        DataError: the file cannot be read without running code from it, or holds no tokenizer, or
            several of them.
        ConfigError: a key is missing, unexpected or of another shape.
    """
    checkpoint, source = open_checkpoint(path_or_state_dict)
    is_gumbel = holds_key(checkpoint, GUMBEL_MARKS[0])
    marks, keys = (GUMBEL_MARKS, GUMBEL_KEYS) if is_gumbel else (MARKS, KEYS)
    state = find_state(checkpoint, marks, "tokenizer of taming-transformers").state
    state = {key: value for key, value in state.items() if not key.startswith(BESIDE)}
    return tokenizer_of(state, keys, source, beta)


def tokenizer_state_dict(tokenizer: ImageTokenizer) -> dict[str, Tensor]:
    """Return the weights under the keys and in the shapes of taming's ``VQModel``.

    Those of a LogitVQ have the keys of ``GumbelVQ``.

    Raises:
        ConfigError: taming's code cannot hold this tokenizer; the message gives the reasons.
    """
    quantizer = getattr(getattr(tokenizer, "config", None), "quantizer", None)
    is_gumbel = getattr(quantizer, "kind", "") == GUMBEL_KEYS.quantizer
    return state_dict_of(tokenizer, GUMBEL_KEYS if is_gumbel else KEYS)
