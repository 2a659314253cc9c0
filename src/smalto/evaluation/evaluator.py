"""What is measured of a tokenizer, image by image."""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from smalto.core.errors import ConfigError, DataError, MissingExtra
from smalto.core.files import file_sha256
from smalto.core.layout import TokenLayout
from smalto.evaluation.codecs import CODECS, compress_to_size
from smalto.features.frozen import FrozenNetwork, PooledNetwork
from smalto.features.inception import Inception
from smalto.features.lite0 import Lite0
from smalto.features.lpips import LPIPS
from smalto.images.bundled import credit
from smalto.images.image_file import Skipped, printable, summary
from smalto.images.image_reader import batches_of_one_shape
from smalto.images.tensors import to_uint8, to_unit_range
from smalto.inference.inference_tokenizer import InferenceTokenizer
from smalto.metrics import (
    CodebookMeter,
    FeatureMoments,
    frechet_distance,
    ms_ssim,
    perplexity,
    psnr,
    ssim,
    used,
)
from smalto.metrics.frechet import Gaussian, read_statistics
from smalto.metrics.image_quality import MIN_MS_SSIM_SIDE
from smalto.report import Example
from smalto.tokenizer import ImageTokenizer

MIN_SSIM_SIDE = 11
MIN_NETWORK_SIDE = 32
MAX_EXAMPLES = 6
MAX_CODEC_IMAGES = 256  # only so many are decoded after each grid, and coded as JPEG and WebP: both take many times as long


@dataclass(frozen=True)
class Evaluation:
    """What was measured: ``metrics`` for machines, images and the code histogram for the report."""

    metrics: dict[str, Any]
    examples: list[Example]
    histogram: Tensor
    skipped: list[Skipped]


@dataclass(frozen=True)
class FeatureNetworks:
    """The frozen networks that an evaluation looks through, those that there are, and a reference for Fréchet distances.

    ``reference``: (statistics, where they come from); None compares with the images that were encoded.
    """

    lite0: Lite0 | None = None
    lpips: LPIPS | None = None
    inception: Inception | None = None
    reference: tuple[Gaussian, str] | None = None

    @classmethod
    def open(
        cls,
        device: torch.device,
        *,
        reference_stats: str | Path | None = None,
        inception_weights: str | Path | None = None,
        lpips_vgg: str | Path | None = None,
    ) -> Self:
        """lite0 where it is installed, the others from files.

        Raises:
            DataError: a file holds something else.
            ConfigError: the reference statistics are of a network that is not there.
        """
        try:
            lite0 = Lite0().to(device)
        except MissingExtra:
            lite0 = None
        lpips = LPIPS(lpips_vgg).to(device) if lpips_vgg else None
        inception = Inception(inception_weights).to(device) if inception_weights else None
        reference = None
        if reference_stats:
            reference = (
                read_statistics(reference_stats),
                f"{Path(reference_stats).name} (sha256 {file_sha256(reference_stats)})",
            )
            width = len(reference[0].mean)
            there = [network for network in (lite0, inception) if network is not None]
            if width not in [network.dim for network in there]:
                raise ConfigError(
                    f"{reference_stats} holds statistics of {width} features; there is "
                    f"{', '.join(f'{n.name} with {n.dim}' for n in there) or 'no network'}. Those of Inception have 2048: name its weights "
                    "with --inception-weights."
                )
        return cls(lite0, lpips, inception, reference)

    def pooled(self) -> list[tuple[str, PooledNetwork]]:
        """The networks for Fréchet distances, and what the distance is called."""
        both: list[tuple[str, PooledNetwork | None]] = [
            ("lite0_fid", self.lite0),
            ("rfid", self.inception),
        ]
        return [(name, network) for name, network in both if network is not None]

    def hashes(self) -> dict[str, str]:
        return {
            network.name: network.sha256
            for network in (self.lite0, self.lpips, self.inception)
            if network is not None
        }


@dataclass(frozen=True)
class _Grid:
    """One grid of the layout over all images: its codes, its sizes, the PSNR of what it makes together with those before it."""

    histogram: Tensor
    sizes: set[tuple[int, int]]
    psnr: list[float]

    def metrics(self) -> dict[str, Any]:
        share, ceiling = used(self.histogram)
        return {
            "grid": "x".join(map(str, *self.sizes)) if len(self.sizes) == 1 else "varies",
            "tokens": int(self.histogram.sum()),
            "used": share,
            "ceiling": ceiling,
            "perplexity": perplexity(self.histogram),
            "psnr": _mean(self.psnr) if self.psnr else None,
            "psnr_num_images": len(self.psnr),
        }


