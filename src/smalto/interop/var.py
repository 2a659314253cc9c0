"""FoundationVision/VAR: weights, names and settings of its multi-scale tokenizer; its transformer.

Paper: Tian et al. 2024, arXiv 2404.02905. Code: https://github.com/FoundationVision/VAR, read at
commit 78b9539; defaults and file names below are from there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from smalto.autoencoders import CNNAutoencoderConfig
from smalto.core.config import parse_config
from smalto.core.errors import ConfigError, DataError, InputError, describe
from smalto.core.layout import TokenLayout, as_grids
from smalto.core.weight_files import State, find_state, weight_problem
from smalto.interop.state_dicts import (
    check_tensors,
    compare,
    count_of,
    open_checkpoint,
    shape_of,
)
from smalto.interop.var_generator import generator_state_dict as generator_state_dict
from smalto.interop.var_generator import load_generator as load_generator
from smalto.interop.vqgan import network_obstacles
from smalto.quantizers import MultiScaleVQ, MultiScaleVQConfig
from smalto.tokenizer import ImageTokenizer, TokenizerConfig
from smalto.tokenizer.token_blocks import PatchHws

PATCH_NUMS = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
MIN_QUANT_RESI = 1e-6  # at or below it VAR builds Identity in the place of φ, without weights
HITS = "quantize.ema_vocab_hit_SV"  # statistics of VAR's training, unused in inference
VARValue = bool | int | float | tuple[int, ...]  # an argument of VAR's code
MARKS = ("quantize.embedding.weight", "encoder.conv_in.weight")


@torch.inference_mode(False)  # what is loaded inside such a block can be trained later
def load_tokenizer(
    path_or_state_dict: str | Path | State,
    patch_nums: PatchHws = PATCH_NUMS,
    using_znorm: bool = False,
    quant_resi: float = 0.5,
    beta: float = 0.25,
) -> ImageTokenizer:
    """Read a tokenizer of VAR, such as the published ``vae_ch160v4096z32.pth``, with equal tokens.

    Args:
        path_or_state_dict: a ``.pth`` or ``.safetensors`` file, or its content. Weights nested in
            a training checkpoint are found if there is exactly one set of them.
        patch_nums, using_znorm, quant_resi, beta: arguments with which the tokenizer was built.
            The weights do not contain them. ``ch``, ``vocab_size``, ``z_channels``, the sharing of
            φ and all other settings are read from keys and shapes. With ``abs(quant_resi)`` of at
            most 1e-6 the tokenizer has no φ, as in VAR's code.

    Returns:
        ImageTokenizer: in evaluation mode on the CPU, in the dtype of the weights. Its
        ``save(folder)`` writes it as a tokenizer of smalto.

    Raises:
        DataError: the file cannot be read without running code from it, or holds no tokenizer, or
            several of them.
        ConfigError: a key is missing, unexpected or of another shape, or the number of scales
            differs from that of ``patch_nums``.
    """
    checkpoint, source = open_checkpoint(path_or_state_dict)
    if isinstance(checkpoint, Mapping) and "pos_1LC" in checkpoint:
        raise DataError(
            f"{source} is VAR's transformer; expected its tokenizer. Load vae_ch160v4096z32.pth, "
            "which was published in the same place, and then the transformer with load_generator "
            "(`smalto convert --to smalto --tokenizer TOKENIZER`)."
        )
    state = find_state(checkpoint, MARKS, "tokenizer of VAR").state
    check_tensors(state, MARKS[1], source, exempt=(HITS,))
    config = _read_config(state, patch_nums, using_znorm, quant_resi, beta, source)
    with torch.device("meta"):
        tokenizer = config.build()
    names = var_names(tokenizer)
    expected = {names[key]: tensor.shape for key, tensor in tokenizer.state_dict().items()}
    quantizer = config.quantizer
    assert isinstance(quantizer, MultiScaleVQConfig)
    expected[HITS] = torch.Size((len(quantizer.grids), quantizer.codebook_size))
    _check_hits(expected, state, source)
    compare(expected, state, source, "this tokenizer of VAR")
    if problem := weight_problem(state):
        raise ConfigError(f"{source}: {problem}. Use another checkpoint.")
    tokenizer.load_state_dict(
        {key: state[name].detach().clone() for key, name in names.items()}, assign=True
    )
    return tokenizer.eval()


def tokenizer_state_dict(tokenizer: ImageTokenizer) -> dict[str, Tensor]:
    """Return the weights under the keys and in the shapes of VAR's ``VQVAE``, copied to the CPU.

    Projected codebooks are folded. ``quantize.ema_vocab_hit_SV`` is zero: it counts hits during
    VAR's own training and is unused otherwise.

    Raises:
        ConfigError: VAR's code cannot hold this tokenizer; the message gives the reasons.
    """
    if not isinstance(tokenizer, ImageTokenizer):
        raise InputError(
            f"got {describe(tokenizer)}; expected an ImageTokenizer. Load one with smalto.load."
        )
    reasons = obstacles(tokenizer)
    if reasons:
        raise ConfigError(f"VAR cannot hold this tokenizer: {'; '.join(reasons)}.")
    tokenizer = tokenizer.folded()
    quantizer = tokenizer.quantize
    assert isinstance(quantizer, MultiScaleVQ)
    own = tokenizer.state_dict()
    names = var_names(tokenizer)
    state = {name: own[key].detach().cpu().clone() for key, name in names.items()}
    state[HITS] = torch.zeros(len(quantizer.scales), quantizer.codebook_size)
    return state


def obstacles(tokenizer: ImageTokenizer) -> list[str]:
    """Return the reasons why VAR's code cannot hold a tokenizer, whatever arguments it is given."""
    config = tokenizer.config
    autoencoder = getattr(config, "autoencoder", None)
    quantizer = getattr(config, "quantizer", None)
    if not isinstance(autoencoder, CNNAutoencoderConfig) or not isinstance(
        quantizer, MultiScaleVQConfig
    ):
        kinds = [getattr(part, "kind", "simple") for part in (autoencoder, quantizer)]
        return [
            f"got autoencoder.kind {kinds[0]!r} and quantizer.kind {kinds[1]!r}; "
            'expected "cnn" and "multiscale"'
        ]
    reasons = network_obstacles(autoencoder)
    if autoencoder.attention_levels not in (None, (), (len(autoencoder.ch_mult) - 1,)):
        reasons.append(
            f"got autoencoder.attention_levels {autoencoder.attention_levels}; expected the lowest "
            "resolution at most"
        )
    if not autoencoder.quant_conv_kernel:
        reasons.append("got autoencoder.quant_conv_kernel 0; expected 1 or 3")
    if quantizer.scale.code_dim is not None:
        reasons.append(
            f"got quantizer.scale.code_dim {quantizer.scale.code_dim}; expected None, because VAR "
            "has no projections around the codebook"
        )
    if any(h != w for h, w in quantizer.grids):
        reasons.append(f"got quantizer.scales {_shown(quantizer.grids)}; expected square scales")
    if len(quantizer.scales) == 1:
        reasons.append(
            "got one scale; expected at least two, because VAR divides by their number - 1"
        )
    if 0 < quantizer.phi_ratio <= MIN_QUANT_RESI:
        reasons.append(
            f"got quantizer.phi_ratio {quantizer.phi_ratio:g}; expected 0 or a value above "
            f"{MIN_QUANT_RESI:g}, because VAR builds Identity for values up to that and does not "
            "load the φ weights. Train with phi_ratio = 0 or a larger one"
        )
    return reasons


