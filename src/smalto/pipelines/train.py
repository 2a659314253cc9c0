"""Training a tokenizer: from images to a run with a report."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from smalto.core import distributed
from smalto.core.allocator import retain_freed_memory
from smalto.core.device import resolve_device
from smalto.core.errors import ConfigError, RunError
from smalto.core.files import named_path
from smalto.core.progress import Progress
from smalto.evaluation.evaluator import Evaluation, evaluate_tokenizer
from smalto.evaluation.feature_networks import FeatureNetworks
from smalto.evaluation.run_summary import write_results
from smalto.images.image_reader import transform_of
from smalto.images.tensors import to_unit_range
from smalto.inference.inference_tokenizer import InferenceTokenizer
from smalto.interop.var import load_tokenizer as load_var
from smalto.metrics.record import ChangedIndices, Metrics, TrainingSummary
from smalto.pretrained import finetuning_recipe, is_pretrained, recorded_name
from smalto.tokenizer import ImageTokenizer, load
from smalto.training.recipe import change_recipe
from smalto.training.recipe_file import load_recipe
from smalto.training.run_folder import RECIPE_FILE, START_FOLDER, RunFolder
from smalto.training.tokenizer_recipe import TokenizerRecipe
from smalto.training.tokenizer_run import TrainedRun, resume_run, start_run
from smalto.training.training_images import (
    DATASET,
    ImageData,
    TrainingImages,
    open_training_images,
)


@dataclass(frozen=True)
class Trained:
    """A finished training.

    Attributes:
        run: the folder.
        tokenizer: in evaluation mode.
        metrics: measured on whole held-out images; None on ranks other than 0.
        training: the training in numbers; None on ranks other than 0.
    """

    run: RunFolder
    tokenizer: ImageTokenizer
    metrics: Metrics | None
    training: TrainingSummary | None


@retain_freed_memory()
def train(
    data: ImageData,
    recipe: TokenizerRecipe | None = None,
    *,
    out: str | Path = "runs/mine",
    overwrite: bool = False,
    start: ImageTokenizer | str | Path | None = None,
    device: str = "auto",
    workers: int | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Train a tokenizer and write a run folder with checkpoints, metrics and a report.

    Under torchrun the processes share every batch; rank 0 writes, and it alone evaluates at the
    end.

    Args:
        data: a folder of images, ``"bundled"``, ``"emoji"``, or a map-style dataset of [C, H, W]
            tensors (uint8, or float in [-1, 1]).
        recipe: what to train and how; None: ``TokenizerRecipe()``, or the recipe for fine-tuning of
            a ``start`` in this package.
        out: the run folder to create.
        overwrite: replace a run that exists.
        start: fine-tune this tokenizer: an ImageTokenizer, its folder, a name such as
            ``"photos-f8"``, or a weight file of VAR.
            ``recipe.finetune.learn`` says what is trained.
        device: "auto", "cpu", "cuda" or "mps".
        workers: processes that read images (0: none); None leaves one core to the model. In a
            script, workers need the call under ``if __name__ == "__main__":``.
        progress: receives steps, metrics and messages.

    Raises:
        ConfigError, DataError, RunError: settings, images or the output folder do not fit.
        Interrupted: SIGINT, SIGTERM or SIGHUP arrived; everything is saved.
    """
    out = named_path(out, "the run")
    target = resolve_device(device)
    recipe = recipe or load_recipe(finetuning_recipe(start))
    if start is None and recipe.finetune.learn != "everything":
        raise ConfigError(
            f"finetune.learn is {recipe.finetune.learn!r}, but no tokenizer was named to start "
            "from. Name one: --from FOLDER."
        )
    with distributed.process_group(target):
        progress = _rank_zero_progress(progress)
        if distributed.rank() == 0:
            if isinstance(data, (str, Path)) and Path(data).resolve().is_relative_to(out.resolve()):
                raise RunError(
                    f"the images lie inside {out}, the run to create. Name another --out."
                )
            RunFolder.check_free(out, overwrite)
        with open_training_images(data, recipe, workers) as images:
            trained = start_run(
                images,
                recipe,
                out,
                target,
                progress,
                overwrite=overwrite,
                start=_read_start(start),
                start_name=_name_of(start),
            )
            return _finish(trained, images, progress)


