"""Measuring a tokenizer, image by image."""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from smalto.core.device import PeakMemory
from smalto.core.errors import DataError, MissingExtra
from smalto.core.layout import TokenLayout
from smalto.core.text import printable
from smalto.evaluation.codecs import CODECS, compress_to_size
from smalto.evaluation.feature_networks import FeatureNetworks
from smalto.features.frozen import FrozenNetwork
from smalto.images.bundled import credit
from smalto.images.image_file import Skipped, summary
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
from smalto.metrics.image_quality import MIN_MS_SSIM_SIDE
from smalto.metrics.record import CodecMetrics, GridMetrics, Mean, Metrics
from smalto.report import Example
from smalto.tokenizer import ImageTokenizer

MIN_SSIM_SIDE = 11
MIN_NETWORK_SIDE = 32
MAX_EXAMPLES = 6
MAX_CODEC_IMAGES = (
    256  # decoded grid by grid and compressed as JPEG and WebP: both take many times as long
)

Values = defaultdict[str, list[float]]


@dataclass(frozen=True)
class Evaluation:
    """What was measured, with what the report shows besides.

    Attributes:
        metrics: all of them.
        examples: the first images.
        histogram: how often each code occurred, int64 [K].
        skipped: files left out, and why.
        memory: largest memory of encoding and decoding one batch, weights included, in bytes; None
            if it was not measured, or this system hides it.
    """

    metrics: Metrics
    examples: list[Example]
    histogram: Tensor
    skipped: list[Skipped]
    memory: int | None = None

    def with_changes(self, **changes: Any) -> Evaluation:
        """Return a copy with some metrics replaced."""
        return replace(self, metrics=replace(self.metrics, **changes))


def evaluate_tokenizer(
    inference: InferenceTokenizer,
    images: Iterable[tuple[str, Tensor]],
    networks: FeatureNetworks,
    *,
    measured_on: str,
    transform: str,
    skipped: Callable[[], list[Skipped]],
    measure_memory: bool = False,
) -> Evaluation:
    """Encode and decode whole images and compare.

    Args:
        inference: the tokenizer.
        images: (name, [C, H, W]), uint8 or float in [-1, 1].
        networks: for perceptual and Fréchet distances.
        measured_on: which images, in words.
        transform: what was done to them first, in words.
        skipped: called at the end: what was left out.
        measure_memory: also measure the memory of each batch, which resets the peak memory that
            the system reports for this process.

    Raises:
        DataError: there was no image.
    """
    evaluator = Evaluator(inference.tokenizer, networks)
    growths = []
    for names, stacked in batches_of_one_shape(images, inference.batch):
        batch = to_unit_range(stacked)
        memory = PeakMemory(inference.device) if measure_memory else None
        tokens, reconstructions, seconds = inference.roundtrip(batch)
        growths.append(memory.growth() if memory is not None else None)
        layout = inference.tokenizer.layout(*batch.shape[2:])
        stages = []
        progressive = inference.tokenizer.is_progressive and len(layout.grids) > 1
        if progressive and evaluator.needs_stages:
            earlier = inference.decode_each(tokens[:, : -layout.lengths[-1]], layout)
            stages = [*earlier, reconstructions]
        evaluator.add(names, batch, reconstructions, tokens, layout, seconds, stages)
    evaluation = evaluator.result(measured_on, transform, inference.precision, skipped())
    measured = [growth for growth in growths if growth is not None]
    return replace(evaluation, memory=inference.weight_bytes + max(measured) if measured else None)


@dataclass(frozen=True)
class _Grid:
    """One grid of the layout over all images: its codes, its sizes, the PSNR up to it."""

    histogram: Tensor
    sizes: set[tuple[int, int]]
    psnr: list[float]

    def metrics(self) -> GridMetrics:
        share, ceiling = used(self.histogram)
        return GridMetrics(
            grid="x".join(map(str, *self.sizes)) if len(self.sizes) == 1 else "varies",
            tokens=int(self.histogram.sum()),
            used=share,
            ceiling=ceiling,
            perplexity=perplexity(self.histogram),
            psnr=Mean.of(self.psnr),
        )


