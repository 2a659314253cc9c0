"""BlockKind of tokens: the list ``idx_Bl`` that autoregressive models of images pass around, and the layout that it stands for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from smalto.core.errors import InputError, describe
from smalto.core.layout import TokenLayout, as_grids, square_grids

BlockKind = Literal["whole", "halves", "diagonal"]
PatchHws = Sequence[int | tuple[int, int]]


def split_blocks(tokens: Tensor, layout: TokenLayout, kind: BlockKind) -> list[Tensor]:
    """Tokens [B, L] -> blocks [B, L_i]; the kinds are those of ``ImageTokenizer.img_to_idxBl``."""
    if kind not in ("whole", "halves", "diagonal"):
        raise InputError(f'blocks must be "whole", "halves" or "diagonal"; got {kind!r}.')
    if kind == "whole":
        return list(tokens.split(layout.lengths, dim=1))
    if len(layout.grids) > 1:
        raise InputError(
            f'blocks="{kind}" cuts one map of tokens; this tokenizer makes {len(layout.grids)}. Use blocks="whole".'
        )
    rows, columns = layout.grids[0]
    index_map = tokens.view(-1, rows, columns)
    upper, lower, middle = index_map[:, : rows // 2], index_map[:, rows // 2 :], columns // 2
    if kind == "halves":
        return [upper.flatten(1), lower.flatten(1)]
    return DiagonalBlocks([upper[:, :, :middle].flatten(1), lower[:, :, middle:].flatten(1)])


class DiagonalBlocks(list[Tensor]):
    """Marks blocks that cannot be decoded."""


def join_blocks(idx_Bl: Sequence[Tensor]) -> Tensor:
    """BlockKind [B, L_i] -> tokens [B, L]."""
    if not isinstance(idx_Bl, (list, tuple)) or not idx_Bl:
        raise InputError(
            "idx_Bl must be a list of blocks [B, L_i], as img_to_idxBl gives it; wrap one tensor as [tokens]."
        )
    if any(
        not isinstance(block, Tensor) or block.ndim != 2 or block.shape[0] != idx_Bl[0].shape[0]
        for block in idx_Bl
    ):
        raise InputError(
            f"every block must be a tensor [B, L_i] with the same B; got {[describe(block) for block in idx_Bl]}."
        )
    return torch.cat(list(idx_Bl), dim=1)


def stacked_layout(lengths: list[int], patch_hws: PatchHws | None) -> TokenLayout:
    """The layout of blocks of one map that lie below one another; without ``patch_hws`` the map is taken to be square."""
    if patch_hws is None:
        grids = square_grids([sum(lengths)])
        side = grids[0][0] if grids else 0
        if not side or lengths not in (
            [side * side],
            [side // 2 * side, (side - side // 2) * side],
        ):
            raise InputError(
                f"blocks of {lengths} tokens are not one square map or its two halves: pass patch_hws, one (rows, columns) per block."
            )
        return TokenLayout.single(side, side)
    filled = [(h, w) for h, w in _checked(lengths, patch_hws) if h * w]
    if not filled or len({w for _, w in filled}) != 1:
        raise InputError(
            f"blocks of one map lie below one another, so patch_hws must share their columns; got {list(patch_hws)}."
        )
    return TokenLayout.single(sum(h for h, _ in filled), filled[0][1])


def layout_by_grid(
    lengths: list[int], patch_hws: PatchHws | None, usual: TokenLayout | None = None
) -> TokenLayout:
    """The layout of one block per grid, the first ones at least.

    Without ``patch_hws`` it is the ``usual`` one, or where there is none one of square grids.
    """
    if patch_hws is not None:
        grids = as_grids(patch_hws)
        _checked(lengths, grids[: len(lengths)] if len(grids) > len(lengths) else grids)
        return TokenLayout(grids)
    if usual is not None:
        if list(usual.lengths[: len(lengths)]) != lengths:
            raise InputError(
                f"blocks of {lengths} tokens are not this tokenizer's usual scales {usual}: pass patch_hws, one (rows, columns) per scale, "
                "such as tokenizer.layout(height, width).grids of the images that were encoded."
            )
        return usual
    squares = square_grids(lengths)
    if squares is None:
        raise InputError(
            f"blocks of {lengths} tokens are not square maps: pass patch_hws, one (rows, columns) per block."
        )
    return TokenLayout(squares)


def _checked(lengths: list[int], patch_hws: PatchHws) -> tuple[tuple[int, int], ...]:
    grids = as_grids(patch_hws)
    if len(grids) != len(lengths) or any(
        h * w != n for (h, w), n in zip(grids, lengths, strict=True)
    ):
        raise InputError(
            f"patch_hws must hold one (rows, columns) per block, for blocks of {lengths} tokens; got {list(patch_hws)}."
        )
    return grids
