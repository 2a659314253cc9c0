"""Starting and resuming the run of a tokenizer."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from smalto.core import distributed
from smalto.core.config import parse_config
from smalto.core.progress import Progress
from smalto.core.text import printable
from smalto.images.crops import CropStream
from smalto.images.image_file import summary
from smalto.tokenizer import ImageTokenizer, load
from smalto.training.random_state import seeded
from smalto.training.recipe import change_recipe, recipe_toml
from smalto.training.resuming import checkpoint_to_resume, run_threads
from smalto.training.run_folder import START_FOLDER, RunFolder, Split
from smalto.training.tokenizer_recipe import TokenizerRecipe
from smalto.training.tokenizer_task import TokenizerTask
from smalto.training.trainer import Trainer
from smalto.training.training_images import TrainingImages, check_data


@dataclass(frozen=True)
class TrainedRun:
    """A run that was trained to its last step.

    Attributes:
        folder: on disk.
        recipe: as resolved.
        tokenizer: in evaluation mode, on its device.
    """

    folder: RunFolder
    recipe: TokenizerRecipe
    tokenizer: ImageTokenizer


def start_run(
    images: TrainingImages,
    recipe: TokenizerRecipe,
    out: Path,
    device: torch.device,
    progress: Progress,
    *,
    overwrite: bool = False,
    start: ImageTokenizer | None = None,
    start_name: str = "",
) -> TrainedRun:
    """Create a run and train it to its last step.

    Args:
        images: to train on.
        recipe: what to train and how.
        out: the run folder to create.
        device: to train on.
        progress: receives steps, metrics and messages.
        overwrite: replace a run that exists.
        start: fine-tune this tokenizer.
        start_name: where it came from.
    """
    if start is not None:
        recipe = _for_finetuning(recipe, start, start_name)
    check_data(images, recipe)
    recipe = change_recipe(recipe, {"data.source": images.source})
    progress.message(f"{images.describe()}; device {device}")
    _report_skipped(images, progress)
    with seeded(recipe.seed, device):
        tokenizer = recipe.tokenizer.build()
        if start is not None:
            tokenizer.load_state_dict(start.state_dict())  # copied, and so in float32
        held_out = images.held_out_crops(recipe)
        task = TokenizerTask(tokenizer.to(device), recipe, held_out, keep_codes=start is not None)
        if start is None and task.num_start_images:
            number = max(recipe.data.batch, task.num_start_images)
            task.start(list(images.start_crops(recipe, number).split(recipe.data.batch)))
    with seeded(recipe.seed + distributed.rank(), device):
        batches = images.batches(recipe)
        trainer = Trainer(task, batches, out, recipe, progress)
        state = trainer.state()
        if distributed.rank() == 0:
            RunFolder.create(
                out,
                recipe_toml(recipe),
                images.split(),
                task.save,
                state,
                overwrite,
                partial(_save_start, start) if start is not None else None,
            )
        distributed.broadcast_object("the run exists", device)
        _train(trainer, batches, images, RunFolder(out), recipe, progress)
    return TrainedRun(RunFolder(out), recipe, task.result.eval())


def resume_run(
    images: TrainingImages,
    run: RunFolder,
    recipe: TokenizerRecipe,
    device: torch.device,
    progress: Progress,
) -> TrainedRun:
    """Train a run that exists to its last step, from its newest checkpoint that is not damaged."""
    check_data(images, recipe)
    checkpoint = checkpoint_to_resume(run, recipe.steps, load, device)
    before = run.split()
    recipe = change_recipe(recipe, {"data.source": images.source})
    _report_changes(before, images, progress)
    if others := run.other_files():
        progress.message(f"left alone in {run.path}: {', '.join(others[:8])} (not of the run)")
    if distributed.rank() == 0:
        with run.locked():
            split = Split(images.source, before.num_images, before.digest, before.held_out)
            run.continue_from(checkpoint, recipe_toml(recipe), split, recipe.steps)
    with seeded(recipe.seed, device):
        tokenizer = load(checkpoint.folder).to(device)
        held_out = images.held_out_crops(recipe)
        task = TokenizerTask(tokenizer, recipe, held_out, keep_codes=True)
    with (
        seeded(recipe.seed + distributed.rank(), device),
        run_threads(checkpoint.state["threads"], device, progress),
    ):
        batches = images.batches(recipe)
        trainer = Trainer(task, batches, run.path, recipe, progress)
        trainer.load(checkpoint)
        distributed.broadcast_object("the run is ready", device)
        progress.message(f"{images.describe()}; device {device}")
        _report_skipped(images, progress)
        progress.message(f"resuming after step {checkpoint.step} of {recipe.steps}")
        _train(trainer, batches, images, run, recipe, progress)
    return TrainedRun(run, recipe, task.result.eval())


def _train(
    trainer: Trainer,
    batches: CropStream,
    images: TrainingImages,
    run: RunFolder,
    recipe: TokenizerRecipe,
    progress: Progress,
) -> None:
    known = len(images.skipped)
    is_first = distributed.rank() == 0
    with run.locked() if is_first else nullcontext():
        trainer.train()
        if len(images.skipped) > known:
            progress.message(f"found while training: {summary(images.skipped)}")
        if unreadable := images.images.unreadable:
            name, reason = next(iter(unreadable.items()))
            progress.message(
                f"{len(unreadable)} images could not be read at times, such as {printable(name)} "
                f"({reason}): training used them whenever it could"
            )
        if batches.enlarged and is_first:
            number = len(batches.enlarged)
            run.event("enlarged images", count=number)
            progress.message(
                f"{number} images are smaller than the crop and were enlarged to "
                f"{recipe.data.size} pixels"
            )


def _save_start(start: ImageTokenizer, folder: Path) -> None:
    """Keep the tokenizer that fine-tuning starts from, to compare with."""
    (folder / START_FOLDER).mkdir()
    start.save(folder / START_FOLDER)


def _for_finetuning(recipe: TokenizerRecipe, start: ImageTokenizer, name: str) -> TokenizerRecipe:
    """Return the recipe with the configuration of the tokenizer that it starts from."""
    finetune = recipe.finetune.model_dump() | {"tokenizer": name}
    settings = recipe.model_dump(mode="json") | {
        "tokenizer": start.config.general().model_dump(mode="json"),
        "finetune": finetune,
    }
    return parse_config(type(recipe), settings, f"fine-tuning {name}")


def _report_skipped(images: TrainingImages, progress: Progress) -> None:
    if images.skipped:
        progress.message(summary(images.skipped))


def _report_changes(before: Split, images: TrainingImages, progress: Progress) -> None:
    if len(images.images) != before.num_images:
        progress.message(
            f"there were {before.num_images} images when this run started and there are "
            f"{len(images.images)} now, so the crops will differ"
        )
    if before.held_out and not images.held_out:
        progress.message(
            f"the {len(before.held_out)} held-out images no longer exist, so metrics are on "
            "training images"
        )
