"""The interface of every quantizer, and of its settings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from smalto.core.config import Config
from smalto.core.errors import InputError, describe
from smalto.core.layout import TokenLayout
from smalto.quantizers.codebook import Codebook


class BaseQuantizerConfig(Config, ABC):
    """Settings of a quantizer.

    Attributes:
        codebook_size_key: the dotted key of the number of codes inside these settings.
        latent_grid: (h, w) of the latent map that the settings are made for; None: any.
    """

    kind: str
    codebook_size_key: ClassVar[str] = "codebook_size"

    @property
    def latent_grid(self) -> tuple[int, int] | None:
        return None

    @abstractmethod
    def build(self) -> Quantizer:
        """Build the quantizer, untrained."""

    def folded(self) -> Self:
        """Return the settings with projected codebooks (SimVQ) as the plain ones they fold to."""
        return self


class QuantizerOutput(NamedTuple):
    """Unpacks as ``quantized, loss, indices``.

    Attributes:
        quantized: [B, C, h, w] in the dtype of the latents; the value is exactly the codes', the
            gradient is the estimator's.
        loss: scalar, at least float32 (float64 for float64 latents); the same definition in
            training and evaluation.
        indices: int64 [B*L], image by image in token order; ``indices.view(B, -1)`` gives tokens.
    """

    quantized: Tensor
    loss: Tensor
    indices: Tensor


class Quantizer(nn.Module, ABC):
    """Latents [B, C, h, w] -> indices -> latents.

    ``forward`` is pure: it changes no parameter, buffer or random state. Everything that changes a
    codebook outside the optimizer belongs to ``CodebookUpdater``. ``decode(encode(z), layout)`` is
    bitwise ``forward(z).quantized`` (after ``.to(z.dtype)``, the dtype of the latter). Arithmetic
    is in float32, or in float64 if the weights are float64.

    A vector with a NaN, an infinity or a value beyond 1e15 gets code 0 and is left out of loss,
    gradient and statistics.

    Attributes:
        codebook_size: every token is in [0, codebook_size); a Python integer.
        latent_dim: channels of the latents, C.
        code_dim: dimension of one code, D.
        is_progressive: whether the tokens of the first grids alone decode to a coarser result.
        is_local: whether a token depends on the latents at its own position alone.
        may_leave_parameters_unused: whether a forward pass may leave some parameters without a
            gradient (DistributedDataParallel must then search for them).
    """

    codebook_size: int
    latent_dim: int
    code_dim: int
    is_progressive = False
    is_local = False
    may_leave_parameters_unused = False

    @abstractmethod
    def forward(
        self, latents: Tensor, *, num_stages: int | None = None, noise: Tensor | None = None
    ) -> QuantizerOutput:
        """Quantize latents [B, C, h, w], with gradients.

        Args:
            latents: floating point [B, C, h, w].
            num_stages: use only this many stages; None: all. A quantizer without stages takes None
                or 1.
            noise: [B, code_dim, h, w], for an estimator that uses it, in training.
        """

    @abstractmethod
    def encode(self, latents: Tensor, layout: TokenLayout | None = None) -> Tensor:
        """Latents [B, C, h, w] -> tokens int64 [B, L], without gradients.

        Args:
            latents: floating point [B, C, h, w].
            layout: grids other than ``self.layout(h, w)``, for a quantizer that has a choice.

        Raises:
            InputError: a layout that is not this quantizer's.
        """

    @abstractmethod
    def decode(self, indices: Tensor, layout: TokenLayout) -> Tensor:
        """Tokens int64 [B, L] -> quantized latents [B, C, h, w].

        A progressive quantizer also takes the tokens of the layout's first grids alone.

        Raises:
            InputError: a layout that is not this quantizer's, a number of tokens other than the
                layout's, or an index outside the codebook.
        """

    @abstractmethod
    def lookup(self, blocks: Sequence[Tensor]) -> Tensor:
        """Token blocks int64 [B, L_i], one per grid of the layout -> codes in order [B, L, D].

        D is C if one token stands for a whole vector, otherwise ``code_dim``.
        """

    @abstractmethod
    def layout(self, height: int, width: int) -> TokenLayout:
        """Return the layout of the tokens of a latent map of ``height`` x ``width``."""

    @abstractmethod
    def token_gaps(self, latents: Tensor, tokens: Tensor, layout: TokenLayout) -> Tensor:
        """Return by how much each token misses the nearest code, float64 [B, L].

        0 means that the token is the nearest code of its vector; see ``CodeSpace.vector_gaps`` for
        the unit. Later stages and scales are computed from the given tokens of the earlier ones, so
        one token that a tie decided otherwise does not make those after it look wrong.
        """

    def codebook(self) -> Tensor | None:
        """Return all codes, [K, D], or [G, K, D] if every grid of the layout has its own.

        None if the codes are implicit.
        """
        return None

    def codebook_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that hold explicit codes; empty if there are none."""
        codebooks = [module for module in self.modules() if isinstance(module, Codebook)]
        return [parameter for codebook in codebooks for parameter in codebook.parameters()]

    @property
    def configured_layout(self) -> TokenLayout | None:
        """The layout that the settings name; None if it follows from the latents alone."""
        return None

    @torch.no_grad()
    def generator_input(self, blocks: Sequence[Tensor], layout: TokenLayout | None) -> Tensor:
        """Token blocks [B, L_i] -> the input of the autoregressive model that follows, [B, L, D].

        The codes of the tokens in order; multi-scale quantizers return what VAR's model takes.

        Args:
            blocks: one per grid of the layout.
            layout: of the tokens; None if ``configured_layout`` is None.
        """
        return self.lookup(blocks)

    @torch.no_grad()
    def token_colors(self, tokens: Tensor, grid: int = 0) -> Tensor:
        """Return a color for each token [L] of grid number ``grid``, uint8 [L, 3].

        Similar codes have similar colors: the three main directions of all codes, or of the codes
        of these tokens if codes are implicit.
        """
        codes = self.codebook()
        if codes is None:
            tokens, indices = tokens.unique(return_inverse=True)
            grids = self.layout(1, 1).grids
            blocks = [
                tokens[None] if number == grid else tokens[None, :0] for number in range(len(grids))
            ]
            return color_codes(self.lookup(blocks)[0])[indices]
        return color_codes(codes[grid] if codes.ndim == 3 else codes)[tokens]

    def check_latents(self, latents: Tensor) -> None:
        """Raise InputError unless latents are floating point [B, latent_dim, h, w]."""
        if (
            not isinstance(latents, Tensor)
            or latents.ndim != 4
            or latents.shape[1] != self.latent_dim
            or not latents.is_floating_point()
        ):
            raise InputError(
                f"latents must be floating point [B, {self.latent_dim}, h, w]; "
                f"got {describe(latents)}."
            )

    def check_layout(self, latents: Tensor, layout: TokenLayout | None) -> None:
        """Raise InputError if a layout is given that is not the one of these latents."""
        if layout is not None and layout != self.layout(*latents.shape[2:]):
            raise InputError(
                f"this tokenizer has no choice of grids: these images give "
                f"{self.layout(*latents.shape[2:])}; got {layout}. Leave out patch_hws."
            )

    def check_indices(self, indices: Tensor, num_tokens: int) -> Tensor:
        """Return indices as int64.

        Raises:
            InputError: they are not integers [B, num_tokens] in [0, codebook_size).
        """
        if not isinstance(indices, Tensor) or indices.ndim != 2 or indices.shape[1] != num_tokens:
            raise InputError(
                f"indices must be [B, {num_tokens}] for this layout; got {describe(indices)}. "
                "Pass the layout (or patch_hws) that they were encoded with."
            )
        return self.check_range(indices)

    def check_prefix(self, indices: Tensor, layout: TokenLayout) -> list[Tensor]:
        """Return indices [B, L] as int64 token blocks, one per grid of the layout.

        Fewer if the indices are those of the first grids alone.

        Raises:
            InputError: the lengths do not fit, or an index is outside the codebook.
        """
        is_matrix = isinstance(indices, Tensor) and indices.ndim == 2
        length = indices.shape[1] if is_matrix else -1
        every = len(layout.grids)
        fitting = (k for k in range(1, every + 1) if sum(layout.lengths[:k]) == length)
        num_grids = next(fitting, every)
        indices = self.check_indices(indices, sum(layout.lengths[:num_grids]))
        return list(indices.split(layout.lengths[:num_grids], dim=1))

    def check_range(self, indices: Tensor) -> Tensor:
        """Return indices as int64.

        Raises:
            InputError: they are not integers in [0, codebook_size).
        """
        if (
            not isinstance(indices, Tensor)
            or indices.is_floating_point()
            or indices.is_complex()
            or indices.dtype is torch.bool
        ):
            raise InputError(f"indices must be integers; got {describe(indices)}.")
        indices = indices.long()
        if is_exporting() or not indices.numel():  # an exported graph cannot branch on values
            return indices
        low, high = (int(i) for i in indices.aminmax())
        if low < 0 or high >= self.codebook_size:
            raise InputError(
                f"indices must be in [0, {self.codebook_size}); got values from {low} to {high}. "
                "Were these tokens written by another tokenizer?"
            )
        return indices


def is_exporting() -> bool:
    """Return whether torch.export is tracing."""
    compiler = torch.compiler
    return hasattr(compiler, "is_exporting") and compiler.is_exporting()  # not in torch 2.6


def color_codes(codes: Tensor) -> Tensor:
    """Return one color per code, uint8 [K, 3], for codes [K, D].

    Similar codes have similar colors.
    """
    centered = codes.detach().cpu().float().clamp(-1e9, 1e9)  # whose products are finite
    centered = centered - centered.mean(dim=0)
    if centered.shape[1] < 3:
        centered = nn.functional.pad(centered, (0, 3 - centered.shape[1]))
    _, _, directions = torch.linalg.svd(centered, full_matrices=False)  # the main directions
    coordinates = torch.zeros(len(centered), 3)
    coordinates[:, : len(directions[:3])] = centered @ directions[:3].T
    # Ranks spread the colors evenly, whatever the distances.
    ranks = coordinates.argsort(dim=0).argsort(dim=0).float() / max(1, len(coordinates) - 1)
    return (40 + 200 * ranks).to(torch.uint8)
