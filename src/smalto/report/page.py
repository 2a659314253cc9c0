"""Filling the page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from torch import Tensor

from smalto.core.files import write_atomic
from smalto.report.charts import bar_chart, line_chart
from smalto.report.drawing import ERROR_GAIN, code_colours, data_uri, error_map, token_map


@dataclass(frozen=True)
class Example:
    """One picture to show: uint8 [3, H, W] before and after, the tokens [h*w] of one grid, and how many it has in all.

    ``stages``: where the first grids alone make a picture, what comes back (uint8 [3, H, W]) after each but the last, and its PSNR.
    ``coded``: the picture after other codecs at as many bytes, each under a caption.
    """

    name: str
    picture: Tensor
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
        headline: (figure, meaning) of the few numbers on top.
        table: (name, value) of all of them.
        grids: for a tokenizer of several grids a line on each, under a line of headings.
        codecs: a line on the tokenizer and on each codec at as many bytes, under a line of headings.
        notes: sentences a reader must know, such as files left out.
        examples: pictures.
        codebook: codes [K, C], for the token map's colours.
        histogram: how often each code occurred [K].
        log: the run's log.jsonl.
    """
    colours = code_colours(codebook.detach().cpu())
    environment = jinja2.Environment(loader=jinja2.PackageLoader("smalto", "report"), autoescape=True)
    page = environment.get_template("template.html").render(
        title=title,
        subtitle=subtitle,
        headline=headline,
        table=table,
        grids=grids,
        codecs=codecs,
        notes=notes,
        error_gain=ERROR_GAIN,
        examples=[_shown(example, colours) for example in examples],
        charts=_charts(histogram, log),
    )
    write_atomic(path, page)


def _shown(example: Example, colours: Tensor) -> dict[str, Any]:
    height, width = example.picture.shape[1:]
    scale = max(1, width // example.grid[1])
    stages = [*example.stages, (example.reconstruction, example.psnr)] if example.stages else []
    return {
        "stages": [(f"{n}: {psnr:.2f} dB", data_uri(picture, lossless=False)) for n, (picture, psnr) in enumerate(stages, start=1)],
        "coded": [(caption, data_uri(picture)) for caption, picture in example.coded],
        "name": example.name,
        "size": f"{width} x {height} pixels, {example.num_tokens:,} tokens",
        "psnr": f"{example.psnr:.2f} dB",
        "credit": example.credit,
        "pictures": [
            ("picture", data_uri(example.picture)),
            ("reconstruction", data_uri(example.reconstruction)),
            ("error", data_uri(error_map(example.picture, example.reconstruction), lossless=False)),
            ("tokens", data_uri(token_map(example.tokens, example.grid, colours, scale))),
        ],
    }


# Title, unit, whether the axis is logarithmic, and the curves: label, key in the log.
_CURVES = (
    ("Loss", "loss", True, (("reconstruction", "reconstruction_loss"), ("codebook", "vq_loss"))),
    ("PSNR", "dB", False, (("training crops", "psnr"), ("held-out crops", "held_out_psnr"))),
    ("Perceptual distance", "distance", False, (("training crops", "perceptual"), ("held-out crops", "held_out_distance"))),
    ("Codebook use in training", "usage@32K", False, (("share of codes in use", "usage"),)),
    ("Discriminator", "hinge loss", False, (("2: knows nothing, 0: tells all apart", "discriminator_loss"),)),
    ("Adversarial gradient at the last layer", "share", False, (("of the reconstruction's", "adversarial_gradient"),)),
)


def _charts(histogram: Tensor, log: list[dict[str, Any]]) -> list[tuple[str, str]]:
    charts = []
    for title, unit, log_y, curves in _CURVES:
        series = [
            (label, [row["step"] for row in log if key in row], [row[key] for row in log if key in row])
            for label, key in curves
            if any(key in row for row in log)
        ]
        charts.append((title, line_chart(series, "step", unit, log_y)))
    counts = sorted((int(n) for n in histogram), reverse=True)
    title = "How often each code occurs in the pictures measured, most used first"
    charts.append((title, bar_chart(counts, "codes", "tokens", line=sum(counts) / max(1, len(counts)))))
    return [(name, chart) for name, chart in charts if chart]
