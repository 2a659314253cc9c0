"""Which part of its input an autoencoder's output depends on, and running it tile by tile.

A layer that is neither elementwise nor one of torch's convolutions answers two questions:
``is_local`` (default True), and ``input_range(first, last)``: which rows of its input the output
rows first to last depend on. Columns are alike.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

TILE = 384  # pixels along each side of a tile, besides what it needs of its neighbors
WHOLE = 2**20  # pixels of the largest image that is not tiled


def is_local(network: nn.Module) -> bool:
    """Return whether each output position depends on a bounded part of the input."""
    return all(getattr(module, "is_local", True) for module in network.modules())


def input_range(network: nn.Module, first: int, last: int) -> tuple[int, int]:
    """Return which rows of its input the rows first to last of a network's output depend on.

    The rows may lie outside of the map: they are padding there.
    """
    own: Any = getattr(network, "input_range", None)
    if own is not None:
        return own(first, last)
    if isinstance(network, nn.Sequential):
        for layer in reversed(network):
            first, last = input_range(layer, first, last)
        return first, last
    if isinstance(network, nn.Conv2d):
        (kernel, _), (stride, _), padding = network.kernel_size, network.stride, network.padding
        assert not isinstance(padding, str)
        return first * stride - padding[0], last * stride - padding[0] + kernel - 1
    if isinstance(network, nn.ConvTranspose2d):
        (kernel, _), (stride, _), padding = network.kernel_size, network.stride, network.padding
        assert not isinstance(padding, str)
        return -(-(first + padding[0] - kernel + 1) // stride), (last + padding[0]) // stride
    return first, last  # elementwise


def run_in_tiles(
    network: nn.Module, maps: Tensor, dtype: torch.dtype, *, down: int = 1, up: int = 1
) -> Tensor:
    """Return ``network(maps)`` in ``dtype``, computed tile by tile if the images are large.

    The values are those of the whole map but for the order of sums. Networks that are not local
    run on the whole map. With gradients the backward pass computes each tile again.

    Args:
        network: an encoder or decoder.
        maps: [B, C, h, w].
        dtype: of the result.
        down: input positions along a side per latent position: the stride, for an encoder.
        up: output positions along a side per latent position: the stride, for a decoder.
    """
    stride = down * up
    height, width = maps.shape[2] // down, maps.shape[3] // down
    is_large = not torch.compiler.is_compiling() and height * width * stride**2 > WHOLE
    if not is_large or not is_local(network):
        return network(maps).to(dtype)
    side = max(1, TILE // stride)
    rows, columns = _spans(height, side), _spans(width, side)
    out: Tensor | None = None
    for number in range(len(maps)):
        for top, bottom in rows:
            first, last = _needed(network, top, bottom, height, down, up)
            for left, right in columns:
                start, stop = _needed(network, left, right, width, down, up)
                tile = maps[number, None, :, first * down : last * down, start * down : stop * down]
                values = (
                    checkpoint(network, tile, use_reentrant=False)
                    if torch.is_grad_enabled()
                    else network(tile)
                )
                if out is None:
                    shape = len(maps), values.shape[1], height * up, width * up
                    out = values.new_empty(shape, dtype=dtype)
                out[number, :, top * up : bottom * up, left * up : right * up] = values[
                    0,
                    :,
                    (top - first) * up : (bottom - first) * up,
                    (left - start) * up : (right - start) * up,
                ]
    assert out is not None
    return out


def _spans(length: int, side: int) -> list[tuple[int, int]]:
    """Divide positions into equal parts of at most ``side``."""
    number = -(-length // side)
    return [(length * n // number, length * (n + 1) // number) for n in range(number)]


def _needed(
    network: nn.Module, start: int, stop: int, length: int, down: int, up: int
) -> tuple[int, int]:
    """Return the latent positions, from and up to, that those of a tile depend on."""
    first, last = input_range(network, start * up, stop * up - 1)
    return max(0, first // down), min(length, last // down + 1)
