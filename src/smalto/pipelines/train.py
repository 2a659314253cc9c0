"""Training a tokenizer: from pictures to a run with a report."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from smalto.data.archives import Skipped
from smalto.data.crops import CropStream
from smalto.data.decoding import Decoder
from smalto.data.images import MIN_PICTURES_TO_HOLD_OUT, summary
from smalto.data.pictures import DatasetPictures, FilePictures, Pictures, centre_crop, split, split_by_name
from smalto.data.sources import open_source
from smalto.device import resolve_device
from smalto.errors import ConfigError, RunError
from smalto.memory import reused_memory
from smalto.pipelines.evaluate import measure
from smalto.pipelines.finish import finish_run
from smalto.pipelines.running import Runner, default_workers
from smalto.progress import Progress
from smalto.tokenizer import ImageTokenizer
from smalto.training.checkpoint import RunFolder
from smalto.training.recipe import Recipe, change_recipe
from smalto.training.tokenizer_task import TokenizerTask
from smalto.training.trainer import train_loop

Data = str | Path | Dataset[Any]
_DATASET = "a dataset"
_HELD_OUT_CROPS, _START_CROPS = 1_000_003, 2_000_003  # added to the seed: these crops are not those of training


@dataclass(frozen=True)
class Trained:
    """A finished training: the run, its model, what was measured (``metrics["psnr"]`` and so on)."""

    run: RunFolder
    tokenizer: ImageTokenizer
    metrics: dict[str, Any]


@dataclass(frozen=True)
class Material:
    """The pictures of a run: the numbers of those to train on and of those held out, and the files that are of no use."""

    pictures: Pictures
    source: str
    training: list[int]
    held_out: list[int]
    unusable: list[Skipped]

    @property
    def picture_files(self) -> bool:
        return isinstance(self.pictures, FilePictures)

    @property
    def skipped(self) -> list[Skipped]:
        """Everything left out so far, before and while reading."""
        return sorted({*self.unusable, *self.pictures.skipped})

    def facts(self) -> dict[str, Any]:
        """What the run remembers."""
        names = [self.pictures.names[i] for i in self.held_out]
        return {"source": self.source, "num_pictures": len(self.pictures), "held_out": names}

    def crops(self, indices: list[int], recipe: Recipe, number: int, shift: int) -> Tensor:
        """``number`` fixed crops [number, C, size, size]."""
        stream = CropStream(self.pictures, indices, size=recipe.data.size, batch=number, seed=recipe.seed + shift, flip=False)
        return next(stream)


@reused_memory()
def train(
    data: Data,
    recipe: Recipe | None = None,
    *,
    out: str | Path = "runs/mine",
    overwrite: bool = False,
    device: str = "auto",
    workers: int | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Train a tokenizer and write a run folder with checkpoints, figures and a report.

    Args:
        data: a folder of pictures, ``"bundled"``, or a map-style dataset of [C, H, W] tensors (uint8, or float in [-1, 1]).
        recipe: what to train and how; None takes ``Recipe()``.
        out: the run folder to make.
        overwrite: replace a run that is there.
        device: "auto", "cpu", "cuda" or "mps".
        workers: decoding processes (0: decode in this one); None leaves one core to the model. In a script of your own, workers
            need the call under ``if __name__ == "__main__":``.
        progress: told what happens.

    Raises:
        RunError: ``out`` exists already.
        DataError: no picture can be read.
        Interrupted: SIGINT or SIGTERM came; ``resume(out)`` goes on.
    """
    recipe, progress = recipe or Recipe(), progress or Progress()
    RunFolder.check_free(Path(out), overwrite)
    with open_material(data, recipe, workers) as material:
        return _finish(*fit(material, recipe, Path(out), overwrite, device, progress), material, progress)


