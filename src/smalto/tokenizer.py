"""ImageTokenizer: encoder + quantizer + decoder, and the files that hold one."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import safetensors
import safetensors.torch
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from smalto.autoencoders import SimpleAutoencoderConfig
from smalto.config import Config, parse_config
from smalto.errors import ConfigError, InputError, RunError, describe
from smalto.files import write_atomic
from smalto.layout import TokenLayout, square_grids
from smalto.quantizers import QuantizerConfig, VectorQuantizerConfig, fold

FORMAT_VERSION = 1
Blocks = Literal["whole", "halves", "diagonal"]


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


class TokenizerConfig(Config):
    """Settings of an ImageTokenizer: which autoencoder, which quantizer."""

    kind: Literal["image-tokenizer"] = "image-tokenizer"
    autoencoder: SimpleAutoencoderConfig = SimpleAutoencoderConfig()
    quantizer: QuantizerConfig = VectorQuantizerConfig()

    @model_validator(mode="after")
    def _parts_fit(self) -> TokenizerConfig:
        if self.autoencoder.latent_dim != self.quantizer.latent_dim:
            raise ValueError(
                f"autoencoder.latent_dim is {self.autoencoder.latent_dim} and quantizer.latent_dim is "
                f"{self.quantizer.latent_dim}: they must be equal."
            )
        return self

    def build(self) -> ImageTokenizer:
        return ImageTokenizer(self)


class SimpleVQVAEConfig(Config):
    """Settings of a SimpleVQVAE."""

    kind: Literal["simple-vqvae"] = "simple-vqvae"
    vocab_size: int = Field(16, ge=1)
    embedding_dim: int = Field(64, ge=1)
    hidden_dim: int = Field(128, ge=1)
    encoder_relu: bool = False

    def build(self) -> SimpleVQVAE:
        return SimpleVQVAE(self.vocab_size, self.embedding_dim, self.hidden_dim, encoder_relu=self.encoder_relu)


class ImageTokenizer(nn.Module):
    """Images [B, C, H, W] in [-1, 1] <-> tokens [B, L].

    Args:
        config: which parts; ``TokenizerConfig(...).build()`` is the usual way here.

    Attributes:
        encoder, quantize, decoder: the parts, each of which knows nothing of the others.
        stride: pixels per latent position; H and W must be multiples of it.
    """

    default_blocks: Blocks = "whole"

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config: TokenizerConfig | SimpleVQVAEConfig = config
        self.in_channels = config.autoencoder.in_channels
        self.stride = config.autoencoder.stride
        self.encoder = config.autoencoder.build_encoder()
        self.quantize = config.quantizer.build()
        self.decoder = config.autoencoder.build_decoder()

    def forward(self, images: Tensor, *, num_stages: int | None = None, noise: Tensor | None = None) -> TokenizerOutput:
        """Images [B, C, H, W] -> (reconstruction [B, C, H, W] not clamped, vq_loss scalar, indices int64 [B*L]), with gradients.

        ``num_stages`` and ``noise`` are the quantizer's: see ``Quantizer.forward``.
        """
        self.check_images(images)
        quantized, vq_loss, indices = self.quantize(self.encoder(images), num_stages=num_stages, noise=noise)
        return TokenizerOutput(self.decoder(quantized), vq_loss, indices)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] in [-1, 1] -> tokens int64 [B, L].

        Raises:
            InputError: not floating point, another rank or number of channels, or sides that the stride does not divide.
        """
        self.check_images(images)
        return self.quantize.encode(self.encoder(images))

    def decode(self, tokens: Tensor, layout: TokenLayout, *, clamp: bool = True) -> Tensor:
        """Tokens int64 [B, L] -> images [B, C, H, W], clamped to [-1, 1] unless ``clamp=False``.

        Args:
            tokens: what ``encode`` gave.
            layout: ``tokenizer.layout(height, width)`` of the pictures that were encoded.

        Raises:
            InputError: a token outside the codebook, or another number of tokens than the layout's.
        """
        images = self.decoder(self.quantize.decode(tokens, layout))
        return images.clamp(-1, 1) if clamp else images

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

    def img_to_idxBl(self, imgs: Tensor, blocks: Blocks | None = None) -> list[Tensor]:
        """Images [B, C, H, W] in [-1, 1] -> blocks of tokens, a list of int64 [B, L_i], without gradients.

        Args:
            imgs: as for ``encode``.
            blocks: ``"whole"``: one block per grid of the layout, so one block for a single-scale tokenizer. ``"halves"``: the upper rows
                [0, h//2) and the rest, so that ``torch.cat(blocks, 1)`` is the whole map in raster order. ``"diagonal"``: the upper left
                and the lower right quadrant only (the published sketch); these cannot be decoded. None: this tokenizer's own kind
                (``SimpleVQVAE``: halves; others: whole).

        Raises:
            InputError: an unknown kind, or halves of a layout of several grids.
        """
        blocks = blocks or self.default_blocks
        if blocks not in ("whole", "halves", "diagonal"):
            raise InputError(f'blocks must be "whole", "halves" or "diagonal"; got {blocks!r}.')
        tokens, layout = self.encode(imgs), self.layout(*imgs.shape[2:])
        if blocks == "whole":
            return list(tokens.split(layout.lengths, dim=1))
        if len(layout.grids) > 1:
            raise InputError(f'blocks="{blocks}" cuts one map of tokens; this tokenizer makes {len(layout.grids)}. Use blocks="whole".')
        rows, columns = layout.grids[0]
        index_map = tokens.view(-1, rows, columns)
        upper, lower, middle = index_map[:, : rows // 2], index_map[:, rows // 2 :], columns // 2
        if blocks == "halves":
            return [upper.flatten(1), lower.flatten(1)]
        return _DiagonalBlocks([upper[:, :, :middle].flatten(1), lower[:, :, middle:].flatten(1)])

    def idxBl_to_var_input(self, idx_Bl: list[Tensor]) -> Tensor:
        """Blocks of tokens -> the codes in order, [B, L, D]: input of the autoregressive model that follows.

        D is ``latent_dim``; for residual and product quantizers the dimension of one stage's or head's codes.
        """
        self._join(idx_Bl)
        return self.quantize.lookup(idx_Bl)

    def idxBl_to_img(self, idx_Bl: list[Tensor], patch_hws: list[tuple[int, int]] | None = None, *, clamp: bool = True) -> Tensor:
        """Blocks of tokens -> images [B, C, H, W], clamped to [-1, 1] unless ``clamp=False``.

        Args:
            idx_Bl: what ``img_to_idxBl`` gave: blocks that lie below one another, or one block per grid of the layout (of a
                residual tokenizer the first ones alone give the picture of the first stages).
            patch_hws: (rows, columns) of each block. Without it every map is taken to be square.

        Raises:
            InputError: the lengths do not fit, or diagonal blocks, which leave out half of the picture. They are known by the list that
                ``img_to_idxBl`` gave; put into another list they cannot be told from halves of a smaller map.
        """
        tokens = self._join(idx_Bl)
        if isinstance(idx_Bl, _DiagonalBlocks):
            raise InputError('diagonal blocks hold half of the picture and cannot be decoded. Use img_to_idxBl(images, blocks="halves").')
        lengths = [block.shape[1] for block in idx_Bl]
        single = len(self.quantize.layout(1, 1).grids) == 1
        layout = self._stacked_layout(lengths, patch_hws) if single else self._layout_by_grid(lengths, patch_hws)
        return self.decode(tokens, layout, clamp=clamp)

    def check_images(self, images: Tensor) -> None:
        """Raise InputError unless images are floating point [B, in_channels, H, W] with sides that the stride divides."""
        if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] != self.in_channels:
            raise InputError(
                f"images must be a tensor [B, {self.in_channels}, H, W]; got {describe(images)}. "
                "One image [C, H, W] becomes a batch with images[None]."
            )
        if not images.is_floating_point():
            raise InputError(f"images must be floating point in [-1, 1]; got {images.dtype}. Convert with images.float() / 127.5 - 1.")
        weights = next(self.parameters()).dtype
        if images.dtype != weights and not torch.is_autocast_enabled(images.device.type):
            raise InputError(f"images are {images.dtype} and the tokenizer is {weights}. Convert with images.to({weights}).")
        self.layout(*images.shape[2:])

    def save(self, folder: str | Path) -> None:
        """Write ``model.safetensors`` and ``config.json`` into ``folder``; ``smalto.load(folder)`` reads them."""
        folder = Path(folder)
        config = {"format_version": FORMAT_VERSION, **self.config.model_dump(mode="json")}
        metadata = {"smalto": json.dumps(config, sort_keys=True)}
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        write_atomic(folder / "model.safetensors", safetensors.torch.save(state, metadata))
        write_atomic(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")

    def fingerprint(self) -> str:
        """SHA-256 of configuration and weights, in hexadecimal: equal exactly where the tokens mean the same."""
        digest = hashlib.sha256(json.dumps(self.config.model_dump(mode="json"), sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"\0{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @staticmethod
    def _join(idx_Bl: list[Tensor]) -> Tensor:
        if not isinstance(idx_Bl, (list, tuple)) or not idx_Bl:
            raise InputError("idx_Bl must be a list of blocks [B, L_i], as img_to_idxBl gives it; wrap one tensor as [tokens].")
        if any(not isinstance(block, Tensor) or block.ndim != 2 or block.shape[0] != idx_Bl[0].shape[0] for block in idx_Bl):
            raise InputError(f"every block must be a tensor [B, L_i] with the same B; got {[describe(block) for block in idx_Bl]}.")
        return torch.cat(list(idx_Bl), dim=1)

    @staticmethod
    def _stacked_layout(lengths: list[int], patch_hws: list[tuple[int, int]] | None) -> TokenLayout:
        if patch_hws is None:
            grids = square_grids([sum(lengths)])
            side = grids[0][0] if grids else 0
            if not side or lengths not in ([side * side], [side // 2 * side, (side - side // 2) * side]):
                raise InputError(
                    f"blocks of {lengths} tokens are not one square map or its two halves: pass patch_hws, one (rows, columns) per block."
                )
            return TokenLayout.single(side, side)
        _check_patch_hws(patch_hws, lengths)
        filled = [(h, w) for h, w in patch_hws if h * w]
        if not filled or len({w for _, w in filled}) != 1:
            raise InputError(f"blocks of one map lie below one another, so patch_hws must share their columns; got {list(patch_hws)}.")
        return TokenLayout.single(sum(h for h, _ in filled), filled[0][1])

    @staticmethod
    def _layout_by_grid(lengths: list[int], patch_hws: list[tuple[int, int]] | None) -> TokenLayout:
        if patch_hws is None:
            grids = square_grids(lengths)
            if grids is None:
                raise InputError(f"blocks of {lengths} tokens are not square maps: pass patch_hws, one (rows, columns) per block.")
            return TokenLayout(grids)
        _check_patch_hws(patch_hws, lengths)
        return TokenLayout(tuple(patch_hws))

    def folded(self) -> ImageTokenizer:
        """A copy with projected codebooks (SimVQ) as the plain ones of the same codes: same tokens, for files that outlive training."""
        tokenizer = fold(self)
        if isinstance(self.config, TokenizerConfig):
            tokenizer.config = self.config.model_copy(update={"quantizer": self.config.quantizer.folded()})
        return tokenizer


def _check_patch_hws(patch_hws: list[tuple[int, int]], lengths: list[int]) -> None:
    pairs = all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in patch_hws)
    if not pairs or len(patch_hws) != len(lengths) or any(h * w != n for (h, w), n in zip(patch_hws, lengths, strict=True)):
        raise InputError(f"patch_hws must hold one (rows, columns) per block, for blocks of {lengths} tokens; got {list(patch_hws)}.")


class _DiagonalBlocks(list[Tensor]):
    """Marks blocks that cannot be decoded."""


class SimpleVQVAE(ImageTokenizer):
    """The smallest tokenizer: two 4x4 convolutions of stride 2 each way around one learned codebook.

    Args:
        vocab_size: number of codes.
        embedding_dim: channels of latents and codes.
        hidden_dim: channels between the convolutions.
        encoder_relu: end the encoder with a ReLU, as the published sketch of this class does. It confines latents to one
            orthant and makes codebooks collapse, so it is off.
    """

    default_blocks: Blocks = "halves"

    def __init__(self, vocab_size: int = 16, embedding_dim: int = 64, hidden_dim: int = 128, *, encoder_relu: bool = False) -> None:
        own = parse_config(
            SimpleVQVAEConfig,
            {"vocab_size": vocab_size, "embedding_dim": embedding_dim, "hidden_dim": hidden_dim, "encoder_relu": encoder_relu},
            "SimpleVQVAE",
        )
        super().__init__(
            TokenizerConfig(
                autoencoder=SimpleAutoencoderConfig(latent_dim=own.embedding_dim, hidden_dim=own.hidden_dim, encoder_relu=own.encoder_relu),
                quantizer=VectorQuantizerConfig(codebook_size=own.vocab_size, latent_dim=own.embedding_dim),
            )
        )
        self.config = own
        self.vocab_size, self.embedding_dim, self.hidden_dim = own.vocab_size, own.embedding_dim, own.hidden_dim


def default_tokenizer_config(codebook_size: int = 512) -> TokenizerConfig:
    """What training uses without a recipe: SimpleVQVAE's layers around moving-average codes of 16 dimensions."""
    settings = {"codebook_size": codebook_size, "code_dim": 16, "codebook": "ema", "beta": 1.0}
    return parse_config(TokenizerConfig, {"quantizer": settings}, "default_tokenizer")


def default_tokenizer(codebook_size: int = 512) -> ImageTokenizer:
    """An untrained tokenizer of the kind that training uses without a recipe."""
    return default_tokenizer_config(codebook_size).build()


def load(folder: str | Path) -> ImageTokenizer:
    """Read a tokenizer (or a run, which is one too) from a folder, in evaluation mode on the CPU.

    Raises:
        RunError: the folder or one of its two files is missing or damaged, or weights and configuration do not fit.
        ConfigError: the configuration is of another format or has unknown keys.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file() or not (folder / "model.safetensors").is_file():
        there = "holds no tokenizer" if folder.is_dir() else "does not exist"
        raise RunError(
            f"{folder} {there}: a tokenizer is a folder with config.json and model.safetensors, such as a run of `smalto train`."
        )
    config = _read_config(folder / "config.json")
    tokenizer = config.build()
    try:
        state = safetensors.torch.load_file(folder / "model.safetensors")
    except (safetensors.SafetensorError, OSError) as error:
        raise RunError(f"{folder / 'model.safetensors'} cannot be read ({error}). Take the one of an older checkpoint.") from None
    try:
        tokenizer.load_state_dict(state, assign=True)  # in the precision that was saved
    except RuntimeError as error:
        raise RunError(f"{folder / 'model.safetensors'} does not fit config.json beside it: {error}") from None
    return tokenizer.eval()


def _read_config(path: Path) -> TokenizerConfig | SimpleVQVAEConfig:
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path} is not readable JSON ({error}).") from None
    version = data.pop("format_version", None) if isinstance(data, dict) else None
    if version != FORMAT_VERSION:
        raise ConfigError(f"{path} has format_version {version!r}; this smalto reads {FORMAT_VERSION}.")
    kinds: dict[str, type[TokenizerConfig] | type[SimpleVQVAEConfig]] = {
        "image-tokenizer": TokenizerConfig,
        "simple-vqvae": SimpleVQVAEConfig,
    }
    if not isinstance(data.get("kind"), str) or data["kind"] not in kinds:
        raise ConfigError(f"{path}: kind must be one of {sorted(kinds)}; got {data.get('kind')!r}.")
    return parse_config(kinds[data["kind"]], data, str(path))
