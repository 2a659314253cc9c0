"""The networks of VQGAN under the names of the projects that continued it.

Esser et al. 2021, arXiv 2012.09841. taming-transformers, LlamaGen and others train the same
encoder, decoder and codebook under different keys. A ``VQGANKeys`` holds the differences.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from smalto.autoencoders import CNNAutoencoderConfig
from smalto.core.config import parse_config
from smalto.core.errors import ConfigError, InputError, describe
from smalto.core.weight_files import State, weight_problem
from smalto.interop.state_dicts import check_tensors, compare, shape_of
from smalto.tokenizer import ImageTokenizer, TokenizerConfig

_FUSED = "qkv"  # our attention has one convolution for queries, keys and values
_PROJECTIONS = tuple(f"quantize.{name}.weight" for name in ("project_in", "project_out", "proj"))


@dataclass(frozen=True)
class VQGANKeys:
    """The keys of a project.

    Attributes:
        project: its name.
        table: (pattern of our key, its replacement), tried in this order, all that match.
        up_is_reversed: whether the decoder's levels are numbered from the lowest resolution.
        settings: of the quantizer, which the weights do not show.
        unused: keys that the project's code does not need in inference.
        attention_is_linear: whether attention has linear layers, not 1x1 convolutions.
        norms: norms of the autoencoder that the project's network has.
        quantizer: the kind of the quantizer.
    """

    project: str
    table: tuple[tuple[str, str], ...]
    up_is_reversed: bool
    settings: Mapping[str, object]
    unused: tuple[str, ...] = ()
    attention_is_linear: bool = False
    norms: tuple[str, ...] = ("group",)
    quantizer: Literal["vector", "logit"] = "vector"

    def of(self, key: str, num_levels: int) -> str:
        """Return the project's key for one of ours, with q, k or v in the place of qkv."""
        if self.up_is_reversed and (match := re.match(r"decoder\.up\.(\d+)\.", key)):
            level = num_levels - 1 - int(match[1])
            key = f"decoder.up.{level}.{key[match.end() :]}"
        for pattern, replacement in self.table:
            key = re.sub(pattern, replacement, key)
        return key

    def shape_of(self, key: str, shape: torch.Size) -> torch.Size:
        """Return the shape of the project's tensor, or of each of three, for one of ours."""
        if key in _PROJECTIONS:  # 1x1 convolutions there
            return torch.Size((*shape, 1, 1))
        rows = shape[0] // (3 if f".{_FUSED}." in key else 1)
        is_attention = re.search(rf"\.attn(_1)?\..*({_FUSED}|proj_out)\.weight$", key)
        if self.attention_is_linear and is_attention:
            return torch.Size((rows, shape[1]))
        return torch.Size((rows, *shape[1:]))

    def all_of(self, key: str, num_levels: int) -> list[str]:
        """Return the project's keys for one of ours: three for a fused convolution."""
        if f".{_FUSED}." not in key:
            return [self.of(key, num_levels)]
        return [self.of(key.replace(f".{_FUSED}.", f".{part}."), num_levels) for part in _FUSED]


@torch.inference_mode(False)  # what is loaded inside such a block can be trained later
def tokenizer_of(
    state: State, keys: VQGANKeys, source: str, beta: float, norm_groups: int = 32
) -> ImageTokenizer:
    """Return the tokenizer with a project's weights, in evaluation mode on the CPU.

    Args:
        state: all weights of the tokenizer, and nothing else.
        keys: of the project.
        source: where the weights come from, for errors.
        beta: weight of the commitment loss, which matters in training only.
        norm_groups: number of groups of the normalization, which the weights do not show.

    Raises:
        ConfigError: a key is missing, unexpected or of another shape, or weights are not finite.
    """
    state = {key: tensor for key, tensor in state.items() if key not in keys.unused}
    check_tensors(state, keys.of("encoder.conv_in.weight", 1), source)
    tokenizer, names = fitting_tokenizer(state, keys, source, beta, norm_groups)
    if problem := weight_problem(state):
        raise ConfigError(f"{source}: {problem}. Use another checkpoint.")
    own = tokenizer.state_dict()
    tokenizer.load_state_dict(
        {
            key: torch.cat([state[name].detach() for name in theirs]).view(own[key].shape).clone()
            for key, theirs in names.items()
        },
        assign=True,
    )
    return tokenizer.eval()