@reused_memory()
def resume(
    run: str | Path,
    data: Data | None = None,
    *,
    settings: dict[str, Any] | None = None,
    device: str = "auto",
    workers: int | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Go on with a run from its newest checkpoint that can be read.

    Args:
        run: the run folder.
        data: where the pictures are now, if they moved; needed again where the run was trained on a dataset.
        settings: changes to its recipe, such as ``{"steps": 4000}``; the tokenizer and the pictures stay.
        device, workers, progress: as for ``train``.
    """
    progress, folder = progress or Progress(), RunFolder(run)
    recipe = changed(folder, settings or {})
    if data is None and recipe.data.source == _DATASET:
        raise ConfigError(f"{run} was trained on a dataset: pass it again, smalto.resume({str(run)!r}, dataset).")
    with open_material(data if data is not None else recipe.data.source, recipe, workers, folder.split()) as material:
        return _finish(*refit(material, folder, recipe, device, progress), material, progress)


@contextmanager
def open_material(data: Data, recipe: Recipe, workers: int | None, facts: dict[str, Any] | None = None) -> Iterator[Material]:
    """Find and split the pictures; ``facts`` of an earlier run repeat its split."""
    files = open_source(data) if isinstance(data, (str, Path)) else None
    with Decoder(default_workers(workers), recipe.data.longer_side) as decoder:
        pictures: Pictures
        if files:
            pictures = FilePictures(files.files, decoder, recipe.data.cache_mb * 2**20)
        else:
            assert not isinstance(data, (str, Path))
            pictures = DatasetPictures(data)
        names = facts["held_out"] if facts else files.held_out if files else None
        training, held_out = split(pictures) if names is None else split_by_name(pictures, names)
        yield Material(pictures, files.name if files else _DATASET, training, held_out, files.skipped if files else [])


def changed(run: RunFolder, settings: dict[str, Any]) -> Recipe:
    """The run's recipe with ``settings``, unless they would make it another run."""
    for key in settings:
        if key.startswith("tokenizer.") or key in ("data.source", "seed"):
            raise ConfigError(f"a resumed run keeps its {key}. Begin a new one with another --out to change it.")
    return change_recipe(run.recipe(), settings)


def fit(
    material: Material, recipe: Recipe, out: Path, overwrite: bool, device: str, progress: Progress
) -> tuple[RunFolder, Recipe, ImageTokenizer]:
    """Make a run and train it to the end."""
    if Path(material.source).is_relative_to(out.resolve()):
        raise RunError(f"the pictures lie inside {out}, which is to be the run. Name another --out.")
    if material.picture_files and recipe.tokenizer.autoencoder.in_channels != 3:
        raise ConfigError(
            f"picture files have 3 channels; tokenizer.autoencoder.in_channels is {recipe.tokenizer.autoencoder.in_channels}."
        )
    target = resolve_device(device)
    recipe = change_recipe(recipe, {"data.source": material.source})
    _announce(material, target, progress)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        tokenizer = recipe.tokenizer.build()
    task = _task(tokenizer.to(target), material, recipe)
    number = max(recipe.data.batch, task.num_start_images)
    task.start(list(material.crops(material.training, recipe, number, _START_CROPS).split(recipe.data.batch)))
    run = RunFolder.create(out, recipe, material.facts(), tokenizer, task.state(), overwrite)
    return _loop(task, material, run, recipe, 0, None, progress)


def refit(material: Material, run: RunFolder, recipe: Recipe, device: str, progress: Progress) -> tuple[RunFolder, Recipe, ImageTokenizer]:
    """Train a run that exists to its end."""
    target = resolve_device(device)
    step, tokenizer, state = run.restore()
    if recipe.steps < step:
        raise ConfigError(f"{run.path} is at step {step} already; --steps must be at least that to go on with it, got {recipe.steps}.")
    before = run.split()
    recipe = change_recipe(recipe, {"data.source": material.source})
    if len(material.pictures) != before["num_pictures"]:
        progress.say(
            f"there were {before['num_pictures']} pictures when this run began and there are {len(material.pictures)} now, "
            "so the crops will differ"
        )
    if before["held_out"] and not material.held_out:
        progress.say(f"the {len(before['held_out'])} held-out pictures are not there any more, so figures are on training pictures")
    task = _task(tokenizer.to(target), material, recipe)
    task.load_state(state)
    run.continue_from(step, recipe, {**before, "source": material.source})
    _announce(material, target, progress)
    progress.say(f"going on after step {step} of {recipe.steps}")
    return _loop(task, material, run, recipe, step, state.get("stream"), progress)


def _task(tokenizer: ImageTokenizer, material: Material, recipe: Recipe) -> TokenizerTask:
    looked_at = material.crops(material.held_out or material.training, recipe, recipe.evaluate.crops, _HELD_OUT_CROPS)
    return TokenizerTask(tokenizer, recipe, looked_at)


def _loop(
    task: TokenizerTask, material: Material, run: RunFolder, recipe: Recipe, step: int, position: dict[str, int] | None, progress: Progress
) -> tuple[RunFolder, Recipe, ImageTokenizer]:
    known = len(material.skipped)
    stream = CropStream(
        material.pictures,
        material.training,
        size=recipe.data.size,
        batch=recipe.data.batch,
        seed=recipe.seed,
        crops_per_picture=recipe.data.crops_per_picture,
        flip=recipe.data.flip,
        position=position,
    )
    train_loop(task, stream, run, recipe, step, progress)
    if len(material.skipped) > known:
        progress.say(f"found while training: {summary(material.skipped)}")
    if stream.enlarged:
        run.event("enlarged pictures", count=len(stream.enlarged))
        progress.say(f"{len(stream.enlarged)} pictures are smaller than the crop and were enlarged to {recipe.data.size} pixels")
    return run, recipe, task.tokenizer.eval()


def _announce(material: Material, device: torch.device, progress: Progress) -> None:
    few = len(material.pictures) < MIN_PICTURES_TO_HOLD_OUT
    reason = "fewer than 4 pictures, so figures are on training pictures" if few else "figures are on training pictures"
    held_out = f"{len(material.held_out)} held out" if material.held_out else f"none held out ({reason})"
    progress.say(f"{len(material.training)} pictures to train on, {held_out}; device {device}")
    if material.skipped:
        progress.say(summary(material.skipped))


def _finish(run: RunFolder, recipe: Recipe, tokenizer: ImageTokenizer, material: Material, progress: Progress) -> Trained:
    """Measure on whole held-out pictures and write metrics.json and report.html."""
    runner = Runner.on(tokenizer, recipe.precision)
    indices = (material.held_out or material.training)[: recipe.evaluate.pictures]
    progress.begin("measuring", len(indices), "pictures")
    measurement = measure(runner, _whole(material, indices, runner.tokenizer.stride, progress))
    progress.end()
    on = "held-out pictures" if material.held_out else "training pictures"
    transform = f"longer side at most {recipe.data.longer_side}, centre crop to a multiple of {runner.tokenizer.stride}"
    evaluation = measurement.result(runner.tokenizer, on, transform, recipe.precision, material.skipped)
    return Trained(run, tokenizer, finish_run(run, recipe, runner, evaluation))


def _whole(material: Material, indices: list[int], stride: int, progress: Progress) -> Iterator[tuple[str, Tensor]]:
    for place, index in enumerate(indices):
        material.pictures.ask(indices[place : place + 8])
        picture = material.pictures.get(index)
        progress.advance()
        if picture is not None:
            yield material.pictures.names[index], centre_crop(picture, stride)
