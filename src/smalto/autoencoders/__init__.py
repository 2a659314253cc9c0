"""Autoencoders: images to latents and back. They do not depend on the quantizer."""

from smalto.autoencoders.cnn import CheckpointedNetwork, CNNAutoencoderConfig
from smalto.autoencoders.config import AutoencoderConfig
from smalto.autoencoders.maskgit_autoencoder import MaskGITAutoencoderConfig
from smalto.autoencoders.simple import SimpleAutoencoderConfig

__all__ = [
    "AutoencoderConfig",
    "CNNAutoencoderConfig",
    "CheckpointedNetwork",
    "MaskGITAutoencoderConfig",
    "SimpleAutoencoderConfig",
]
