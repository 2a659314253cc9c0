"""Training a tokenizer: from images to a run with a report."""

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
from smalto.core.allocator import retain_freed_memory
from smalto.core.config import parse_config
from smalto.core.device import resolve_device
from smalto.core.errors import ConfigError, RunError
from smalto.core.progress import Progress
from smalto.evaluation.evaluator import FeatureNetworks, measure
from smalto.evaluation.run_summary import write_results
from smalto.images.crops import CropStream
from smalto.images.image_file import Skipped, summary
from smalto.images.image_reader import default_workers, transform_of
from smalto.images.image_set import DatasetImages, ImageFiles, ImageSet
from smalto.images.reading import read_image
from smalto.images.sources import open_source
from smalto.images.splits import MIN_IMAGES_TO_HOLD_OUT, held_out_order, split, split_by_name
from smalto.images.tensors import center_crop, to_unit_range
from smalto.images.worker_pool import ReaderPool
from smalto.inference.inference_tokenizer import InferenceTokenizer
from smalto.interop.var import load_tokenizer as load_var
from smalto.tokenizer import ImageTokenizer, TokenizerConfig, load
from smalto.training.random_state import seeded
from smalto.training.recipe import Recipe, change_recipe
from smalto.training.run_folder import START_FOLDER, RunFolder
from smalto.training.tokenizer_task import TokenizerTask
from smalto.training.trainer import Trainer

Data = str | Path | Dataset[Any]
_DATASET = "a dataset"
_HELD_OUT_CROPS, _START_CROPS = (
    1_000_003,
    2_000_003,
)  # added to the seed: these crops are not those of training


@dataclass(frozen=True)
class Trained:
    """A finished training: the run, its model, what was measured (``metrics["psnr"]`` and so on)."""

    run: RunFolder
    tokenizer: ImageTokenizer
    metrics: dict[str, Any]


