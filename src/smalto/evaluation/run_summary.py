"""The last step of a run: metrics.json and report.html."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from smalto.core.files import write_atomic
from smalto.evaluation.evaluator import Evaluation
from smalto.evaluation.formatting import codec_rows, grid_rows, metric_rows
from smalto.images.bundled import CREDITS, SOURCE
from smalto.images.image_file import printable, summary
from smalto.inference.inference_tokenizer import InferenceTokenizer
from smalto.report import write_report
from smalto.training.recipe import Recipe
from smalto.training.run_folder import RunFolder, read_jsonl


def write_results(
    run: RunFolder, recipe: Recipe, inference: InferenceTokenizer, evaluation: Evaluation
) -> dict[str, Any]:
    """Write metrics.json and report.html of a trained run; returns the metrics.

    Args:
        evaluation: what was measured after training.
    """
    metrics = {
        **evaluation.metrics,
        "steps": recipe.steps,
        "seed": recipe.seed,
        "device": str(inference.device),
        "fingerprint": inference.fingerprint,
        **_training_times(run),
        "versions": versions(),
    }
    run.event("finished", step=recipe.steps)
    write_report(
        run.path / "report.html",
        title=f"smalto: {printable(run.path.resolve().name)}",
        subtitle=f"{recipe.steps:,} steps on {recipe.data.source}; measured on {metrics['num_images']} {metrics['measured_on']}.",
        headline=_headline(metrics),
        table=_table(metrics, recipe),
        grids=grid_rows(metrics),
        codecs=codec_rows(metrics),
        notes=_notes(metrics, evaluation),
        examples=evaluation.examples,
        codebook=inference.tokenizer.get_codebook(),
        histogram=evaluation.histogram,
        log=read_jsonl(run.path / "log.jsonl"),
    )
    write_atomic(
        run.path / "metrics.json", json.dumps(metrics, indent=2, allow_nan=False) + "\n"
    )  # last: it says that the run is complete
    return metrics


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
        "training_images_per_second": round(sum(row["images"] for row in rows) / seconds, 1)
        if seconds
        else None,
        "share_waiting_for_data": round(waiting / seconds, 4) if seconds else None,
        "training_peak_memory_mb": max((row.get("memory_mb", 0) for row in rows), default=0),
    }


def _headline(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    tiles = [(f"{metrics['psnr']:.2f} dB", f"PSNR on {metrics['measured_on']}")]
    if "ssim" in metrics:
        tiles.append((f"{metrics['ssim']:.3f}", "SSIM"))
    return [
        *tiles,
        (f"{metrics['usage']:.1%}", f"codes in use (usage@{metrics['usage_window']:,})"),
        (f"{metrics['perplexity']:.0f} of {metrics['codebook_size']:,}", "perplexity"),
        (f"{metrics['bits_per_pixel']:.3f}", "bits per pixel (RGB has 24)"),
        (f"{metrics['training_seconds'] / 60:.1f} min", "training time"),
    ]


def _table(metrics: dict[str, Any], recipe: Recipe) -> list[tuple[str, str]]:
    waiting = metrics["share_waiting_for_data"]
    credits = (
        "; ".join(f"{name}: {who}" for name, who in CREDITS.items())
        if recipe.data.source == SOURCE
        else ""
    )
    return [
        *metric_rows(metrics),
        ("trained on", recipe.data.source),
        (
            "steps, batch, crop",
            f"{recipe.steps:,} steps of {recipe.data.batch} crops of {recipe.data.size} x {recipe.data.size}",
        ),
        (
            "training time",
            f"{metrics['training_seconds']:.0f} s on {metrics['device']}"
            + (f", {waiting:.1%} of it waiting for data" if waiting is not None else ""),
        ),
        (
            "training speed",
            f"{metrics['training_images_per_second']} crops/s, at most {metrics['training_peak_memory_mb']:,} MiB of memory",
        ),
        ("seed", str(recipe.seed)),
        ("versions", ", ".join(f"{name} {number}" for name, number in metrics["versions"].items())),
        ("fingerprint", metrics["fingerprint"]),
        *([("images by", credits)] if credits else []),
    ]


def _notes(metrics: dict[str, Any], evaluation: Evaluation) -> list[str]:
    notes = []
    if metrics["measured_on"].startswith("training images"):
        notes.append(
            "These metrics are on training images, because there were too few to hold any out: they flatter the model."
        )
    if metrics["usage_window"] < 32 * metrics["codebook_size"]:
        notes.append(
            f"There were only {metrics['usage_window']:,} tokens to look for codes in; usage is usually stated at 32 per code."
        )
    if evaluation.skipped:
        notes.append(summary(evaluation.skipped))
    return notes
