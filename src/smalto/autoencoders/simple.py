"""Smallest autoencoder: two strided convolutions in the encoder, two in the decoder."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import nn

from smalto.autoencoders.layers import check_layer_initialization
from smalto.core.config import Config


class SimpleAutoencoderConfig(Config):
    """Settings of the simple autoencoder: two 4x4 convolutions of stride 2 with a ReLU between.

    The decoder has the same layers as transposed convolutions.
    Images [B, in_channels, H, W] <-> latents [B, latent_dim, H/4, W/4].
    """

    kind: Literal["simple"] = "simple"
    in_channels: int = Field(3, ge=1, le=4096, description="channels of the images")
    latent_dim: int = Field(64, ge=1, le=65536, description="channels of the latents (C)")
    hidden_dim: int = Field(
        128, ge=1, le=65536, description="channels between the two convolutions"
    )
    encoder_relu: bool = Field(
        False,
        description="end the encoder with a ReLU, as the published sketch does; it confines "
        "latents to one orthant, and most codes stay unused",
    )

    @property
    def stride(self) -> int:
        """Pixels per latent position, along height and width alike."""
        return 4

    def build_encoder(self) -> nn.Sequential:
        """Return a new encoder.

        Raises:
            RunError: this process does not initialize layers; see ``check_layer_initialization``.
        """
        check_layer_initialization()
        layers: list[nn.Module] = [
            nn.Conv2d(self.in_channels, self.hidden_dim, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(self.hidden_dim, self.latent_dim, 4, stride=2, padding=1),
        ]
        return nn.Sequential(*layers, *([nn.ReLU()] if self.encoder_relu else []))

    def build_decoder(self) -> nn.Sequential:
        """Return a new decoder.

        Raises:
            RunError: this process does not initialize layers; see ``check_layer_initialization``.
        """
        check_layer_initialization()
        return nn.Sequential(
            nn.ConvTranspose2d(self.latent_dim, self.hidden_dim, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(self.hidden_dim, self.in_channels, 4, stride=2, padding=1),
        )
