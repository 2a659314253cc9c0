"""FoundationVision/VAR: its multi-scale tokenizer, weights and names (Tian et al. 2024, arXiv 2404.02905)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smalto.autoencoders import CNNAutoencoderConfig
from smalto.core.config import parse_config
from smalto.core.errors import ConfigError, DataError, InputError, describe
from smalto.core.layout import TokenLayout, as_grids
from smalto.core.weight_files import State, find_state, read_checkpoint
from smalto.quantizers import MultiScaleVQ, MultiScaleVQConfig
from smalto.tokenizer import ImageTokenizer, TokenizerConfig
from smalto.tokenizer.token_blocks import PatchHws

PATCH_NUMS = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
HITS = "quantize.ema_vocab_hit_SV"  # statistics of VAR's training; nothing computes with them
_MARKS = ("quantize.embedding.weight", "encoder.conv_in.weight")


def load_tokenizer(
    path_or_state_dict: str | Path | State,
    patch_nums: PatchHws = PATCH_NUMS,
    using_znorm: bool = False,
    quant_resi: float = 0.5,
    beta: float = 0.25,
) -> ImageTokenizer:
    """Read a tokenizer of VAR, such as the published ``vae_ch160v4096z32.pth``: its tokens come out exactly.

    Args:
        path_or_state_dict: a ``.pth`` or ``.safetensors`` file, or what one holds. Weights that are nested in a training checkpoint are
            found where there is one set of them.
        patch_nums, using_znorm, quant_resi, beta: what the tokenizer was built with; they leave no trace in the weights. ``ch``,
            ``vocab_size``, ``z_channels``, the sharing of φ and all else is read off keys and shapes.

    Returns:
        ImageTokenizer: in evaluation mode on the CPU, in the precision of the weights. ``.save(folder)`` keeps it.

    Raises:
        DataError: the file cannot be read without running code from it, or holds no tokenizer or several.
        ConfigError: a key is missing, too many or of another shape, or the number of scales is another.
    """
    if isinstance(path_or_state_dict, (str, Path)):
        source, checkpoint = str(path_or_state_dict), read_checkpoint(path_or_state_dict)
    else:
        source, checkpoint = "the state dict", path_or_state_dict
    if isinstance(checkpoint, Mapping) and "pos_1LC" in checkpoint:
        raise DataError(
            f"{source} is VAR's transformer, not its tokenizer: load vae_ch160v4096z32.pth, which lies beside it."
        )
    state = find_state(checkpoint, _MARKS, "tokenizer of VAR")
    _check_tensors(state, source)
    config = _read_config(state, patch_nums, using_znorm, quant_resi, beta, source)
    with torch.device("meta"):
        tokenizer = config.build()
    names = _var_names(tokenizer)
    expected = {names[key]: tensor.shape for key, tensor in tokenizer.state_dict().items()}
    expected[HITS] = torch.Size((len(config.quantizer.grids), config.quantizer.codebook_size))  # type: ignore[union-attr]
    _compare(expected, state, source)
    tokenizer.load_state_dict(
        {key: state[name].detach().clone() for key, name in names.items()}, assign=True
    )
    return tokenizer.eval()


def tokenizer_state_dict(tokenizer: ImageTokenizer) -> dict[str, Tensor]:
    """The weights under the keys and in the shapes of VAR's ``VQVAE``, as copies on the CPU. Projected codebooks are folded.

    ``quantize.ema_vocab_hit_SV`` is zero: it counts hits during VAR's own training and nothing computes with it.

    Raises:
        ConfigError: VAR cannot hold this tokenizer, and why.
    """
    if not isinstance(tokenizer, ImageTokenizer):
        raise InputError(
            f"tokenizer_state_dict takes an ImageTokenizer; got {describe(tokenizer)}."
        )
    reasons = obstacles(tokenizer)
    if reasons:
        raise ConfigError(f"VAR cannot hold this tokenizer: {'; '.join(reasons)}.")
    tokenizer = tokenizer.folded()
    quantizer = tokenizer.quantize
    assert isinstance(quantizer, MultiScaleVQ)
    own, names = tokenizer.state_dict(), _var_names(tokenizer)
    state = {name: own[key].detach().cpu().clone() for key, name in names.items()}
    state[HITS] = torch.zeros(len(quantizer.scales), quantizer.codebook_size)
    return state


def obstacles(tokenizer: ImageTokenizer) -> list[str]:
    """Why VAR's code cannot hold a tokenizer, whatever values it is built with; empty where it can."""
    config = tokenizer.config
    autoencoder, quantizer = (
        getattr(config, "autoencoder", None),
        getattr(config, "quantizer", None),
    )
    if not isinstance(autoencoder, CNNAutoencoderConfig) or not isinstance(
        quantizer, MultiScaleVQConfig
    ):
        kinds = [getattr(part, "kind", "simple") for part in (autoencoder, quantizer)]
        return [
            f'it needs autoencoder.kind "cnn" and quantizer.kind "multiscale"; this one has {kinds[0]!r} and {kinds[1]!r}'
        ]
    reasons = []
    if quantizer.scale.code_dim is not None:
        reasons.append(
            f'it knows no projections around the codebook (quantizer.scale.code_dim is {quantizer.scale.code_dim}, not "none")'
        )
    if any(h != w for h, w in quantizer.grids):
        reasons.append(f"its scales are square (quantizer.scales are {_shown(quantizer.grids)})")
    if len(quantizer.scales) == 1:
        reasons.append("it divides by zero with one scale")
    return reasons


