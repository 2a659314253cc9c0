"""What every job that runs a tokenizer over images shares."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from smalto.core.device import Precision, memory_errors, resolve_device
from smalto.core.errors import ConfigError, DataError
from smalto.core.layout import TokenLayout
from smalto.core.progress import Progress
from smalto.tokenizer import ImageTokenizer, load


@dataclass(frozen=True)
class InferenceTokenizer:
    """A tokenizer on its device, in the form that runs fastest, with how to run it.

    Attributes:
        tokenizer: a copy for inference.
        fingerprint: of the tokenizer that it is a copy of.
    """

    tokenizer: ImageTokenizer
    fingerprint: str
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
        if batch < 1:
            raise ConfigError(f"batch must be at least 1; got {batch}.")
        model = tokenizer if isinstance(tokenizer, ImageTokenizer) else load(tokenizer)
        if model.in_channels != 3:
            raise DataError(
                f"this tokenizer takes images of {model.in_channels} channels; image files have 3. Call encode() with tensors."
            )
        target = resolve_device(device)
        progress.message(f"device {target}, {precision}")
        return cls.on(model.to(target), precision, batch)

    @classmethod
    def on(
        cls, tokenizer: ImageTokenizer, precision: Precision, batch: int = 1
    ) -> InferenceTokenizer:
        """Run a tokenizer on the device where it is."""
        return cls(
            tokenizer.for_inference(precision),
            tokenizer.fingerprint(),
            next(tokenizer.parameters()).device,
            precision,
            batch,
        )

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] in [-1, 1] -> tokens [B, L] on the CPU."""
        with memory_errors(self.device, len(images)):
            return self.tokenizer.encode(images.to(self.device)).cpu()

    @torch.no_grad()
    def decode(self, tokens: Tensor, layout: TokenLayout) -> Tensor:
        """Tokens [B, L] -> images float32 [B, C, H, W] in [-1, 1] on the CPU."""
        with memory_errors(self.device, len(tokens)):
            return self.tokenizer.decode(tokens.to(self.device), layout).float().cpu()

    @torch.no_grad()
    def decode_each(self, tokens: Tensor, layout: TokenLayout) -> list[Tensor]:
        """Tokens [B, L] -> the images, as ``decode`` gives them, after each grid of the layout."""
        with memory_errors(self.device, len(tokens)):
            return [
                images.float().cpu()
                for images in self.tokenizer.decode_each(tokens.to(self.device), layout)
            ]

    def roundtrip(self, images: Tensor) -> tuple[Tensor, Tensor, float]:
        """Images -> tokens, what comes back, and the seconds that both took."""
        begun = time.perf_counter()
        tokens = self.encode(images)
        reconstruction = self.decode(tokens, self.tokenizer.layout(*images.shape[2:]))
        return tokens, reconstruction, time.perf_counter() - begun
