"""Metrics as text, for terminals and pages."""

from __future__ import annotations

from collections.abc import Sequence

from smalto.metrics.frechet import ENOUGH
from smalto.metrics.generator_metrics import GeneratorMetrics
from smalto.metrics.record import ImageMetrics, Mean, Metrics

NO_SSIM = 'not measured (it needs pip install "smalto[eval]" and sides of 11 pixels)'
_MEANS = (
    ("MS-SSIM", "ms_ssim"),
    ("lite0 distance", "lite0_distance"),
    ("LPIPS (VGG)", "lpips"),
)
_DISTANCES = (("lite0-FID", "lite0_fid"), ("rFID", "rfid"))
_CODEC_COLUMNS = (
    ("PSNR", "psnr", "{:.2f} dB"),
    ("SSIM", "ssim", "{:.4f}"),
    ("lite0 distance", "lite0_distance", "{:.4f}"),
)


def metric_tables(metrics: Metrics) -> list[list[tuple[str, ...]]]:
    """Return all tables of a tokenizer's metrics; the first is one of (name, value)."""
    return [list(metric_rows(metrics)), grid_rows(metrics), codec_rows(metrics)]


def metric_rows(metrics: Metrics) -> list[tuple[str, str]]:
    """Return the metrics as (name, value)."""
    psnr, ssim = metrics.psnr, metrics.ssim
    assert psnr is not None
    codes = f"{metrics.codebook_size:,} codes"
    rows = [
        ("measured on", f"{metrics.num_images} {metrics.measured_on}"),
        ("images", metrics.transform),
        ("PSNR", _mean(psnr, "{:.2f} dB")),
        ("SSIM", _mean(ssim) if ssim is not None else NO_SSIM),
    ]
    for label, name in _MEANS:
        value = getattr(metrics, name)
        if value is not None:
            rows.append((label, _mean(value)))
    for label, name in _DISTANCES:
        value = getattr(metrics, name)
        if value is not None:
            rows.append((label, _distance(value)))
    rows += [
        (f"usage@{metrics.usage_window:,}", f"{metrics.usage:.1%} of {codes}"),
        (
            f"used in all {metrics.num_tokens:,} tokens",
            f"{metrics.used:.1%} of the codes, of at most {metrics.used_ceiling:.1%}",
        ),
        ("perplexity", f"{metrics.perplexity:.1f}"),
        ("bits per pixel", f"{metrics.bits_per_pixel:.4f}"),
        ("images/s", _speed(metrics)),
        ("parameters", f"{metrics.parameters:,}"),
        ("precision", metrics.precision),
    ]
    if metrics.changed_indices is not None:
        changed = metrics.changed_indices
        rows.append(
            (
                "indices changed",
                f"{changed.share:.2%} of {changed.num_tokens:,} by this fine-tuning "
                f"(N = {changed.num_images:,})",
            )
        )
    rows += [(f"weights of {name}", f"sha256 {sha}") for name, sha in metrics.networks.items()]
    return rows


def codec_rows(metrics: Metrics) -> list[tuple[str, ...]]:
    """Return a row for the tokens and for each codec at their size, below a heading.

    Empty if no codec was measured.
    """
    if not metrics.codecs:
        return []
    measured = metrics.codecs[0].psnr
    number = measured.num_images if measured is not None else 0
    first = f", the first {number:,}" if number < metrics.num_images else ""
    columns = [column for column in _CODEC_COLUMNS if getattr(metrics, column[1]) is not None]
    heading = ("", "images", "bits per pixel", *(label for label, _, _ in columns))
    tokens = f"{metrics.num_images:,}", f"{metrics.bits_per_pixel:.4f}"
    rows = [heading, ("these tokens", *tokens, *_cells(metrics, columns))]
    for codec in metrics.codecs:
        size = f"{codec.bits_per_pixel:.4f}" if codec.bits_per_pixel is not None else "-"
        rows.append((codec.codec, f"{number:,}{first}", size, *_cells(codec, columns)))
    return rows


