"""A tokenizer as two graphs of torch.export, with dynamic batch, height and width."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from smalto.core.errors import ConfigError
from smalto.core.layout import TokenLayout
from smalto.tokenizer.model import ImageTokenizer

_LARGEST = 2**15


class Programs(NamedTuple):
    """The graphs of a tokenizer.

    Attributes:
        encoder: images [B, C, H, W] in [-1, 1] -> token maps int64 [B, h, w], one per grid.
        decoder: token maps -> images [B, C, H, W], clamped to [-1, 1].
        num_maps: number of token maps: 1, or one per stage, head or scale.
    """

    encoder: ExportedProgram
    decoder: ExportedProgram
    num_maps: int


class Encoding(nn.Module):
    """Images [B, C, H, W] -> token maps int64 [B, h, w], one per grid."""

    def __init__(self, tokenizer: ImageTokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        stride = self.tokenizer.stride
        layout = self.tokenizer.quantize.layout(
            images.shape[2] // stride, images.shape[3] // stride
        )
        tokens = self.tokenizer.encode(images).split(layout.lengths, dim=1)
        return tuple(
            block.view(images.shape[0], *grid)
            for block, grid in zip(tokens, layout.grids, strict=True)
        )


class Decoding(nn.Module):
    """Token maps int64 [B, h, w], one per grid -> images [B, C, H, W]."""

    def __init__(self, tokenizer: ImageTokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, *maps: Tensor) -> Tensor:
        layout = TokenLayout(tuple((tokens.shape[1], tokens.shape[2]) for tokens in maps))
        return self.tokenizer.decode(torch.cat([tokens.flatten(1) for tokens in maps], 1), layout)


@torch.no_grad()
def export_tokenizer(tokenizer: ImageTokenizer) -> Programs:
    """Export encoding and decoding with torch.export.

    The search is one operator, ``smalto::nearest_codes``: import smalto before a program is run.
    For a multi-scale tokenizer call ``program.module(check_guards=False)``: torch guards that no
    grid has a side of 1, which the graphs do not need.

    Raises:
        ConfigError: the tokenizer has no decoder.
    """
    if not tokenizer.has_decoder:
        raise ConfigError("this tokenizer has no decoder; only whole tokenizers are exported.")
    tokenizer = tokenizer.folded().cpu().eval().requires_grad_(False)
    quantizer = tokenizer.quantize
    num_maps = len(quantizer.layout(8, 8).grids)
    rows, columns = (quantizer.configured_layout or TokenLayout.single(8, 8)).grids[-1]
    stride = tokenizer.stride
    # No size of an example is 1, and none equals another by chance: torch.export would fix it.
    dtype = next(tokenizer.parameters()).dtype
    size = 2, tokenizer.in_channels, 2 * rows * stride, 3 * columns * stride
    batch, height, width = _size("batch"), _size("rows"), _size("columns")
    encoder = torch.export.export(
        Encoding(tokenizer),
        (torch.zeros(size, dtype=dtype),),
        dynamic_shapes={"images": {0: batch, 2: stride * height, 3: stride * width}},
    )
    if quantizer.configured_layout is None:  # the maps of all stages or heads are equal in size
        maps = [torch.zeros(2, 3, 5, dtype=torch.int64) for _ in range(num_maps)]
        sizes = [{0: batch, 1: height, 2: width} for _ in range(num_maps)]
    else:
        maps = [torch.zeros(2, 3 + n, 5 + 2 * n, dtype=torch.int64) for n in range(num_maps)]
        sizes = [
            {0: batch, 1: _size(f"rows_{n}"), 2: _size(f"columns_{n}")} for n in range(num_maps)
        ]
    decoder = torch.export.export(
        Decoding(tokenizer), tuple(maps), dynamic_shapes={"maps": tuple(sizes)}
    )
    return Programs(encoder, decoder, num_maps)


def _size(name: str) -> Any:
    return Dim(name, max=_LARGEST)
