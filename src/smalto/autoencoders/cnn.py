"""Convolutional autoencoder of VQGAN (Esser et al. 2021, arXiv 2012.09841), in VAR's form.

VAR: Tian et al. 2024, arXiv 2404.02905.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from smalto.autoencoders.layers import (
    NUM_GROUPS,
    AttentionBlock,
    Downsample,
    FromPatches,
    GroupNorm,
    Norm,
    ResBlock,
    RMSNorm,
    SpatialNorm,
    ToPatches,
    Upsample,
    check_layer_initialization,
    conv3x3,
)
from smalto.autoencoders.locality import input_range
from smalto.autoencoders.video import video_decoder, video_encoder
from smalto.core.config import Config
from smalto.core.errors import ConfigError


def _is(default: object) -> Callable[[object], bool]:
    """Return a test for the default value.

    Settings that are newer than saved files are written only if they differ from it, so that
    configurations and fingerprints stay the same.
    """
    return lambda value: value == default


class CNNAutoencoderConfig(Config):
    """Settings of the convolutional autoencoder: residual blocks at halving resolutions.

    Images [B, in_channels, H, W] <-> latents [B, latent_dim, H/stride, W/stride], with
    stride = patch · 2^(levels - 1). The defaults are VQGAN's. With ``norm = "rms"`` and without
    attention the autoencoder is local: each token depends on a bounded part of the image.
    """

    kind: Literal["cnn"] = "cnn"
    in_channels: int = Field(3, ge=1, le=4096, description="channels of the images")
    latent_dim: int = Field(32, ge=1, le=65536, description="channels of the latents (C)")
    ch: int = Field(
        128,
        ge=1,
        le=8192,
        description="unit of the widths; for norm group a multiple of norm_groups (32)",
    )
    ch_mult: tuple[int, ...] = Field(
        (1, 1, 2, 2, 4),
        min_length=1,
        max_length=8,
        description="width of each level as a multiple of ch; each further level halves the map",
    )
    num_res_blocks: int = Field(
        2, ge=1, le=64, description="residual blocks per level; the decoder has one more"
    )
    attention: bool = Field(
        True,
        description="attention in the middle and at the lowest resolution; its time grows with the "
        "square of the number of positions",
    )
    attention_levels: tuple[int, ...] | None = Field(
        None,
        max_length=8,
        description="with attention: the levels that have it besides the middle, counted from 0 at "
        "the highest resolution; default: the lowest resolution",
        exclude_if=_is(None),
    )
    quant_conv_kernel: Literal[0, 1, 3] = Field(
        3,
        description="kernel size of the convolutions on both sides of the quantizer; 0: without "
        "them",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout inside residual blocks")
    norm: Literal["group", "rms", "spatial"] = Field(
        "group",
        description="group: over groups of channels and the whole map, as in published weights; "
        "rms: over the channels at each position; spatial: group, and in the decoder its scale and "
        "shift follow from the quantized latents (MoVQ)",
        exclude_if=_is("group"),
    )
    norm_groups: int = Field(
        NUM_GROUPS,
        ge=1,
        le=8192,
        description="groups of channels, for norm group",
        exclude_if=_is(NUM_GROUPS),
    )
    shortcuts: bool = Field(
        False,
        description="parameter-free shortcuts around down- and upsampling (DC-AE); the width "
        "changes there",
        exclude_if=_is(False),
    )
    patch: Literal[1, 2, 4] = Field(
        1,
        description="side of the patches of pixels that become channels first: a quarter or a "
        "sixteenth of the positions",
        exclude_if=_is(1),
    )
    local_statistics: int = Field(
        0,
        ge=0,
        le=2**16,
        description="for norm group: compute its statistics over windows of so many latent "
        "positions a side (TLC), not over the whole map; changes the tokens. 0: off",
        exclude_if=_is(0),
    )

    video_frames: int | None = Field(
        None,
        ge=1,
        le=16,
        description="layers of a video tokenizer (Emu3) that see one image as so many equal "
        "frames; a power of two",
        exclude_if=_is(None),
    )
    encoder_only: bool = Field(
        False,
        description="for weights that were published without a decoder: images become tokens, "
        "tokens do not become images",
        exclude_if=_is(False),
    )

    @model_validator(mode="after")
    def _widths_fit(self) -> CNNAutoencoderConfig:
        if min(self.ch_mult) < 1 or max(self.ch_mult) > 1024:
            raise ValueError(f"ch_mult must be integers from 1 to 1024; got {self.ch_mult}.")
        if self.norm != "group" and self.norm_groups != NUM_GROUPS:
            raise ValueError(
                f'norm_groups is for norm "group"; got {self.norm_groups} and norm {self.norm!r}. '
                f"Set norm_groups to {NUM_GROUPS}."
            )
        if self.norm != "rms" and self.ch % self.norm_groups:
            raise ValueError(
                f"ch must be a multiple of {self.norm_groups}, the number of normalization groups; "
                f"got {self.ch}."
            )
        if self.norm != "group" and self.local_statistics:
            raise ValueError(
                f'local_statistics is for norm "group"; got norm {self.norm!r}, which looks at one '
                "position at a time. Set local_statistics to 0."
            )
        if self.video_frames is not None and self.video_frames.bit_count() != 1:
            raise ValueError(
                f"video_frames must be a power of two from 1 to 16; got {self.video_frames}."
            )
        levels = self.attention_levels
        if levels is not None and (
            not self.attention
            or list(levels) != sorted(set(levels))
            or not set(levels) <= set(range(len(self.ch_mult)))
        ):
            raise ValueError(
                "attention_levels must be increasing levels from 0 to "
                f"{len(self.ch_mult) - 1}, with attention = true; got {levels} and attention "
                f"{self.attention}."
            )
        for width, lower in itertools.pairwise(self.ch_mult):
            if self.shortcuts and 4 * width % lower:
                raise ValueError(
                    "with shortcuts the width of each level must divide four times that of the "
                    f"level before; got ch_mult {self.ch_mult}."
                )
        return self

    @property
    def stride(self) -> int:
        """Pixels per latent position, along height and width alike."""
        return self.patch * 2 ** (len(self.ch_mult) - 1)

    @property
    def widths(self) -> list[int]:
        """Channels of each level, from the highest to the lowest resolution."""
        return [self.ch * m for m in self.ch_mult]

    def has_attention(self, level: int) -> bool:
        """Return whether attention follows each residual block of a level."""
        if self.attention_levels is not None:
            return level in self.attention_levels
        return self.attention and level == len(self.ch_mult) - 1

    def norm_of(self, level: int, in_decoder: bool = False) -> Norm:
        """Return the normalization of a level, which builds a layer for some width."""
        if self.norm == "rms":
            return RMSNorm
        if self.norm == "spatial" and in_decoder:
            return partial(SpatialNorm, latent_dim=self.latent_dim)
        positions = self.stride // self.patch >> level  # of the level, per latent position
        window = self.local_statistics * positions
        return partial(GroupNorm, window=window, groups=self.norm_groups)

    def build_encoder(self) -> CNNEncoder:
        """Return a new encoder.

        Raises:
            RunError: this process does not initialize layers; see ``check_layer_initialization``.
        """
        check_layer_initialization()
        return CNNEncoder(self)

    def build_decoder(self) -> CNNDecoder | NoDecoder:
        """Return a new decoder.

        Raises:
            RunError: this process does not initialize layers; see ``check_layer_initialization``.
        """
        check_layer_initialization()
        return NoDecoder() if self.encoder_only else CNNDecoder(self)


class CheckpointedNetwork(nn.Module, ABC):
    """Sequential network whose modules have the names that published checkpoints use.

    Attributes:
        gradient_checkpointing: whether training keeps only the input of each residual or attention
            block and recomputes its activations in the backward pass.
    """

    gradient_checkpointing = False

    @abstractmethod
    def steps(self) -> Iterator[nn.Module]:
        """Yield the modules in the order in which they run."""

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)

    def run(self, x: Tensor, *condition: Tensor) -> Tensor:
        """Run the steps; blocks and norms receive ``condition`` too."""
        saving = self.gradient_checkpointing and torch.is_grad_enabled()
        for step in self.steps():
            is_block = isinstance(step, (ResBlock, AttentionBlock))
            of_step = condition if is_block or isinstance(step, SpatialNorm) else ()
            x = (
                checkpoint(step, x, *of_step, use_reentrant=False)
                if saving and is_block
                else step(x, *of_step)
            )
        return x

    def input_range(self, first: int, last: int) -> tuple[int, int]:
        for step in reversed(list(self.steps())):
            first, last = input_range(step, first, last)
        return first, last


def _level(
    widths: list[int], config: CNNAutoencoderConfig, level: int, in_decoder: bool = False
) -> nn.ModuleDict:
    """Return the residual blocks of one level, and the attention that follows each, if any."""
    norm = config.norm_of(level, in_decoder)
    has_attention = config.has_attention(level)
    blocks = [ResBlock(a, b, config.dropout, norm) for a, b in itertools.pairwise(widths)]
    attention = [AttentionBlock(width, norm) for width in widths[1:] if has_attention]
    return nn.ModuleDict({"block": nn.ModuleList(blocks), "attn": nn.ModuleList(attention)})


def _middle(width: int, config: CNNAutoencoderConfig, in_decoder: bool = False) -> nn.ModuleDict:
    norm = config.norm_of(len(config.ch_mult) - 1, in_decoder)
    first = ResBlock(width, width, config.dropout, norm)
    last = ResBlock(width, width, config.dropout, norm)
    return nn.ModuleDict(
        {
            "block_1": first,
            **({"attn_1": AttentionBlock(width, norm)} if config.attention else {}),
            "block_2": last,
        }
    )


def _in_order(level: nn.ModuleDict) -> Iterator[nn.Module]:
    for block, attention in itertools.zip_longest(level["block"], level["attn"]):  # type: ignore[call-overload]
        yield block
        if attention is not None:
            yield attention
    yield from (level[name] for name in ("downsample", "upsample") if name in level)


class CNNEncoder(CheckpointedNetwork):
    """Images [B, in_channels, H, W] -> latents [B, latent_dim, H/stride, W/stride]."""

    def __init__(self, config: CNNAutoencoderConfig) -> None:
        super().__init__()
        widths = config.widths
        self.patches = ToPatches(config.patch)
        self.conv_in = conv3x3(config.in_channels * config.patch**2, widths[0])
        self.down = nn.ModuleList()
        width = widths[0]
        for number, out in enumerate(widths):
            level = _level([width] + [out] * config.num_res_blocks, config, number)
            width = out
            if number < len(widths) - 1:
                width = widths[number + 1] if config.shortcuts else out
                level["downsample"] = Downsample(out, width, config.shortcuts)
            self.down.append(level)
        self.mid = _middle(width, config)
        self.norm_out = config.norm_of(len(widths) - 1)(width)
        self.silu = nn.SiLU(inplace=True)
        self.conv_out = conv3x3(width, config.latent_dim)
        self.video = video_encoder(config.latent_dim, config.video_frames, config.num_res_blocks)
        self.quant_conv = _quant_conv(config)

    def steps(self) -> Iterator[nn.Module]:
        yield from (self.patches, self.conv_in)
        for level in self.down:
            yield from _in_order(level)  # type: ignore[arg-type]
        yield from self.mid.values()
        yield from (self.norm_out, self.silu, self.conv_out, self.video, self.quant_conv)


class CNNDecoder(CheckpointedNetwork):
    """Latents [B, latent_dim, h, w] -> images [B, in_channels, h·stride, w·stride], not clamped.

    Level i has the same resolution as level i of the encoder.
    """

    def __init__(self, config: CNNAutoencoderConfig) -> None:
        super().__init__()
        widths = config.widths
        width = widths[-1]
        self.is_conditioned = config.norm == "spatial"
        self.post_quant_conv = _quant_conv(config)
        self.video = video_decoder(config.latent_dim, config.video_frames, config.num_res_blocks)
        self.conv_in = conv3x3(config.latent_dim, width)
        self.mid = _middle(width, config, in_decoder=True)
        levels = []
        for number, out in reversed(list(enumerate(widths))):
            blocks = [width] + [out] * (config.num_res_blocks + 1)
            level = _level(blocks, config, number, in_decoder=True)
            width = out
            if number:
                width = widths[number - 1] if config.shortcuts else out
                level["upsample"] = Upsample(out, width, config.shortcuts)
            levels.append(level)
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = config.norm_of(0, in_decoder=True)(width)
        self.silu = nn.SiLU(inplace=True)
        self.conv_out = conv3x3(width, config.in_channels * config.patch**2)
        self.patches = FromPatches(config.patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, *([self.video(x)] if self.is_conditioned else []))

    def steps(self) -> Iterator[nn.Module]:
        yield from (self.post_quant_conv, self.video, self.conv_in)
        yield from self.mid.values()
        for level in reversed(list(self.up)):
            yield from _in_order(level)  # type: ignore[arg-type]
        yield from (self.norm_out, self.silu, self.conv_out, self.patches)


class NoDecoder(nn.Module):
    """Stands for a decoder that was not published with its encoder."""

    def forward(self, x: Tensor) -> Tensor:
        raise ConfigError(
            "this tokenizer has no decoder: its weights were published without one. Use it to "
            "encode images, or load the weights of the project's own code."
        )


def _quant_conv(config: CNNAutoencoderConfig) -> nn.Module:
    kernel = config.quant_conv_kernel
    if not kernel:
        return nn.Identity()
    return nn.Conv2d(config.latent_dim, config.latent_dim, kernel, padding=kernel // 2)
