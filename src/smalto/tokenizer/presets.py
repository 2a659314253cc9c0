"""Predefined tokenizers: the smallest one, and the default of training without a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from smalto.autoencoders import SimpleAutoencoderConfig
from smalto.core.config import parse_config
from smalto.quantizers import VectorQuantizerConfig
from smalto.tokenizer.model import AnyTokenizerConfig, ImageTokenizer, TokenizerConfig
from smalto.tokenizer.token_blocks import BlockKind


class SimpleVQVAEConfig(AnyTokenizerConfig):
    """Settings of a SimpleVQVAE."""

    kind: Literal["simple-vqvae"] = "simple-vqvae"
    vocab_size: int = Field(16, ge=1, le=2**24)
    embedding_dim: int = Field(64, ge=1, le=65536)
    hidden_dim: int = Field(128, ge=1, le=65536)
    encoder_relu: bool = False

    def general(self) -> TokenizerConfig:
        """Return the settings of the same tokenizer as a TokenizerConfig."""
        return TokenizerConfig(
            autoencoder=SimpleAutoencoderConfig(
                latent_dim=self.embedding_dim,
                hidden_dim=self.hidden_dim,
                encoder_relu=self.encoder_relu,
            ),
            quantizer=VectorQuantizerConfig(
                codebook_size=self.vocab_size, latent_dim=self.embedding_dim
            ),
        )

    def build(self) -> SimpleVQVAE:
        return SimpleVQVAE(
            self.vocab_size, self.embedding_dim, self.hidden_dim, encoder_relu=self.encoder_relu
        )


class SimpleVQVAE(ImageTokenizer):
    """Smallest tokenizer: one learned codebook between an encoder and a decoder.

    Encoder and decoder each have two 4x4 convolutions of stride 2.

    Args:
        vocab_size: number of codes.
        embedding_dim: channels of latents and codes.
        hidden_dim: channels between the convolutions.
        encoder_relu: end the encoder with a ReLU, as in the published sketch of this class. It
            confines latents to one orthant and makes codebooks collapse, so it is off by default.
    """

    default_blocks: BlockKind = "halves"

    def __init__(
        self,
        vocab_size: int = 16,
        embedding_dim: int = 64,
        hidden_dim: int = 128,
        *,
        encoder_relu: bool = False,
    ) -> None:
        own = parse_config(
            SimpleVQVAEConfig,
            {
                "vocab_size": vocab_size,
                "embedding_dim": embedding_dim,
                "hidden_dim": hidden_dim,
                "encoder_relu": encoder_relu,
            },
            "SimpleVQVAE",
        )
        super().__init__(own.general())
        self.config = own
        self.vocab_size = own.vocab_size
        self.embedding_dim = own.embedding_dim
        self.hidden_dim = own.hidden_dim


def default_tokenizer_config(codebook_size: int = 512) -> TokenizerConfig:
    """Return the settings that training uses without a recipe.

    They are the layers of SimpleVQVAE with moving-average codes of 16 dimensions.
    """
    settings = {"codebook_size": codebook_size, "code_dim": 16, "codebook": "ema", "beta": 1.0}
    return parse_config(TokenizerConfig, {"quantizer": settings}, "default_tokenizer")


def default_tokenizer(codebook_size: int = 512) -> ImageTokenizer:
    """Return an untrained tokenizer with the settings that training uses without a recipe."""
    return default_tokenizer_config(codebook_size).build()
