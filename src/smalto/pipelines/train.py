"""Training a tokenizer or a generator: from images or tokens to a run with a report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch

from smalto.core import distributed
from smalto.core.allocator import retain_freed_memory
from smalto.core.device import resolve_device
from smalto.core.errors import ConfigError, RunError
from smalto.core.files import named_path
from smalto.core.progress import Progress
from smalto.evaluation.run_summary import evaluate_run, write_results
from smalto.generator import Generator
from smalto.inference.inference_tokenizer import InferenceTokenizer
from smalto.interop.open_tokenizer import open_tokenizer
from smalto.metrics.formatting import generator_rows, metric_tables, prediction_rows
from smalto.metrics.generator_metrics import GeneratorMetrics
from smalto.metrics.record import Metrics, TrainingSummary
from smalto.pretrained import finetuning_recipe, recorded_name
from smalto.tokenizer import ImageTokenizer
from smalto.training.generator_recipe import GeneratorRecipe
from smalto.training.recipe import Recipe, change_recipe
from smalto.training.recipe_file import load_recipe
from smalto.training.run_folder import RECIPE_FILE, RunFolder
from smalto.training.tokenizer_recipe import TokenizerRecipe
from smalto.training.tokenizer_run import TrainedRun, resume_run, start_run
from smalto.training.training_images import (
    DATASET,
    ImageData,
    TrainingImages,
    open_training_images,
)

if TYPE_CHECKING:  # they need the token store
    from smalto.training.generator_run import TrainedGeneratorRun
    from smalto.training.training_tokens import TokenData


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

    def tables(self) -> list[list[tuple[str, ...]]]:
        """Return the metrics as tables of text; the first is one of (name, value)."""
        assert self.metrics is not None
        return metric_tables(self.metrics)


@dataclass(frozen=True)
class TrainedGenerator:
    """A finished training of a generator.

    Attributes:
        run: the folder.
        generator: in evaluation mode.
        metrics: cross-entropies and accuracies; None on ranks other than 0.
    """

    run: RunFolder
    generator: Generator
    metrics: GeneratorMetrics | None

    def tables(self) -> list[list[tuple[str, ...]]]:
        """Return the metrics as tables of text; the first is one of (name, value)."""
        assert self.metrics is not None
        grids = [f"{h}x{w}" for h, w in self.generator.config.grids]
        return [list(generator_rows(self.metrics)), prediction_rows(self.metrics, grids)]


@overload
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
) -> Trained: ...


@overload
def train(
    data: TokenData,
    recipe: GeneratorRecipe,
    *,
    out: str | Path = "runs/mine",
    overwrite: bool = False,
    start: ImageTokenizer | str | Path | None = None,
    device: str = "auto",
    workers: int | None = None,
    progress: Progress | None = None,
) -> TrainedGenerator: ...


@retain_freed_memory()
def train(
    data: Any,
    recipe: Recipe | None = None,
    *,
    out: str | Path = "runs/mine",
    overwrite: bool = False,
    start: ImageTokenizer | str | Path | None = None,
    device: str = "auto",
    workers: int | None = None,
    progress: Progress | None = None,
) -> Trained | TrainedGenerator:
    """Train a tokenizer or a generator; write a run folder with checkpoints, metrics and a report.

    Under torchrun the processes share every batch; rank 0 writes, and it alone evaluates a
    tokenizer at the end.

    Args:
        data: a folder of images, ``"bundled"``, ``"emoji"``, or a map-style dataset of [C, H, W]
            tensors (uint8, or float in [-1, 1]). For a generator: a token store, a folder of
            stores, or a list of these.
        recipe: what to train and how: a TokenizerRecipe or a GeneratorRecipe; None:
            ``TokenizerRecipe()``, or the recipe for fine-tuning of a ``start`` in this package.
        out: the run folder to create.
        overwrite: replace a run that exists.
        start: for tokenizers, fine-tune this one: an ImageTokenizer, its folder, a name such as
            ``"photos-f8"``, or a weight file of another project: see ``smalto.load``.
            ``recipe.finetune.learn`` says what is trained.
        device: "auto", "cpu", "cuda" or "mps".
        workers: for tokenizers, processes that read images (0: none); None leaves one core to the
            model. In a script, workers need the call under ``if __name__ == "__main__":``.
        progress: receives steps, metrics and messages.

    Raises:
        ConfigError, DataError, InputError, RunError: settings, images, tokens or the output folder
            do not fit.
        Interrupted: SIGINT, SIGTERM or SIGHUP arrived; everything is saved.
    """
    out = named_path(out, "the run")
    target = resolve_device(device)
    recipe = recipe or load_recipe(finetuning_recipe(start))
    with distributed.process_group(target):
        progress = _rank_zero_progress(progress)
        if distributed.rank() == 0:
            if isinstance(data, (str, Path)) and Path(data).resolve().is_relative_to(out.resolve()):
                raise RunError(f"{data} lies inside {out}, the run to create. Name another --out.")
            RunFolder.check_free(out, overwrite)
        return _TRAIN[recipe.trains](
            data,
            recipe,
            out,
            overwrite=overwrite,
            start=start,
            device=target,
            workers=workers,
            progress=progress,
        )


@retain_freed_memory()
def resume(
    run: str | Path,
    data: Any = None,
    *,
    settings: dict[str, Any] | None = None,
    device: str = "auto",
    workers: int | None = None,
    progress: Progress | None = None,
) -> Trained | TrainedGenerator:
    """Resume a run from its newest checkpoint that is not damaged, on any number of processes.

    Args:
        run: the run folder.
        data: where the images or tokens are now, if they moved; required if the run was trained on
            a dataset.
        settings: changes to its recipe, such as ``{"steps": 4000}``; the model and the data cannot
            change.
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
            f"{run}/{RECIPE_FILE} has an empty data.source; expected the folder of the images or "
            "tokens. Name it, or restore that file from a copy."
        )
    with distributed.process_group(target):
        progress = _rank_zero_progress(progress)
        return _RESUME[recipe.trains](
            source, recipe, folder, device=target, workers=workers, progress=progress
        )


