"""What every quantizer promises."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from smalto.core.errors import InputError, describe
from smalto.core.layout import TokenLayout


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
    dtype of z: after ``.to(z.dtype)``). All arithmetic is in float32, in float64 where the weights are float64.

    A vector that holds a NaN, an infinity or a number beyond 1e15 takes code 0 and is left out of loss, gradient and statistics.

    Attributes:
        codebook_size: every token is in [0, codebook_size).
        latent_dim: channels of the latents, C.
    """

    codebook_size: int
    latent_dim: int

    @abstractmethod
    def forward(
        self, latents: Tensor, *, num_stages: int | None = None, noise: Tensor | None = None
    ) -> QuantizerOutput:
        """Quantize latents [B, C, h, w], with gradients.

        Args:
            latents: floating point [B, C, h, w].
            num_stages: use this many stages only; None: all. A quantizer without stages takes None or 1.
            noise: [B, D, h, w] with D the dimension of the codes, for an estimator that wants it, in training.
        """

    @abstractmethod
    def encode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] -> tokens int64 [B, L], without gradients."""

    @abstractmethod
    def decode(self, indices: Tensor, layout: TokenLayout) -> Tensor:
        """Tokens int64 [B, L] -> quantized latents [B, C, h, w].

        Residual and multi-scale quantizers also take the tokens of the layout's first grids alone: a coarser result.

        Raises:
            InputError: a layout that is not this quantizer's, another number of tokens than the layout's, or an index that is no code's.
        """

    @abstractmethod
    def lookup(self, blocks: Sequence[Tensor]) -> Tensor:
        """Codes of tokens, in order: blocks of int64 [B, L_i], one per grid of the layout -> [B, L, D].

        D is the latents' C where one token stands for a whole vector, and the dimension of the codes where several do.
        """

    @abstractmethod
    def get_codebook(self) -> Tensor:
        """All codes: [K, D], or [G, K, D] where every grid of the layout has its own."""

    @abstractmethod
    def layout(self, height: int, width: int) -> TokenLayout:
        """The layout of the tokens of a latent map of ``height`` x ``width``."""

    def check_latents(self, latents: Tensor) -> None:
        """Raise InputError unless latents are floating point [B, c, h, w] with c = ``latent_dim``."""
        if (
            not isinstance(latents, Tensor)
            or latents.ndim != 4
            or latents.shape[1] != self.latent_dim
            or not latents.is_floating_point()
        ):
            raise InputError(
                f"latents must be floating point [B, {self.latent_dim}, h, w]; got {describe(latents)}."
            )

    def check_indices(self, indices: Tensor, num_tokens: int) -> Tensor:
        """Return indices as int64, or raise InputError unless they are whole numbers [B, num_tokens] in [0, codebook_size)."""
        if not isinstance(indices, Tensor) or indices.ndim != 2 or indices.shape[1] != num_tokens:
            raise InputError(
                f"indices must be [B, {num_tokens}] for this layout; got {describe(indices)}. "
                "Pass the layout (or patch_hws) that they were encoded with."
            )
        return self.check_range(indices)

    def check_prefix(self, indices: Tensor, layout: TokenLayout) -> list[Tensor]:
        """Return indices [B, L] as int64 blocks, one per grid of the layout; or fewer, where they are those of the first grids alone.

        Raises:
            InputError: the lengths do not fit, or an index is no code's.
        """
        length = indices.shape[1] if isinstance(indices, Tensor) and indices.ndim == 2 else -1
        num_grids = next(
            (k for k in range(1, len(layout.grids) + 1) if sum(layout.lengths[:k]) == length),
            len(layout.grids),
        )
        indices = self.check_indices(indices, sum(layout.lengths[:num_grids]))
        return list(indices.split(layout.lengths[:num_grids], dim=1))

    def check_range(self, indices: Tensor) -> Tensor:
        """Return indices as int64, or raise InputError unless they are whole numbers in [0, codebook_size)."""
        if (
            not isinstance(indices, Tensor)
            or indices.is_floating_point()
            or indices.is_complex()
            or indices.dtype is torch.bool
        ):
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
