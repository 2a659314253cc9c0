"""The last step of a tokenizer's run: its evaluation, metrics.json and report.html."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from torch import Tensor

from smalto.core.files import write_atomic
from smalto.core.progress import Progress
from smalto.core.text import printable
from smalto.evaluation.evaluator import Evaluation, evaluate_tokenizer
from smalto.evaluation.feature_networks import FeatureNetworks
from smalto.images.image_file import summary
from smalto.images.image_reader import transform_of
from smalto.images.sources import credits_of
from smalto.images.tensors import to_unit_range
from smalto.inference.inference_tokenizer import InferenceTokenizer
from smalto.metrics.record import ChangedIndices, TrainingSummary
from smalto.report import RunReport, write_report
from smalto.tokenizer import load
from smalto.training.run_folder import (
    METRICS_FILE,
    REPORT_FILE,
    START_FOLDER,
    RunFolder,
    read_log,
)
from smalto.training.tokenizer_recipe import TokenizerRecipe
from smalto.training.tokenizer_run import TrainedRun
from smalto.training.training_images import TrainingImages


def evaluate_run(
    trained: TrainedRun, inference: InferenceTokenizer, images: TrainingImages, progress: Progress
) -> Evaluation:
    """Evaluate a trained run on whole held-out images, as ``smalto evaluate`` does."""
    recipe = trained.recipe
    stride, longer_side = inference.tokenizer.stride, recipe.data.longer_side
    indices = images.to_evaluate(recipe.evaluate.images)
    candidates = len(images.held_out or images.training)
    drawn = f", drawn from {candidates:,}" if len(indices) < candidates else ""
    progress.start("evaluating", len(indices), "images")
    evaluation = evaluate_tokenizer(
        inference,
        images.whole_images(indices, stride, longer_side, progress),
        FeatureNetworks.open(inference.device),
        measured_on=images.measured_on + drawn,
        transform=str(transform_of(stride, longer_side=longer_side)),
        skipped=lambda: images.skipped,
    )
    progress.finish()
    start = trained.folder.path / START_FOLDER
    if not start.is_dir():
        return evaluation
    before = InferenceTokenizer.on(load(start).to(inference.device), recipe.precision)
    again = images.whole_images(indices, stride, longer_side, Progress())
    return evaluation.with_changes(changed_indices=_changed_indices(before, inference, again))


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
    return TrainingSummary(
        steps=recipe.steps,
        batch=recipe.data.batch,
        size=recipe.data.size,
        seed=recipe.seed,
        source=recipe.data.source,
        device=str(inference.device),
        fingerprint=inference.identity.fingerprint,
        times=run.times(),
        versions=versions(),
    )


def _changed_indices(
    before: InferenceTokenizer, after: InferenceTokenizer, images: Iterator[tuple[str, Tensor]]
) -> ChangedIndices:
    changed = total = number = 0
    for _, image in images:
        batch = to_unit_range(image)[None]
        first, second = before.encode(batch), after.encode(batch)
        changed += int((first != second).sum())
        total += first.numel()
        number += 1
    return ChangedIndices(changed / max(total, 1), total, number)
