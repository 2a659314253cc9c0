"""The images of a tokenizer's run: which are trained on, which are held out, and batches of their
crops.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from smalto.core import distributed
from smalto.core.errors import ConfigError
from smalto.core.progress import Progress
from smalto.images.crops import CropStream
from smalto.images.image_file import ImageFile, Skipped
from smalto.images.image_reader import ImageReader, default_workers
from smalto.images.image_set import DatasetImages, ImageFiles, ImageSet
from smalto.images.reading import read_image
from smalto.images.sources import open_source
from smalto.images.splits import MIN_IMAGES_TO_HOLD_OUT, held_out_order, split, split_by_name
from smalto.images.tensors import center_crop
from smalto.images.worker_pool import ReaderPool
from smalto.training.run_folder import Split
from smalto.training.tokenizer_recipe import TokenizerRecipe

ImageData = str | Path | Dataset[Any]
DATASET = "a dataset"  # the source of a run on a dataset
HELD_OUT_SEED = 1_000_003  # added to the seed, so that these crops are not those of training
START_SEED = 2_000_003
FEW_FILES = 32  # are read faster than processes start


@dataclass(frozen=True)
class TrainingImages:
    """The images of a run.

    Attributes:
        images: all of them, by number.
        source: where they are, as runs remember it.
        training: numbers of the images to train on.
        held_out: numbers of the images that training never sees.
        unusable: files that were left out otherwise than by ``images``.
        digest: of names and sizes.
        files: the image files; empty for a dataset.
        workers: processes that read them.
    """

    images: ImageSet
    source: str
    training: list[int]
    held_out: list[int]
    unusable: list[Skipped]
    digest: str
    files: list[ImageFile]
    workers: int

    @property
    def skipped(self) -> list[Skipped]:
        """Everything left out so far, before and while reading."""
        return sorted({*self.unusable, *self.images.skipped})

    @property
    def measured_on(self) -> str:
        """What the evaluation at the end measures, in words."""
        return "held-out images" if self.held_out else "training images"

    def split(self) -> Split:
        """Return what the run remembers of its images."""
        names = [self.images.names[i] for i in self.held_out]
        return Split(self.source, len(self.images), self.digest, names)

    def describe(self) -> str:
        """Return the numbers of images in one sentence."""
        if self.held_out:
            held_out = f"{len(self.held_out)} held out"
        elif len(self.images) < MIN_IMAGES_TO_HOLD_OUT:
            held_out = "none held out (fewer than 4 images, so metrics are on training images)"
        else:
            held_out = "none held out (metrics are on training images)"
        return f"{len(self.training)} images to train on, {held_out}"

    def batches(self, recipe: TokenizerRecipe) -> CropStream:
        """Return this rank's rows of the training batches."""
        return CropStream(
            self.images,
            self.training,
            size=recipe.data.size,
            batch=recipe.data.batch,
            seed=recipe.seed,
            crops_per_image=recipe.data.crops_per_image,
            flip=recipe.data.flip,
            color=recipe.data.color,
            rows=distributed.rank_range(recipe.data.batch),
        )

    def held_out_crops(self, recipe: TokenizerRecipe) -> Tensor:
        """Return fixed crops [N, C, size, size] for evaluation in training."""
        number = recipe.evaluate.crops
        crops = self._crops(self.held_out or self.training, recipe, number, HELD_OUT_SEED)
        return crops[:number]

    def start_crops(self, recipe: TokenizerRecipe, number: int) -> Tensor:
        """Return this rank's share of at least ``number`` crops for the k-means start."""
        return self._crops(self.training, recipe, number, START_SEED, shared=True)

    def _crops(
        self,
        indices: list[int],
        recipe: TokenizerRecipe,
        number: int,
        seed: int,
        shared: bool = False,
    ) -> Tensor:
        """Return at least ``number`` fixed crops, several of each image; ``shared``: this
        rank's.
        """
        several, size = recipe.data.crops_per_image, recipe.data.size
        batch = -(-number // several)
        rows = distributed.rank_range(batch) if shared else range(batch)
        if not rows:
            return torch.zeros(0, recipe.tokenizer.autoencoder.in_channels, size, size)
        stream = CropStream(
            self.images,
            indices,
            size=size,
            batch=batch,
            seed=recipe.seed + seed,
            flip=False,
            crops_per_image=several,
            rows=rows,
        )
        return torch.cat([next(stream) for _ in range(several)])

    def to_evaluate(self, limit: int) -> list[int]:
        """Return the images to evaluate at the end: at most ``limit``, drawn by the hash of the
        name.
        """
        indices = self.held_out or self.training
        if len(indices) <= limit:
            return indices
        order = held_out_order([self.images.names[i] for i in indices])
        return sorted(indices[place] for place in order[:limit])

    def whole_images(
        self, indices: list[int], stride: int, longer_side: int, progress: Progress
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, [C, H, W]) of whole images, as ``smalto evaluate`` reads them."""
        if self.files:
            files = [self.files[i] for i in indices]
            workers = self.workers if len(files) > FEW_FILES else 0
            reader = ImageReader(files, stride, progress, longer_side=longer_side, workers=workers)
            yield from reader
            self.unusable.extend(reader.skipped)
            return
        for index in indices:
            image = self.images.get(index)
            progress.advance()
            if image is not None:
                yield self.images.names[index], center_crop(image, stride)


@contextmanager
def open_training_images(
    data: ImageData, recipe: TokenizerRecipe, workers: int | None, before: Split | None = None
) -> Iterator[TrainingImages]:
    """Find and split the images of a run.

    Args:
        data: a source of image files, or a dataset.
        recipe: of the run.
        workers: processes that read images.
        before: the split of the run that is resumed; it is repeated.
    """
    read = partial(read_image, longer_side=recipe.data.longer_side)
    workers = default_workers(workers)
    with ReaderPool(workers, read) as pool:
        if isinstance(data, (str, Path)):
            source = open_source(data)
            images: ImageSet = ImageFiles(source.files, pool, recipe.data.cache_mb * 2**20)
            names = before.held_out if before else source.held_out
            training, held_out = split(images) if names is None else split_by_name(images, names)
            yield TrainingImages(
                images,
                source.name,
                training,
                held_out,
                source.skipped,
                source.digest,
                source.files,
                workers,
            )
        else:
            images = DatasetImages(data)
            if before:
                training, held_out = split_by_name(images, before.held_out)
            else:
                training, held_out = split(images)
            yield TrainingImages(images, DATASET, training, held_out, [], "", [], 0)


def check_data(images: TrainingImages, recipe: TokenizerRecipe) -> None:
    """Raise ConfigError unless the recipe fits the images and the number of processes."""
    channels = recipe.tokenizer.autoencoder.in_channels
    if images.files and channels != 3:
        raise ConfigError(
            f"image files have 3 channels; tokenizer.autoencoder.in_channels is {channels}."
        )
    if recipe.data.batch % distributed.world_size():
        raise ConfigError(
            f"data.batch is {recipe.data.batch}, the crops of all {distributed.world_size()} "
            "processes together: it must be a multiple of their number."
        )
