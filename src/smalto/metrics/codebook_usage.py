"""How well a codebook is used."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from smalto.core.errors import InputError
from smalto.search import USAGE_WINDOW


def perplexity(histogram: Tensor) -> float:
    """exp(entropy) of a histogram [K]: the number of equally used codes that would carry as much. 0 for an empty one."""
    total = histogram.sum()
    if not total:
        return 0.0
    shares = histogram[histogram > 0].double() / total
    return math.exp(-float((shares * shares.log()).sum()))


def used(histogram: Tensor) -> tuple[float, float]:
    """Of a histogram [K]: the share of codes that occur at all, exactly, and the share that so many tokens can hit at most."""
    return int((histogram > 0).sum()) / len(histogram), min(
        1.0, int(histogram.sum()) / len(histogram)
    )


class CodebookMeter:
    """Counts tokens as they come, in O(K) memory.

    Attributes:
        histogram: int64 [K], how often each code occurred.
    """

    def __init__(self, codebook_size: int, seed: int = 0) -> None:
        self.histogram = torch.zeros(codebook_size, dtype=torch.int64)
        self._window = USAGE_WINDOW * codebook_size
        self._generator = torch.Generator().manual_seed(seed)
        self._keys = torch.zeros(0)
        self._sample = torch.zeros(0, dtype=torch.int64)

    def add(self, tokens: Tensor) -> None:
        """Take in tokens of any shape."""
        tokens = tokens.reshape(-1).cpu().long()
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < len(self.histogram):
            raise InputError(
                f"tokens must be in [0, {len(self.histogram)}); got values from {int(tokens.min())} to {int(tokens.max())}."
            )
        self.histogram += torch.bincount(tokens, minlength=len(self.histogram))
        # The W largest random keys belong to a uniform sample of W tokens, however many come.
        keys = torch.cat([self._keys, torch.rand(len(tokens), generator=self._generator)])
        self._keys, order = keys.topk(min(self._window, len(keys)))
        self._sample = torch.cat([self._sample, tokens])[order]

    def usage(self) -> tuple[float, int]:
        """usage@W: the share of codes that occur among W tokens drawn from all, and W = 32·K (fewer where there were fewer).

        A share without its W says nothing: every codebook looks used when one looks long enough.
        """
        return len(self._sample.unique()) / len(self.histogram), len(self._sample)

    def perplexity(self) -> float:
        """Perplexity of all tokens seen."""
        return perplexity(self.histogram)
