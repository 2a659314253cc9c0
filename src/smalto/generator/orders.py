"""The order in which the tokens of an image are made, and the input of each step."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from smalto.core.layout import TokenLayout
from smalto.quantizers import MultiScaleVQ, Quantizer


class Order(ABC):
    """Images in the making: the values of ``idxBl_to_var_input`` and the image, step by step.

    Args:
        quantizer: of the tokenizer.
        layout: of the tokens.
    """

    def __init__(self, quantizer: Quantizer, layout: TokenLayout) -> None:
        self.quantizer = quantizer
        self.layout = layout

    @staticmethod
    @abstractmethod
    def guidance(strength: float, step: int, num_steps: int) -> float:
        """Return the guidance of a step."""

    @abstractmethod
    def lookup(self, step: int, tokens: Tensor) -> Tensor:
        """Return the codes of a step's tokens: int64 [B, n] -> [B, n, code_dim]."""

    @abstractmethod
    def add(self, step: int, codes: Tensor) -> Tensor | None:
        """Add the codes of a step; return the input of the next one [B, m, code_dim], or None."""

    @abstractmethod
    def quantized(self, tokens: Tensor) -> Tensor:
        """Return the quantized latents [B, C, h, w], when all steps are done.

        Args:
            tokens: int64 [B, L].
        """


class NextScale(Order):
    """A step makes all tokens of a grid, from coarse to fine (VAR)."""

    def __init__(self, quantizer: Quantizer, layout: TokenLayout) -> None:
        super().__init__(quantizer, layout)
        assert isinstance(quantizer, MultiScaleVQ)
        self._scales = quantizer
        self._result: Tensor | None = None

    @staticmethod
    def guidance(strength: float, step: int, num_steps: int) -> float:
        """Return a guidance that grows over the scales, from 0 to ``strength``."""
        return strength * step / (num_steps - 1) if num_steps > 1 else strength

    def lookup(self, step: int, tokens: Tensor) -> Tensor:
        return self._scales.lookup([tokens])

    def add(self, step: int, codes: Tensor) -> Tensor | None:
        self._result = self._scales.add_scale(self._result, codes, step, self.layout)
        if step + 1 == len(self.layout.grids):
            return None
        return self._scales.scale_input(self._result, self.layout.grids[step + 1])

    def quantized(self, tokens: Tensor) -> Tensor:
        assert self._result is not None
        return self._scales.project_result(self._result)


class NextToken(Order):
    """A step makes one token: grid by grid, each in raster order."""

    @staticmethod
    def guidance(strength: float, step: int, num_steps: int) -> float:
        """Return ``strength`` for every token."""
        return strength

    def lookup(self, step: int, tokens: Tensor) -> Tensor:
        blocks = []
        for length in self.layout.lengths:
            blocks.append(tokens if 0 <= step < length else tokens[:, :0])
            step -= length
        return self.quantizer.lookup(blocks)

    def add(self, step: int, codes: Tensor) -> Tensor | None:
        return codes if step + 1 < self.layout.num_tokens else None

    def quantized(self, tokens: Tensor) -> Tensor:
        return self.quantizer.decode(tokens, self.layout)


ORDERS: dict[str, type[Order]] = {"next-scale": NextScale, "next-token": NextToken}
