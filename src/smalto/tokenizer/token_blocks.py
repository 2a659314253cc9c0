"""Token blocks: the list ``idx_Bl`` of autoregressive image models, and its layout."""

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
    """Tokens [B, L] -> token blocks [B, L_i], a list.

    The kinds are those of ``ImageTokenizer.img_to_idxBl``.

    Raises:
        InputError: an unknown kind, or a kind other than ``"whole"`` for several grids.
    """
    if kind not in ("whole", "halves", "diagonal"):
        raise InputError(f'got blocks={kind!r}; expected "whole", "halves" or "diagonal".')
    if kind == "whole":
        return list(tokens.split(layout.lengths, dim=1))
    if len(layout.grids) > 1:
        raise InputError(
            f'got blocks="{kind}" for {len(layout.grids)} grids of tokens; it splits a single '
            'grid. Use blocks="whole".'
        )
    rows, columns = layout.grids[0]
    index_map = tokens.view(-1, rows, columns)
    upper = index_map[:, : rows // 2]
    lower = index_map[:, rows // 2 :]
    middle = columns // 2
    if kind == "halves":
        return [upper.flatten(1), lower.flatten(1)]
    return DiagonalBlocks([upper[:, :, :middle].flatten(1), lower[:, :, middle:].flatten(1)])


class DiagonalBlocks(list[Tensor]):
    """Token blocks of two quadrants, which cannot be decoded."""


def join_blocks(idx_Bl: Sequence[Tensor]) -> Tensor:
    """Token blocks [B, L_i] -> tokens [B, L].

    Raises:
        InputError: it is not a list of tensors [B, L_i] with the same B.
    """
    if not isinstance(idx_Bl, (list, tuple)) or not idx_Bl:
        given = "an empty list" if isinstance(idx_Bl, (list, tuple)) else describe(idx_Bl)
        raise InputError(
            f"got {given}; idx_Bl must be a list of token blocks [B, L_i], as img_to_idxBl returns "
            "it. Wrap one tensor as [tokens]."
        )
    if any(
        not isinstance(block, Tensor) or block.ndim != 2 or block.shape[0] != idx_Bl[0].shape[0]
        for block in idx_Bl
    ):
        raise InputError(
            f"got {[describe(block) for block in idx_Bl]}; every token block must be a tensor "
            "[B, L_i] with the same B. Pass the list that img_to_idxBl returned."
        )
    return torch.cat(list(idx_Bl), dim=1)


def stacked_layout(lengths: list[int], patch_hws: PatchHws | None) -> TokenLayout:
    """Return the layout of token blocks that are stacked vertically in one map.

    Without ``patch_hws`` the map must be square.

    Raises:
        InputError: the lengths do not fit.
    """
    if patch_hws is None:
        grids = square_grids([sum(lengths)])
        side = grids[0][0] if grids else 0
        if not side or lengths not in (
            [side * side],
            [side // 2 * side, (side - side // 2) * side],
        ):
            raise InputError(
                f"got token blocks of {lengths} tokens; without patch_hws they must be one square "
                "map or its two halves. Pass patch_hws with one (rows, columns) per block."
            )
        return TokenLayout.single(side, side)
    filled = [(h, w) for h, w in _checked(lengths, patch_hws) if h * w]
    if not filled or len({w for _, w in filled}) != 1:
        raise InputError(
            f"got patch_hws={list(patch_hws)}; token blocks of one map are stacked vertically and "
            "must have the same number of columns. Pass patch_hws with equal columns."
        )
    return TokenLayout.single(sum(h for h, _ in filled), filled[0][1])


def layout_by_grid(
    lengths: list[int], patch_hws: PatchHws | None, usual: TokenLayout | None = None
) -> TokenLayout:
    """Return the layout of one token block per grid, for all grids or the first ones.

    Without ``patch_hws`` it is ``usual``, or a layout of square grids if ``usual`` is None.

    Raises:
        InputError: the lengths do not fit.
    """
    if patch_hws is not None:
        grids = as_grids(patch_hws)
        _checked(lengths, grids[: len(lengths)] if len(grids) > len(lengths) else grids)
        return TokenLayout(grids)
    if usual is not None:
        if list(usual.lengths[: len(lengths)]) != lengths:
            raise InputError(
                f"got token blocks of {lengths} tokens; the configured scales are {usual}. Pass "
                "patch_hws with one (rows, columns) per scale, such as "
                "tokenizer.layout(height, width).grids of the encoded images."
            )
        return usual
    squares = square_grids(lengths)
    if squares is None:
        raise InputError(
            f"got token blocks of {lengths} tokens; without patch_hws they must be square maps. "
            "Pass patch_hws with one (rows, columns) per block."
        )
    return TokenLayout(squares)


def _checked(lengths: list[int], patch_hws: PatchHws) -> tuple[tuple[int, int], ...]:
    grids = as_grids(patch_hws)
    if len(grids) != len(lengths) or any(
        h * w != n for (h, w), n in zip(grids, lengths, strict=True)
    ):
        raise InputError(
            f"got patch_hws={list(patch_hws)} for token blocks of {lengths} tokens; expected one "
            "(rows, columns) per block, with rows * columns equal to its number of tokens. "
            "Pass the grid of every block."
        )
    return grids