@dataclass(frozen=True)
class VARSettings:
    """Values that VAR's code needs to load a tokenizer, by the place where each one is set.

    Attributes:
        vocab_size: codes; ``V`` of ``build_vae_var`` (models/__init__.py).
        z_channels: channels of the latents; ``Cvae`` of ``build_vae_var``.
        ch: width at full resolution; ``ch`` of ``build_vae_var``.
        share_quant_resi: number of φ, 0 for one per scale; an argument of ``build_vae_var``.
        patch_nums: side of each scale; ``patch_nums`` of ``build_vae_var``, ``--pn`` of train.py.
        patch_size: pixels per latent position; ``--patch_size`` of train.py.
        vqvae: arguments of ``VQVAE`` that differ from its defaults and that ``build_vae_var`` does
            not pass to it. They must be added to the call in models/__init__.py.
        ddconfig: values that differ from those fixed in ``ddconfig`` (models/vqvae.py).
    """

    vocab_size: int
    z_channels: int
    ch: int
    share_quant_resi: int
    patch_nums: tuple[int, ...]
    patch_size: int
    vqvae: dict[str, VARValue]
    ddconfig: dict[str, VARValue]

    @property
    def are_published(self) -> bool:
        """Whether ``build_vae_var`` and train.py of VAR have these values by default."""
        return self == VARSettings(4096, 32, 160, 4, PATCH_NUMS, 16, {}, {})