def constructor_values(tokenizer: ImageTokenizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """What VAR's ``VQVAE(...)`` must be given to load ``tokenizer_state_dict(tokenizer)``, where that differs from its defaults.

    Returns:
        Arguments of ``VQVAE`` (the published tokenizer's are ``{"ch": 160}``); and values that its code fixes in ``ddconfig``
        (models/vqvae.py) and that must be edited there.
    """
    config = tokenizer.config
    assert isinstance(config, TokenizerConfig)
    autoencoder, quantizer = config.autoencoder, config.quantizer
    assert isinstance(autoencoder, CNNAutoencoderConfig)
    assert isinstance(quantizer, MultiScaleVQConfig)
    num_phis = quantizer.num_phis or 0
    arguments = {
        "vocab_size": (quantizer.codebook_size, 4096),
        "z_channels": (quantizer.latent_dim, 32),
        "ch": (autoencoder.ch, 128),
        "dropout": (autoencoder.dropout, 0.0),
        "beta": (quantizer.scale.beta, 0.25),
        "using_znorm": (quantizer.scale.metric == "cosine", False),
        "quant_conv_ks": (autoencoder.quant_conv_kernel, 3),
        "quant_resi": (quantizer.phi_ratio, 0.5),
        "share_quant_resi": (num_phis, 4),
        "v_patch_nums": (tuple(h for h, _ in quantizer.grids), PATCH_NUMS),
    }
    fixed = {
        "in_channels": (autoencoder.in_channels, 3),
        "ch_mult": (autoencoder.ch_mult, (1, 1, 2, 2, 4)),
        "num_res_blocks": (autoencoder.num_res_blocks, 2),
        "using_sa": (autoencoder.attention, True),
        "using_mid_sa": (autoencoder.attention, True),
    }
    return _differing(arguments), _differing(fixed)


def _differing(values: dict[str, tuple[Any, Any]]) -> dict[str, Any]:
    return {name: value for name, (value, default) in values.items() if value != default}


def _var_names(tokenizer: ImageTokenizer) -> dict[str, str]:
    """Our key -> VAR's, for everything that VAR has."""
    quantizer = tokenizer.quantize
    assert isinstance(quantizer, MultiScaleVQ)
    config = tokenizer.config
    assert isinstance(config, TokenizerConfig)
    assert isinstance(config.quantizer, MultiScaleVQConfig)
    phis = {None: r"quantize.quant_resi.\1", 1: "quantize.quant_resi.qresi"}
    patterns = [
        (r"encoder\.quant_conv", "quant_conv"),
        (r"decoder\.post_quant_conv", "post_quant_conv"),
        (r"quantize\.scale\.embedding", "quantize.embedding"),
        (
            r"quantize\.phis\.(\d+)",
            phis.get(config.quantizer.num_phis, r"quantize.quant_resi.qresi_ls.\1"),
        ),
    ]
    names = {}
    for key in tokenizer.state_dict():
        if not key.startswith(
            "quantize.scale.embedding.ema_"
        ):  # moving averages are of training only
            names[key] = key
            for pattern, replacement in patterns:
                names[key] = re.sub(rf"^{pattern}\.", replacement + ".", names[key])
    return names


def _read_config(
    state: State,
    patch_nums: PatchHws,
    using_znorm: bool,
    quant_resi: float,
    beta: float,
    source: str,
) -> TokenizerConfig:
    """What the keys and shapes of a state say about the tokenizer that it is of."""

    def shape(key: str, rank: int = 4) -> tuple[int, ...]:
        if key not in state:
            raise ConfigError(f"{source}: the key {key!r} is missing.")
        if state[key].ndim != rank:
            raise ConfigError(
                f"{source}: {key!r} is {list(state[key].shape)}, expected {rank} dimensions."
            )
        return tuple(state[key].shape)

    ch, in_channels = shape("encoder.conv_in.weight")[:2]
    levels = _count(state, r"encoder\.down\.(\d+)\.block\.0\.conv1\.weight")
    widths = [shape(f"encoder.down.{level}.block.0.conv1.weight")[0] for level in range(levels)]
    if ch < 1 or any(width % ch for width in widths):
        raise ConfigError(
            f"{source}: encoder.down.*.block.0.conv1.weight have {widths} channels, which are not multiples of ch = {ch}."
        )
    codebook_size, code_dim = shape("quantize.embedding.weight", rank=2)
    num_phis: int | None
    if any(key.startswith("quantize.quant_resi.qresi_ls.") for key in state):
        num_phis = _count(state, r"quantize\.quant_resi\.qresi_ls\.(\d+)\.weight")
    elif "quantize.quant_resi.qresi.weight" in state:
        num_phis = 1
    else:
        num_phis = None
    autoencoder = {
        "kind": "cnn",
        "in_channels": in_channels,
        "latent_dim": shape("encoder.conv_out.weight")[0],
        "ch": ch,
        "ch_mult": tuple(width // ch for width in widths),
        "num_res_blocks": _count(state, r"encoder\.down\.0\.block\.(\d+)\.conv1\.weight"),
        "attention": "encoder.mid.attn_1.qkv.weight" in state,
        "quant_conv_kernel": shape("quant_conv.weight")[-1],
    }
    if not isinstance(using_znorm, bool) or not isinstance(quant_resi, (int, float)):
        raise ConfigError(
            f"using_znorm is True or False and quant_resi a number; got {using_znorm!r} and {quant_resi!r}."
        )
    scale = {
        "codebook_size": codebook_size,
        "latent_dim": code_dim,
        "metric": "cosine" if using_znorm else "l2",
        "beta": beta,
    }
    quantizer = {
        "kind": "multiscale",
        "scales": TokenLayout(as_grids(patch_nums)).grids,
        "num_phis": num_phis,
        "phi_ratio": abs(quant_resi),
        "scale": scale,
    }
    return parse_config(
        TokenizerConfig, {"autoencoder": autoencoder, "quantizer": quantizer}, source
    )


def _count(state: State, pattern: str) -> int:
    """How many numbers, from 0 on, stand in keys of this pattern."""
    numbers = [int(match[1]) for key in state if (match := re.fullmatch(pattern, key))]
    return max(numbers, default=-1) + 1


def _check_tensors(state: State, source: str) -> None:
    """Raise ConfigError unless everything is a plain tensor of numbers, in one precision."""
    precision = state[_MARKS[1]].dtype if isinstance(state[_MARKS[1]], Tensor) else None
    for key, tensor in state.items():
        plain = isinstance(tensor, Tensor) and tensor.layout == torch.strided and not tensor.is_meta
        if (
            not plain
            or not tensor.is_floating_point()
            or (key != HITS and tensor.dtype != precision)
        ):
            wanted = f"numbers in the precision of {_MARKS[1]!r}, {precision}"
            raise ConfigError(
                f"{source}: {key!r} is {describe(tensor)}, expected a plain tensor of {wanted}."
            )
        if not bool(tensor.isfinite().all()):
            raise ConfigError(
                f"{source}: {key!r} holds NaN or infinite numbers. Take an earlier checkpoint."
            )


def _compare(expected: Mapping[str, torch.Size], state: State, source: str) -> None:
    hits = state.get(HITS)
    if hits is not None and hits.ndim == 2 and len(hits) != expected[HITS][0]:
        raise ConfigError(
            f"{source}: {HITS!r} is {list(hits.shape)}, of {len(hits)} scales, and patch_nums has {expected[HITS][0]} "
            f"(expected {list(expected[HITS])}). Pass the tokenizer's own patch_nums."
        )
    problems = [
        f"{key!r} is {list(state[key].shape)}, expected {list(size)}"
        for key, size in expected.items()
        if _differs(state, key, size)
    ]
    problems += [
        f"{key!r} is missing (expected {list(size)})"
        for key, size in expected.items()
        if key not in state
    ]
    problems += [
        f"{key!r} {list(tensor.shape)} is not expected"
        for key, tensor in state.items()
        if key not in expected
    ]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ConfigError(
            f"{source} is not this tokenizer of VAR: {'; '.join(problems[:5])}{more}."
        )


def _differs(state: State, key: str, size: torch.Size) -> bool:
    return key in state and state[key].shape != size


def _shown(grids: tuple[tuple[int, int], ...]) -> str:
    return ", ".join(f"{h}x{w}" for h, w in grids)
