"""The metrics of a tokenizer as one frozen record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self


class Mean(float):
    """A mean over images: a float that knows how many.

    Attributes:
        num_images: N.
        reference: for a distance between two collections, where the other one comes from.
    """

    num_images: int
    reference: str

    def __new__(cls, value: float, num_images: int, reference: str = "") -> Self:
        mean = super().__new__(cls, value)
        mean.num_images = num_images
        mean.reference = reference
        return mean

    @classmethod
    def of(cls, values: Sequence[float]) -> Self | None:
        """Return the mean of one value per image, or None if there are none."""
        return cls(sum(values) / len(values), len(values)) if values else None


@dataclass(frozen=True)
class ImageMetrics:
    """How close reconstructions are to their images; None: not measured.

    Attributes:
        psnr: in dB.
        ssim, ms_ssim: at most 1.
        lite0_distance, lpips: perceptual distances, 0 for equal images.
    """

    psnr: Mean | None = None
    ssim: Mean | None = None
    ms_ssim: Mean | None = None
    lite0_distance: Mean | None = None
    lpips: Mean | None = None


@dataclass(frozen=True)
class CodecMetrics(ImageMetrics):
    """An image codec at as many bytes as the tokens."""

    codec: str = ""
    bits_per_pixel: Mean | None = None


@dataclass(frozen=True)
class GridMetrics:
    """One grid of the layout over all images.

    Attributes:
        grid: its size, or "varies".
        tokens: how many.
        used, ceiling: share of codes that occur, and the largest share that so many tokens allow.
        perplexity: of its tokens.
        psnr: in dB, of what this grid and those before decode to.
    """

    grid: str
    tokens: int
    used: float
    ceiling: float
    perplexity: float
    psnr: Mean | None


@dataclass(frozen=True)
class ChangedIndices:
    """The share of indices that fine-tuning has changed, of how many tokens of how many images."""

    share: float
    num_tokens: int
    num_images: int


@dataclass(frozen=True)
class Metrics(ImageMetrics):
    """What was measured of a tokenizer.

    Attributes:
        measured_on: which images, in words.
        num_images: how many.
        transform: what was done to them first.
        precision: of encoder and decoder.
        lite0_fid, rfid: Fréchet distances; None: not measured.
        networks: SHA-256 of the weights of each network that took part.
        codecs: JPEG and WebP at as many bytes.
        usage: share of codes hit by ``usage_window`` tokens.
        used, used_ceiling: share of codes that occur at all, and the largest possible share.
        num_tokens: of all images.
        perplexity: exp(entropy) of the code histogram.
        codebook_size: number of codes.
        bits_per_pixel: log2(K) per token, per pixel.
        images_per_second: encoded and decoded; None: too fast to measure.
        pixels_per_image: mean.
        grids: one per grid, for tokenizers with several.
        parameters: of the tokenizer.
        skipped: name and reason of images left out.
        changed_indices: by fine-tuning.
    """

    measured_on: str = ""
    num_images: int = 0
    transform: str = ""
    precision: str = "float32"
    lite0_fid: Mean | None = None
    rfid: Mean | None = None
    networks: Mapping[str, str] = field(default_factory=dict)
    codecs: tuple[CodecMetrics, ...] = ()
    usage: float = 0.0
    usage_window: int = 0
    used: float = 0.0
    used_ceiling: float = 0.0
    num_tokens: int = 0
    perplexity: float = 0.0
    codebook_size: int = 1
    bits_per_pixel: float = 0.0
    images_per_second: float | None = None
    pixels_per_image: float = 0.0
    grids: tuple[GridMetrics, ...] = ()
    parameters: int = 0
    skipped: tuple[tuple[str, str], ...] = ()
    changed_indices: ChangedIndices | None = None

    def as_json(self) -> dict[str, Any]:
        """Return plain values; next to each mean ``NAME_num_images``, to a distance
        ``NAME_reference``.
        """
        data = _flat(self)
        data["codecs"] = [_flat(codec) for codec in self.codecs]
        data["grids"] = [{"psnr": None, **_flat(grid)} for grid in self.grids]
        data["networks"] = dict(self.networks)
        data["skipped"] = [{"name": name, "reason": reason} for name, reason in self.skipped]
        if self.changed_indices is not None:
            changed = self.changed_indices
            data["indices_changed"] = changed.share
            data["indices_changed_num_tokens"] = changed.num_tokens
            data["indices_changed_num_images"] = changed.num_images
        return data


@dataclass(frozen=True)
class TrainingTimes:
    """The time that a run was trained, over all its resumes.

    Attributes:
        seconds: of all steps.
        waiting: share of it spent waiting for data; None without steps.
        images_per_second: None without steps.
        peak_memory_mb: largest of all steps.
    """

    seconds: float
    waiting: float | None
    images_per_second: float | None
    peak_memory_mb: int

    def as_json(self) -> dict[str, Any]:
        """Return plain values under the names of ``metrics.json``."""
        return {
            "training_seconds": self.seconds,
            "training_images_per_second": self.images_per_second,
            "share_waiting_for_data": self.waiting,
            "training_peak_memory_mb": self.peak_memory_mb,
        }


@dataclass(frozen=True)
class TrainingSummary:
    """A training run in numbers.

    Attributes:
        steps, batch, size: of the recipe: steps, crops per step, side of a crop.
        seed: random seed.
        source: where the images were.
        device: that trained.
        fingerprint: of the tokenizer.
        times: of training.
        versions: of what decides the result.
    """

    steps: int
    batch: int
    size: int
    seed: int
    source: str
    device: str
    fingerprint: str
    times: TrainingTimes
    versions: Mapping[str, str]

    def as_json(self) -> dict[str, Any]:
        """Return plain values under the names of ``metrics.json``."""
        return {
            "steps": self.steps,
            "seed": self.seed,
            "device": self.device,
            "fingerprint": self.fingerprint,
            **self.times.as_json(),
            "versions": dict(self.versions),
        }


def _flat(record: Any) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for name, value in vars(record).items():
        if name == "changed_indices":
            continue
        if isinstance(value, Mean):
            data[name] = float(value)
            data[f"{name}_num_images"] = value.num_images
            if value.reference:
                data[f"{name}_reference"] = value.reference
        elif value is not None or name in ("images_per_second",):
            data[name] = value
    return data
