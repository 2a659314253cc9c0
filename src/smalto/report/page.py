"""Page of the run report: one self-contained HTML file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from torch import Tensor

from smalto.core.files import write_atomic
from smalto.metrics.formatting import codec_rows, grid_rows, metric_rows
from smalto.metrics.record import Metrics, TrainingSummary
from smalto.report.charts import Curves, bar_chart, curves
from smalto.report.drawing import ERROR_GAIN, data_uri, error_map, token_map

_CURVES: Curves = (
    ("Loss", "loss", True, (("reconstruction", "reconstruction_loss"), ("codebook", "vq_loss"))),
    ("PSNR", "dB", False, (("training crops", "psnr"), ("held-out crops", "held_out_psnr"))),
    (
        "Perceptual distance",
        "distance",
        False,
        (("training crops", "perceptual"), ("held-out crops", "held_out_distance")),
    ),
    ("Codebook use in training", "usage@32K", False, (("share of codes in use", "usage"),)),
    (
        "Discriminator",
        "hinge loss",
        False,
        (("2: cannot tell images apart, 0: tells all apart", "discriminator_loss"),),
    ),
    (
        "Adversarial gradient at the last layer",
        "share",
        False,
        (("of the reconstruction's", "adversarial_gradient"),),
    ),
)


@dataclass(frozen=True)
class Example:
    """One example image with its reconstruction.

    Attributes:
        name: of the image.
        image, reconstruction: uint8 [3, H, W].
        token_colors: uint8 [h*w, 3], a color per token of one grid.
        grid: (h, w) of that grid.
        num_tokens: of the whole image.
        psnr: in dB.
        credit: author of the image.
        stages: for progressive tokenizers, (image, PSNR in dB) after each grid but the last.
        compressed: (caption, image) for other codecs at the same number of bytes.
        beside: (caption, image) of reconstructions by other tokenizers.
    """

    name: str
    image: Tensor
    reconstruction: Tensor
    token_colors: Tensor
    grid: tuple[int, int]
    num_tokens: int
    psnr: float
    credit: str = ""
    stages: tuple[tuple[Tensor, float], ...] = ()
    compressed: tuple[tuple[str, Tensor], ...] = ()
    beside: tuple[tuple[str, Tensor], ...] = ()


@dataclass(frozen=True)
class RunReport:
    """Contents of the report of a run.

    Attributes:
        name: of the run.
        metrics: measured after training.
        training: summary of the training.
        examples: example images.
        histogram: how often each code occurred, int64 [K].
        log: rows of the run's log.jsonl.
        skipped: skipped files, in one sentence; may be empty.
        credits: authors of the training images; may be empty.
    """

    name: str
    metrics: Metrics
    training: TrainingSummary
    examples: list[Example]
    histogram: Tensor
    log: list[dict[str, Any]]
    skipped: str = ""
    credits: str = ""


def write_report(path: Path, report: RunReport) -> None:
    """Write the report as one HTML file."""
    metrics, training = report.metrics, report.training
    page = template("tokenizer.html").render(
        title=f"smalto: {report.name}",
        subtitle=(
            f"{training.steps:,} steps on {training.source}; "
            f"measured on {metrics.num_images} {metrics.measured_on}."
        ),
        headline=_headline(metrics, training),
        table=_table(report),
        grids=grid_rows(metrics),
        codecs=codec_rows(metrics),
        notes=_notes(report),
        error_gain=ERROR_GAIN,
        examples=[_card(example) for example in report.examples],
        charts=_charts(report.histogram, report.log),
    )
    write_atomic(path, page)


def template(name: str) -> jinja2.Template:
    """Return a template of this folder."""
    loader = jinja2.PackageLoader("smalto", "report")
    return jinja2.Environment(loader=loader, autoescape=True).get_template(name)


def _headline(metrics: Metrics, training: TrainingSummary) -> list[tuple[str, str]]:
    tiles = [(f"{metrics.psnr:.2f} dB", f"PSNR on {metrics.measured_on}")]
    if metrics.ssim is not None:
        tiles.append((f"{metrics.ssim:.3f}", "SSIM"))
    return [
        *tiles,
        (f"{metrics.usage:.1%}", f"codes in use (usage@{metrics.usage_window:,})"),
        (f"{metrics.perplexity:.0f} of {metrics.codebook_size:,}", "perplexity"),
        (f"{metrics.bits_per_pixel:.3f}", "bits per pixel (RGB has 24)"),
        (f"{training.times.seconds / 60:.1f} min", "training time"),
    ]


def _table(report: RunReport) -> list[tuple[str, str]]:
    training = report.training
    times = training.times
    waiting = f", {times.waiting:.1%} of it waiting for data" if times.waiting is not None else ""
    rows = [
        *metric_rows(report.metrics),
        ("trained on", training.source),
        (
            "steps, batch, crop",
            f"{training.steps:,} steps of {training.batch} crops of "
            f"{training.size} x {training.size}",
        ),
        ("training time", f"{times.seconds:.0f} s on {training.device}{waiting}"),
        (
            "training speed",
            f"{times.images_per_second} crops/s, at most {times.peak_memory_mb:,} MiB of memory",
        ),
        ("seed", str(training.seed)),
        ("versions", ", ".join(f"{name} {number}" for name, number in training.versions.items())),
        ("fingerprint", training.fingerprint),
    ]
    return [*rows, ("images by", report.credits)] if report.credits else rows


def _notes(report: RunReport) -> list[str]:
    metrics = report.metrics
    notes = []
    if metrics.measured_on.startswith("training images"):
        notes.append(
            "These metrics are measured on training images, because there were too few images to "
            "hold any out. They overestimate the quality on new images."
        )
    if metrics.usage_window < 32 * metrics.codebook_size:
        notes.append(
            f"Usage is measured over only {metrics.usage_window:,} tokens; it is usually reported "
            "over 32 tokens per code."
        )
    return [*notes, report.skipped] if report.skipped else notes


def _card(example: Example) -> dict[str, Any]:
    height, width = example.image.shape[1:]
    scale = max(1, width // example.grid[1])
    last = (example.reconstruction, example.psnr)
    stages = [*example.stages, last] if example.stages else []
    errors = error_map(example.image, example.reconstruction)
    tokens = token_map(example.token_colors, example.grid, scale)
    return {
        "stages": [
            (f"{number}: {psnr:.2f} dB", data_uri(image, lossless=False))
            for number, (image, psnr) in enumerate(stages, start=1)
        ],
        "compressed": [(caption, data_uri(image)) for caption, image in example.compressed],
        "name": example.name,
        "size": f"{width} x {height} pixels, {example.num_tokens:,} tokens",
        "psnr": f"{example.psnr:.2f} dB",
        "credit": example.credit,
        "images": [
            ("image", data_uri(example.image)),
            ("reconstruction", data_uri(example.reconstruction)),
            ("error", data_uri(errors, lossless=False)),
            ("tokens", data_uri(tokens)),
            *((caption, data_uri(image)) for caption, image in example.beside),
        ],
    }


def _charts(histogram: Tensor, log: list[dict[str, Any]]) -> list[tuple[str, str]]:
    charts = curves(_CURVES, log)
    counts = sorted((int(n) for n in histogram), reverse=True)
    title = "How often each code occurs in the evaluated images, most frequent first"
    chart = bar_chart(counts, "codes", "tokens", line=sum(counts) / max(1, len(counts)))
    return [*charts, (title, chart)] if chart else charts