def var_settings(tokenizer: ImageTokenizer) -> VARSettings:
    """Return what VAR's code needs to load ``tokenizer_state_dict(tokenizer)``."""
    config = tokenizer.config
    assert isinstance(config, TokenizerConfig)
    autoencoder = config.autoencoder
    quantizer = config.quantizer
    assert isinstance(autoencoder, CNNAutoencoderConfig)
    assert isinstance(quantizer, MultiScaleVQConfig)
    vqvae: dict[str, tuple[VARValue, VARValue]] = {
        "dropout": (autoencoder.dropout, 0.0),
        "beta": (quantizer.scale.beta, 0.25),
        "using_znorm": (quantizer.scale.metric == "cosine", False),
        "quant_conv_ks": (autoencoder.quant_conv_kernel, 3),
        "quant_resi": (quantizer.phi_ratio, 0.5),
    }
    ddconfig: dict[str, tuple[VARValue, VARValue]] = {
        "in_channels": (autoencoder.in_channels, 3),
        "ch_mult": (autoencoder.ch_mult, (1, 1, 2, 2, 4)),
        "num_res_blocks": (autoencoder.num_res_blocks, 2),
        "using_sa": (autoencoder.has_attention(len(autoencoder.ch_mult) - 1), True),
        "using_mid_sa": (autoencoder.attention, True),
    }
    return VARSettings(
        vocab_size=quantizer.codebook_size,
        z_channels=quantizer.latent_dim,
        ch=autoencoder.ch,
        share_quant_resi=quantizer.num_phis or 0,
        patch_nums=tuple(h for h, _ in quantizer.grids),
        patch_size=autoencoder.stride,
        vqvae=_differing(vqvae),
        ddconfig=_differing(ddconfig),
    )


def constructor_values(
    tokenizer: ImageTokenizer,
) -> tuple[dict[str, VARValue], dict[str, VARValue]]:
    """Return the values for code that builds VAR's ``VQVAE`` itself, without ``build_vae_var``.

    Returns:
        Arguments of ``VQVAE`` that differ from its defaults (for the published tokenizer
        ``{"ch": 160}``), and the values that must be edited in ``ddconfig`` (models/vqvae.py).
    """
    settings = var_settings(tokenizer)
    arguments: dict[str, tuple[VARValue, VARValue]] = {
        "vocab_size": (settings.vocab_size, 4096),
        "z_channels": (settings.z_channels, 32),
        "ch": (settings.ch, 128),
        "share_quant_resi": (settings.share_quant_resi, 4),
        "v_patch_nums": (settings.patch_nums, PATCH_NUMS),
    }
    return _differing(arguments) | settings.vqvae, settings.ddconfig


def _differing(values: dict[str, tuple[VARValue, VARValue]]) -> dict[str, VARValue]:
    return {name: value for name, (value, default) in values.items() if value != default}


def var_names(tokenizer: ImageTokenizer) -> dict[str, str]:
    """Return the key of VAR for each key of ours that VAR has."""
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
        # The moving averages of codes are needed in training only, and VAR does not have them.
        if not key.startswith("quantize.scale.embedding.ema_"):
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
    """Return the settings of a tokenizer from the keys and shapes of its weights."""

    def shape(key: str, rank: int = 4) -> tuple[int, ...]:
        return shape_of(state, key, rank, source)

    ch, in_channels = shape("encoder.conv_in.weight")[:2]
    levels = count_of(state, r"encoder\.down\.(\d+)\.block\.0\.conv1\.weight")
    widths = [shape(f"encoder.down.{level}.block.0.conv1.weight")[0] for level in range(levels)]
    if ch < 1 or any(width % ch for width in widths):
        raise ConfigError(
            f"{source}: got {widths} channels in encoder.down.*.block.0.conv1.weight; "
            f"expected multiples of ch = {ch}."
        )
    codebook_size, code_dim = shape("quantize.embedding.weight", rank=2)
    num_phis: int | None
    if any(key.startswith("quantize.quant_resi.qresi_ls.") for key in state):
        num_phis = count_of(state, r"quantize\.quant_resi\.qresi_ls\.(\d+)\.weight")
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
        "num_res_blocks": count_of(state, r"encoder\.down\.0\.block\.(\d+)\.conv1\.weight"),
        "attention": "encoder.mid.attn_1.qkv.weight" in state,
        "quant_conv_kernel": shape("quant_conv.weight")[-1],
    }
    if not isinstance(using_znorm, bool) or not isinstance(quant_resi, (int, float)):
        raise ConfigError(
            f"got using_znorm {using_znorm!r} and quant_resi {quant_resi!r}; "
            "expected True or False, and a number."
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
        "phi_ratio": 0.0 if abs(quant_resi) <= MIN_QUANT_RESI else abs(quant_resi),
        "scale": scale,
    }
    return parse_config(
        TokenizerConfig, {"autoencoder": autoencoder, "quantizer": quantizer}, source
    )


def _check_hits(expected: Mapping[str, torch.Size], state: State, source: str) -> None:
    """Raise ConfigError if the statistics of hits show another number of scales."""
    hits = state.get(HITS)
    if hits is not None and hits.ndim == 2 and len(hits) != expected[HITS][0]:
        raise ConfigError(
            f"{source}: {HITS!r} is {list(hits.shape)}, of {len(hits)} scales, and patch_nums has "
            f"{expected[HITS][0]} (expected {list(expected[HITS])}). Pass the patch_nums with "
            "which the tokenizer was trained."
        )


def _shown(grids: tuple[tuple[int, int], ...]) -> str:
    return ", ".join(f"{h}x{w}" for h, w in grids)
