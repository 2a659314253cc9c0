"""Metrics as text, for terminals and pages."""

from __future__ import annotations

from typing import Any

from smalto.metrics.frechet import ENOUGH


def figure_rows(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """The measured figures as (name, value), for tables on pages and terminals."""
    speed, pixels = figures["images_per_second"], figures["pixels_per_image"]

    def mean(name: str, form: str = "{:.4f}") -> str:
        """A mean with the number of pictures behind it: without that it says nothing."""
        return f"{form.format(figures[name])} (N = {figures[f'{name}_num_images']:,})"

    def distance(name: str) -> str:
        number = figures[f"{name}_num_images"]
        few = "" if number >= ENOUGH else f"; fewer than {ENOUGH:,}: compare it with nothing else"
        return f"{figures[name]:.2f} (N = {number:,}{few}) from {figures[f'{name}_reference']}"

    no_ssim = 'not measured (it needs pip install "smalto[eval]" and sides of 11 pixels)'
    means = (("MS-SSIM", "ms_ssim"), ("lite0 distance", "lite0_distance"), ("LPIPS (VGG)", "lpips"))
    distances = (("lite0-FID", "lite0_fid"), ("rFID", "rfid"))
    return [
        ("measured on", f"{figures['num_images']} {figures['measured_on']}"),
        ("pictures", figures["transform"]),
        ("PSNR", mean("psnr", "{:.2f} dB")),
        ("SSIM", mean("ssim") if "ssim" in figures else no_ssim),
        *[(label, mean(name)) for label, name in means if name in figures],
        *[(label, distance(name)) for label, name in distances if name in figures],
        (f"usage@{figures['usage_window']:,}", f"{figures['usage']:.1%} of {figures['codebook_size']:,} codes"),
        (f"used in all {figures['num_tokens']:,} tokens", f"{figures['used']:.1%} of the codes, of at most {figures['used_ceiling']:.1%}"),
        ("perplexity", f"{figures['perplexity']:.1f}"),
        ("bits per pixel", f"{figures['bits_per_pixel']:.4f}"),
        ("images/s", f"{speed:.2f} encoded and decoded, of {pixels / 1e6:.2f} megapixels" if speed else "too fast to tell"),
        ("parameters", f"{figures['parameters']:,}"),
        ("precision", figures["precision"]),
        *([("indices changed", _changed(figures))] if "indices_changed" in figures else []),
        *[(f"weights of {name}", f"sha256 {digest}") for name, digest in figures["networks"].items()],
    ]


def _changed(figures: dict[str, Any]) -> str:
    tokens, images = figures["indices_changed_num_tokens"], figures["indices_changed_num_images"]
    return f"{figures['indices_changed']:.2%} of {tokens:,} by this fine-tuning (N = {images:,})"


def codec_rows(figures: dict[str, Any]) -> list[tuple[str, ...]]:
    """A line on the tokenizer and on each other codec at its size, under a line of headings; empty where none was measured."""
    if not figures["codecs"]:
        return []
    number, every = figures["codecs"][0]["psnr_num_images"], figures["num_images"]
    first = f", the first {number:,}" if number < every else ""
    shown = [("PSNR", "psnr", "{:.2f} dB"), ("SSIM", "ssim", "{:.4f}"), ("lite0 distance", "lite0_distance", "{:.4f}")]
    shown = [(label, name, form) for label, name, form in shown if name in figures]
    heading = ("", "pictures", "bits per pixel", *(label for label, _, _ in shown))
    own = {"codec": "these tokens", **figures}
    return [heading] + [
        (
            line["codec"],
            f"{line['psnr_num_images']:,}{first if line is not own else ''}",
            f"{line['bits_per_pixel']:.4f}",
            *(form.format(line[name]) if name in line else "-" for _, name, form in shown),
        )
        for line in (own, *figures["codecs"])
    ]


def grid_rows(figures: dict[str, Any]) -> list[tuple[str, ...]]:
    """A line on each grid of a tokenizer of several, under a line of headings; empty for one grid."""
    if not figures["grids"]:
        return []
    staged, every = figures["grids"][0]["psnr_num_images"], figures["num_images"]
    of_some = f" ({staged} pictures)" if 0 < staged < every else ""
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
        for number, grid in enumerate(figures["grids"], start=1)
    ]
    all_of_them = (
        "all", f"{figures['num_tokens']:,}", f"{figures['used']:.1%}", f"{figures['used_ceiling']:.1%}",
        f"{figures['perplexity']:.1f}", f"{figures['psnr']:.2f} dB",
    )  # fmt: skip
    return [heading, *lines, all_of_them]