class Evaluator:
    """Adds up what is measured, image by image."""

    def __init__(
        self,
        codebook_size: int,
        networks: FeatureNetworks | None = None,
        max_examples: int = MAX_EXAMPLES,
    ) -> None:
        self._meter = CodebookMeter(codebook_size)
        self._networks = networks or FeatureNetworks()
        self._moments = {
            name: (FeatureMoments(network.dim), FeatureMoments(network.dim), network)
            for name, network in self._networks.pooled()
        }
        self._grids: list[_Grid] = []
        self._values: defaultdict[str, list[float]] = defaultdict(list)
        self._codecs: dict[str, defaultdict[str, list[float]]] = {
            codec: defaultdict(list) for codec in CODECS
        }
        self._pixels = self._tokens = 0
        self._seconds = 0.0
        self._max_examples = max_examples
        self._examples: list[Example] = []

    def add(
        self,
        names: list[str],
        images: Tensor,
        reconstructions: Tensor,
        tokens: Tensor,
        layout: TokenLayout,
        seconds: float,
        stages: Sequence[Tensor] = (),
    ) -> None:
        """Take in a batch: images and reconstructions float [B, C, H, W] in [-1, 1], tokens [B, L], seconds to encode and decode.

        ``stages``: where the first grids alone make an image, the either after each grid.
        """
        self._meter.add(tokens)
        values = compare(reconstructions, images, self._networks)
        for name, measured in values.items():
            self._values[name] += measured
        if images.shape[1] == 3:
            for whole, back, network in self._moments.values():
                for moments, either in ((whole, images), (back, reconstructions)):
                    moments.add(_on(network, network.pooled, either))
        self._pixels += images.shape[0] * images.shape[2] * images.shape[3]
        self._tokens += tokens.numel()
        self._seconds += seconds
        stage_values = [psnr(stage, images).tolist() for stage in stages]
        if len(layout.grids) > 1:
            self._count_grids(tokens, layout, stage_values)
        coded: list[list[tuple[str, Tensor]]] = [[] for _ in names]
        if images.shape[1] == 3 and len(self._codecs[CODECS[0]]["psnr"]) < MAX_CODEC_IMAGES:
            coded = [self._code(image, tokens.shape[1]) for image in images]
        shown = max(
            range(len(layout.grids)), key=lambda number: layout.lengths[number]
        )  # the first of the finest
        finest = tokens.split(layout.lengths, dim=1)[shown]
        for i in range(
            min(len(names), self._max_examples - len(self._examples)) if images.shape[1] == 3 else 0
        ):
            earlier = tuple(
                (to_uint8(stage[i]), value[i])
                for stage, value in zip(stages, stage_values, strict=True)
            )[:-1]
            self._examples.append(
                Example(
                    printable(names[i]),
                    image=to_uint8(images[i]),
                    reconstruction=to_uint8(reconstructions[i]),
                    tokens=finest[i],
                    grid=layout.grids[shown],
                    num_tokens=tokens.shape[1],
                    psnr=values["psnr"][i],
                    credit=credit(names[i]),
                    stages=earlier,
                    coded=tuple(coded[i]),
                )
            )

    def _count_grids(
        self, tokens: Tensor, layout: TokenLayout, stage_values: list[list[float]]
    ) -> None:
        size = len(self._meter.histogram)
        self._grids = self._grids or [
            _Grid(torch.zeros(size, dtype=torch.int64), set(), []) for _ in layout.grids
        ]
        for number, (grid, block) in enumerate(
            zip(self._grids, tokens.split(layout.lengths, dim=1), strict=True)
        ):
            grid.histogram.add_(torch.bincount(block.flatten(), minlength=size))
            grid.sizes.add(layout.grids[number])
            grid.psnr.extend(stage_values[number] if stage_values else [])

    def _code(self, image: Tensor, num_tokens: int) -> list[tuple[str, Tensor]]:
        """Measure one image [C, H, W] as JPEG and WebP of as many bytes as its tokens; returns what comes back, with a caption."""
        size = num_tokens * math.log2(len(self._meter.histogram)) / 8
        found = []
        for codec, values in self._codecs.items():
            coded = compress_to_size(to_uint8(image), codec, size)
            if coded is None:
                continue
            measured = compare(to_unit_range(coded.image)[None], image[None], self._networks)
            for name, value in measured.items():
                values[name] += value
            bits_per_pixel = 8 * coded.size / (image.shape[1] * image.shape[2])
            values["bits_per_pixel"].append(bits_per_pixel)
            found.append(
                (
                    f"{codec}: {measured['psnr'][0]:.2f} dB at {bits_per_pixel:.3f} bits per pixel",
                    coded.image,
                )
            )
        return found

    @property
    def wants_stages(self) -> bool:
        """Whether images after each grid are still asked for: decoding them takes as many times as long as there are grids."""
        return len(self._values["psnr"]) < MAX_CODEC_IMAGES

    def result(
        self,
        tokenizer: ImageTokenizer,
        on: str,
        transform: str,
        precision: str,
        skipped: list[Skipped],
    ) -> Evaluation:
        """The metrics, over all images added.

        Raises:
            DataError: none was added.
        """
        if not self._values["psnr"]:
            raise DataError(f"there was no image to measure. {summary(skipped)}")
        share, window = self._meter.usage()
        used_share, ceiling = used(self._meter.histogram)
        size, number = tokenizer.quantize.codebook_size, len(self._values["psnr"])
        metrics = {
            "measured_on": on,
            "num_images": number,
            "transform": transform,
            "precision": precision,
            **_means(self._values),
            **self._distances(),
            "networks": self._networks.hashes(),
            "codecs": [
                {"codec": codec, **_means(values)}
                for codec, values in self._codecs.items()
                if values["psnr"]
            ],
            "usage": share,
            "usage_window": window,
            "used": used_share,
            "used_ceiling": ceiling,
            "num_tokens": self._tokens,
            "perplexity": self._meter.perplexity(),
            "codebook_size": size,
            "bits_per_pixel": self._tokens * math.log2(size) / self._pixels,
            "images_per_second": number / self._seconds if self._seconds else None,
            "pixels_per_image": self._pixels / number,
            "grids": [grid.metrics() for grid in self._grids],
            "parameters": sum(p.numel() for p in tokenizer.parameters()),
            "skipped": [{"name": printable(name), "reason": reason} for name, reason in skipped],
        }
        return Evaluation(metrics, self._examples, self._meter.histogram, skipped)

    def _distances(self) -> dict[str, Any]:
        """Fréchet distances between reconstructions and the reference, or the images themselves."""
        metrics: dict[str, Any] = {}
        for name, (whole, back, _) in self._moments.items():
            if back.number > 1:
                reference, source = self._networks.reference or (None, "")
                if reference is None or len(reference.mean) != len(back.gaussian().mean):
                    reference, source = whole.gaussian(), "the images that were encoded"
                metrics[name] = frechet_distance(reference, back.gaussian())
                metrics[f"{name}_num_images"] = back.number
                metrics[f"{name}_reference"] = source
        return metrics


