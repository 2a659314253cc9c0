"""Starting and resuming the run of a generator."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from smalto.core import distributed
from smalto.core.errors import ConfigError, RunError
from smalto.core.progress import Progress
from smalto.generator import Generator, GeneratorConfig, Transformer, save_tokenizer
from smalto.generator.generator_folder import load_transformer
from smalto.pretrained import TOKENIZER_FOLDER, folder_of_recorded
from smalto.tokenizer import ImageTokenizer, load
from smalto.training.generator_recipe import GeneratorRecipe
from smalto.training.generator_task import GeneratorTask
from smalto.training.random_state import seeded
from smalto.training.recipe import change_recipe, recipe_toml
from smalto.training.resuming import checkpoint_to_resume, run_threads
from smalto.training.run_folder import RunFolder
from smalto.training.token_baselines import (
    Baselines,
    measure_baselines,
    read_baselines,
    write_baselines,
)
from smalto.training.trainer import Trainer
from smalto.training.training_tokens import TokenBatch, TrainingTokens


@dataclass(frozen=True)
class EvaluatedRows:
    """The rows that a run is evaluated on, read before it trains: a store may change later."""

    held_out: TokenBatch
    training: TokenBatch

    @classmethod
    def of(cls, tokens: TrainingTokens, number: int) -> EvaluatedRows:
        """Read at most ``number`` rows of each kind."""
        return cls(tokens.some_held_out_rows(number), tokens.some_training_rows(number))


@dataclass(frozen=True)
class TrainedGeneratorRun:
    """A generator's run that was trained to its last step.

    Attributes:
        folder: on disk.
        recipe: as resolved.
        task: with the trained generator.
        baselines: of its tokens.
        rows: that are evaluated.
        measured_on: what the held-out ones really are, in words.
        credits: authors of the images; may be empty.
    """

    folder: RunFolder
    recipe: GeneratorRecipe
    task: GeneratorTask
    baselines: Baselines
    rows: EvaluatedRows
    measured_on: str
    credits: str


def start_generator_run(
    tokens: TrainingTokens,
    recipe: GeneratorRecipe,
    out: Path,
    device: torch.device,
    progress: Progress,
    *,
    overwrite: bool = False,
) -> TrainedGeneratorRun:
    """Create a run and train it to its last step.

    Args:
        tokens: to train on.
        recipe: what to train and how.
        out: the run folder to create.
        device: to train on.
        progress: receives steps, metrics and messages.
        overwrite: replace a run that exists.
    """
    recipe = change_recipe(recipe, {"data.source": tokens.source})
    tokenizer = _tokenizer_of(tokens, recipe)
    config = _generator_config(tokens, recipe, tokenizer)
    progress.message(f"{tokens.describe()}; device {device}")
    rows = EvaluatedRows.of(tokens, recipe.evaluate.rows)
    baselines = measure_baselines(tokens, rows.held_out, device, progress)
    with seeded(recipe.seed, device):
        generator = Generator(Transformer(config), tokenizer).to(device)
        task = GeneratorTask(generator, recipe, rows.held_out)
    with seeded(recipe.seed + distributed.rank(), device):
        trainer = Trainer(task, tokens.batches(recipe), out, recipe, progress)
        state = trainer.state()
        if distributed.rank() == 0:
            RunFolder.create(
                out,
                recipe_toml(recipe),
                tokens.split(),
                task.save,
                state,
                overwrite,
                partial(_save_once, generator.tokenizer, baselines),
            )
        distributed.broadcast_object("the run exists", device)
        _train(trainer, RunFolder(out))
    return TrainedGeneratorRun(
        RunFolder(out), recipe, task, baselines, rows, tokens.measured_on, tokens.credits
    )


def resume_generator_run(
    tokens: TrainingTokens,
    run: RunFolder,
    recipe: GeneratorRecipe,
    device: torch.device,
    progress: Progress,
) -> TrainedGeneratorRun:
    """Train a run that exists to its last step, from its newest checkpoint that is not damaged."""
    tokenizer = load(run.path / TOKENIZER_FOLDER)
    _check_fingerprint(tokens, tokenizer, run.path / TOKENIZER_FOLDER)
    checkpoint = checkpoint_to_resume(run, recipe.steps, load_transformer, device)
    transformer = load_transformer(checkpoint.folder)
    expected = _generator_config(tokens, recipe, tokenizer)
    if transformer.config != expected:
        raise RunError(
            f"got {tokens.stores} with {len(expected.class_names)} classes and the layout "
            f"{tokens.layout}; the run has {len(transformer.config.class_names)} and "
            f"{transformer.config.layout}. Name the store with which it was started."
        )
    recipe = change_recipe(recipe, {"data.source": tokens.source})
    if others := run.other_files():
        progress.message(f"left alone in {run.path}: {', '.join(others[:8])} (not of the run)")
    if distributed.rank() == 0:
        with run.locked():
            run.continue_from(checkpoint, recipe_toml(recipe), tokens.split(), recipe.steps)
    rows = EvaluatedRows.of(tokens, recipe.evaluate.rows)
    baselines = _baselines_of(run, tokens, rows, device, progress)
    generator = Generator(transformer, tokenizer).to(device)
    task = GeneratorTask(generator, recipe, rows.held_out)
    with (
        seeded(recipe.seed + distributed.rank(), device),
        run_threads(checkpoint.state["threads"], device, progress),
    ):
        trainer = Trainer(task, tokens.batches(recipe), run.path, recipe, progress)
        trainer.load(checkpoint)
        distributed.broadcast_object("the run is ready", device)
        progress.message(f"{tokens.describe()}; device {device}")
        progress.message(f"resuming after step {checkpoint.step} of {recipe.steps}")
        _train(trainer, run)
    return TrainedGeneratorRun(
        run, recipe, task, baselines, rows, tokens.measured_on, tokens.credits
    )


def _train(trainer: Trainer, run: RunFolder) -> None:
    with run.locked() if distributed.rank() == 0 else nullcontext():
        trainer.train()


def _baselines_of(
    run: RunFolder,
    tokens: TrainingTokens,
    rows: EvaluatedRows,
    device: torch.device,
    progress: Progress,
) -> Baselines:
    """Return the baselines that the run has recorded; compute them again if the file is damaged."""
    try:
        return read_baselines(run.path)
    except RunError as error:
        progress.message(f"{error}")
        baselines = measure_baselines(tokens, rows.held_out, device, progress)
        if distributed.rank() == 0:
            write_baselines(run.path, baselines)
        return baselines


def _save_once(tokenizer: ImageTokenizer, baselines: Baselines, folder: Path) -> None:
    save_tokenizer(tokenizer, folder)
    write_baselines(folder, baselines)


def _tokenizer_of(tokens: TrainingTokens, recipe: GeneratorRecipe) -> ImageTokenizer:
    """Return the tokenizer that wrote the store, from the recipe or the path in the store.

    Raises:
        RunError: it does not exist, or it is not the one that wrote the store.
    """
    recorded = tokens.stores.header.tokenizer
    name = recipe.data.tokenizer or recorded
    folder = folder_of_recorded(name) if name else None
    if folder is None or not folder.exists():
        place = f"{name}, which does not exist" if name else "a tokenizer without a path"
        raise RunError(
            f"{tokens.stores} was written by {place}. Name the folder of the tokenizer with "
            "--set data.tokenizer=FOLDER."
        )
    tokenizer = load(folder)
    _check_fingerprint(tokens, tokenizer, folder)
    return tokenizer


def _check_fingerprint(tokens: TrainingTokens, tokenizer: ImageTokenizer, folder: Path) -> None:
    own, stored = tokenizer.fingerprint(), tokens.stores.header.fingerprint
    if own != stored:
        raise RunError(
            f"the tokenizer {folder} is not the one that wrote {tokens.stores}: its fingerprint is "
            f"{own[:12]}, the store's {stored[:12]}. If it was trained further, name the "
            "checkpoint that wrote the store with --set data.tokenizer=FOLDER, or tokenize the "
            "images again."
        )


def _generator_config(
    tokens: TrainingTokens, recipe: GeneratorRecipe, tokenizer: ImageTokenizer
) -> GeneratorConfig:
    rows, columns = tokens.layout.grids[-1]
    stride = tokenizer.stride
    config = GeneratorConfig.for_tokenizer(
        tokenizer,
        (rows * stride, columns * stride),
        **recipe.generator.model_dump(),
        num_classes=len(tokens.class_names),
        class_names=tokens.class_names,
    )
    if config.grids != tokens.layout.grids:
        raise ConfigError(
            f"got a store with the layout {tokens.layout}; expected {config.layout}, that of the "
            f"tokenizer for {rows * stride} x {columns * stride} pixels. Tokenize the images with "
            "a --size."
        )
    return config
