"""The last step of a run: metrics.json and report.html."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from smalto.data.bundled import CREDITS, SOURCE
from smalto.data.images import printable, summary
from smalto.files import write_atomic
from smalto.metrics.frechet import ENOUGH
from smalto.pipelines.measuring import Evaluation
from smalto.pipelines.running import Runner
from smalto.report import write_report
from smalto.training.checkpoint import RunFolder, read_jsonl
from smalto.training.recipe import Recipe


def finish_run(run: RunFolder, recipe: Recipe, runner: Runner, evaluation: Evaluation) -> dict[str, Any]:
    """Write metrics.json and report.html of a trained run; returns the figures.

    Args:
        evaluation: what was measured after training.
    """
    figures = {
        **evaluation.figures,
        "steps": recipe.steps,
        "seed": recipe.seed,
        "device": str(runner.device),
        "fingerprint": runner.fingerprint,
        **_training_times(run),
        "versions": versions(),
    }
    run.event("finished", step=recipe.steps)
    write_report(
        run.path / "report.html",
        title=f"smalto: {printable(run.path.resolve().name)}",
        subtitle=f"{recipe.steps:,} steps on {recipe.data.source}; measured on {figures['num_images']} {figures['measured_on']}.",
        headline=_headline(figures),
        table=_table(figures, recipe),
        grids=grid_rows(figures),
        codecs=codec_rows(figures),
        notes=_notes(figures, evaluation),
        examples=evaluation.examples,
        codebook=runner.tokenizer.get_codebook(),
        histogram=evaluation.histogram,
        log=read_jsonl(run.path / "log.jsonl"),
    )
    write_atomic(run.path / "metrics.json", json.dumps(figures, indent=2, allow_nan=False) + "\n")  # last: it says that the run is complete
    return figures


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


def versions() -> dict[str, str]:
    """Versions of what decides the result."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in ("smalto", "torch", "numpy", "pillow"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _training_times(run: RunFolder) -> dict[str, Any]:
    rows = read_jsonl(run.path / "times.jsonl")
    seconds, waiting = sum(row["seconds"] for row in rows), sum(row["waiting"] for row in rows)
    return {
        "training_seconds": round(seconds, 1),
        "training_images_per_second": round(sum(row["images"] for row in rows) / seconds, 1) if seconds else None,
        "share_waiting_for_data": round(waiting / seconds, 4) if seconds else None,
        "training_peak_memory_mb": max((row.get("memory_mb", 0) for row in rows), default=0),
    }


def _headline(figures: dict[str, Any]) -> list[tuple[str, str]]:
    tiles = [(f"{figures['psnr']:.2f} dB", f"PSNR on {figures['measured_on']}")]
    if "ssim" in figures:
        tiles.append((f"{figures['ssim']:.3f}", "SSIM"))
    return [
        *tiles,
        (f"{figures['usage']:.1%}", f"codes in use (usage@{figures['usage_window']:,})"),
        (f"{figures['perplexity']:.0f} of {figures['codebook_size']:,}", "perplexity"),
        (f"{figures['bits_per_pixel']:.3f}", "bits per pixel (RGB has 24)"),
        (f"{figures['training_seconds'] / 60:.1f} min", "training time"),
    ]


def _table(figures: dict[str, Any], recipe: Recipe) -> list[tuple[str, str]]:
    waiting = figures["share_waiting_for_data"]
    credits = "; ".join(f"{name}: {who}" for name, who in CREDITS.items()) if recipe.data.source == SOURCE else ""
    return [
        *figure_rows(figures),
        ("trained on", recipe.data.source),
        ("steps, batch, crop", f"{recipe.steps:,} steps of {recipe.data.batch} crops of {recipe.data.size} x {recipe.data.size}"),
        (
            "training time",
            f"{figures['training_seconds']:.0f} s on {figures['device']}"
            + (f", {waiting:.1%} of it waiting for data" if waiting is not None else ""),
        ),
        (
            "training speed",
            f"{figures['training_images_per_second']} crops/s, at most {figures['training_peak_memory_mb']:,} MiB of memory",
        ),
        ("seed", str(recipe.seed)),
        ("versions", ", ".join(f"{name} {number}" for name, number in figures["versions"].items())),
        ("fingerprint", figures["fingerprint"]),
        *([("pictures by", credits)] if credits else []),
    ]


def _notes(figures: dict[str, Any], evaluation: Evaluation) -> list[str]:
    notes = []
    if figures["measured_on"].startswith("training pictures"):
        notes.append("These figures are on training pictures, because there were too few to hold any out: they flatter the model.")
    if figures["usage_window"] < 32 * figures["codebook_size"]:
        notes.append(f"There were only {figures['usage_window']:,} tokens to look for codes in; usage is usually stated at 32 per code.")
    if evaluation.skipped:
        notes.append(summary(evaluation.skipped))
    return notes
