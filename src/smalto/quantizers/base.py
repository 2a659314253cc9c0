"""What every quantizer promises."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from smalto.errors import InputError, describe
from smalto.layout import TokenLayout


class QuantizerOutput(NamedTuple):
    """Unpacks as ``quantized, loss, indices``.

    Attributes:
        quantized: [B, C, h, w] in the dtype of the latents; the value is exactly the codes', the gradient the estimator's.
        loss: scalar, at least float32 (float64 for float64 latents); the same definition in training and evaluation.
        indices: int64 [B*L], image by image in token order; ``indices.view(B, -1)`` gives tokens.
    """

    quantized: Tensor
    loss: Tensor
    indices: Tensor


class Quantizer(nn.Module, ABC):
    """Latents [B, C, h, w] -> indices -> latents.

    ``forward`` is pure: it changes no parameter, buffer or random state. Whatever changes a codebook outside the optimizer
    is the work of ``CodebookUpdater``. ``decode(encode(z), layout)`` is bitwise ``forward(z).quantized`` (which has the
    dtype of z: with z in bfloat16, after ``.to(z.dtype)``).
    """

    codebook_size: int
    latent_dim: int

    @abstractmethod
    def forward(self, latents: Tensor) -> QuantizerOutput:
        """Quantize latents [B, C, h, w], with gradients."""

    @abstractmethod
    def encode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] -> tokens int64 [B, L], without gradients."""

    @abstractmethod
    def decode(self, indices: Tensor, layout: TokenLayout) -> Tensor:
        """Tokens int64 [B, L] -> quantized latents [B, C, h, w]."""

    @abstractmethod
    def layout(self, height: int, width: int) -> TokenLayout:
        """The layout of the tokens of a latent map of ``height`` x ``width``."""

    def check_latents(self, latents: Tensor) -> None:
        """Raise InputError unless latents are floating point [B, C, h, w] with C = ``latent_dim``."""
        if not isinstance(latents, Tensor) or latents.ndim != 4 or latents.shape[1] != self.latent_dim or not latents.is_floating_point():
            raise InputError(f"latents must be floating point [B, {self.latent_dim}, h, w]; got {describe(latents)}.")

    def check_indices(self, indices: Tensor, num_tokens: int) -> Tensor:
        """Return indices as int64, or raise InputError unless they are whole numbers [B, num_tokens] in [0, codebook_size)."""
        if not isinstance(indices, Tensor) or indices.ndim != 2 or indices.shape[1] != num_tokens:
            raise InputError(
                f"indices must be [B, {num_tokens}] for this layout; got {describe(indices)}. "
                "Pass the layout (or patch_hws) that they were encoded with."
            )
        return self.check_range(indices)

    def check_range(self, indices: Tensor) -> Tensor:
        """Return indices as int64, or raise InputError unless they are whole numbers in [0, codebook_size)."""
        if not isinstance(indices, Tensor) or indices.is_floating_point() or indices.is_complex() or indices.dtype is torch.bool:
            raise InputError(f"indices must be whole numbers; got {describe(indices)}.")
        indices = indices.long()
        if indices.numel():
            low, high = (int(i) for i in indices.aminmax())
            if low < 0 or high >= self.codebook_size:
                raise InputError(
                    f"indices must be in [0, {self.codebook_size}); got values from {low} to {high}. "
                    "Were these tokens written by another tokenizer?"
                )
        return indices