@dataclass(frozen=True)
class TrainingImages:
    """The images of a run: the numbers of those to train on and of those held out, and the files that are of no use."""

    images: ImageSet
    source: str
    training: list[int]
    held_out: list[int]
    unusable: list[Skipped]
    digest: str

    @property
    def are_files(self) -> bool:
        return isinstance(self.images, ImageFiles)

    @property
    def skipped(self) -> list[Skipped]:
        """Everything left out so far, before and while reading."""
        return sorted({*self.unusable, *self.images.skipped})

    def metadata(self) -> dict[str, Any]:
        """What the run remembers."""
        names = [self.images.names[i] for i in self.held_out]
        return {
            "source": self.source,
            "num_images": len(self.images),
            "digest": self.digest,
            "held_out": names,
        }

    def crops(
        self, indices: list[int], recipe: Recipe, number: int, shift: int, shared: bool = False
    ) -> Tensor:
        """At least ``number`` fixed crops [n, C, size, size], several of each image; ``shared``: this process's part of them."""
        several = recipe.data.crops_per_image
        batch = -(-number // several)
        rows = distributed.rank_range(batch) if shared else range(batch)
        if not rows:
            return torch.zeros(
                0, recipe.tokenizer.autoencoder.in_channels, recipe.data.size, recipe.data.size
            )
        stream = CropStream(
            self.images,
            indices,
            size=recipe.data.size,
            batch=batch,
            seed=recipe.seed + shift,
            flip=False,
            crops_per_image=several,
            rows=rows,
        )
        return torch.cat([next(stream) for _ in range(several)])


@retain_freed_memory()
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
    """Train a tokenizer and write a run folder with checkpoints, metrics and a report.

    Started by torchrun, its processes share every batch; the first one writes, and it alone measures at the end.

    Args:
        data: a folder of images, ``"bundled"``, ``"emoji"``, or a map-style dataset of [C, H, W] tensors (uint8, or float in [-1, 1]).
        recipe: what to train and how; None takes ``Recipe()``.
        out: the run folder to make.
        overwrite: replace a run that is there.
        start: fine-tune this tokenizer: one, the folder of one, or a weight file of VAR. ``recipe.finetune.learn`` says what learns.
        device: "auto", "cpu", "cuda" or "mps".
        workers: decoding processes (0: decode in this one); None leaves one core to the model. In a script of your own, workers
            need the call under ``if __name__ == "__main__":``.
        progress: told what happens.

    Raises:
        ConfigError, DataError, RunError: settings, images or the place for the run do not fit.
        Interrupted: SIGINT or SIGTERM came; everything is saved.
    """
    target, recipe = resolve_device(device), recipe or Recipe()
    if start is None and recipe.finetune.learn != "everything":
        raise ConfigError(
            f"finetune.learn is {recipe.finetune.learn!r}, and there is no tokenizer to begin with. Name one: --from FOLDER."
        )
    with distributed.process_group(target):
        progress = _rank_zero_progress(progress)
        if distributed.rank() == 0:
            RunFolder.check_free(Path(out), overwrite)
        with open_training_images(data, recipe, workers) as images_of_run:
            return _finish(
                *fit(images_of_run, recipe, Path(out), overwrite, target, progress, start),
                images_of_run,
                progress,
            )


@retain_freed_memory()
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
        data: where the images are now, if they moved; needed again where the run was trained on a dataset.
        settings: changes to its recipe, such as ``{"steps": 4000}``; the tokenizer and the images stay.
        device, workers, progress: as for ``train``.
    """
    folder, target = RunFolder(run), resolve_device(device)
    recipe = changed(folder, settings or {})
    if data is None and recipe.data.source == _DATASET:
        raise ConfigError(
            f"{run} was trained on a dataset: pass it again, smalto.resume({str(run)!r}, dataset)."
        )
    with distributed.process_group(target):
        progress = _rank_zero_progress(progress)
        with open_training_images(
            data if data is not None else recipe.data.source, recipe, workers, folder.split()
        ) as images_of_run:
            return _finish(
                *resume_run(images_of_run, folder, recipe, target, progress),
                images_of_run,
                progress,
            )


def _rank_zero_progress(progress: Progress | None) -> Progress:
    """Of several processes the first one speaks."""
    return progress if progress is not None and distributed.rank() == 0 else Progress()


@contextmanager
def open_training_images(
    data: Data, recipe: Recipe, workers: int | None, metadata: dict[str, Any] | None = None
) -> Iterator[TrainingImages]:
    """Find and split the images; ``metadata`` of an earlier run repeat its split."""
    files = open_source(data) if isinstance(data, (str, Path)) else None
    with ReaderPool(
        default_workers(workers), partial(read_image, longer_side=recipe.data.longer_side)
    ) as decoder:
        images: ImageSet
        if files:
            images = ImageFiles(files.files, decoder, recipe.data.cache_mb * 2**20)
        else:
            assert not isinstance(data, (str, Path))
            images = DatasetImages(data)
        names = metadata["held_out"] if metadata else files.held_out if files else None
        training, held_out = split(images) if names is None else split_by_name(images, names)
        name, skipped, digest = (
            (files.name, files.skipped, files.digest) if files else (_DATASET, [], "")
        )
        yield TrainingImages(images, name, training, held_out, skipped, digest)


def changed(run: RunFolder, settings: dict[str, Any]) -> Recipe:
    """The run's recipe with ``settings``, unless they would make it another run."""
    for key in settings:
        if key.startswith(("tokenizer.", "finetune.")) or key in ("data.source", "seed"):
            raise ConfigError(
                f"a resumed run keeps its {key}. Begin a new one with another --out to change it."
            )
        if (
            key in ("losses.adversarial.width", "losses.adversarial.layers")
            and run.recipe().losses.adversarial.weight
        ):
            raise ConfigError(
                f"a resumed run keeps its discriminator, and so its {key}. Begin a new one with another --out to change it."
            )
    return change_recipe(run.recipe(), settings)


def fit(
    images_of_run: TrainingImages,
    recipe: Recipe,
    out: Path,
    overwrite: bool,
    device: torch.device,
    progress: Progress,
    start: ImageTokenizer | str | Path | None = None,
) -> tuple[RunFolder, Recipe, ImageTokenizer]:
    """Make a run and train it to the end."""
    if Path(images_of_run.source).is_relative_to(out.resolve()):
        raise RunError(f"the images lie inside {out}, which is to be the run. Name another --out.")
    begun = None
    if start is not None:
        begun = start if isinstance(start, ImageTokenizer) else _read_tokenizer(Path(start))
        recipe = _for_finetuning(
            recipe,
            begun,
            "a tokenizer" if isinstance(start, ImageTokenizer) else str(Path(start).resolve()),
        )
    if images_of_run.are_files and recipe.tokenizer.autoencoder.in_channels != 3:
        raise ConfigError(
            f"image files have 3 channels; tokenizer.autoencoder.in_channels is {recipe.tokenizer.autoencoder.in_channels}."
        )
    _check_batch(recipe)
    recipe = change_recipe(recipe, {"data.source": images_of_run.source})
    _announce(images_of_run, device, progress)
    with seeded(recipe.seed, device):
        tokenizer = recipe.tokenizer.build()
        if begun is not None:
            tokenizer.load_state_dict(begun.state_dict())  # copied, and so in float32
        task = _task(tokenizer.to(device), images_of_run, recipe, keep_codes=begun is not None)
        if begun is None:
            number = max(recipe.data.batch, task.num_start_images)
            task.start(
                list(
                    images_of_run.crops(
                        images_of_run.training, recipe, number, _START_CROPS, shared=True
                    ).split(recipe.data.batch)
                )
            )
    with seeded(recipe.seed + distributed.rank(), device):
        trainer = Trainer(task, _stream_at(images_of_run, recipe), out, recipe, progress)
        state = trainer.state()
        if distributed.rank() == 0:
            RunFolder.create(
                out, recipe, images_of_run.metadata(), task.result, state, overwrite, begun
            )
        distributed.broadcast_object("the run is there", device)
        return _loop(trainer, task, images_of_run, RunFolder(out), recipe, progress)


def resume_run(
    images_of_run: TrainingImages,
    run: RunFolder,
    recipe: Recipe,
    device: torch.device,
    progress: Progress,
) -> tuple[RunFolder, Recipe, ImageTokenizer]:
    """Train a run that exists to its end."""
    _check_batch(recipe)
    if distributed.rank() == 0:
        with run.locked():
            checkpoint = run.restore()
    step = distributed.broadcast_object(checkpoint.step if distributed.rank() == 0 else 0, device)
    if distributed.rank() > 0:
        checkpoint = run.read(step)
    if recipe.steps < step:
        raise ConfigError(
            f"{run.path} is at step {step} already; --steps must be at least that to go on with it, got {recipe.steps}."
        )
    before = run.split()
    recipe = change_recipe(recipe, {"data.source": images_of_run.source})
    if len(images_of_run.images) != before["num_images"]:
        progress.message(
            f"there were {before['num_images']} images when this run began and there are {len(images_of_run.images)} now, "
            "so the crops will differ"
        )
    if before["held_out"] and not images_of_run.held_out:
        progress.message(
            f"the {len(before['held_out'])} held-out images are not there any more, so metrics are on training images"
        )
    if distributed.rank() == 0:
        with run.locked():
            run.continue_from(checkpoint, recipe, {**before, "source": images_of_run.source})
    with seeded(recipe.seed, device):
        task = _task(checkpoint.tokenizer.to(device), images_of_run, recipe, keep_codes=True)
    with (
        seeded(recipe.seed + distributed.rank(), device),
        _threads(checkpoint.state["threads"], device, progress),
    ):
        trainer = Trainer(task, _stream_at(images_of_run, recipe), run.path, recipe, progress)
        trainer.load(checkpoint)
        distributed.broadcast_object("the run is ready", device)
        _announce(images_of_run, device, progress)
        progress.message(f"going on after step {step} of {recipe.steps}")
        return _loop(trainer, task, images_of_run, run, recipe, progress)


def _loop(
    trainer: Trainer,
    task: TokenizerTask,
    images_of_run: TrainingImages,
    run: RunFolder,
    recipe: Recipe,
    progress: Progress,
) -> tuple[RunFolder, Recipe, ImageTokenizer]:
    known = len(images_of_run.skipped)
    with run.locked() if distributed.rank() == 0 else nullcontext():
        trainer.train()
        if len(images_of_run.skipped) > known:
            progress.message(f"found while training: {summary(images_of_run.skipped)}")
        enlarged = trainer.stream.enlarged
        if enlarged and distributed.rank() == 0:
            run.event("enlarged images", count=len(enlarged))
            progress.message(
                f"{len(enlarged)} images are smaller than the crop and were enlarged to {recipe.data.size} pixels"
            )
    return run, recipe, task.result.eval()


def _task(
    tokenizer: ImageTokenizer, images_of_run: TrainingImages, recipe: Recipe, keep_codes: bool
) -> TokenizerTask:
    looked_at = images_of_run.crops(
        images_of_run.held_out or images_of_run.training,
        recipe,
        recipe.evaluate.crops,
        _HELD_OUT_CROPS,
    )
    return TokenizerTask(tokenizer, recipe, looked_at[: recipe.evaluate.crops], keep_codes)


def _stream_at(
    images_of_run: TrainingImages, recipe: Recipe
) -> Callable[[list[list[int]] | None], CropStream]:
    """Makes the stream of this process's rows of the batches, from a position on."""
    return lambda position: CropStream(
        images_of_run.images,
        images_of_run.training,
        size=recipe.data.size,
        batch=recipe.data.batch,
        seed=recipe.seed,
        crops_per_image=recipe.data.crops_per_image,
        flip=recipe.data.flip,
        color=recipe.data.color,
        rows=distributed.rank_range(recipe.data.batch),
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
    settings = recipe.model_dump(mode="json") | {
        "tokenizer": config.model_dump(mode="json"),
        "finetune": finetune,
    }
    return parse_config(Recipe, settings, f"fine-tuning {name}")


@contextmanager
def _threads(number: int, device: torch.device, progress: Progress) -> Iterator[None]:
    """Compute with the threads that the run began with: on a CPU, sums depend on their number."""
    before = torch.get_num_threads()
    if device.type == "cpu" and number != before:
        progress.message(
            f"computing with {number} threads, as when this run began, in place of {before}: with others its numbers would differ"
        )
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _announce(images_of_run: TrainingImages, device: torch.device, progress: Progress) -> None:
    few = len(images_of_run.images) < MIN_IMAGES_TO_HOLD_OUT
    reason = (
        "fewer than 4 images, so metrics are on training images"
        if few
        else "metrics are on training images"
    )
    held_out = (
        f"{len(images_of_run.held_out)} held out"
        if images_of_run.held_out
        else f"none held out ({reason})"
    )
    progress.message(
        f"{len(images_of_run.training)} images to train on, {held_out}; device {device}"
    )
    if images_of_run.skipped:
        progress.message(summary(images_of_run.skipped))


def _finish(
    run: RunFolder,
    recipe: Recipe,
    tokenizer: ImageTokenizer,
    images_of_run: TrainingImages,
    progress: Progress,
) -> Trained:
    """Measure on whole held-out images and write metrics.json and report.html; the first process alone does."""
    first = distributed.rank() == 0
    distributed.leave_process_group()
    if not first:
        return Trained(run, tokenizer, {})
    inference = InferenceTokenizer.on(tokenizer, recipe.precision)
    indices = _to_measure(images_of_run, recipe.evaluate.images)
    progress.start("measuring", len(indices), "images")
    evaluator = measure(
        inference,
        _whole(images_of_run, indices, inference.tokenizer.stride, progress),
        FeatureNetworks.open(inference.device),
    )
    progress.finish()
    on = "held-out images" if images_of_run.held_out else "training images"
    every = len(images_of_run.held_out or images_of_run.training)
    if len(indices) < every:
        on += f", drawn from {every:,}"
    transform = str(transform_of(inference.tokenizer.stride, longer_side=recipe.data.longer_side))
    evaluation = evaluator.result(
        inference.tokenizer, on, transform, recipe.precision, images_of_run.skipped
    )
    if (run.path / START_FOLDER).is_dir():
        start = InferenceTokenizer.on(
            load(run.path / START_FOLDER).to(inference.device), recipe.precision
        )
        evaluation.metrics.update(
            _changed_indices(
                start,
                inference,
                _whole(images_of_run, indices, inference.tokenizer.stride, Progress()),
            )
        )
    return Trained(run, tokenizer, write_results(run, recipe, inference, evaluation))


def _to_measure(images_of_run: TrainingImages, most: int) -> list[int]:
    """The images to measure at the end: all that were held out, or ``most`` of them by the hash of the name, whatever their folders."""
    indices = images_of_run.held_out or images_of_run.training
    if len(indices) <= most:
        return indices
    order = held_out_order([images_of_run.images.names[i] for i in indices])
    return sorted(indices[place] for place in order[:most])


def _changed_indices(
    before: InferenceTokenizer, after: InferenceTokenizer, images: Iterator[tuple[str, Tensor]]
) -> dict[str, Any]:
    """The share of indices that a fine-tuning has changed, and out of how many."""
    changed = total = number = 0
    for _, image in images:
        tokens = [inference.encode(to_unit_range(image)[None]) for inference in (before, after)]
        changed += int((tokens[0] != tokens[1]).sum())
        total, number = total + tokens[0].numel(), number + 1
    return {
        "indices_changed": changed / max(total, 1),
        "indices_changed_num_tokens": total,
        "indices_changed_num_images": number,
    }


def _whole(
    images_of_run: TrainingImages, indices: list[int], stride: int, progress: Progress
) -> Iterator[tuple[str, Tensor]]:
    images_of_run.images.prefetch(indices[:8])
    for place, index in enumerate(indices):
        images_of_run.images.prefetch(indices[place + 8 : place + 9])
        image = images_of_run.images.get(index)
        progress.advance()
        if image is not None:
            yield images_of_run.images.names[index], center_crop(image, stride)
