"""ImageTokenizer: encoder + quantizer + decoder."""

from __future__ import annotations

import copy
import itertools
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple, Self, overload

import torch
from pydantic import model_validator
from torch import Tensor, nn

from smalto.autoencoders import AutoencoderConfig, SimpleAutoencoderConfig
from smalto.autoencoders.layers import Upsample
from smalto.autoencoders.locality import input_range, is_local, run_in_tiles
from smalto.core import model_files
from smalto.core.config import Config
from smalto.core.device import Precision
from smalto.core.errors import ConfigError, InputError, describe
from smalto.core.identity import TokenizerIdentity
from smalto.core.layout import TokenLayout, as_grids
from smalto.quantizers import QuantizerConfig, VectorQuantizerConfig, fold
from smalto.tokenizer.hub import check_repository, local_folder, upload, write_card
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
    """Output of a tokenizer; unpacks as ``reconstruction, vq_loss, indices``.

    Attributes:
        reconstruction: [B, C, H, W], near [-1, 1] but not clamped.
        vq_loss: scalar, the quantizer's loss.
        indices: int64 [B*L].
    """

    reconstruction: Tensor
    vq_loss: Tensor
    indices: Tensor


class AnyTokenizerConfig(Config, ABC):
    """Settings of a tokenizer: those of a TokenizerConfig, or those of a preset."""

    kind: str

    @property
    def quantizer_kind(self) -> str:
        """The kind of the quantizer, or the name of a preset."""
        return self.kind

    @abstractmethod
    def general(self) -> TokenizerConfig:
        """Return the settings of the same tokenizer as a TokenizerConfig."""

    def folded(self) -> AnyTokenizerConfig:
        """Return the settings with projected codebooks as the plain ones that they fold to."""
        return self

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
                f"got autoencoder.latent_dim={self.autoencoder.latent_dim} and "
                f"quantizer.latent_dim={self.quantizer.latent_dim}; they must be equal. "
                f"Set autoencoder.latent_dim={self.quantizer.latent_dim}, or "
                f"quantizer.latent_dim={self.autoencoder.latent_dim}."
            )
        return self

    @property
    def quantizer_kind(self) -> str:
        return self.quantizer.kind

    def general(self) -> TokenizerConfig:
        return self

    def folded(self) -> TokenizerConfig:
        return self.model_copy(update={"quantizer": self.quantizer.folded()})

    def build(self) -> ImageTokenizer:
        return ImageTokenizer(self)


