"""What every job that runs a tokenizer over pictures shares."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from smalto.config import parse_config
from smalto.data.archives import PictureFile, Skipped
from smalto.data.decoding import Decoder
from smalto.data.images import LONGER_SIDE, BadPicture
from smalto.data.pictures import to_tensor
from smalto.data.transform import Transform
from smalto.device import Precision, memory_errors, resolve_device
from smalto.distributed import local_world_size
from smalto.errors import ConfigError, DataError
from smalto.layout import TokenLayout
from smalto.progress import Progress
from smalto.tokenizer import ImageTokenizer, load

T = TypeVar("T")


def default_workers(workers: int | None = None) -> int:
    """Decoding processes: as asked for, else all cores of this process but one, between 1 and 8."""
    if workers is not None and workers < 0:
        raise ConfigError(f"workers must be 0 or more; got {workers}.")
    own = (os.cpu_count() or 2) // local_world_size()
    return workers if workers is not None else min(8, max(1, own - 1))


@dataclass(frozen=True)
class Runner:
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
    def of(cls, tokenizer: ImageTokenizer | str | Path, device: str, precision: Precision, batch: int, progress: Progress) -> Runner:
        if batch < 1:
            raise ConfigError(f"batch must be at least 1; got {batch}.")
        model = tokenizer if isinstance(tokenizer, ImageTokenizer) else load(tokenizer)
        if model.in_channels != 3:
            raise DataError(
                f"this tokenizer takes images of {model.in_channels} channels; picture files have 3. Call encode() with tensors."
            )
        target = resolve_device(device)
        progress.say(f"device {target}, {precision}")
        return cls.on(model.to(target), precision, batch)

    @classmethod
    def on(cls, tokenizer: ImageTokenizer, precision: Precision, batch: int = 1) -> Runner:
        """Run a tokenizer on the device where it is."""
        return cls(tokenizer.for_inference(precision), tokenizer.fingerprint(), next(tokenizer.parameters()).device, precision, batch)

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
        """Tokens [B, L] -> the pictures, as ``decode`` gives them, after each grid of the layout."""
        with memory_errors(self.device, len(tokens)):
            return [images.float().cpu() for images in self.tokenizer.decode_each(tokens.to(self.device), layout)]

    def roundtrip(self, images: Tensor) -> tuple[Tensor, Tensor, float]:
        """Images -> tokens, what comes back, and the seconds that both took."""
        begun = time.perf_counter()
        tokens = self.encode(images)
        reconstruction = self.decode(tokens, self.tokenizer.layout(*images.shape[2:]))
        return tokens, reconstruction, time.perf_counter() - begun


class PictureReader:
    """Whole pictures for a tokenizer: decoded in the background, cut to what its stride divides.

    Attributes:
        skipped: files that could not be used, and why; grows while reading.
        transform: what is done to each picture.
    """

    def __init__(
        self,
        files: list[PictureFile],
        stride: int,
        progress: Progress,
        *,
        longer_side: int | None = LONGER_SIDE,
        size: int | None = None,
        workers: int | None = None,
    ) -> None:
        self.transform = transform_of(stride, size=size, longer_side=longer_side)
        self._files, self._progress, self._workers = files, progress, default_workers(workers)
        self.skipped: list[Skipped] = []

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """(name, uint8 [3, H, W]) of every picture that can be read."""
        with Decoder(self._workers if len(self._files) > 1 else 0, self.transform.prepare) as decoder:
            for file, picture in decoder.in_order(self._files):
                self._progress.advance()
                if isinstance(picture, BadPicture):
                    self.skipped.append(Skipped(file.name, str(picture)))
                    continue
                yield file.name, to_tensor(picture.views[0])


def transform_of(
    stride: int, *, size: int | None = None, longer_side: int | None = LONGER_SIDE, crops: int = 1, flip: bool = False
) -> Transform:
    """The transform for a tokenizer of this stride; ``longer_side`` 0 keeps the size.

    Raises:
        ConfigError: the parts do not fit.
    """
    settings = {"stride": stride, "size": size, "longer_side": longer_side or None, "crops": crops, "flip": flip}
    return parse_config(Transform, settings, "transform")


def batches_of_one_shape(pictures: Iterable[tuple[T, Tensor]], batch: int) -> Iterator[tuple[list[T], Tensor]]:
    """Group pictures of equal shape into (names, [B, C, H, W]) of at most ``batch``; at most 4 batches' worth wait at a time."""
    waiting: dict[tuple[int, ...], list[tuple[T, Tensor]]] = {}
    for name, picture in pictures:
        group = waiting.setdefault(tuple(picture.shape), [])
        group.append((name, picture))
        if len(group) == batch or sum(map(len, waiting.values())) >= 4 * batch:
            fullest = max(waiting, key=lambda shape: len(waiting[shape]))
            yield _stack(waiting.pop(fullest))
    for group in waiting.values():
        yield _stack(group)


def _stack(group: list[tuple[T, Tensor]]) -> tuple[list[T], Tensor]:
    return [name for name, _ in group], torch.stack([picture for _, picture in group])