class Evaluator:
    """Adds up what is measured, batch by batch.

    Args:
        tokenizer: the one that is measured.
        networks: for perceptual and Fréchet distances.
        max_examples: images kept for the report.
    """

    def __init__(
        self,
        tokenizer: ImageTokenizer,
        networks: FeatureNetworks | None = None,
        max_examples: int = MAX_EXAMPLES,
    ) -> None:
        self._tokenizer = tokenizer
        self._size = tokenizer.quantize.codebook_size
        self._meter = CodebookMeter(self._size)
        self._networks = networks or FeatureNetworks()
        self._moments = {
            name: (FeatureMoments(network.dim), FeatureMoments(network.dim), network)
            for name, network in self._networks.pooled()
        }
        self._grids: list[_Grid] = []
        self._values: Values = defaultdict(list)
        self._codecs: dict[str, Values] = {codec: defaultdict(list) for codec in CODECS}
        self._pixels = 0
        self._tokens = 0
        self._seconds = 0.0
        self._max_examples = max_examples
        self._examples: list[Example] = []

    @property
    def needs_stages(self) -> bool:
        """Whether images after each grid are still measured: decoding them takes many times as
        long.
        """
        return len(self._values["psnr"]) < MAX_CODEC_IMAGES

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
        """Add a batch.

        Args:
            names: of the images.
            images, reconstructions: float [B, C, H, W] in [-1, 1].
            tokens: int64 [B, L].
            layout: of the tokens.
            seconds: to encode and decode them.
            stages: for progressive tokenizers, the images after each grid.
        """
        self._meter.add(tokens)
        values = compare(reconstructions, images, self._networks)
        for name, measured in values.items():
            self._values[name] += measured
        is_rgb = images.shape[1] == 3
        if is_rgb:
            for whole, back, network in self._moments.values():
                whole.add(_on_device_of(network, network.pooled, images))
                back.add(_on_device_of(network, network.pooled, reconstructions))
        self._pixels += images.shape[0] * images.shape[2] * images.shape[3]
        self._tokens += tokens.numel()
        self._seconds += seconds
        stage_values = [psnr(stage, images).tolist() for stage in stages]
        if len(layout.grids) > 1:
            self._count_grids(tokens, layout, stage_values)
        compressed: list[list[tuple[str, Tensor]]] = [[] for _ in names]
        if is_rgb and len(self._codecs[CODECS[0]]["psnr"]) < MAX_CODEC_IMAGES:
            compressed = [self._compress(image, tokens.shape[1]) for image in images]
        # The first of the finest grids is shown.
        shown = max(range(len(layout.grids)), key=lambda number: layout.lengths[number])
        finest = tokens.split(layout.lengths, dim=1)[shown]
        room = self._max_examples - len(self._examples) if is_rgb else 0
        for i in range(min(len(names), room)):
            earlier = [
                (to_uint8(stage[i]), value[i])
                for stage, value in zip(stages, stage_values, strict=True)
            ]
            self._examples.append(
                Example(
                    printable(names[i]),
                    image=to_uint8(images[i]),
                    reconstruction=to_uint8(reconstructions[i]),
                    token_colors=self._tokenizer.quantize.token_colors(finest[i], shown),
                    grid=layout.grids[shown],
                    num_tokens=tokens.shape[1],
                    psnr=values["psnr"][i],
                    credit=credit(names[i]),
                    stages=tuple(earlier[:-1]),
                    compressed=tuple(compressed[i]),
                )
            )

    def result(
        self, measured_on: str, transform: str, precision: str, skipped: list[Skipped]
    ) -> Evaluation:
        """Return the metrics over all images added.

        Raises:
            DataError: there was none.
        """
        if not self._values["psnr"]:
            raise DataError(f"there was no image to measure. {summary(skipped)}".strip())
        usage, window = self._meter.usage()
        used_share, ceiling = used(self._meter.histogram)
        number = len(self._values["psnr"])
        metrics = Metrics(
            **_means(self._values),
            **self._distances(),
            measured_on=measured_on,
            num_images=number,
            transform=transform,
            precision=precision,
            networks=self._networks.hashes(),
            codecs=tuple(
                CodecMetrics(codec=codec, **_means(values))
                for codec, values in self._codecs.items()
                if values["psnr"]
            ),
            usage=usage,
            usage_window=window,
            used=used_share,
            used_ceiling=ceiling,
            num_tokens=self._tokens,
            perplexity=self._meter.perplexity(),
            codebook_size=self._size,
            bits_per_pixel=self._tokens * math.log2(self._size) / self._pixels,
            images_per_second=number / self._seconds if self._seconds else None,
            pixels_per_image=self._pixels / number,
            grids=tuple(grid.metrics() for grid in self._grids),
            parameters=sum(p.numel() for p in self._tokenizer.parameters()),
            skipped=tuple((printable(name), reason) for name, reason in skipped),
        )
        return Evaluation(metrics, self._examples, self._meter.histogram, skipped)

    def _count_grids(
        self, tokens: Tensor, layout: TokenLayout, stage_values: list[list[float]]
    ) -> None:
        if not self._grids:
            empty = torch.zeros(self._size, dtype=torch.int64)
            self._grids = [_Grid(empty.clone(), set(), []) for _ in layout.grids]
        blocks = tokens.split(layout.lengths, dim=1)
        for number, (grid, block) in enumerate(zip(self._grids, blocks, strict=True)):
            grid.histogram.add_(torch.bincount(block.flatten(), minlength=self._size))
            grid.sizes.add(layout.grids[number])
            grid.psnr.extend(stage_values[number] if stage_values else [])

    def _compress(self, image: Tensor, num_tokens: int) -> list[tuple[str, Tensor]]:
        """Measure an image [C, H, W] as JPEG and WebP of as many bytes as its tokens.

        Returns:
            a caption and the decoded image for each.
        """
        size = num_tokens * math.log2(self._size) / 8
        found = []
        for codec, values in self._codecs.items():
            compressed = compress_to_size(to_uint8(image), codec, size)
            if compressed is None:
                continue
            decoded = to_unit_range(compressed.image)[None]
            measured = compare(decoded, image[None], self._networks)
            for name, value in measured.items():
                values[name] += value
            bits_per_pixel = 8 * compressed.size / (image.shape[1] * image.shape[2])
            values["bits_per_pixel"].append(bits_per_pixel)
            caption = (
                f"{codec}: {measured['psnr'][0]:.2f} dB at {bits_per_pixel:.3f} bits per pixel"
            )
            found.append((caption, compressed.image))
        return found

    def _distances(self) -> dict[str, Any]:
        """Fréchet distances between reconstructions and the reference, or the images themselves."""
        distances = {}
        for name, (whole, back, _) in self._moments.items():
            if back.number > 1:
                reference, source = self._networks.reference or (None, "")
                if reference is None or len(reference.mean) != len(back.gaussian().mean):
                    reference, source = whole.gaussian(), "the images that were encoded"
                distance = frechet_distance(reference, back.gaussian())
                distances[name] = Mean(distance, back.number, source)
        return distances