def compare(
    reconstructions: Tensor, images: Tensor, networks: FeatureNetworks
) -> dict[str, list[float]]:
    """Every measure that there is for images of this size, per image; both [B, C, H, W] in [-1, 1]."""
    values = {"psnr": psnr(reconstructions, images).tolist()}
    side = min(images.shape[2:])
    for name, measure, smallest in (
        ("ssim", ssim, MIN_SSIM_SIDE),
        ("ms_ssim", ms_ssim, MIN_MS_SSIM_SIDE),
    ):
        if side >= smallest:
            with contextlib.suppress(MissingExtra):
                values[name] = measure(reconstructions, images).tolist()
    for name, network in (("lite0_distance", networks.lite0), ("lpips", networks.lpips)):
        if network is not None and images.shape[1] == 3 and side >= MIN_NETWORK_SIDE:
            values[name] = _on(
                network, network.distance, reconstructions.clamp(-1, 1), images
            ).tolist()
    return values


def measure(
    inference: InferenceTokenizer,
    named_images: Iterable[tuple[str, Tensor]],
    networks: FeatureNetworks | None = None,
) -> Evaluator:
    """Encode and decode (name, [C, H, W]) named_images and compare."""
    evaluator = Evaluator(inference.tokenizer.quantize.codebook_size, networks)
    for names, stacked in batches_of_one_shape(named_images, inference.batch):
        images = to_unit_range(stacked)
        tokens, reconstructions, seconds = inference.roundtrip(images)
        layout = inference.tokenizer.layout(*images.shape[2:])
        stages = []
        if inference.tokenizer.is_progressive and len(layout.grids) > 1 and evaluator.wants_stages:
            stages = [
                *inference.decode_each(tokens[:, : -layout.lengths[-1]], layout),
                reconstructions,
            ]
        evaluator.add(names, images, reconstructions, tokens, layout, seconds, stages)
    return evaluator


@torch.no_grad()
def _on(network: FrozenNetwork, function: Callable[..., Tensor], *images: Tensor) -> Tensor:
    """Run a function of a network where the network is; the result comes back to the CPU."""
    device = next(network.buffers()).device
    return function(*(image.float().to(device) for image in images)).cpu()


def _means(values: dict[str, list[float]]) -> dict[str, Any]:
    """Mean of each measure, and over how many images."""
    metrics: dict[str, Any] = {}
    for name, measured in values.items():
        if measured:
            metrics[name], metrics[f"{name}_num_images"] = _mean(measured), len(measured)
    return metrics


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
