"""Metrics of codebook usage."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from smalto.core.errors import InputError
from smalto.search import USAGE_WINDOW


def perplexity(histogram: Tensor) -> float:
    """Return exp(entropy) of a histogram [K], or 0 if it is empty.

    This is the number of equally used codes that would have the same entropy.
    """
    total = histogram.sum()
    if not total:
        return 0.0
    shares = histogram[histogram > 0].double() / total
    return math.exp(-float((shares * shares.log()).sum()))


def used(histogram: Tensor) -> tuple[float, float]:
    """Return the exact share of codes in a histogram [K] that occur, and its upper limit.

    The limit is the share that as many tokens as the histogram counts can use at most.
    """
    occurring = int((histogram > 0).sum()) / len(histogram)
    ceiling = min(1.0, int(histogram.sum()) / len(histogram))
    return occurring, ceiling


class CodebookMeter:
    """Streaming meter of codebook usage, in O(K) memory.

    Args:
        codebook_size: number of codes K.
        seed: random seed for the sample of ``usage``.

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
        """Count integer tokens of any shape.

        Raises:
            InputError: a token is outside the codebook.
        """
        tokens = tokens.reshape(-1).cpu().long()
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < len(self.histogram):
            raise InputError(
                f"got tokens from {int(tokens.min())} to {int(tokens.max())}; expected values in "
                f"[0, {len(self.histogram)}). Pass the tokens of a codebook of this size."
            )
        self.histogram += torch.bincount(tokens, minlength=len(self.histogram))
        # The tokens with the W largest random keys are a uniform sample of all tokens.
        keys = torch.cat([self._keys, torch.rand(len(tokens), generator=self._generator)])
        self._keys, order = keys.topk(min(self._window, len(keys)))
        self._sample = torch.cat([self._sample, tokens])[order]

    def usage(self) -> tuple[float, int]:
        """Return usage@W and W: the share of codes that occur among W tokens drawn from all.

        W is 32·K, or the number of tokens if there are fewer. The share is meaningless without its
        W, because every codebook appears used after enough tokens.
        """
        return len(self._sample.unique()) / len(self.histogram), len(self._sample)

    def perplexity(self) -> float:
        """Return the perplexity of all tokens counted so far."""
        return perplexity(self.histogram)
