"""Metrics as text, for terminals and pages."""

from __future__ import annotations

from typing import Any

from smalto.metrics.frechet import ENOUGH


def metric_rows(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    """The measured metrics as (name, value), for tables on pages and terminals."""
    speed, pixels = metrics["images_per_second"], metrics["pixels_per_image"]

    def mean(name: str, form: str = "{:.4f}") -> str:
        """A mean with the number of images behind it: without that it says nothing."""
        return f"{form.format(metrics[name])} (N = {metrics[f'{name}_num_images']:,})"

    def distance(name: str) -> str:
        number = metrics[f"{name}_num_images"]
        few = "" if number >= ENOUGH else f"; fewer than {ENOUGH:,}: compare it with nothing else"
        return f"{metrics[name]:.2f} (N = {number:,}{few}) from {metrics[f'{name}_reference']}"

    no_ssim = 'not measured (it needs pip install "smalto[eval]" and sides of 11 pixels)'
    means = (("MS-SSIM", "ms_ssim"), ("lite0 distance", "lite0_distance"), ("LPIPS (VGG)", "lpips"))
    distances = (("lite0-FID", "lite0_fid"), ("rFID", "rfid"))
    return [
        ("measured on", f"{metrics['num_images']} {metrics['measured_on']}"),
        ("images", metrics["transform"]),
        ("PSNR", mean("psnr", "{:.2f} dB")),
        ("SSIM", mean("ssim") if "ssim" in metrics else no_ssim),
        *[(label, mean(name)) for label, name in means if name in metrics],
        *[(label, distance(name)) for label, name in distances if name in metrics],
        (
            f"usage@{metrics['usage_window']:,}",
            f"{metrics['usage']:.1%} of {metrics['codebook_size']:,} codes",
        ),
        (
            f"used in all {metrics['num_tokens']:,} tokens",
            f"{metrics['used']:.1%} of the codes, of at most {metrics['used_ceiling']:.1%}",
        ),
        ("perplexity", f"{metrics['perplexity']:.1f}"),
        ("bits per pixel", f"{metrics['bits_per_pixel']:.4f}"),
        (
            "images/s",
            f"{speed:.2f} encoded and decoded, of {pixels / 1e6:.2f} megapixels"
            if speed
            else "too fast to tell",
        ),
        ("parameters", f"{metrics['parameters']:,}"),
        ("precision", metrics["precision"]),
        *([("indices changed", _changed(metrics))] if "indices_changed" in metrics else []),
        *[
            (f"weights of {name}", f"sha256 {digest}")
            for name, digest in metrics["networks"].items()
        ],
    ]


def _changed(metrics: dict[str, Any]) -> str:
    tokens, images = metrics["indices_changed_num_tokens"], metrics["indices_changed_num_images"]
    return f"{metrics['indices_changed']:.2%} of {tokens:,} by this fine-tuning (N = {images:,})"


def codec_rows(metrics: dict[str, Any]) -> list[tuple[str, ...]]:
    """A line on the tokenizer and on each other codec at its size, under a line of headings; empty where none was measured."""
    if not metrics["codecs"]:
        return []
    number, every = metrics["codecs"][0]["psnr_num_images"], metrics["num_images"]
    first = f", the first {number:,}" if number < every else ""
    shown = [
        ("PSNR", "psnr", "{:.2f} dB"),
        ("SSIM", "ssim", "{:.4f}"),
        ("lite0 distance", "lite0_distance", "{:.4f}"),
    ]
    shown = [(label, name, form) for label, name, form in shown if name in metrics]
    heading = ("", "images", "bits per pixel", *(label for label, _, _ in shown))
    own = {"codec": "these tokens", **metrics}
    return [heading] + [
        (
            line["codec"],
            f"{line['psnr_num_images']:,}{first if line is not own else ''}",
            f"{line['bits_per_pixel']:.4f}",
            *(form.format(line[name]) if name in line else "-" for _, name, form in shown),
        )
        for line in (own, *metrics["codecs"])
    ]


def grid_rows(metrics: dict[str, Any]) -> list[tuple[str, ...]]:
    """A line on each grid of a tokenizer of several, under a line of headings; empty for one grid."""
    if not metrics["grids"]:
        return []
    staged, every = metrics["grids"][0]["psnr_num_images"], metrics["num_images"]
    of_some = f" ({staged} images)" if 0 < staged < every else ""
    heading = ("grid", "tokens", "codes used", "at most", "perplexity", f"PSNR up to it{of_some}")
    lines = [
        (
            f"{number}: {grid['grid']}",
            f"{grid['tokens']:,}",
            f"{grid['used']:.1%}",
            f"{grid['ceiling']:.1%}",
            f"{grid['perplexity']:.1f}",
            f"{grid['psnr']:.2f} dB" if grid["psnr"] is not None else "-",
        )
        for number, grid in enumerate(metrics["grids"], start=1)
    ]
    all_of_them = (
        "all", f"{metrics['num_tokens']:,}", f"{metrics['used']:.1%}", f"{metrics['used_ceiling']:.1%}",
        f"{metrics['perplexity']:.1f}", f"{metrics['psnr']:.2f} dB",
    )  # fmt: skip
    return [heading, *lines, all_of_them]
