"""Images to latents and back. An encoder never sees a code."""

from smalto.autoencoders.simple import SimpleAutoencoderConfig

__all__ = ["SimpleAutoencoderConfig"]
