"""A tokenizer on its device, for all jobs that encode and decode images."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from smalto.core.device import Precision, memory_errors, resolve_device
from smalto.core.errors import ConfigError, DataError
from smalto.core.identity import TokenizerIdentity
from smalto.core.layout import TokenLayout
from smalto.core.progress import Progress
from smalto.quantizers.latents import usable
from smalto.tokenizer import ImageTokenizer, load


@dataclass(frozen=True)
class InferenceTokenizer:
    """A copy of a tokenizer on its device, optimized for inference, with its batch size.

    Attributes:
        tokenizer: the copy, see ``ImageTokenizer.for_inference``.
        identity: of the original tokenizer.
        device: of the copy.
        precision: of encoder and decoder.
        batch: images per batch.
    """

    tokenizer: ImageTokenizer
    identity: TokenizerIdentity
    device: torch.device
    precision: Precision
    batch: int

    @classmethod
    def of(
        cls,
        tokenizer: ImageTokenizer | str | Path,
        device: str,
        precision: Precision,
        batch: int,
        progress: Progress,
    ) -> InferenceTokenizer:
        """Load a tokenizer on a device, and report the device as a message.

        Raises:
            ConfigError: ``batch`` is below 1, or the device does not exist.
            DataError: the tokenizer is not for RGB images.
        """
        if batch < 1:
            raise ConfigError(f"batch must be at least 1; got {batch}.")
        model = tokenizer if isinstance(tokenizer, ImageTokenizer) else load(tokenizer)
        if model.in_channels != 3:
            raise DataError(
                f"got a tokenizer for images of {model.in_channels} channels; expected 3, as in "
                "image files. Call its encode() with tensors."
            )
        target = resolve_device(device)
        progress.message(f"device {target}, {precision}")
        return cls.on(model.to(target), precision, batch)

    @classmethod
    def on(
        cls, tokenizer: ImageTokenizer, precision: Precision, batch: int = 1
    ) -> InferenceTokenizer:
        """Copy a tokenizer for inference on its present device."""
        return cls(
            tokenizer.for_inference(precision),
            tokenizer.identity(),
            next(tokenizer.parameters()).device,
            precision,
            batch,
        )

    @property
    def weight_bytes(self) -> int:
        """Size of all parameters and buffers."""
        return sum(t.numel() * t.element_size() for t in self.tokenizer.state_dict().values())

    def encode(self, images: Tensor) -> Tensor:
        """Encode images [B, C, H, W] in [-1, 1] to tokens [B, L] on the CPU."""
        with memory_errors(self.device, len(images)):
            return self.tokenizer.encode(images.to(self.device)).cpu()

    @torch.no_grad()
    def encode_finite(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Encode images like ``encode``; return tokens, and whether the latents are usable, bool
        [B].

        The quantizer ignores latents that are not finite, or huge: their tokens mean nothing.
        """
        with memory_errors(self.device, len(images)):
            images = images.to(self.device)
            self.tokenizer.check_images(images)
            latents = self.tokenizer.tiled_latents(images)
            tokens = self.tokenizer.quantize.encode(latents)
            return tokens.cpu(), usable(latents).flatten(1).all(dim=1).cpu()

    @torch.no_grad()
    def decode(self, tokens: Tensor, layout: TokenLayout) -> Tensor:
        """Decode tokens [B, L] to images float32 [B, C, H, W] in [-1, 1] on the CPU."""
        with memory_errors(self.device, len(tokens)):
            return self.tokenizer.decode(tokens.to(self.device), layout).float().cpu()

    @torch.no_grad()
    def decode_each(self, tokens: Tensor, layout: TokenLayout) -> list[Tensor]:
        """Decode tokens [B, L] up to each grid of the layout; one batch of images per grid."""
        with memory_errors(self.device, len(tokens)):
            return [
                images.float().cpu()
                for images in self.tokenizer.decode_each(tokens.to(self.device), layout)
            ]

    def roundtrip(self, images: Tensor) -> tuple[Tensor, Tensor, float]:
        """Encode and decode images; return tokens, reconstructions, and the seconds for both."""
        begun = time.perf_counter()
        tokens = self.encode(images)
        reconstruction = self.decode(tokens, self.tokenizer.layout(*images.shape[2:]))
        return tokens, reconstruction, time.perf_counter() - begun
