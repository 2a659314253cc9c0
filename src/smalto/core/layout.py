"""TokenLayout: which grid every token of one image belongs to."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass

from smalto.core.errors import InputError


@dataclass(frozen=True)
class TokenLayout:
    """The grids of one image's tokens, in token order; inside a grid the tokens run in raster order.

    A single-scale tokenizer has one grid, e.g. ``TokenLayout(((16, 24),))``: 16 rows of 24 tokens.
    """

    grids: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        grids = tuple((operator.index(h), operator.index(w)) for h, w in self.grids)
        if not grids or any(h < 1 or w < 1 for h, w in grids):
            raise InputError(
                f"a layout needs at least one grid of (rows, columns), each at least 1; got {self.grids}."
            )
        object.__setattr__(self, "grids", grids)

    @classmethod
    def single(cls, height: int, width: int) -> TokenLayout:
        """The layout of one ``height`` x ``width`` map of tokens."""
        return cls(((height, width),))

    def prefix(self, num_grids: int) -> TokenLayout:
        """The layout of the first grids alone: of an image from its first stages."""
        return TokenLayout(self.grids[:num_grids])

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens per grid."""
        return tuple(h * w for h, w in self.grids)

    @property
    def num_tokens(self) -> int:
        """Tokens per image (L)."""
        return sum(self.lengths)

    def __str__(self) -> str:
        return " + ".join(f"{h}x{w}" for h, w in self.grids)


def square_grids(lengths: Iterable[int]) -> tuple[tuple[int, int], ...] | None:
    """One square grid per length, or None where a length is not a square number."""
    sides = [(math.isqrt(n), n) for n in lengths]
    return tuple((s, s) for s, _ in sides) if all(s > 0 and s * s == n for s, n in sides) else None


def as_grids(scales: Iterable[int | tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Scales as (rows, columns), where one number stands for both.

    Raises:
        InputError: something else.
    """
    try:
        pairs = [scale if isinstance(scale, (tuple, list)) else (scale, scale) for scale in scales]
        return tuple((operator.index(h), operator.index(w)) for h, w in pairs)
    except (TypeError, ValueError):
        raise InputError(
            f"scales are whole numbers or pairs (rows, columns); got {scales}."
        ) from None
