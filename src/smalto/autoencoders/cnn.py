"""Convolutional autoencoder of VQGAN (Esser et al. 2021, arXiv 2012.09841), in VAR's form.

VAR: Tian et al. 2024, arXiv 2404.02905.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from smalto.autoencoders.layers import (
    NUM_GROUPS,
    AttentionBlock,
    Downsample,
    ResBlock,
    Upsample,
    check_layer_initialization,
    conv3x3,
    normalize,
)
from smalto.core.config import Config


class CNNAutoencoderConfig(Config):
    """Settings of the convolutional autoencoder: residual blocks at halving resolutions.

    Images [B, in_channels, H, W] <-> latents [B, latent_dim, H/stride, W/stride], with
    stride = 2^(levels - 1).
    """

    kind: Literal["cnn"] = "cnn"
    in_channels: int = Field(3, ge=1, le=4096, description="channels of the images")
    latent_dim: int = Field(32, ge=1, le=65536, description="channels of the latents (C)")
    ch: int = Field(
        128, ge=NUM_GROUPS, le=8192, description="width at full resolution, a multiple of 32"
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
        description="attention at the lowest resolution; its time grows with the square "
        "of the number of positions",
    )
    quant_conv_kernel: Literal[1, 3] = Field(
        3, description="kernel size of the convolutions on both sides of the quantizer"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout inside residual blocks")

    @model_validator(mode="after")
    def _widths_fit(self) -> CNNAutoencoderConfig:
        if self.ch % NUM_GROUPS:
            raise ValueError(
                f"ch must be a multiple of {NUM_GROUPS}, the number of normalization groups; "
                f"got {self.ch}."
            )
        if min(self.ch_mult) < 1 or max(self.ch_mult) > 1024:
            raise ValueError(f"ch_mult must be integers from 1 to 1024; got {self.ch_mult}.")
        return self

    @property
    def stride(self) -> int:
        """Pixels per latent position, along height and width alike."""
        return 2 ** (len(self.ch_mult) - 1)

    @property
    def widths(self) -> list[int]:
        """Channels of each level, from the full to the lowest resolution."""
        return [self.ch * m for m in self.ch_mult]

    def build_encoder(self) -> CNNEncoder:
        """Return a new encoder.

        Raises:
            RunError: this process does not initialize layers; see ``check_layer_initialization``.
        """
        check_layer_initialization()
        return CNNEncoder(self)

    def build_decoder(self) -> CNNDecoder:
        """Return a new decoder.

        Raises:
            RunError: this process does not initialize layers; see ``check_layer_initialization``.
        """
        check_layer_initialization()
        return CNNDecoder(self)


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
        saving = self.gradient_checkpointing and torch.is_grad_enabled()
        for step in self.steps():
            x = (
                checkpoint(step, x, use_reentrant=False)
                if saving and isinstance(step, (ResBlock, AttentionBlock))
                else step(x)
            )
        return x


def _level(widths: list[int], config: CNNAutoencoderConfig, lowest: bool) -> nn.ModuleDict:
    """Return the residual blocks of one level; at the lowest one attention follows each."""
    blocks = [ResBlock(a, b, config.dropout) for a, b in itertools.pairwise(widths)]
    attention = [AttentionBlock(width) for width in widths[1:] if lowest and config.attention]
    return nn.ModuleDict({"block": nn.ModuleList(blocks), "attn": nn.ModuleList(attention)})


def _middle(width: int, config: CNNAutoencoderConfig) -> nn.ModuleDict:
    first = ResBlock(width, width, config.dropout)
    last = ResBlock(width, width, config.dropout)
    return nn.ModuleDict(
        {
            "block_1": first,
            **({"attn_1": AttentionBlock(width)} if config.attention else {}),
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
        self.conv_in = conv3x3(config.in_channels, config.ch)
        self.down = nn.ModuleList()
        width = config.ch
        for number, out in enumerate(config.widths):
            lowest = number == len(config.widths) - 1
            level = _level([width] + [out] * config.num_res_blocks, config, lowest)
            if not lowest:
                level["downsample"] = Downsample(out)
            self.down.append(level)
            width = out
        self.mid = _middle(width, config)
        self.norm_out = normalize(width)
        self.silu = nn.SiLU(inplace=True)
        self.conv_out = conv3x3(width, config.latent_dim)
        self.quant_conv = _quant_conv(config)

    def steps(self) -> Iterator[nn.Module]:
        yield self.conv_in
        for level in self.down:
            yield from _in_order(level)  # type: ignore[arg-type]
        yield from self.mid.values()
        yield from (self.norm_out, self.silu, self.conv_out, self.quant_conv)


class CNNDecoder(CheckpointedNetwork):
    """Latents [B, latent_dim, h, w] -> images [B, in_channels, h·stride, w·stride], not clamped.

    Level i has the same resolution as level i of the encoder.
    """

    def __init__(self, config: CNNAutoencoderConfig) -> None:
        super().__init__()
        width = config.widths[-1]
        self.post_quant_conv = _quant_conv(config)
        self.conv_in = conv3x3(config.latent_dim, width)
        self.mid = _middle(width, config)
        levels = []
        for number, out in reversed(list(enumerate(config.widths))):
            lowest = number == len(config.widths) - 1
            level = _level([width] + [out] * (config.num_res_blocks + 1), config, lowest)
            if number:
                level["upsample"] = Upsample(out)
            levels.append(level)
            width = out
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = normalize(width)
        self.silu = nn.SiLU(inplace=True)
        self.conv_out = conv3x3(width, config.in_channels)

    def steps(self) -> Iterator[nn.Module]:
        yield from (self.post_quant_conv, self.conv_in)
        yield from self.mid.values()
        for level in reversed(list(self.up)):
            yield from _in_order(level)  # type: ignore[arg-type]
        yield from (self.norm_out, self.silu, self.conv_out)


def _quant_conv(config: CNNAutoencoderConfig) -> nn.Conv2d:
    kernel = config.quant_conv_kernel
    return nn.Conv2d(config.latent_dim, config.latent_dim, kernel, padding=kernel // 2)
