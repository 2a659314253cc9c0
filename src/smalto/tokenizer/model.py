"""ImageTokenizer: encoder + quantizer + decoder."""

from __future__ import annotations

import copy
import itertools
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Literal, NamedTuple, Self, overload

import torch
from pydantic import model_validator
from torch import Tensor, nn

from smalto.autoencoders import AutoencoderConfig, SimpleAutoencoderConfig
from smalto.autoencoders.layers import Upsample
from smalto.core.config import Config
from smalto.core.device import Precision
from smalto.core.errors import ConfigError, InputError, describe
from smalto.core.layout import TokenLayout, as_grids
from smalto.quantizers import MultiScaleVQ, QuantizerConfig, ResidualVQ, VectorQuantizerConfig, fold
from smalto.tokenizer import saving
from smalto.tokenizer.token_blocks import (
    BlockKind,
    DiagonalBlocks,
    PatchHws,
    join_blocks,
    layout_by_grid,
    split_blocks,
    stacked_layout,
)


class TokenizerOutput(NamedTuple):
    """Unpacks as ``reconstruction, vq_loss, indices``.

    Attributes:
        reconstruction: [B, C, H, W], near [-1, 1] but not clamped.
        vq_loss: scalar, the quantizer's loss.
        indices: int64 [B*L].
    """

    reconstruction: Tensor
    vq_loss: Tensor
    indices: Tensor


class AnyTokenizerConfig(Config, ABC):
    """Settings that describe a tokenizer: the general ones below, or those of a preset."""

    @abstractmethod
    def general(self) -> TokenizerConfig:
        """Return the settings of the same tokenizer as a TokenizerConfig."""

    @abstractmethod
    def build(self) -> ImageTokenizer:
        """Build the tokenizer, untrained."""


class TokenizerConfig(AnyTokenizerConfig):
    """Settings of an ImageTokenizer: which autoencoder, which quantizer."""

    kind: Literal["image-tokenizer"] = "image-tokenizer"
    autoencoder: AutoencoderConfig = SimpleAutoencoderConfig()
    quantizer: QuantizerConfig = VectorQuantizerConfig()

    @model_validator(mode="after")
    def _parts_fit(self) -> TokenizerConfig:
        if self.autoencoder.latent_dim != self.quantizer.latent_dim:
            raise ValueError(
                f"autoencoder.latent_dim is {self.autoencoder.latent_dim} and quantizer.latent_dim is "
                f"{self.quantizer.latent_dim}: they must be equal. Set autoencoder.latent_dim to {self.quantizer.latent_dim}, or the other."
            )
        return self

    def general(self) -> TokenizerConfig:
        return self

    def build(self) -> ImageTokenizer:
        return ImageTokenizer(self)