def compare(
    reconstructions: Tensor, images: Tensor, networks: FeatureNetworks
) -> dict[str, list[float]]:
    """Return every metric that images of this size allow, per image; both [B, C, H, W] in [-1,
    1].
    """
    values = {"psnr": psnr(reconstructions, images).tolist()}
    side = min(images.shape[2:])
    structural = (("ssim", ssim, MIN_SSIM_SIDE), ("ms_ssim", ms_ssim, MIN_MS_SSIM_SIDE))
    for name, metric, smallest in structural:
        if side >= smallest:
            with contextlib.suppress(MissingExtra):
                values[name] = metric(reconstructions, images).tolist()
    for name, network in (("lite0_distance", networks.lite0), ("lpips", networks.lpips)):
        if network is not None and images.shape[1] == 3 and side >= MIN_NETWORK_SIDE:
            clamped = reconstructions.clamp(-1, 1)
            distances = _on_device_of(network, network.distance, clamped, images)
            values[name] = distances.tolist()
    return values


@torch.no_grad()
def _on_device_of(
    network: FrozenNetwork, function: Callable[..., Tensor], *images: Tensor
) -> Tensor:
    """Run a function of a network on the network's device; return the result on the CPU."""
    device = next(network.buffers()).device
    return function(*(image.float().to(device) for image in images)).cpu()


def _means(values: Values) -> dict[str, Any]:
    return {name: Mean.of(measured) for name, measured in values.items() if measured}
