"""Convolutional autoencoder of MaskGIT (Chang et al. 2022, arXiv 2202.04200).

VQGAN without attention, with average pooling, without biases in most convolutions, and for images
in [0, 1]. Where the width of a residual block changes, its shortcut starts from the result of the
block, not from its input: published weights need it so.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Literal

import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from smalto.autoencoders.cnn import CheckpointedNetwork
from smalto.autoencoders.layers import (
    NUM_GROUPS,
    GroupNorm,
    Upsample,
    check_layer_initialization,
    conv3x3,
)
from smalto.core.config import Config


class MaskGITAutoencoderConfig(Config):
    """Settings of MaskGIT's autoencoder: residual blocks at halving resolutions.

    Images [B, in_channels, H, W] <-> latents [B, latent_dim, H/stride, W/stride], with
    stride = 2^(levels - 1).
    """

    kind: Literal["maskgit"] = "maskgit"
    in_channels: int = Field(3, ge=1, le=4096, description="channels of the images")
    latent_dim: int = Field(256, ge=1, le=65536, description="channels of the latents (C)")
    ch: int = Field(128, ge=1, le=8192, description="width of the first level; a multiple of 32")
    ch_mult: tuple[int, ...] = Field(
        (1, 1, 2, 2, 4),
        min_length=1,
        max_length=8,
        description="width of each level as a multiple of ch; each further level halves the map",
    )
    num_res_blocks: int = Field(
        2, ge=1, le=64, description="residual blocks per level and in the middle"
    )

    @model_validator(mode="after")
    def _widths_fit(self) -> MaskGITAutoencoderConfig:
        if min(self.ch_mult) < 1 or max(self.ch_mult) > 1024:
            raise ValueError(f"ch_mult must be integers from 1 to 1024; got {self.ch_mult}.")
        if self.ch % NUM_GROUPS:
            raise ValueError(
                f"ch must be a multiple of {NUM_GROUPS}, the number of normalization groups; "
                f"got {self.ch}."
            )
        return self

    @property
    def stride(self) -> int:
        """Pixels per latent position, along height and width alike."""
        return 2 ** (len(self.ch_mult) - 1)

    @property
    def widths(self) -> list[int]:
        """Channels of each level, from the highest to the lowest resolution."""
        return [self.ch * m for m in self.ch_mult]

    def build_encoder(self) -> MaskGITEncoder:
        """Return a new encoder.

        Raises:
            RunError: this process does not initialize layers; see ``check_layer_initialization``.
        """
        check_layer_initialization()
        return MaskGITEncoder(self)

    def build_decoder(self) -> MaskGITDecoder:
        """Return a new decoder.

        Raises:
            RunError: this process does not initialize layers; see ``check_layer_initialization``.
        """
        check_layer_initialization()
        return MaskGITDecoder(self)


class ResultShortcutBlock(nn.Module):
    """Residual block without biases, whose 1x1 shortcut starts from the block's result."""

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(in_width)
        self.conv1 = nn.Conv2d(in_width, out_width, 3, padding=1, bias=False)
        self.norm2 = GroupNorm(out_width)
        self.conv2 = nn.Conv2d(out_width, out_width, 3, padding=1, bias=False)
        self.nin_shortcut = (
            None if in_width == out_width else nn.Conv2d(out_width, out_width, 1, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x), inplace=True))
        h = self.conv2(F.silu(self.norm2(h), inplace=True))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(h))


class ToUnit(nn.Module):
    """Images in [-1, 1] -> [0, 1]."""

    def forward(self, images: Tensor) -> Tensor:
        return images * 0.5 + 0.5


class FromUnit(nn.Module):
    """Images in [0, 1] -> [-1, 1]."""

    def forward(self, images: Tensor) -> Tensor:
        return images * 2 - 1


def _blocks(in_width: int, width: int, number: int) -> nn.ModuleList:
    widths = [in_width] + [width] * number
    return nn.ModuleList(ResultShortcutBlock(a, b) for a, b in itertools.pairwise(widths))


class MaskGITEncoder(CheckpointedNetwork):
    """Images [B, in_channels, H, W] -> latents [B, latent_dim, H/stride, W/stride]."""

    def __init__(self, config: MaskGITAutoencoderConfig) -> None:
        super().__init__()
        widths = config.widths
        self.to_unit = ToUnit()
        self.conv_in = nn.Conv2d(config.in_channels, config.ch, 3, padding=1, bias=False)
        inner = [config.ch, *widths]
        self.down = nn.ModuleList(
            nn.ModuleDict({"block": _blocks(a, b, config.num_res_blocks)})
            for a, b in itertools.pairwise(inner)
        )
        self.pool = nn.AvgPool2d(2)
        self.mid = _blocks(widths[-1], widths[-1], config.num_res_blocks)
        self.norm_out = GroupNorm(widths[-1])
        self.silu = nn.SiLU(inplace=True)
        self.conv_out = nn.Conv2d(widths[-1], config.latent_dim, 1)

    def steps(self) -> Iterator[nn.Module]:
        yield from (self.to_unit, self.conv_in)
        for number, level in enumerate(self.down):
            if number:
                yield self.pool
            yield from level["block"]  # type: ignore[index]
        yield from (*self.mid, self.norm_out, self.silu, self.conv_out)


class MaskGITDecoder(CheckpointedNetwork):
    """Latents [B, latent_dim, h, w] -> images [B, in_channels, h·stride, w·stride], not clamped.

    Level i has the same resolution as level i of the encoder.
    """

    def __init__(self, config: MaskGITAutoencoderConfig) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = conv3x3(config.latent_dim, widths[-1])
        self.mid = _blocks(widths[-1], widths[-1], config.num_res_blocks)
        self.up = nn.ModuleList()
        for number, (inner, width) in enumerate(
            zip([*widths[1:], widths[-1]], widths, strict=True)
        ):
            level = nn.ModuleDict({"block": _blocks(inner, width, config.num_res_blocks)})
            if number:
                level["upsample"] = Upsample(width, width)
            self.up.append(level)
        self.norm_out = GroupNorm(widths[0])
        self.silu = nn.SiLU(inplace=True)
        self.conv_out = conv3x3(widths[0], config.in_channels)
        self.from_unit = FromUnit()

    def steps(self) -> Iterator[nn.Module]:
        yield from (self.conv_in, *self.mid)
        for level in reversed(list(self.up)):
            yield from level["block"]  # type: ignore[index]
            if "upsample" in level:  # type: ignore[operator]
                yield level["upsample"]  # type: ignore[index]
        yield from (self.norm_out, self.silu, self.conv_out, self.from_unit)