def fitting_tokenizer(
    state: State, keys: VQGANKeys, source: str, beta: float, norm_groups: int = 32
) -> tuple[ImageTokenizer, dict[str, list[str]]]:
    """Return a tokenizer without weights whose keys and shapes fit, and the names of its weights.

    Only keys and shapes of ``state`` are read: its tensors may be on the meta device.

    Raises:
        ConfigError: a key is missing, unexpected or of another shape.
    """
    config = _read_config(state, keys, source, beta, norm_groups)
    with torch.device("meta"):
        tokenizer = config.build()
    names = _names(tokenizer, keys)
    own = tokenizer.state_dict()
    expected = {
        name: keys.shape_of(key, own[key].shape) for key, theirs in names.items() for name in theirs
    }
    if not tokenizer.has_decoder:
        left_over = keys.of("decoder.post_quant_conv.", 1)  # of the decoder that is missing
        state = {k: t for k, t in state.items() if k in expected or not k.startswith(left_over)}
    compare(expected, state, source, f"this tokenizer of {keys.project}")
    return tokenizer, names


def state_dict_of(tokenizer: ImageTokenizer, keys: VQGANKeys) -> dict[str, Tensor]:
    """Return the weights of a tokenizer under a project's keys, copied to the CPU.

    Raises:
        InputError: it is not an ImageTokenizer.
        ConfigError: the project's code cannot hold it; the message gives the reasons.
    """
    if not isinstance(tokenizer, ImageTokenizer):
        raise InputError(
            f"got {describe(tokenizer)}; expected an ImageTokenizer. Load one with smalto.load."
        )
    tokenizer = tokenizer.folded()
    reasons = _obstacles(tokenizer, keys)
    if reasons:
        raise ConfigError(f"{keys.project} cannot hold this tokenizer: {'; '.join(reasons)}.")
    own = tokenizer.state_dict()
    state = {}
    for key, theirs in _names(tokenizer, keys).items():
        parts = own[key].detach().cpu().chunk(len(theirs))
        for name, part in zip(theirs, parts, strict=True):
            state[name] = part.reshape(keys.shape_of(key, own[key].shape)).clone()
    return state


def network_obstacles(
    autoencoder: CNNAutoencoderConfig, norms: tuple[str, ...] = ("group",)
) -> list[str]:
    """Return what the published networks of VQGAN, with one of these norms, do not have."""
    expected = {
        "norm": norms,
        "norm_groups": (32,),
        "shortcuts": (False,),
        "patch": (1,),
        "local_statistics": (0,),
        "video_frames": (None,),
        "encoder_only": (False,),
    }
    return [
        f"got autoencoder.{name} {getattr(autoencoder, name)!r}; expected "
        f"{' or '.join(map(repr, values))}"
        for name, values in expected.items()
        if getattr(autoencoder, name) not in values
    ]


def _obstacles(tokenizer: ImageTokenizer, keys: VQGANKeys) -> list[str]:
    """Return why a project's code cannot hold a tokenizer."""
    autoencoder = getattr(tokenizer.config, "autoencoder", None)
    quantizer = getattr(tokenizer.config, "quantizer", None)
    if (
        not isinstance(autoencoder, CNNAutoencoderConfig)
        or quantizer is None
        or quantizer.kind != keys.quantizer
    ):
        kinds = [getattr(part, "kind", "simple") for part in (autoencoder, quantizer)]
        return [
            f"got autoencoder.kind {kinds[0]!r} and quantizer.kind {kinds[1]!r}; "
            f'expected "cnn" and "{keys.quantizer}"'
        ]
    reasons = network_obstacles(autoencoder, keys.norms)
    is_projected = quantizer.code_dim is not None
    if is_projected == bool(autoencoder.quant_conv_kernel):
        reasons.append(
            "expected either quant_conv_kernel or quantizer.code_dim, which become its quant_conv"
        )
    for name, value in keys.settings.items():
        if getattr(quantizer, name) != value:
            reasons.append(f"got quantizer.{name} {getattr(quantizer, name)!r}; expected {value!r}")
    return reasons


