"""The layers of a video tokenizer (Emu3, Wang et al. 2024, arXiv 2409.18869) for one image.

The tokenizer repeats an image ``frames`` times, and its convolutions over time reduce the frames to
one. Frames before the first are zero. Equal frames and one output need only 2D convolutions, whose
weights ``smalto.interop.transformers`` computes from those over time.
"""

from __future__ import annotations

from torch import nn

from smalto.autoencoders.layers import Affine, ResBlock, conv3x3


def video_encoder(width: int, frames: int | None, num_blocks: int) -> nn.Module:
    """Return the layers behind an encoder: half the frames in each, then residual blocks."""
    if frames is None:
        return nn.Identity()
    layers: list[nn.Module] = []
    distinct = 1  # the frames are equal at first
    while frames > 1:
        frames //= 2
        layers += [conv3x3(distinct * width, frames * width), nn.SiLU()]
        distinct = frames
    return nn.Sequential(*layers, *_blocks(width, num_blocks))


def video_decoder(width: int, frames: int | None, num_blocks: int) -> nn.Module:
    """Return the layers in front of a decoder, whose first frame is the image."""
    if frames is None:
        return nn.Identity()
    layers: list[nn.Module] = []
    while frames > 1:
        frames //= 2
        layers += [conv3x3(width, width), nn.SiLU()]
    return nn.Sequential(*_blocks(width, num_blocks), *layers)


def _blocks(width: int, number: int) -> list[nn.Module]:
    return [ResBlock(width, width, norm=Affine) for _ in range(number)]