@retain_freed_memory()
def resume(
    run: str | Path,
    data: ImageData | None = None,
    *,
    settings: dict[str, Any] | None = None,
    device: str = "auto",
    workers: int | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Resume a run from its newest checkpoint that is not damaged, on any number of processes.

    Args:
        run: the run folder.
        data: where the images are now, if they moved; required if the run was trained on a dataset.
        settings: changes to its recipe, such as ``{"steps": 4000}``; the tokenizer and the images
            cannot change.
        device, workers, progress: as for ``train``.

    Raises:
        ConfigError, DataError, RunError, Interrupted: as for ``train``.
    """
    folder = RunFolder(run)
    target = resolve_device(device)
    recipe = change_run_recipe(folder, settings or {})
    if data is None and recipe.data.source == DATASET:
        raise ConfigError(
            f"{run} was trained on a dataset: pass it again, smalto.resume({str(run)!r}, dataset)."
        )
    source = data if data is not None else recipe.data.source
    if source == "":
        raise ConfigError(
            f"{run}/{RECIPE_FILE} names no source of images; expected one in data.source. Name "
            "their folder, or restore that file from a copy."
        )
    with distributed.process_group(target):
        progress = _rank_zero_progress(progress)
        with open_training_images(source, recipe, workers, folder.split()) as images:
            trained = resume_run(images, folder, recipe, target, progress)
            return _finish(trained, images, progress)


def change_run_recipe(run: RunFolder, settings: dict[str, Any]) -> TokenizerRecipe:
    """Return the run's recipe with ``settings``; raise ConfigError if it would be another run."""
    recipe: TokenizerRecipe = load_recipe(run.path / RECIPE_FILE)
    for key in settings:
        fixed = key.startswith(("tokenizer.", "finetune.")) or key in ("data.source", "seed")
        discriminator = key in ("losses.adversarial.width", "losses.adversarial.layers")
        if fixed or (discriminator and recipe.losses.adversarial.weight):
            raise ConfigError(
                f"a resumed run keeps its {key}. Start a new run with another --out to change it."
            )
    return change_recipe(recipe, settings)


def _evaluate_run(
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


def _finish(trained: TrainedRun, images: TrainingImages, progress: Progress) -> Trained:
    """Evaluate and write metrics.json and report.html, on rank 0 alone."""
    is_first = distributed.rank() == 0
    distributed.leave_process_group()
    if not is_first:
        return Trained(trained.folder, trained.tokenizer, None, None)
    inference = InferenceTokenizer.on(trained.tokenizer, trained.recipe.precision)
    evaluation = _evaluate_run(trained, inference, images, progress)
    training = write_results(trained.folder, trained.recipe, inference, evaluation)
    return Trained(trained.folder, trained.tokenizer, evaluation.metrics, training)


def _rank_zero_progress(progress: Progress | None) -> Progress:
    """Only rank 0 reports progress."""
    return progress if progress is not None and distributed.rank() == 0 else Progress()


def _read_start(start: ImageTokenizer | str | Path | None) -> ImageTokenizer | None:
    """Return the tokenizer to fine-tune: ``start`` itself, or read from a folder, by a name, or
    from a weight file of VAR.
    """
    if start is None or isinstance(start, ImageTokenizer):
        return start
    return load_var(start) if Path(start).is_file() and not is_pretrained(start) else load(start)


def _name_of(start: ImageTokenizer | str | Path | None) -> str:
    if isinstance(start, (str, Path)):
        return recorded_name(start)
    return "a tokenizer" if start is not None else ""


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
