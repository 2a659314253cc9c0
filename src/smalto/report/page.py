"""Filling the page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from torch import Tensor

from smalto.core.files import write_atomic
from smalto.report.charts import bar_chart, line_chart
from smalto.report.drawing import ERROR_GAIN, code_colors, data_uri, error_map, token_map


@dataclass(frozen=True)
class Example:
    """One image to show: uint8 [3, H, W] before and after, the tokens [h*w] of one grid, and how many it has in all.

    ``stages``: where the first grids alone make an image, what comes back (uint8 [3, H, W]) after each but the last, and its PSNR.
    ``coded``: the image after other codecs at as many bytes, each under a caption.
    """

    name: str
    image: Tensor
    reconstruction: Tensor
    tokens: Tensor
    grid: tuple[int, int]
    num_tokens: int
    psnr: float
    credit: str = ""
    stages: tuple[tuple[Tensor, float], ...] = ()
    coded: tuple[tuple[str, Tensor], ...] = ()


def write_report(
    path: Path,
    *,
    title: str,
    subtitle: str,
    headline: list[tuple[str, str]],
    table: list[tuple[str, str]],
    grids: list[tuple[str, ...]],
    codecs: list[tuple[str, ...]],
    notes: list[str],
    examples: list[Example],
    codebook: Tensor,
    histogram: Tensor,
    log: list[dict[str, Any]],
) -> None:
    """Write the report of a run.

    Args:
        path: the HTML file.
        title, subtitle: what was trained, on what.
        headline: (metric, meaning) of the few numbers on top.
        table: (name, value) of all of them.
        grids: for a tokenizer of several grids a line on each, under a line of headings.
        codecs: a line on the tokenizer and on each codec at as many bytes, under a line of headings.
        notes: sentences a reader must know, such as files left out.
        examples: images.
        codebook: codes [K, C], for the token map's colors.
        histogram: how often each code occurred [K].
        log: the run's log.jsonl.
    """
    colors = code_colors(codebook.detach().cpu())
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("smalto", "report"), autoescape=True
    )
    page = environment.get_template("template.html").render(
        title=title,
        subtitle=subtitle,
        headline=headline,
        table=table,
        grids=grids,
        codecs=codecs,
        notes=notes,
        error_gain=ERROR_GAIN,
        examples=[_shown(example, colors) for example in examples],
        charts=_charts(histogram, log),
    )
    write_atomic(path, page)


def _shown(example: Example, colors: Tensor) -> dict[str, Any]:
    height, width = example.image.shape[1:]
    scale = max(1, width // example.grid[1])
    stages = [*example.stages, (example.reconstruction, example.psnr)] if example.stages else []
    return {
        "stages": [
            (f"{n}: {psnr:.2f} dB", data_uri(image, lossless=False))
            for n, (image, psnr) in enumerate(stages, start=1)
        ],
        "coded": [(caption, data_uri(image)) for caption, image in example.coded],
        "name": example.name,
        "size": f"{width} x {height} pixels, {example.num_tokens:,} tokens",
        "psnr": f"{example.psnr:.2f} dB",
        "credit": example.credit,
        "images": [
            ("image", data_uri(example.image)),
            ("reconstruction", data_uri(example.reconstruction)),
            ("error", data_uri(error_map(example.image, example.reconstruction), lossless=False)),
            ("tokens", data_uri(token_map(example.tokens, example.grid, colors, scale))),
        ],
    }


# Title, unit, whether the axis is logarithmic, and the curves: label, key in the log.
_CURVES = (
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
        (("2: knows nothing, 0: tells all apart", "discriminator_loss"),),
    ),
    (
        "Adversarial gradient at the last layer",
        "share",
        False,
        (("of the reconstruction's", "adversarial_gradient"),),
    ),
)


def _charts(histogram: Tensor, log: list[dict[str, Any]]) -> list[tuple[str, str]]:
    charts = []
    for title, unit, log_y, curves in _CURVES:
        series = [
            (
                label,
                [row["step"] for row in log if key in row],
                [row[key] for row in log if key in row],
            )
            for label, key in curves
            if any(key in row for row in log)
        ]
        charts.append((title, line_chart(series, "step", unit, log_y)))
    counts = sorted((int(n) for n in histogram), reverse=True)
    title = "How often each code occurs in the images measured, most used first"
    charts.append(
        (title, bar_chart(counts, "codes", "tokens", line=sum(counts) / max(1, len(counts))))
    )
    return [(name, chart) for name, chart in charts if chart]
