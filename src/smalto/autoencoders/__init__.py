"""Images to latents and back. An encoder never sees a code."""

from smalto.autoencoders.cnn import CheckpointedNetwork, CNNAutoencoderConfig
from smalto.autoencoders.config import AutoencoderConfig
from smalto.autoencoders.simple import SimpleAutoencoderConfig

__all__ = [
    "AutoencoderConfig",
    "CNNAutoencoderConfig",
    "CheckpointedNetwork",
    "SimpleAutoencoderConfig",
]
