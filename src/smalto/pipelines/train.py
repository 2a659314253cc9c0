"""Training a tokenizer: from pictures to a run with a report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from smalto.core import distributed
from smalto.core.allocator import reused_memory
from smalto.core.config import parse_config
from smalto.core.device import resolve_device
from smalto.core.errors import ConfigError, RunError
from smalto.core.progress import Progress
from smalto.evaluation.evaluator import Networks, measure
from smalto.evaluation.run_summary import finish_run
from smalto.images.crops import CropStream
from smalto.images.image_file import Skipped, summary
from smalto.images.image_reader import default_workers, transform_of
from smalto.images.image_set import DatasetPictures, FilePictures, Pictures
from smalto.images.reading import read_picture
from smalto.images.sources import open_source
from smalto.images.splits import MIN_PICTURES_TO_HOLD_OUT, held_out_order, split, split_by_name
from smalto.images.tensors import centre_crop, to_unit_range
from smalto.images.worker_pool import Decoder
from smalto.inference.runner import Runner
from smalto.interop.var import load_tokenizer as load_var
from smalto.tokenizer import ImageTokenizer, TokenizerConfig, load
from smalto.training.random_state import seeded
from smalto.training.recipe import Recipe, change_recipe
from smalto.training.run_folder import START_FOLDER, RunFolder
from smalto.training.tokenizer_task import TokenizerTask
from smalto.training.trainer import Trainer

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
    digest: str

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
        return {"source": self.source, "num_pictures": len(self.pictures), "digest": self.digest, "held_out": names}

    def crops(self, indices: list[int], recipe: Recipe, number: int, shift: int, shared: bool = False) -> Tensor:
        """At least ``number`` fixed crops [n, C, size, size], several of each picture; ``shared``: this process's part of them."""
        several = recipe.data.crops_per_picture
        batch = -(-number // several)
        rows = distributed.share(batch) if shared else range(batch)
        if not rows:
            return torch.zeros(0, recipe.tokenizer.autoencoder.in_channels, recipe.data.size, recipe.data.size)
        stream = CropStream(
            self.pictures,
            indices,
            size=recipe.data.size,
            batch=batch,
            seed=recipe.seed + shift,
            flip=False,
            crops_per_picture=several,
            rows=rows,
        )
        return torch.cat([next(stream) for _ in range(several)])


@reused_memory()
def train(
    data: Data,
    recipe: Recipe | None = None,
    *,
    out: str | Path = "runs/mine",
    overwrite: bool = False,
    start: ImageTokenizer | str | Path | None = None,
    device: str = "auto",
    workers: int | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Train a tokenizer and write a run folder with checkpoints, figures and a report.

    Started by torchrun, its processes share every batch; the first one writes, and it alone measures at the end.

    Args:
        data: a folder of pictures, ``"bundled"``, ``"emoji"``, or a map-style dataset of [C, H, W] tensors (uint8, or float in [-1, 1]).
        recipe: what to train and how; None takes ``Recipe()``.
        out: the run folder to make.
        overwrite: replace a run that is there.
        start: fine-tune this tokenizer: one, the folder of one, or a weight file of VAR. ``recipe.finetune.learn`` says what learns.
        device: "auto", "cpu", "cuda" or "mps".
        workers: decoding processes (0: decode in this one); None leaves one core to the model. In a script of your own, workers
            need the call under ``if __name__ == "__main__":``.
        progress: told what happens.

    Raises:
        ConfigError, DataError, RunError: settings, pictures or the place for the run do not fit.
        Interrupted: SIGINT or SIGTERM came; everything is saved.
    """
    target, recipe = resolve_device(device), recipe or Recipe()
    if start is None and recipe.finetune.learn != "everything":
        raise ConfigError(f"finetune.learn is {recipe.finetune.learn!r}, and there is no tokenizer to begin with. Name one: --from FOLDER.")
    with distributed.joined(target):
        progress = _first_only(progress)
        if distributed.rank() == 0:
            RunFolder.check_free(Path(out), overwrite)
        with open_material(data, recipe, workers) as material:
            return _finish(*fit(material, recipe, Path(out), overwrite, target, progress, start), material, progress)


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
    """Go on with a run from its newest checkpoint that is whole, on any number of processes.

    Args:
        run: the run folder.
        data: where the pictures are now, if they moved; needed again where the run was trained on a dataset.
        settings: changes to its recipe, such as ``{"steps": 4000}``; the tokenizer and the pictures stay.
        device, workers, progress: as for ``train``.
    """
    folder, target = RunFolder(run), resolve_device(device)
    recipe = changed(folder, settings or {})
    if data is None and recipe.data.source == _DATASET:
        raise ConfigError(f"{run} was trained on a dataset: pass it again, smalto.resume({str(run)!r}, dataset).")
    with distributed.joined(target):
        progress = _first_only(progress)
        with open_material(data if data is not None else recipe.data.source, recipe, workers, folder.split()) as material:
            return _finish(*refit(material, folder, recipe, target, progress), material, progress)


def _first_only(progress: Progress | None) -> Progress:
    """Of several processes the first one speaks."""
    return progress if progress is not None and distributed.rank() == 0 else Progress()


@contextmanager
def open_material(data: Data, recipe: Recipe, workers: int | None, facts: dict[str, Any] | None = None) -> Iterator[Material]:
    """Find and split the pictures; ``facts`` of an earlier run repeat its split."""
    files = open_source(data) if isinstance(data, (str, Path)) else None
    with Decoder(default_workers(workers), partial(read_picture, longer_side=recipe.data.longer_side)) as decoder:
        pictures: Pictures
        if files:
            pictures = FilePictures(files.files, decoder, recipe.data.cache_mb * 2**20)
        else:
            assert not isinstance(data, (str, Path))
            pictures = DatasetPictures(data)
        names = facts["held_out"] if facts else files.held_out if files else None
        training, held_out = split(pictures) if names is None else split_by_name(pictures, names)
        name, skipped, digest = (files.name, files.skipped, files.digest) if files else (_DATASET, [], "")
        yield Material(pictures, name, training, held_out, skipped, digest)


def changed(run: RunFolder, settings: dict[str, Any]) -> Recipe:
    """The run's recipe with ``settings``, unless they would make it another run."""
    for key in settings:
        if key.startswith(("tokenizer.", "finetune.")) or key in ("data.source", "seed"):
            raise ConfigError(f"a resumed run keeps its {key}. Begin a new one with another --out to change it.")
        if key in ("losses.adversarial.width", "losses.adversarial.layers") and run.recipe().losses.adversarial.weight:
            raise ConfigError(f"a resumed run keeps its discriminator, and so its {key}. Begin a new one with another --out to change it.")
    return change_recipe(run.recipe(), settings)


def fit(
    material: Material,
    recipe: Recipe,
    out: Path,
    overwrite: bool,
    device: torch.device,
    progress: Progress,
    start: ImageTokenizer | str | Path | None = None,
) -> tuple[RunFolder, Recipe, ImageTokenizer]:
    """Make a run and train it to the end."""
    if Path(material.source).is_relative_to(out.resolve()):
        raise RunError(f"the pictures lie inside {out}, which is to be the run. Name another --out.")
    begun = None
    if start is not None:
        begun = start if isinstance(start, ImageTokenizer) else _read_tokenizer(Path(start))
        recipe = _for_finetuning(recipe, begun, "a tokenizer" if isinstance(start, ImageTokenizer) else str(Path(start).resolve()))
    if material.picture_files and recipe.tokenizer.autoencoder.in_channels != 3:
        raise ConfigError(
            f"picture files have 3 channels; tokenizer.autoencoder.in_channels is {recipe.tokenizer.autoencoder.in_channels}."
        )
    _check_batch(recipe)
    recipe = change_recipe(recipe, {"data.source": material.source})
    _announce(material, device, progress)
    with seeded(recipe.seed, device):
        tokenizer = recipe.tokenizer.build()
        if begun is not None:
            tokenizer.load_state_dict(begun.state_dict())  # copied, and so in float32
        task = _task(tokenizer.to(device), material, recipe, keep_codes=begun is not None)
        if begun is None:
            number = max(recipe.data.batch, task.num_start_images)
            task.start(list(material.crops(material.training, recipe, number, _START_CROPS, shared=True).split(recipe.data.batch)))
    with seeded(recipe.seed + distributed.rank(), device):
        trainer = Trainer(task, _stream_at(material, recipe), out, recipe, progress)
        state = trainer.state()
        if distributed.rank() == 0:
            RunFolder.create(out, recipe, material.facts(), task.result, state, overwrite, begun)
        distributed.first_says("the run is there", device)
        return _loop(trainer, task, material, RunFolder(out), recipe, progress)


def refit(
    material: Material, run: RunFolder, recipe: Recipe, device: torch.device, progress: Progress
) -> tuple[RunFolder, Recipe, ImageTokenizer]:
    """Train a run that exists to its end."""
    _check_batch(recipe)
    if distributed.rank() == 0:
        with run.locked():
            checkpoint = run.restore()
    step = distributed.first_says(checkpoint.step if distributed.rank() == 0 else 0, device)
    if distributed.rank() > 0:
        checkpoint = run.read(step)
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
    if distributed.rank() == 0:
        with run.locked():
            run.continue_from(checkpoint, recipe, {**before, "source": material.source})
    with seeded(recipe.seed, device):
        task = _task(checkpoint.tokenizer.to(device), material, recipe, keep_codes=True)
    with seeded(recipe.seed + distributed.rank(), device), _threads(checkpoint.state["threads"], device, progress):
        trainer = Trainer(task, _stream_at(material, recipe), run.path, recipe, progress)
        trainer.load(checkpoint)
        distributed.first_says("the run is ready", device)
        _announce(material, device, progress)
        progress.say(f"going on after step {step} of {recipe.steps}")
        return _loop(trainer, task, material, run, recipe, progress)


def _loop(
    trainer: Trainer, task: TokenizerTask, material: Material, run: RunFolder, recipe: Recipe, progress: Progress
) -> tuple[RunFolder, Recipe, ImageTokenizer]:
    known = len(material.skipped)
    with run.locked() if distributed.rank() == 0 else nullcontext():
        trainer.train()
        if len(material.skipped) > known:
            progress.say(f"found while training: {summary(material.skipped)}")
        enlarged = trainer.stream.enlarged
        if enlarged and distributed.rank() == 0:
            run.event("enlarged pictures", count=len(enlarged))
            progress.say(f"{len(enlarged)} pictures are smaller than the crop and were enlarged to {recipe.data.size} pixels")
    return run, recipe, task.result.eval()


def _task(tokenizer: ImageTokenizer, material: Material, recipe: Recipe, keep_codes: bool) -> TokenizerTask:
    looked_at = material.crops(material.held_out or material.training, recipe, recipe.evaluate.crops, _HELD_OUT_CROPS)
    return TokenizerTask(tokenizer, recipe, looked_at[: recipe.evaluate.crops], keep_codes)


def _stream_at(material: Material, recipe: Recipe) -> Callable[[list[list[int]] | None], CropStream]:
    """Makes the stream of this process's rows of the batches, from a position on."""
    return lambda position: CropStream(
        material.pictures,
        material.training,
        size=recipe.data.size,
        batch=recipe.data.batch,
        seed=recipe.seed,
        crops_per_picture=recipe.data.crops_per_picture,
        flip=recipe.data.flip,
        colour=recipe.data.colour,
        rows=distributed.share(recipe.data.batch),
        position=position,
    )


def _check_batch(recipe: Recipe) -> None:
    if recipe.data.batch % distributed.world_size():
        raise ConfigError(
            f"data.batch is {recipe.data.batch}, the crops of all {distributed.world_size()} processes together: it must be a multiple of "
            "their number."
        )


def _read_tokenizer(path: Path) -> ImageTokenizer:
    """A tokenizer of smalto from its folder, or one of VAR from its file."""
    return load_var(path) if path.is_file() else load(path)


def _for_finetuning(recipe: Recipe, start: ImageTokenizer, name: str) -> Recipe:
    """The recipe with the tokenizer's own configuration in place of the recipe's."""
    config = start.config if isinstance(start.config, TokenizerConfig) else start.config.general()
    finetune = recipe.finetune.model_dump() | {"tokenizer": name}
    settings = recipe.model_dump(mode="json") | {"tokenizer": config.model_dump(mode="json"), "finetune": finetune}
    return parse_config(Recipe, settings, f"fine-tuning {name}")


@contextmanager
def _threads(number: int, device: torch.device, progress: Progress) -> Iterator[None]:
    """Compute with the threads that the run began with: on a CPU, sums depend on their number."""
    before = torch.get_num_threads()
    if device.type == "cpu" and number != before:
        progress.say(f"computing with {number} threads, as when this run began, in place of {before}: with others its numbers would differ")
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _announce(material: Material, device: torch.device, progress: Progress) -> None:
    few = len(material.pictures) < MIN_PICTURES_TO_HOLD_OUT
    reason = "fewer than 4 pictures, so figures are on training pictures" if few else "figures are on training pictures"
    held_out = f"{len(material.held_out)} held out" if material.held_out else f"none held out ({reason})"
    progress.say(f"{len(material.training)} pictures to train on, {held_out}; device {device}")
    if material.skipped:
        progress.say(summary(material.skipped))


def _finish(run: RunFolder, recipe: Recipe, tokenizer: ImageTokenizer, material: Material, progress: Progress) -> Trained:
    """Measure on whole held-out pictures and write metrics.json and report.html; the first process alone does."""
    first = distributed.rank() == 0
    distributed.leave()
    if not first:
        return Trained(run, tokenizer, {})
    runner = Runner.on(tokenizer, recipe.precision)
    indices = _to_measure(material, recipe.evaluate.pictures)
    progress.begin("measuring", len(indices), "pictures")
    measurement = measure(runner, _whole(material, indices, runner.tokenizer.stride, progress), Networks.open(runner.device))
    progress.end()
    on = "held-out pictures" if material.held_out else "training pictures"
    every = len(material.held_out or material.training)
    if len(indices) < every:
        on += f", drawn from {every:,}"
    transform = str(transform_of(runner.tokenizer.stride, longer_side=recipe.data.longer_side))
    evaluation = measurement.result(runner.tokenizer, on, transform, recipe.precision, material.skipped)
    if (run.path / START_FOLDER).is_dir():
        start = Runner.on(load(run.path / START_FOLDER).to(runner.device), recipe.precision)
        evaluation.figures.update(_changed_indices(start, runner, _whole(material, indices, runner.tokenizer.stride, Progress())))
    return Trained(run, tokenizer, finish_run(run, recipe, runner, evaluation))


def _to_measure(material: Material, most: int) -> list[int]:
    """The pictures to measure at the end: all that were held out, or ``most`` of them by the hash of the name, whatever their folders."""
    indices = material.held_out or material.training
    if len(indices) <= most:
        return indices
    order = held_out_order([material.pictures.names[i] for i in indices])
    return sorted(indices[place] for place in order[:most])


def _changed_indices(before: Runner, after: Runner, pictures: Iterator[tuple[str, Tensor]]) -> dict[str, Any]:
    """The share of indices that a fine-tuning has changed, and out of how many."""
    changed = total = number = 0
    for _, picture in pictures:
        tokens = [runner.encode(to_unit_range(picture)[None]) for runner in (before, after)]
        changed += int((tokens[0] != tokens[1]).sum())
        total, number = total + tokens[0].numel(), number + 1
    return {"indices_changed": changed / max(total, 1), "indices_changed_num_tokens": total, "indices_changed_num_images": number}


def _whole(material: Material, indices: list[int], stride: int, progress: Progress) -> Iterator[tuple[str, Tensor]]:
    material.pictures.ask(indices[:8])
    for place, index in enumerate(indices):
        material.pictures.ask(indices[place + 8 : place + 9])
        picture = material.pictures.get(index)
        progress.advance()
        if picture is not None:
            yield material.pictures.names[index], centre_crop(picture, stride)