class ImageTokenizer(nn.Module):
    """Tokenizer of images: [B, C, H, W] in [-1, 1] <-> tokens [B, L].

    Args:
        config: settings of the parts; usually built by ``TokenizerConfig(...).build()``.

    Attributes:
        encoder, quantize, decoder: the parts, independent of one another.
        stride: pixels per latent position; H and W must be multiples of it.
    """

    default_blocks: BlockKind = "whole"
    read_folder: ClassVar[Callable[[str | Path], ImageTokenizer]]  # set by loading.py

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
        """Reconstruct images [B, C, H, W], with gradients.

        Returns:
            reconstruction [B, C, H, W] (not clamped), vq_loss (scalar), indices int64 [B*L].

        ``num_stages`` and ``noise`` are the quantizer's: see ``Quantizer.forward``.
        """
        self.check_images(images)
        quantized, vq_loss, indices = self.quantize(
            self.latents(images), num_stages=num_stages, noise=noise
        )
        return TokenizerOutput(self.decoder(quantized).to(images.dtype), vq_loss, indices)

    @torch.no_grad()
    def encode(self, images: Tensor, layout: TokenLayout | None = None) -> Tensor:
        """Images [B, C, H, W] in [-1, 1] -> tokens int64 [B, L].

        Args:
            images: floating point; H and W are multiples of ``stride``.
            layout: scales other than ``self.layout(H, W)``, for a multi-scale tokenizer. The last
                one must be the whole latent map.

        Raises:
            InputError: the images are not floating point, have another rank or number of channels,
                or have sides that the stride does not divide; or the layout is not this
                tokenizer's.
        """
        self.check_images(images)
        return self.quantize.encode(self.tiled_latents(images), layout)

    @torch.no_grad()
    def token_gaps(self, images: Tensor, tokens: Tensor, layout: TokenLayout) -> Tensor:
        """Return by how much tokens [B, L] of images miss the nearest codes, float64 [B, L].

        0 for tokens that ``encode`` returns, about 1e-7 for ties that rounding decides; see
        ``Quantizer.token_gaps``.
        """
        self.check_images(images)
        return self.quantize.token_gaps(self.tiled_latents(images), tokens, layout)

    def decode(self, tokens: Tensor, layout: TokenLayout, *, clamp: bool = True) -> Tensor:
        """Tokens int64 [B, L] -> images [B, C, H, W], clamped to [-1, 1] unless ``clamp=False``.

        Args:
            tokens: the result of ``encode``. For residual and multi-scale tokenizers the tokens of
                the first grids alone give a coarser image.
            layout: ``tokenizer.layout(height, width)`` of the encoded images.

        Raises:
            InputError: a token is outside the codebook, or the number of tokens is not the
                layout's.
        """
        return self.decode_latents(self.quantize.decode(tokens, layout), clamp=clamp)

    def decode_latents(self, quantized: Tensor, *, clamp: bool = True) -> Tensor:
        """Quantized latents [B, C, h, w] -> images [B, C, H, W], clamped as by ``decode``."""
        images = run_in_tiles(
            self.decoder, quantized.to(_dtype(self.decoder)), quantized.dtype, up=self.stride
        )
        return images.clamp_(-1, 1) if clamp else images

    def for_inference(self, precision: Precision = "float32") -> Self:
        """Return a copy that encodes and decodes faster and cannot be trained.

        Args:
            precision: ``"float32"`` computes the same in another order, so tokens differ at ties
                only. ``"bf16"`` runs encoder and decoder in bfloat16; the quantizer stays in
                float32. Images are float32 as input and output in both cases.

        Raises:
            ConfigError: an unknown precision.
        """
        if precision not in ("float32", "bf16"):
            raise ConfigError(f'got precision={precision!r}; expected "float32" or "bf16".')
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
        """Return the layout of the tokens of an image of ``height`` x ``width`` pixels.

        Raises:
            InputError: a side is not a multiple of ``stride``.
        """
        if height < 1 or width < 1 or height % self.stride or width % self.stride:
            rows = max(height // self.stride, 1)
            columns = max(width // self.stride, 1)
            raise InputError(
                f"got images of {height} x {width} pixels; height and width must be multiples of "
                f"{self.stride}. Crop or resize the images, for example to "
                f"{rows * self.stride} x {columns * self.stride}."
            )
        return self.quantize.layout(height // self.stride, width // self.stride)

    def get_codebook(self) -> Tensor | None:
        """Return all codes, [K, D], or [G, K, D] if every grid of the layout has its own.

        None if the codes are implicit.
        """
        return self.quantize.codebook()

    def identity(self) -> TokenizerIdentity:
        """Return the identity that distinguishes this tokenizer's tokens from those of others."""
        kind = self.config.quantizer_kind
        return TokenizerIdentity(self.fingerprint(), kind, self.quantize.codebook_size)

    def img_to_idxBl(
        self, imgs: Tensor, patch_hws: PatchHws | None = None, *, blocks: BlockKind | None = None
    ) -> list[Tensor]:
        """Images [B, C, H, W] in [-1, 1] -> token blocks, a list of int64 [B, L_i].

        No gradient flows.

        Args:
            imgs: as for ``encode``.
            patch_hws: scales for this call, as integers or (rows, columns). The last one must be
                the whole latent map. None: the tokenizer's own, in proportion to the images.
            blocks: ``"whole"``: one token block per grid of the layout, so one per scale, or a
                single one for a single-scale tokenizer.
                ``"halves"``: the upper rows [0, h//2) and the rest, so that ``torch.cat(blocks,
                1)`` is the whole map in raster order.
                ``"diagonal"``: the upper left and the lower right quadrant only (the published
                sketch); these cannot be decoded.
                None: this tokenizer's own kind (``SimpleVQVAE``: halves; others: whole).

        Raises:
            InputError: an unknown kind, halves of a layout of several grids, or scales that do not
                fit.
        """
        if isinstance(patch_hws, str):
            raise InputError(
                f"got patch_hws={patch_hws!r}; expected scales. "
                f"Use img_to_idxBl(images, blocks={patch_hws!r})."
            )
        self.check_images(imgs)
        layout = (
            self.layout(*imgs.shape[2:]) if patch_hws is None else TokenLayout(as_grids(patch_hws))
        )
        return split_blocks(self.encode(imgs, layout), layout, blocks or self.default_blocks)

    def idxBl_to_var_input(self, idx_Bl: list[Tensor], patch_hws: PatchHws | None = None) -> Tensor:
        """Token blocks -> the input of the autoregressive model.

        For a multi-scale tokenizer it is that of VAR, [B, L - L_1, C]: for every scale but the
        last, the input of the decoder so far, averaged down to the grid of the next scale. For
        others it is the codes in order, [B, L, D]. D is ``latent_dim``; for residual and product
        quantizers it is the dimension of the codes of one stage or head.

        Args:
            idx_Bl: the result of ``img_to_idxBl``.
            patch_hws: (rows, columns) of each scale, for a multi-scale tokenizer. None: its
                configured scales.
        """
        join_blocks(idx_Bl)  # checks them
        needs_layout = self.quantize.configured_layout is not None
        layout = self._layout_of(idx_Bl, patch_hws) if needs_layout else None
        return self.quantize.generator_input(idx_Bl, layout)

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
        """Token blocks -> images [B, C, H, W], clamped to [-1, 1] unless ``clamp=False``.

        Args:
            idx_Bl: the result of ``img_to_idxBl``: token blocks that are stacked vertically, or one
                per grid of the layout. For a residual or multi-scale tokenizer the first ones alone
                give a coarser image.
            patch_hws: (rows, columns) of each token block. If ``idx_Bl`` holds the first scales
                only, they are still those of all scales. None: the configured scales; other
                tokenizers assume that every map is square.
            last_one: if False, return the list of images after each grid of the layout.

        Raises:
            InputError: the lengths do not fit, or the token blocks are diagonal, which leave out
                half of the image. They are recognized by the list type that ``img_to_idxBl``
                returns. In another list they cannot be distinguished from halves of a smaller map.
        """
        tokens = join_blocks(idx_Bl)
        if isinstance(idx_Bl, DiagonalBlocks):
            raise InputError(
                "got diagonal blocks; they hold half of the image and cannot be decoded. "
                'Use img_to_idxBl(images, blocks="halves").'
            )
        layout = self._layout_of(idx_Bl, patch_hws)
        if last_one:
            return self.decode(tokens, layout, clamp=clamp)
        return self.decode_each(tokens, layout, clamp=clamp)

    def decode_each(
        self, tokens: Tensor, layout: TokenLayout, *, clamp: bool = True
    ) -> list[Tensor]:
        """Return the images after each grid: a list of [B, C, H, W].

        The first one is decoded from the tokens of the first grid, the next one from those of the
        first two grids, and the last one from all ``tokens`` [B, L]. A tokenizer that is not
        progressive, such as a product quantizer, gives one image only.
        """
        last = self.decode(tokens, layout, clamp=clamp)
        earlier = (
            [n for n in itertools.accumulate(layout.lengths) if n < tokens.shape[1]]
            if self.is_progressive
            else []
        )
        return [*(self.decode(tokens[:, :n], layout, clamp=clamp) for n in earlier), last]

    @property
    def receptive_field(self) -> int | None:
        """Side in pixels of the square of the image that a token depends on.

        None if it depends on the whole image.
        """
        if not self.is_local:
            return None
        first, last = input_range(self.encoder, 0, 0)
        return last - first + 1

    @property
    def is_local(self) -> bool:
        """Whether each token depends on a bounded part of the image, its receptive field.

        The tokens of a part of an image are then those of the whole, away from the part's borders.
        This needs an autoencoder without attention and without statistics over the whole map, and
        a quantizer that looks at one position at a time.
        """
        return self.quantize.is_local and is_local(self.encoder) and is_local(self.decoder)

    @property
    def has_decoder(self) -> bool:
        """Whether tokens become images; some weights were published without a decoder."""
        return next(self.decoder.parameters(), None) is not None

    @property
    def is_progressive(self) -> bool:
        """Whether the tokens of the first grids alone decode to an image.

        This holds for residual and multi-scale tokenizers.
        """
        return self.quantize.is_progressive

    def _layout_of(self, idx_Bl: list[Tensor], patch_hws: PatchHws | None) -> TokenLayout:
        lengths = [block.shape[1] for block in idx_Bl]
        configured = self.quantize.configured_layout
        if configured is None and len(self.quantize.layout(1, 1).grids) == 1:
            return stacked_layout(lengths, patch_hws)
        return layout_by_grid(lengths, patch_hws, configured)

    def check_images(self, images: Tensor) -> None:
        """Raise InputError unless images are floating point [B, in_channels, H, W].

        H and W must be multiples of ``stride``.
        """
        if (
            not isinstance(images, Tensor)
            or images.ndim != 4
            or images.shape[1] != self.in_channels
        ):
            raise InputError(
                f"got {describe(images)}; images must be a tensor [B, {self.in_channels}, H, W]. "
                "Make a batch of one image [C, H, W] with images[None]."
            )
        if not images.is_floating_point():
            raise InputError(
                f"got {images.dtype}; images must be floating point in [-1, 1]. "
                "Convert with images.float() / 127.5 - 1."
            )
        weights = _dtype(self.encoder)
        is_expected = images.dtype in (weights, torch.float32)
        if not is_expected and not torch.is_autocast_enabled(images.device.type):
            raise InputError(
                f"got images of {images.dtype}; the tokenizer is {weights}. "
                f"Convert with images.to({weights})."
            )
        self.layout(*images.shape[2:])

    def latents(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] in [-1, 1] -> latents [B, D, h, w], in the encoder's precision."""
        return self.encoder(images.to(_dtype(self.encoder)))

    def tiled_latents(self, images: Tensor) -> Tensor:
        """Return ``latents(images)``; a local encoder runs on tiles of a large image in turn.

        Memory then grows with the tile and not with the image.
        """
        dtype = _dtype(self.encoder)
        return run_in_tiles(self.encoder, images.to(dtype), dtype, down=self.stride)

    def save(self, folder: str | Path) -> None:
        """Write ``model.safetensors`` and ``config.json`` into ``folder``.

        ``smalto.load(folder)`` reads them.
        """
        model_files.write_model(Path(folder), self.config, self.state_dict())

    @classmethod
    def from_pretrained(
        cls,
        folder_or_repo: str | Path,
        *,
        revision: str | None = None,
        token: str | None = None,
    ) -> ImageTokenizer:
        """Load a tokenizer from a folder or from the Hugging Face Hub, in evaluation mode.

        Args:
            folder_or_repo: a folder or name as for ``smalto.load``, which needs neither a network
                nor huggingface_hub; or a repository ``OWNER/NAME`` (extra ``hub``).
            revision: branch, tag or commit of the repository.
            token: for a private repository; default: HF_TOKEN, or what ``hf auth login`` stored.

        Raises:
            RunError: the repository cannot be downloaded, or as ``smalto.load``.
            MissingExtra: huggingface_hub is not installed.
        """
        return cls.read_folder(local_folder(folder_or_repo, revision, token))

    def save_pretrained(
        self, folder: str | Path, *, run: str | Path | None = None, license: str = "unknown"
    ) -> None:
        """Write the files of ``save`` and a model card, ``README.md``: the layout of the hub.

        Args:
            folder: to write into.
            run: folder of the run whose metrics the card shows; None: a card without metrics.
            license: identifier of the hub, such as ``"apache-2.0"``.

        Raises:
            DataError: ``run`` holds no metrics.
        """
        folder = Path(folder)
        self.save(folder)
        facts = {
            "quantizer": self.config.quantizer_kind,
            "codes": f"{self.quantize.codebook_size:,}",
            "pixels per position": f"{self.stride} x {self.stride}",
            "parameters": f"{sum(p.numel() for p in self.parameters()):,}",
            "fingerprint": self.fingerprint(),
        }
        write_card(folder, facts, run=run, license=license)

    def push_to_hub(
        self,
        repo: str,
        *,
        run: str | Path | None = None,
        license: str = "unknown",
        private: bool = False,
        message: str = "Upload a tokenizer of smalto",
        token: str | None = None,
    ) -> str:
        """Upload the files of ``save_pretrained`` to the Hugging Face Hub; return the URL.

        Args:
            repo: ``OWNER/NAME``, created if needed.
            run, license: as for ``save_pretrained``.
            private: whether a new repository is private.
            message: of the commit.
            token: with write access; default: HF_TOKEN, or what ``hf auth login`` stored.

        Raises:
            ConfigError: ``repo`` is not the name of a repository.
            RunError: the upload fails.
            MissingExtra: huggingface_hub is not installed.
        """
        check_repository(repo)
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent, repo.rpartition("/")[2])
            self.save_pretrained(folder, run=run, license=license)
            return upload(folder, repo, private=private, message=message, token=token)

    def fingerprint(self) -> str:
        """Return the SHA-256 of configuration and weights, in hexadecimal.

        It is equal exactly if the tokens have the same meaning.
        """
        return model_files.fingerprint(self.config, self.state_dict())

    def folded(self) -> ImageTokenizer:
        """Return a copy with projected codebooks (SimVQ) as plain ones of the same codes.

        It gives the same tokens and is meant for files that are kept after training.
        """
        tokenizer = fold(self)
        tokenizer.config = self.config.folded()
        return tokenizer


def _dtype(part: nn.Module) -> torch.dtype:
    return next((parameter.dtype for parameter in part.parameters()), torch.float32)
