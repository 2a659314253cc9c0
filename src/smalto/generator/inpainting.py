"""Which tokens of an image an edit keeps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from smalto.core.errors import InputError, describe
from smalto.core.layout import TokenLayout

REPAINTED_SHARE = 0.5  # of a token's area


def kept_tokens(repaint: Tensor, layout: TokenLayout) -> Tensor:
    """Return the tokens to keep for ``Fixed``, if a part of the image is painted again.

    A token of a coarse grid is kept unless at least half of its area is to be painted, so that it
    still describes the rest of the image. In the last grid every token that touches the part is
    painted again.

    Args:
        repaint: bool [H, W], True for the pixels to paint again.
        layout: of the tokens.

    Returns:
        bool [1, L].

    Raises:
        InputError: the mask is of another type, or is True nowhere.
    """
    if repaint.ndim != 2 or repaint.dtype != torch.bool:
        raise InputError(f"got the mask {describe(repaint)}; expected bool [H, W].")
    if not repaint.any():
        raise InputError(
            "got a mask that is True nowhere in the image that the generator sees, which is the "
            "center of yours in its aspect ratio. Set it to True for the pixels to paint."
        )
    pixels = repaint[None, None].float()
    kept = []
    for number, grid in enumerate(layout.grids):
        share = F.interpolate(pixels, grid, mode="area").flatten()
        is_last = grid == layout.grids[-1] or number == len(layout.grids) - 1
        painted = share > 0 if is_last else share >= REPAINTED_SHARE
        kept.append(~painted)
    return torch.cat(kept)[None]


def box_mask(size: tuple[int, int], box: tuple[int, int, int, int]) -> Tensor:
    """Return a mask bool [H, W] that is True in a box.

    Args:
        size: (H, W) in pixels.
        box: (x, y, width, height) in pixels; x goes to the right, y down.

    Raises:
        InputError: the box is empty, or not inside the image.
    """
    height, width = size
    x, y, box_width, box_height = box
    inside = x >= 0 and y >= 0 and x + box_width <= width and y + box_height <= height
    if not inside or box_width < 1 or box_height < 1:
        raise InputError(
            f"got the box x={x}, y={y}, width={box_width}, height={box_height}; expected one "
            f"inside the image of {width} x {height} pixels, such as 0,0,{width // 2},"
            f"{height // 2}."
        )
    mask = torch.zeros(size, dtype=torch.bool)
    mask[y : y + box_height, x : x + box_width] = True
    return mask
