"""The last step of a run: metrics.json and report.html."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version

from smalto.core.files import write_atomic
from smalto.core.text import printable
from smalto.evaluation.evaluator import Evaluation
from smalto.images.image_file import summary
from smalto.images.sources import credits_of
from smalto.inference.inference_tokenizer import InferenceTokenizer
from smalto.metrics.record import TrainingSummary
from smalto.report import RunReport, write_report
from smalto.training.run_folder import METRICS_FILE, REPORT_FILE, RunFolder, read_log
from smalto.training.tokenizer_recipe import TokenizerRecipe


def write_results(
    run: RunFolder,
    recipe: TokenizerRecipe,
    inference: InferenceTokenizer,
    evaluation: Evaluation,
) -> TrainingSummary:
    """Write metrics.json and report.html of a trained run; return the training in numbers."""
    training = _summarize_training(run, recipe, inference)
    run.event("finished", step=recipe.steps)
    report = RunReport(
        name=printable(run.path.resolve().name),
        metrics=evaluation.metrics,
        training=training,
        examples=evaluation.examples,
        histogram=evaluation.histogram,
        log=read_log(run.path / "log.jsonl"),
        skipped=summary(evaluation.skipped),
        credits=credits_of(recipe.data.source),
    )
    write_report(run.path / REPORT_FILE, report)
    metrics = {**evaluation.metrics.as_json(), **training.as_json()}
    text = json.dumps(metrics, indent=2, allow_nan=False) + "\n"
    write_atomic(run.path / METRICS_FILE, text)  # last: it says that the run is complete
    return training


def versions() -> dict[str, str]:
    """Return the versions of what decides the result."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in ("smalto", "torch", "numpy", "pillow"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _summarize_training(
    run: RunFolder, recipe: TokenizerRecipe, inference: InferenceTokenizer
) -> TrainingSummary:
    rows = read_log(run.path / "times.jsonl")
    seconds = sum(row.get("seconds", 0) for row in rows)
    waiting = sum(row.get("waiting", 0) for row in rows)
    images = sum(row.get("images", 0) for row in rows)
    return TrainingSummary(
        steps=recipe.steps,
        batch=recipe.data.batch,
        size=recipe.data.size,
        seed=recipe.seed,
        source=recipe.data.source,
        device=str(inference.device),
        fingerprint=inference.identity.fingerprint,
        seconds=round(seconds, 1),
        waiting=round(waiting / seconds, 4) if seconds else None,
        images_per_second=round(images / seconds, 1) if seconds else None,
        peak_memory_mb=max((row.get("memory_mb", 0) for row in rows), default=0),
        versions=versions(),
    )