def _names(tokenizer: ImageTokenizer, keys: VQGANKeys) -> dict[str, list[str]]:
    """Return the project's keys for each of ours that it has."""
    config = tokenizer.config
    assert isinstance(config, TokenizerConfig)
    assert isinstance(config.autoencoder, CNNAutoencoderConfig)
    num_levels = len(config.autoencoder.ch_mult)
    return {
        key: keys.all_of(key, num_levels)
        for key in tokenizer.state_dict()
        if not key.startswith("quantize.embedding.ema_")  # needed in training only
    }


def _read_config(
    state: State, keys: VQGANKeys, source: str, beta: float, norm_groups: int
) -> TokenizerConfig:
    """Return the settings of a tokenizer from the keys and shapes of its weights."""
    num_levels = 0
    while keys.of(f"encoder.down.{num_levels}.block.0.conv1.weight", 1) in state:
        num_levels += 1

    def has(key: str) -> bool:
        return keys.of(key, num_levels) in state

    def shape(key: str, rank: int = 4) -> tuple[int, ...]:
        return shape_of(state, keys.of(key, num_levels), rank, source)

    num_res_blocks = 0
    while has(f"encoder.down.0.block.{num_res_blocks}.conv1.weight"):
        num_res_blocks += 1
    first, in_channels = shape("encoder.conv_in.weight")[:2]
    widths = [shape(f"encoder.down.{i}.block.0.conv1.weight")[0] for i in range(num_levels)]
    unit = first if not any(width % max(1, first) for width in widths) else math.gcd(*widths)
    if not widths or unit < 1 or first != widths[0]:
        raise ConfigError(
            f"{source}: got {first} channels behind the first convolution and levels of {widths}; "
            "expected the width of the first level. Convert the weights with the project's code."
        )
    attention = has("encoder.mid.attn_1.q.weight")
    levels = tuple(i for i in range(num_levels) if has(f"encoder.down.{i}.attn.0.q.weight"))
    is_usual = levels == ((num_levels - 1,) if attention else ())
    latent_dim = shape("encoder.conv_out.weight")[0]
    codebook_size, code_dim = shape("quantize.embedding.weight", rank=2)
    loss_settings = {"beta": beta} if keys.quantizer == "vector" else {}
    has_quant_conv = has("encoder.quant_conv.weight")
    kernel = shape("encoder.quant_conv.weight")[-1] if has_quant_conv else 0
    is_projected = code_dim != latent_dim
    is_video = has("encoder.video.0.conv1.weight") or has("encoder.video.0.weight")
    num_halvings = sum(has(f"encoder.video.{2 * i}.weight") for i in range(4))
    return parse_config(
        TokenizerConfig,
        {
            "autoencoder": {
                "kind": "cnn",
                "in_channels": in_channels,
                "latent_dim": latent_dim,
                "ch": unit,
                "ch_mult": tuple(width // unit for width in widths),
                "num_res_blocks": num_res_blocks,
                "attention": attention,
                "attention_levels": None if is_usual else levels,
                "quant_conv_kernel": 0 if is_projected else kernel,
                "norm": "spatial" if has("decoder.norm_out.conv_y.weight") else "group",
                "norm_groups": norm_groups,
                "video_frames": 2**num_halvings if is_video else None,
                "encoder_only": not has("decoder.conv_in.weight"),
            },
            "quantizer": {
                "kind": keys.quantizer,
                "codebook_size": codebook_size,
                "latent_dim": latent_dim,
                "code_dim": code_dim if is_projected else None,
                **loss_settings,
                **keys.settings,
            },
        },
        source,
    )
