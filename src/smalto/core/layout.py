"""Layout of the tokens of one image: the grid that every token belongs to."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from smalto.core.errors import InputError


@dataclass(frozen=True)
class TokenLayout:
    """Grids of the tokens of one image, in token order.

    The tokens of a grid are in raster order. A single-scale tokenizer has one grid, for example
    ``TokenLayout(((16, 24),))``: 16 rows of 24 tokens.
    """

    grids: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        grids = tuple((_as_integer(h), _as_integer(w)) for h, w in self.grids)
        if not grids or any(h < 1 or w < 1 for h, w in grids):
            raise InputError(
                f"got the grids {self.grids}; expected at least one grid of (rows, columns), "
                "each at least 1. An example: TokenLayout(((16, 24),))"
            )
        object.__setattr__(self, "grids", grids)

    @classmethod
    def single(cls, height: int, width: int) -> TokenLayout:
        """Return the layout of one ``height`` x ``width`` map of tokens."""
        return cls(((height, width),))

    def prefix(self, num_grids: int) -> TokenLayout:
        """Return the layout of the first grids, for an image from its first scales or stages."""
        return TokenLayout(self.grids[:num_grids])

    @property
    def lengths(self) -> tuple[int, ...]:
        """Return the number of tokens per grid."""
        return tuple(h * w for h, w in self.grids)

    @property
    def has_equal_grids(self) -> bool:
        """Whether all grids are of one size."""
        return all(grid == self.grids[0] for grid in self.grids)

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens per image (L)."""
        return sum(self.lengths)

    def __str__(self) -> str:
        return " + ".join(f"{h}x{w}" for h, w in self.grids)


def _as_integer(size: Any) -> int:
    """Return a size as a Python integer; the symbol of torch.export for a dynamic one is kept."""
    if type(size).__name__ == "SymInt":
        symbol: int = size
        return symbol
    return operator.index(size)


def square_grids(lengths: Iterable[int]) -> tuple[tuple[int, int], ...] | None:
    """Return one square grid per length, or None if a length is not a square number."""
    sides = [(math.isqrt(n), n) for n in lengths]
    return tuple((s, s) for s, _ in sides) if all(s > 0 and s * s == n for s, n in sides) else None


def as_grids(scales: Iterable[int | tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Return scales as (rows, columns); an integer stands for both.

    Raises:
        InputError: a scale is neither an integer nor a pair of integers.
    """
    try:
        pairs = [scale if isinstance(scale, (tuple, list)) else (scale, scale) for scale in scales]
        return tuple((_as_integer(h), _as_integer(w)) for h, w in pairs)
    except (TypeError, ValueError):
        raise InputError(
            f"got the scales {scales}; expected integers or pairs (rows, columns). "
            "An example: [1, 2, (4, 4)]"
        ) from None
