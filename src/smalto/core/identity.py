"""Identity of a tokenizer, which distinguishes its tokens from those of other tokenizers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy


@dataclass(frozen=True)
class TokenizerIdentity:
    """Identity of a tokenizer as it is stored in files.

    Attributes:
        fingerprint: SHA-256 of configuration and weights, in hexadecimal.
        kind: kind of its quantizer, or the name of a preset.
        codebook_size: every token is in [0, codebook_size).
    """

    fingerprint: str
    kind: str
    codebook_size: int

    @property
    def token_dtype(self) -> numpy.dtype[Any]:
        """Return the dtype of tokens on disk: the smaller of two that holds every index."""
        return token_dtype(self.codebook_size)


def token_dtype(codebook_size: int) -> numpy.dtype[Any]:
    """Return uint16 if it holds every index, otherwise uint32."""
    return numpy.dtype(numpy.uint16 if codebook_size <= 2**16 else numpy.uint32)
