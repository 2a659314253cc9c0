"""ProductVQ: the channels are split into heads, and every head has a code of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from smalto.core.config import over_defaults
from smalto.core.errors import ConfigError, InputError, describe
from smalto.core.layout import TokenLayout
from smalto.quantizers.base import BaseQuantizerConfig, Quantizer, QuantizerOutput
from smalto.quantizers.latents import usable
from smalto.quantizers.vector import VectorQuantizerConfig

_HEAD = VectorQuantizerConfig(latent_dim=32, codebook="ema")


class ProductVQConfig(BaseQuantizerConfig):
    """Settings of a ProductVQ; ``build()`` makes it.

    ``head`` is the quantizer of one head, for its share of the channels.
    """

    codebook_size_key: ClassVar[str] = "head.codebook_size"
    kind: Literal["product"] = "product"
    num_heads: int = Field(2, ge=1, le=1024, description="parts that the channels are split into")
    shared: bool = Field(False, description="all heads share one codebook and its projections")
    head: Annotated[VectorQuantizerConfig, over_defaults(_HEAD)] = _HEAD

    @property
    def codebook_size(self) -> int:
        return self.head.codebook_size

    @property
    def latent_dim(self) -> int:
        return self.num_heads * self.head.latent_dim

    def build(self) -> ProductVQ:
        return ProductVQ(self)

    def folded(self) -> ProductVQConfig:
        return self.model_copy(update={"head": self.head.folded()})


class ProductVQ(Quantizer):
    """Product quantization (Jégou et al. 2011): a vector of C channels gets one code per head.

    Tokens [B, heads·h·w] head by head. The loss is the mean over heads.

    Attributes:
        heads: one single-grid quantizer each; with shared codebooks the same one for all.
    """

    is_local = True

    def __init__(self, config: ProductVQConfig) -> None:
        super().__init__()
        if not isinstance(config, ProductVQConfig):
            raise ConfigError(
                f"got {describe(config)}; ProductVQ takes a ProductVQConfig. Call build() on one."
            )
        self.codebook_size = config.codebook_size
        self.latent_dim = config.latent_dim
        self.num_heads = config.num_heads
        heads = [config.head.build() for _ in range(1 if config.shared else config.num_heads)]
        self.code_dim = config.num_heads * heads[0].code_dim
        self.heads = nn.ModuleList(heads)

    def forward(
        self, latents: Tensor, *, num_stages: int | None = None, noise: Tensor | None = None
    ) -> QuantizerOutput:
        """Quantize latents [B, C, h, w]; ``noise`` is split into heads as the latents are."""
        parts = self._parts(latents)
        noises: list[Tensor | None] = [None] * self.num_heads
        if noise is not None:
            shape = latents.shape[0], self.code_dim, *latents.shape[2:]
            if not isinstance(noise, Tensor) or noise.shape != shape:
                raise InputError(f"noise must be {list(shape)}; got {describe(noise)}.")
            noises = list(noise.chunk(self.num_heads, dim=1))
        outputs = [
            head(part, num_stages=num_stages, noise=part_noise)
            for head, part, part_noise in zip(self.all_heads(), parts, noises, strict=True)
        ]
        quantized = torch.cat([out.quantized for out in outputs], dim=1)
        shape = latents.shape[0], latents.shape[2] * latents.shape[3]
        indices = torch.stack([out.indices.view(shape) for out in outputs], dim=1)
        loss = torch.stack([out.loss for out in outputs]).mean()
        return QuantizerOutput(quantized, loss, indices.flatten())

    def encode(self, latents: Tensor, layout: TokenLayout | None = None) -> Tensor:
        """Latents [B, C, h, w] -> tokens int64 [B, heads*h*w], head by head."""
        parts = self._parts(latents)
        self.check_layout(latents, layout)
        tokens = [head.encode(part) for head, part in zip(self.all_heads(), parts, strict=True)]
        return torch.cat(tokens, dim=1)

    def decode(self, indices: Tensor, layout: TokenLayout) -> Tensor:
        """Tokens int64 [B, heads*h*w] -> quantized latents [B, C, h, w]."""
        if (
            not isinstance(layout, TokenLayout)
            or len(layout.grids) != self.num_heads
            or not layout.has_equal_grids
        ):
            raise InputError(
                f"got {layout}; this quantizer decodes a TokenLayout of {self.num_heads} equal "
                "grids, one per head, such as quantizer.layout(4, 4)."
            )
        blocks = self._blocks(indices, layout)
        grid = layout.prefix(1)
        decoded = [
            head.decode(block, grid) for head, block in zip(self.all_heads(), blocks, strict=True)
        ]
        return torch.cat(decoded, dim=1)

    def lookup(self, blocks: Sequence[Tensor]) -> Tensor:
        """Token blocks int64 [B, L_i], one per head -> their codes [B, L, C/heads]."""
        if len(blocks) != self.num_heads:
            raise InputError(
                f"got {len(blocks)} blocks; this quantizer has {self.num_heads} heads. "
                "Pass one block per head."
            )
        heads = self.all_heads()
        codes = [head.lookup([block]) for head, block in zip(heads, blocks, strict=True)]
        return torch.cat(codes, dim=1)

    def layout(self, height: int, width: int) -> TokenLayout:
        return TokenLayout(((height, width),) * self.num_heads)

    def codebook(self) -> Tensor | None:
        """Return the codes of all heads as the decoder sees them: [heads, K, C/heads]."""
        codebooks = [head.codebook() for head in self.all_heads()]
        explicit = [codes for codes in codebooks if codes is not None]
        return torch.stack(explicit) if len(explicit) == len(codebooks) else None

    def token_gaps(self, latents: Tensor, tokens: Tensor, layout: TokenLayout) -> Tensor:
        parts = zip(
            self.all_heads(), self._parts(latents), self._blocks(tokens, layout), strict=True
        )
        grid = layout.prefix(1)
        return torch.cat([head.token_gaps(part, block, grid) for head, part, block in parts], dim=1)

    def all_heads(self) -> list[Quantizer]:
        heads: list[Quantizer] = list(self.heads)  # type: ignore[arg-type]
        return heads * self.num_heads if len(heads) < self.num_heads else heads

    def _blocks(self, indices: Tensor, layout: TokenLayout) -> tuple[Tensor, ...]:
        indices = self.check_indices(indices, layout.num_tokens)
        return indices.split(layout.lengths, dim=1)  # ONNX' exporter fails on chunk

    def _parts(self, latents: Tensor) -> tuple[Tensor, ...]:
        self.check_latents(latents)
        # A vector is usable as a whole or not at all: one broken channel takes all heads out.
        whole = torch.where(usable(latents).unsqueeze(1), latents, torch.nan)
        return whole.chunk(self.num_heads, dim=1)