def grid_rows(metrics: Metrics) -> list[tuple[str, ...]]:
    """Return a row for each grid of the layout, below a heading; empty for a single grid."""
    if not metrics.grids:
        return []
    first = metrics.grids[0].psnr
    decoded = first.num_images if first is not None else 0
    some = f" ({decoded} images)" if 0 < decoded < metrics.num_images else ""
    rows: list[tuple[str, ...]] = [
        ("grid", "tokens", "codes used", "at most", "perplexity", f"PSNR up to it{some}")
    ]
    for number, grid in enumerate(metrics.grids, start=1):
        rows.append(
            (
                f"{number}: {grid.grid}",
                f"{grid.tokens:,}",
                f"{grid.used:.1%}",
                f"{grid.ceiling:.1%}",
                f"{grid.perplexity:.1f}",
                f"{grid.psnr:.2f} dB" if grid.psnr is not None else "-",
            )
        )
    rows.append(
        (
            "all",
            f"{metrics.num_tokens:,}",
            f"{metrics.used:.1%}",
            f"{metrics.used_ceiling:.1%}",
            f"{metrics.perplexity:.1f}",
            f"{metrics.psnr:.2f} dB",
        )
    )
    return rows


def generator_rows(metrics: GeneratorMetrics) -> list[tuple[str, str]]:
    """Return the metrics of a generator as (name, value)."""
    held_out, training, histogram = metrics.held_out, metrics.training, metrics.histogram
    return [
        ("measured on", f"{held_out.num_rows:,} {metrics.measured_on}"),
        ("cross-entropy", f"{held_out.loss:.4f} nats per token"),
        ("below the histogram", f"{metrics.below_histogram:.1%}"),
        ("accuracy", f"{held_out.accuracy:.2%}"),
        ("on training rows", f"{training.loss:.4f} nats (N = {training.num_rows:,})"),
        ("histogram by position", f"{histogram.loss:.4f} nats"),
        ("uniform guess", f"{metrics.uniform:.4f} nats"),
    ]


def prediction_rows(metrics: GeneratorMetrics, grids: Sequence[str]) -> list[tuple[str, ...]]:
    """Return a row for each grid of the layout, and for all, below a heading.

    Args:
        metrics: of the generator.
        grids: the size of each grid, such as ``"4x4"``.
    """
    heading = ("grid", "cross-entropy", "histogram", "on training rows", "accuracy", "histogram's")
    columns = (
        (*metrics.held_out.loss_by_grid, metrics.held_out.loss),
        (*metrics.histogram.loss_by_grid, metrics.histogram.loss),
        (*metrics.training.loss_by_grid, metrics.training.loss),
        (*metrics.held_out.accuracy_by_grid, metrics.held_out.accuracy),
        (*metrics.histogram.accuracy_by_grid, metrics.histogram.accuracy),
    )
    names = [f"{number}: {grid}" for number, grid in enumerate(grids, start=1)]
    rows = [
        (name, *(f"{loss:.4f}" for loss in values[:3]), *(f"{share:.2%}" for share in values[3:]))
        for name, *values in zip([*names, "all"], *columns, strict=True)
    ]
    return [heading, *(rows if len(grids) > 1 else rows[-1:])]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows of cells as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines


def _mean(value: Mean, form: str = "{:.4f}") -> str:
    """A mean with the number of images behind it: without that it means nothing."""
    return f"{form.format(value)} (N = {value.num_images:,})"


def _distance(value: Mean) -> str:
    few = value.num_images < ENOUGH
    warning = f"; fewer than {ENOUGH:,}: not comparable" if few else ""
    return f"{value:.2f} (N = {value.num_images:,}{warning}) from {value.reference}"


def _speed(metrics: Metrics) -> str:
    if metrics.images_per_second is None:
        return "too fast to measure"
    megapixels = metrics.pixels_per_image / 1e6
    speed = metrics.images_per_second
    return f"{speed:.2f} encoded and decoded, of {megapixels:.2f} megapixels"


def _cells(metrics: ImageMetrics, columns: Sequence[tuple[str, str, str]]) -> list[str]:
    values = [(getattr(metrics, name), form) for _, name, form in columns]
    return [form.format(value) if value is not None else "-" for value, form in values]
