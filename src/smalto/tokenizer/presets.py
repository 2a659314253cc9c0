"""Tokenizers under a name of their own: the smallest one, and what training uses without a recipe."""

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
    vocab_size: int = Field(16, ge=1)
    embedding_dim: int = Field(64, ge=1)
    hidden_dim: int = Field(128, ge=1)
    encoder_relu: bool = False

    def general(self) -> TokenizerConfig:
        """The same tokenizer as an ImageTokenizer."""
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
    """The smallest tokenizer: two 4x4 convolutions of stride 2 each way around one learned codebook.

    Args:
        vocab_size: number of codes.
        embedding_dim: channels of latents and codes.
        hidden_dim: channels between the convolutions.
        encoder_relu: end the encoder with a ReLU, as the published sketch of this class does. It confines latents to one
            orthant and makes codebooks collapse, so it is off.
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
        self.vocab_size, self.embedding_dim, self.hidden_dim = (
            own.vocab_size,
            own.embedding_dim,
            own.hidden_dim,
        )


def default_tokenizer_config(codebook_size: int = 512) -> TokenizerConfig:
    """What training uses without a recipe: SimpleVQVAE's layers around moving-average codes of 16 dimensions."""
    settings = {"codebook_size": codebook_size, "code_dim": 16, "codebook": "ema", "beta": 1.0}
    return parse_config(TokenizerConfig, {"quantizer": settings}, "default_tokenizer")


def default_tokenizer(codebook_size: int = 512) -> ImageTokenizer:
    """An untrained tokenizer of the kind that training uses without a recipe."""
    return default_tokenizer_config(codebook_size).build()
