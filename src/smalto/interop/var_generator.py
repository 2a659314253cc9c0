"""FoundationVision/VAR: weights and names of its transformer. Use it through ``interop.var``.

Paper: Tian et al. 2024, arXiv 2404.02905. Code: https://github.com/FoundationVision/VAR, read at
commit 78b9539; names of keys are from there.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import torch
from torch import Tensor

from smalto.core.errors import ConfigError, InputError, describe
from smalto.core.weight_files import State, find_state, weight_problem
from smalto.generator import Generator, GeneratorConfig
from smalto.generator.transformer import Transformer, numbered
from smalto.interop.state_dicts import (
    check_tensors,
    compare,
    count_of,
    open_checkpoint,
    shape_of,
)
from smalto.tokenizer import ImageTokenizer

_MARKS = ("pos_1LC", "word_embed.weight")
_NAMES = (  # our key -> VAR's
    (r"class_embedding\.weight", r"class_emb.weight"),
    (r"start_embedding", r"pos_start"),
    (r"word_embedding\.(\w+)", r"word_embed.\1"),
    (r"level_embedding\.weight", r"lvl_embed.weight"),
    (r"position_embedding", r"pos_1LC"),
    (r"modulation\.linear\.(\w+)", r"shared_ada_lin.1.\1"),
    (r"blocks\.(\d+)\.modulation\.linear\.(\w+)", r"blocks.\1.ada_lin.1.\2"),
    (r"blocks\.(\d+)\.offset", r"blocks.\1.ada_gss"),
    (r"blocks\.(\d+)\.attention\.qkv\.weight", r"blocks.\1.attn.mat_qkv.weight"),
    (r"blocks\.(\d+)\.attention\.(q_bias|v_bias)", r"blocks.\1.attn.\2"),
    (r"blocks\.(\d+)\.attention\.log_scale", r"blocks.\1.attn.scale_mul_1H11"),
    (r"blocks\.(\d+)\.attention\.project\.(\w+)", r"blocks.\1.attn.proj.\2"),
    (r"blocks\.(\d+)\.mlp\.widen\.(\w+)", r"blocks.\1.ffn.fc1.\2"),
    (r"blocks\.(\d+)\.mlp\.narrow\.(\w+)", r"blocks.\1.ffn.fc2.\2"),
    (r"head_norm\.modulation\.linear\.(\w+)", r"head_nm.ada_lin.1.\1"),
    (r"head\.(\w+)", r"head.\1"),
)


@torch.inference_mode(False)  # what is loaded inside such a block can be trained later
def load_generator(
    path_or_state_dict: str | Path | State,
    tokenizer: ImageTokenizer,
    num_heads: int | None = None,
    *,
    label_drop: float = 0.1,
) -> Generator:
    """Read a transformer of VAR, such as the published ``var_d16.pth``, with equal logits.

    Args:
        path_or_state_dict: a ``.pth`` or ``.safetensors`` file, or its content. Weights nested in
            a training checkpoint are found if there is exactly one set of them.
        tokenizer: of its tokens, as ``load_tokenizer`` returns it.
        num_heads: needed if the weights do not show it: attention without l2 normalization, and
            not as many heads as blocks, as the published models have. None: read from the weights,
            else the number of blocks.
        label_drop: share of training rows without a label, which the weights do not contain.

    Returns:
        Generator: in evaluation mode on the CPU, in the dtype of the weights.

    Raises:
        DataError: the file cannot be read without running code from it, or holds no transformer, or
            several of them.
        ConfigError: a key is missing, unexpected or of another shape, a buffer has unexpected
            values, or the tokenizer does not fit.
    """
    checkpoint, source = open_checkpoint(path_or_state_dict)
    state = dict(find_state(checkpoint, _MARKS, "transformer of VAR").state)
    found_buffers = {key: state.pop(key) for key in list(state) if _is_buffer(key)}
    check_tensors(state, _MARKS[1], source)
    config = _read_config(state, tokenizer, num_heads, label_drop, source)
    with torch.device("meta"):
        transformer = Transformer(config)
    names = generator_names(transformer)
    shapes = transformer.state_dict()
    expected = {name: shapes[key].shape for key, name in names.items()}
    compare(expected, state, source, "this transformer of VAR")
    if problem := weight_problem(state):
        raise ConfigError(f"{source}: {problem}. Use another checkpoint.")
    _check_buffers(found_buffers, buffers(config), source)
    transformer.load_state_dict(
        {key: state[name].detach().to("cpu", copy=True) for key, name in names.items()},
        assign=True,
    )
    return Generator(transformer, tokenizer).eval()


def generator_state_dict(generator: Generator) -> dict[str, Tensor]:
    """Return the weights under the keys and in the shapes of VAR's ``VAR``, copied to the CPU.

    Raises:
        ConfigError: VAR's code cannot hold this generator; the message gives the reason.
    """
    if not isinstance(generator, Generator):
        raise InputError(
            f"got {describe(generator)}; expected a Generator. Load one with load_generator."
        )
    config = generator.config
    if config.order != "next-scale" or any(h != w for h, w in config.grids):
        raise ConfigError(
            f"VAR cannot hold this generator: got {config.order} prediction over "
            f"{config.layout}; expected next-scale prediction over square scales."
        )
    if config.num_classes == 0 or len(config.grids) == 1:
        raise ConfigError(
            f"VAR cannot hold this generator: got {config.num_classes} classes and "
            f"{len(config.grids)} scales; expected at least 1 class and 2 scales, because VAR "
            "divides by the number of classes, and by that of scales - 1."
        )
    own = generator.transformer.state_dict()
    names = generator_names(generator.transformer)
    state = {name: own[key].detach().cpu().clone() for key, name in names.items()}
    return state | buffers(config)


def generator_names(transformer: Transformer) -> dict[str, str]:
    """Return the key of VAR for each key of a transformer of ours."""
    names = {}
    for key in transformer.state_dict():
        for pattern, name in _NAMES:
            if re.fullmatch(pattern, key):
                names[key] = re.sub(pattern, name, key)
    return names


def buffers(config: GeneratorConfig) -> dict[str, Tensor]:
    """Return the tensors in VAR's files that follow from the configuration."""
    levels = numbered(config.layout.lengths)
    later = levels[:, None] < levels
    mask = torch.zeros(later.shape).masked_fill(later, -math.inf)
    zeros = {
        f"blocks.{number}.attn.zero_k_bias": torch.zeros(config.width)
        for number in range(config.depth)
    }
    return {"lvl_1L": levels[None], "attn_bias_for_masking": mask[None, None]} | zeros