class ImageTokenizer(nn.Module):
    """Images [B, C, H, W] in [-1, 1] <-> tokens [B, L].

    Args:
        config: which parts; ``TokenizerConfig(...).build()`` is the usual way here.

    Attributes:
        encoder, quantize, decoder: the parts, each of which knows nothing of the others.
        stride: pixels per latent position; H and W must be multiples of it.
    """

    default_blocks: BlockKind = "whole"

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config: AnyTokenizerConfig = config
        self.in_channels = config.autoencoder.in_channels
        self.stride = config.autoencoder.stride
        self.encoder = config.autoencoder.build_encoder()
        self.quantize = config.quantizer.build()
        self.decoder = config.autoencoder.build_decoder()

    def forward(
        self, images: Tensor, *, num_stages: int | None = None, noise: Tensor | None = None
    ) -> TokenizerOutput:
        """Images [B, C, H, W] -> (reconstruction [B, C, H, W] not clamped, vq_loss scalar, indices int64 [B*L]), with gradients.

        ``num_stages`` and ``noise`` are the quantizer's: see ``Quantizer.forward``.
        """
        self.check_images(images)
        quantized, vq_loss, indices = self.quantize(
            self._latents(images), num_stages=num_stages, noise=noise
        )
        return TokenizerOutput(self.decoder(quantized).to(images.dtype), vq_loss, indices)

    @torch.no_grad()
    def encode(self, images: Tensor, layout: TokenLayout | None = None) -> Tensor:
        """Images [B, C, H, W] in [-1, 1] -> tokens int64 [B, L].

        Args:
            images: with sides that the stride divides.
            layout: of a multi-scale tokenizer: other scales than ``self.layout(H, W)``; the last one must be the whole latent map.

        Raises:
            InputError: not floating point, another rank or number of channels, sides that the stride does not divide, or a layout that is
                not this tokenizer's.
        """
        self.check_images(images)
        if isinstance(self.quantize, MultiScaleVQ):
            return self.quantize.encode(self._latents(images), layout)
        if layout is not None and layout != self.layout(*images.shape[2:]):
            raise InputError(
                f"this tokenizer has no choice of grids: these images give {self.layout(*images.shape[2:])}; got {layout}."
            )
        return self.quantize.encode(self._latents(images))

    def decode(self, tokens: Tensor, layout: TokenLayout, *, clamp: bool = True) -> Tensor:
        """Tokens int64 [B, L] -> images [B, C, H, W], clamped to [-1, 1] unless ``clamp=False``.

        Args:
            tokens: what ``encode`` gave. Of residual and multi-scale tokenizers the tokens of the first grids alone give a coarser image.
            layout: ``tokenizer.layout(height, width)`` of the images that were encoded.

        Raises:
            InputError: a token outside the codebook, or another number of tokens than the layout's.
        """
        quantized = self.quantize.decode(tokens, layout)
        images = self.decoder(quantized.to(_dtype(self.decoder))).to(quantized.dtype)
        return images.clamp(-1, 1) if clamp else images

    def for_inference(self, precision: Precision = "float32") -> Self:
        """A copy that encodes and decodes faster and does not train.

        Args:
            precision: ``"float32"`` computes the same in another order, so that tokens differ at ties only. ``"bf16"`` runs encoder and
                decoder in bfloat16; the quantizer stays in float32. Images go in and come out as float32 either way.
        """
        if precision not in ("float32", "bf16"):
            raise ConfigError(f'precision must be "float32" or "bf16"; got {precision!r}.')
        fast = copy.deepcopy(self).eval().requires_grad_(False)
        for module in fast.decoder.modules():
            if isinstance(module, Upsample):
                module.fold()
        for part in (fast.encoder, fast.decoder):
            part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            if precision == "bf16":
                part.to(torch.bfloat16)
        return fast

    def layout(self, height: int, width: int) -> TokenLayout:
        """The layout of the tokens of an image of ``height`` x ``width`` pixels."""
        if height < 1 or width < 1 or height % self.stride or width % self.stride:
            fit = f"{max(height // self.stride, 1) * self.stride} x {max(width // self.stride, 1) * self.stride}"
            raise InputError(
                f"height and width must be multiples of {self.stride}; got {height} x {width}. "
                f"Crop or resize the images, for example to {fit}."
            )
        return self.quantize.layout(height // self.stride, width // self.stride)

    def get_codebook(self) -> Tensor:
        """All codes: [K, D], or [G, K, D] where every grid of the layout has its own."""
        return self.quantize.get_codebook()

    def img_to_idxBl(
        self, imgs: Tensor, patch_hws: PatchHws | None = None, *, blocks: BlockKind | None = None
    ) -> list[Tensor]:
        """Images [B, C, H, W] in [-1, 1] -> blocks of tokens, a list of int64 [B, L_i], without gradients.

        Args:
            imgs: as for ``encode``.
            patch_hws: scales for this call, as whole numbers or (rows, columns); the last one must be the whole latent map. None: the
                tokenizer's own, in proportion to the images.
            blocks: ``"whole"``: one block per grid of the layout: one per scale, or one in all for a single-scale tokenizer.
                ``"halves"``: the upper rows [0, h//2) and the rest, so that ``torch.cat(blocks, 1)`` is the whole map in raster order.
                ``"diagonal"``: the upper left and the lower right quadrant only (the published sketch); these cannot be decoded.
                None: this tokenizer's own kind (``SimpleVQVAE``: halves; others: whole).

        Raises:
            InputError: an unknown kind, halves of a layout of several grids, or scales that do not fit.
        """
        if isinstance(patch_hws, str):
            raise InputError(
                f"the second argument is patch_hws; say img_to_idxBl(images, blocks={patch_hws!r})."
            )
        self.check_images(imgs)
        layout = (
            self.layout(*imgs.shape[2:]) if patch_hws is None else TokenLayout(as_grids(patch_hws))
        )
        return split_blocks(self.encode(imgs, layout), layout, blocks or self.default_blocks)

    def idxBl_to_var_input(self, idx_Bl: list[Tensor], patch_hws: PatchHws | None = None) -> Tensor:
        """BlockKind of tokens -> the input of the autoregressive model that follows.

        Of a multi-scale tokenizer, as in VAR: for every scale but the last what the decoder would be given so far, averaged down to
        the next scale's grid: [B, L - L_1, C]. Of others: the codes in order, [B, L, D]; D is ``latent_dim``, for residual and product
        quantizers the dimension of one stage's or head's codes.

        Args:
            idx_Bl: what ``img_to_idxBl`` gave.
            patch_hws: of a multi-scale tokenizer: (rows, columns) of each scale. None: its configured ones.
        """
        tokens = join_blocks(idx_Bl)
        if isinstance(self.quantize, MultiScaleVQ):
            return self.quantize.var_input(tokens, self._layout_of(idx_Bl, patch_hws))
        return self.quantize.lookup(idx_Bl)

    @overload
    def idxBl_to_img(
        self,
        idx_Bl: list[Tensor],
        patch_hws: PatchHws | None = None,
        last_one: Literal[True] = True,
        *,
        clamp: bool = True,
    ) -> Tensor: ...

    @overload
    def idxBl_to_img(
        self,
        idx_Bl: list[Tensor],
        patch_hws: PatchHws | None = None,
        *,
        last_one: Literal[False],
        clamp: bool = True,
    ) -> list[Tensor]: ...

    def idxBl_to_img(
        self,
        idx_Bl: list[Tensor],
        patch_hws: PatchHws | None = None,
        last_one: bool = True,
        *,
        clamp: bool = True,
    ) -> Tensor | list[Tensor]:
        """BlockKind of tokens -> images [B, C, H, W], clamped to [-1, 1] unless ``clamp=False``.

        Args:
            idx_Bl: what ``img_to_idxBl`` gave: blocks that lie below one another, or one block per grid of the layout. Of a residual or
                multi-scale tokenizer the first ones alone give a coarser image.
            patch_hws: (rows, columns) of each block; where ``idx_Bl`` holds the first scales only, of all scales nevertheless. None:
                the configured scales; for other tokenizers every map is taken to be square.
            last_one: False gives the list of images after each grid of the layout.

        Raises:
            InputError: the lengths do not fit, or diagonal blocks, which leave out half of the image. They are known by the list that
                ``img_to_idxBl`` gave; put into another list they cannot be told from halves of a smaller map.
        """
        tokens = join_blocks(idx_Bl)
        if isinstance(idx_Bl, DiagonalBlocks):
            raise InputError(
                'diagonal blocks hold half of the image and cannot be decoded. Use img_to_idxBl(images, blocks="halves").'
            )
        layout = self._layout_of(idx_Bl, patch_hws)
        if last_one:
            return self.decode(tokens, layout, clamp=clamp)
        return self.decode_each(tokens, layout, clamp=clamp)

    def decode_each(
        self, tokens: Tensor, layout: TokenLayout, *, clamp: bool = True
    ) -> list[Tensor]:
        """The images [B, C, H, W] that the first grid's tokens make, the first two grids', and so on to all of ``tokens`` [B, L].

        Of a tokenizer whose grids say nothing alone (product) there is one image.
        """
        last = self.decode(tokens, layout, clamp=clamp)
        earlier = (
            [n for n in itertools.accumulate(layout.lengths) if n < tokens.shape[1]]
            if self.is_progressive
            else []
        )
        return [*(self.decode(tokens[:, :n], layout, clamp=clamp) for n in earlier), last]

    @property
    def is_progressive(self) -> bool:
        """Whether the tokens of the first grids alone make an image: residual and multi-scale tokenizers."""
        return isinstance(self.quantize, (MultiScaleVQ, ResidualVQ))

    def _layout_of(self, idx_Bl: list[Tensor], patch_hws: PatchHws | None) -> TokenLayout:
        lengths = [block.shape[1] for block in idx_Bl]
        if isinstance(self.quantize, MultiScaleVQ):
            return layout_by_grid(lengths, patch_hws, TokenLayout(self.quantize.scales))
        single = len(self.quantize.layout(1, 1).grids) == 1
        return stacked_layout(lengths, patch_hws) if single else layout_by_grid(lengths, patch_hws)

    def check_images(self, images: Tensor) -> None:
        """Raise InputError unless images are floating point [B, in_channels, H, W] with sides that the stride divides."""
        if (
            not isinstance(images, Tensor)
            or images.ndim != 4
            or images.shape[1] != self.in_channels
        ):
            raise InputError(
                f"images must be a tensor [B, {self.in_channels}, H, W]; got {describe(images)}. "
                "One image [C, H, W] becomes a batch with images[None]."
            )
        if not images.is_floating_point():
            raise InputError(
                f"images must be floating point in [-1, 1]; got {images.dtype}. Convert with images.float() / 127.5 - 1."
            )
        weights = _dtype(self.encoder)
        if images.dtype not in (weights, torch.float32) and not torch.is_autocast_enabled(
            images.device.type
        ):
            raise InputError(
                f"images are {images.dtype} and the tokenizer is {weights}. Convert with images.to({weights})."
            )
        self.layout(*images.shape[2:])

    def _latents(self, images: Tensor) -> Tensor:
        return self.encoder(images.to(_dtype(self.encoder)))

    def save(self, folder: str | Path) -> None:
        """Write ``model.safetensors`` and ``config.json`` into ``folder``; ``smalto.load(folder)`` reads them."""
        saving.write_tokenizer(Path(folder), self.config, self.state_dict())

    def fingerprint(self) -> str:
        """Return the SHA-256 of configuration and weights, in hexadecimal: equal exactly if the tokens mean the same."""
        return saving.fingerprint(self.config, self.state_dict())

    def folded(self) -> ImageTokenizer:
        """A copy with projected codebooks (SimVQ) as the plain ones of the same codes: same tokens, for files that outlive training."""
        tokenizer = fold(self)
        if isinstance(self.config, TokenizerConfig):
            tokenizer.config = self.config.model_copy(
                update={"quantizer": self.config.quantizer.folded()}
            )
        return tokenizer


def _dtype(part: nn.Module) -> torch.dtype:
    return next(part.parameters()).dtype
