"""ProductVQ: the channels are cut into heads, and every head has a code of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from smalto.core.config import Config, over_defaults
from smalto.core.errors import ConfigError, InputError, describe
from smalto.core.layout import TokenLayout
from smalto.quantizers.base import Quantizer, QuantizerOutput
from smalto.quantizers.latents import usable
from smalto.quantizers.vector import VectorQuantizer, VectorQuantizerConfig

_HEAD = VectorQuantizerConfig(latent_dim=32, codebook="ema")


class ProductVQConfig(Config):
    """Settings of a ProductVQ; ``build()`` makes it. ``head`` is the quantizer of one head, for its share of the channels."""

    kind: Literal["product"] = "product"
    num_heads: int = Field(2, ge=1, le=1024, description="parts that the channels are cut into")
    shared: bool = Field(
        False, description="all heads use one codebook, and the projections around it"
    )
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
        """The same with projected codebooks as the plain ones that they fold to."""
        return self.model_copy(update={"head": self.head.folded()})


class ProductVQ(Quantizer):
    """Product quantization (Jégou et al. 2011): a vector of C channels becomes one code of C/heads channels per head.

    Tokens [B, heads·h·w] head by head. Loss: the mean over heads.

    Attributes:
        heads: one VectorQuantizer each; with shared codebooks the same one for all.
    """

    def __init__(self, config: ProductVQConfig) -> None:
        super().__init__()
        if not isinstance(config, ProductVQConfig):
            raise ConfigError(
                f"ProductVQ takes a ProductVQConfig; got {describe(config)}. Or call build() on one."
            )
        self.codebook_size, self.latent_dim, self.num_heads = (
            config.codebook_size,
            config.latent_dim,
            config.num_heads,
        )
        self.heads = nn.ModuleList(
            config.head.build() for _ in range(1 if config.shared else config.num_heads)
        )

    def forward(
        self, latents: Tensor, *, num_stages: int | None = None, noise: Tensor | None = None
    ) -> QuantizerOutput:
        """Quantize latents [B, C, h, w]; see ``Quantizer.forward``. ``noise`` is cut into heads as the latents are."""
        parts = self._parts(latents)
        noises: list[Tensor | None] = [None] * self.num_heads
        if noise is not None:
            code_dim = self._all_heads()[0].embedding.embedding_dim
            shape = latents.shape[0], self.num_heads * code_dim, *latents.shape[2:]
            if not isinstance(noise, Tensor) or noise.shape != shape:
                raise InputError(f"noise must be {list(shape)}; got {describe(noise)}.")
            noises = list(noise.split(code_dim, dim=1))
        outputs = [
            head(part, num_stages=num_stages, noise=part_noise)
            for head, part, part_noise in zip(self._all_heads(), parts, noises, strict=True)
        ]
        quantized = torch.cat([out.quantized for out in outputs], dim=1)
        indices = torch.stack(
            [
                out.indices.view(latents.shape[0], latents.shape[2] * latents.shape[3])
                for out in outputs
            ],
            dim=1,
        )
        return QuantizerOutput(
            quantized, torch.stack([out.loss for out in outputs]).mean(), indices.flatten()
        )

    def encode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] -> tokens int64 [B, heads*h*w], head by head."""
        return torch.cat(
            [
                head.encode(part)
                for head, part in zip(self._all_heads(), self._parts(latents), strict=True)
            ],
            dim=1,
        )

    def decode(self, indices: Tensor, layout: TokenLayout) -> Tensor:
        """Tokens int64 [B, heads*h*w] -> quantized latents [B, C, h, w]."""
        if (
            not isinstance(layout, TokenLayout)
            or len(layout.grids) != self.num_heads
            or len(set(layout.grids)) != 1
        ):
            raise InputError(
                f"this quantizer decodes a TokenLayout of {self.num_heads} equal grids, one per head; got {layout}."
            )
        blocks = self.check_indices(indices, layout.num_tokens).chunk(self.num_heads, dim=1)
        grid = TokenLayout(layout.grids[:1])
        return torch.cat(
            [
                head.decode(block, grid)
                for head, block in zip(self._all_heads(), blocks, strict=True)
            ],
            dim=1,
        )

    def lookup(self, blocks: Sequence[Tensor]) -> Tensor:
        """Codes of tokens: blocks of int64 [B, L_i], one per head -> [B, L, C/heads]."""
        if len(blocks) != self.num_heads:
            raise InputError(
                f"this quantizer looks up {self.num_heads} blocks, one per head; got {len(blocks)}."
            )
        return torch.cat(
            [head.lookup([block]) for head, block in zip(self._all_heads(), blocks, strict=True)],
            dim=1,
        )

    def layout(self, height: int, width: int) -> TokenLayout:
        return TokenLayout(((height, width),) * self.num_heads)

    def get_codebook(self) -> Tensor:
        """The codes of all heads as the decoder sees them: [heads, K, C/heads]."""
        return torch.stack([head.get_codebook() for head in self._all_heads()])

    def _all_heads(self) -> list[VectorQuantizer]:
        heads = [head for head in self.heads if isinstance(head, VectorQuantizer)]
        return heads * self.num_heads if len(heads) < self.num_heads else heads

    def _parts(self, latents: Tensor) -> tuple[Tensor, ...]:
        self.check_latents(latents)
        # A vector is usable as a whole or not at all: one broken channel takes all heads out.
        return torch.where(usable(latents).unsqueeze(1), latents, torch.nan).chunk(
            self.num_heads, dim=1
        )