def change_run_recipe(run: RunFolder, settings: dict[str, Any]) -> Any:
    """Return the run's recipe with ``settings``; raise ConfigError if it would be another run."""
    recipe: Recipe = load_recipe(run.path / RECIPE_FILE)
    for key in settings:
        if recipe.is_fixed(key):
            raise ConfigError(
                f"a resumed run keeps its {key}. Start a new run with another --out to change it."
            )
    return change_recipe(recipe, settings)


def _train_tokenizer(
    data: ImageData,
    recipe: TokenizerRecipe,
    out: Path,
    *,
    overwrite: bool,
    start: ImageTokenizer | str | Path | None,
    device: torch.device,
    workers: int | None,
    progress: Progress,
) -> Trained:
    if isinstance(data, (str, Path)) and (Path(data) / "head.json").is_file():
        raise ConfigError(
            f"{data} is a token store, and a tokenizer trains on images. To train a generator on "
            "its tokens, name its recipe: --recipe recipes/emoji-generator.toml."
        )
    if start is None and recipe.finetune.learn != "everything":
        raise ConfigError(
            f"finetune.learn is {recipe.finetune.learn!r}, but no tokenizer was named to start "
            "from. Name one: --from FOLDER."
        )
    with open_training_images(data, recipe, workers) as images:
        trained = start_run(
            images,
            recipe,
            out,
            device,
            progress,
            overwrite=overwrite,
            start=_read_start(start, progress),
            start_name=_name_of(start),
        )
        return _finish(trained, images, progress)


def _resume_tokenizer(
    data: ImageData,
    recipe: TokenizerRecipe,
    run: RunFolder,
    *,
    device: torch.device,
    workers: int | None,
    progress: Progress,
) -> Trained:
    with open_training_images(data, recipe, workers, run.split()) as images:
        trained = resume_run(images, run, recipe, device, progress)
        return _finish(trained, images, progress)


def _train_generator(
    data: TokenData,
    recipe: GeneratorRecipe,
    out: Path,
    *,
    overwrite: bool,
    start: ImageTokenizer | str | Path | None,
    device: torch.device,
    workers: int | None,
    progress: Progress,
) -> TrainedGenerator:
    from smalto.training.generator_run import start_generator_run
    from smalto.training.training_tokens import TrainingTokens

    if start is not None:
        raise ConfigError("got --from and a recipe of a generator; --from is for tokenizers.")
    _report_ignored(workers, progress)
    tokens = TrainingTokens.open(data, recipe)
    trained = start_generator_run(tokens, recipe, out, device, progress, overwrite=overwrite)
    return _finish_generator(trained, progress)


def _resume_generator(
    data: TokenData,
    recipe: GeneratorRecipe,
    run: RunFolder,
    *,
    device: torch.device,
    workers: int | None,
    progress: Progress,
) -> TrainedGenerator:
    from smalto.training.generator_run import resume_generator_run
    from smalto.training.training_tokens import TrainingTokens

    _report_ignored(workers, progress)
    tokens = TrainingTokens.open(data, recipe, run.split())
    trained = resume_generator_run(tokens, run, recipe, device, progress)
    return _finish_generator(trained, progress)


def _report_ignored(workers: int | None, progress: Progress) -> None:
    if workers is not None:
        progress.message("workers is ignored: they read images, and a generator trains on tokens")


_TRAIN: dict[str, Callable[..., Any]] = {
    "tokenizer": _train_tokenizer,
    "generator": _train_generator,
}
_RESUME: dict[str, Callable[..., Any]] = {
    "tokenizer": _resume_tokenizer,
    "generator": _resume_generator,
}


def _finish_generator(trained: TrainedGeneratorRun, progress: Progress) -> TrainedGenerator:
    """Measure on all ranks; write metrics.json and report.html on rank 0."""
    from smalto.evaluation.generator_summary import measure_run, write_generator_results

    metrics = measure_run(trained)
    generator = trained.task.result.eval()
    is_first = distributed.rank() == 0
    distributed.leave_process_group()
    if not is_first:
        return TrainedGenerator(trained.folder, generator, None)
    write_generator_results(trained, generator, metrics, progress)
    return TrainedGenerator(trained.folder, generator, metrics)


def _finish(trained: TrainedRun, images: TrainingImages, progress: Progress) -> Trained:
    """Evaluate and write metrics.json and report.html, on rank 0 alone."""
    is_first = distributed.rank() == 0
    distributed.leave_process_group()
    if not is_first:
        return Trained(trained.folder, trained.tokenizer, None, None)
    inference = InferenceTokenizer.on(trained.tokenizer, trained.recipe.precision)
    evaluation = evaluate_run(trained, inference, images, progress)
    training = write_results(trained.folder, trained.recipe, inference, evaluation)
    return Trained(trained.folder, trained.tokenizer, evaluation.metrics, training)


def _rank_zero_progress(progress: Progress | None) -> Progress:
    """Only rank 0 reports progress."""
    return progress if progress is not None and distributed.rank() == 0 else Progress()


def _read_start(
    start: ImageTokenizer | str | Path | None, progress: Progress
) -> ImageTokenizer | None:
    """Return the tokenizer to fine-tune, if any."""
    if start is None:
        return None
    return open_tokenizer(start, progress)


def _name_of(start: ImageTokenizer | str | Path | None) -> str:
    if isinstance(start, (str, Path)):
        return recorded_name(start)
    return "a tokenizer" if start is not None else ""