def _is_buffer(key: str) -> bool:
    return key in ("lvl_1L", "attn_bias_for_masking") or key.endswith(".attn.zero_k_bias")


def _check_buffers(found: State, expected: State, source: str) -> None:
    """Raise ConfigError unless all buffers that a file has are those of the configuration."""
    for key, tensor in found.items():
        right = expected.get(key)
        fits = right is not None and isinstance(tensor, Tensor) and tensor.shape == right.shape
        if right is None or not fits or not torch.equal(tensor.cpu().to(right.dtype), right):
            raise ConfigError(
                f"{source}: {key!r} differs from what the tokenizer's scales give. Load the "
                "tokenizer with the patch_nums with which this transformer was trained."
            )


def _read_config(
    state: State,
    tokenizer: ImageTokenizer,
    num_heads: int | None,
    label_drop: float,
    source: str,
) -> GeneratorConfig:
    """Return the settings of a generator from the keys and shapes of its weights."""
    layout = tokenizer.quantize.configured_layout
    if layout is None:
        raise ConfigError(
            f"{source} predicts the scales of a multi-scale tokenizer; got one without scales. "
            "Load VAR's tokenizer with load_tokenizer."
        )

    def shape(key: str, rank: int = 2) -> tuple[int, ...]:
        return shape_of(state, key, rank, source)

    num_positions = shape("pos_1LC", rank=3)[1]
    if num_positions != layout.num_tokens:
        raise ConfigError(
            f"{source}: got {num_positions} positions; the tokenizer's scales {layout} have "
            f"{layout.num_tokens}. Load the tokenizer with the patch_nums of this transformer "
            "(var_d36: 1, 2, 3, 4, 6, 9, 13, 18, 24, 32)."
        )
    depth = count_of(state, r"blocks\.(\d+)\.attn\.mat_qkv\.weight")
    width = shape("word_embed.weight")[0]
    has_scales = "blocks.0.attn.scale_mul_1H11" in state
    shown = shape("blocks.0.attn.scale_mul_1H11", rank=4)[1] if has_scales else None
    if num_heads is not None and shown not in (None, num_heads):
        raise ConfigError(f"{source}: got num_heads {num_heads}; the weights have {shown} heads.")
    rows, columns = layout.grids[-1]
    stride = tokenizer.stride
    return GeneratorConfig.for_tokenizer(
        tokenizer,
        (rows * stride, columns * stride),
        num_classes=shape("class_emb.weight")[0] - 1,
        depth=depth,
        width=width,
        num_heads=num_heads or shown or depth,
        mlp_ratio=shape("blocks.0.ffn.fc1.weight")[0] / width,
        shared_adaln="shared_ada_lin.1.weight" in state,
        l2_attention=has_scales,
        label_drop=label_drop,
    )
