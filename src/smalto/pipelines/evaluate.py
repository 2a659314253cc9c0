"""Measuring a tokenizer on pictures that it has not seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smalto.data.archives import PictureFile, Skipped
from smalto.data.bundled import credit
from smalto.data.images import LONGER_SIDE, printable, summary
from smalto.data.pictures import to_uint8, to_unit_range
from smalto.data.sources import Source, open_source
from smalto.device import Precision
from smalto.errors import DataError, MissingExtra
from smalto.layout import TokenLayout
from smalto.memory import reused_memory
from smalto.metrics import CodebookMeter, perplexity, psnr, ssim, used
from smalto.pipelines.running import PictureReader, Runner, batches_of_one_shape
from smalto.progress import Progress
from smalto.report import Example
from smalto.tokenizer import ImageTokenizer
from smalto.training.checkpoint import SPLIT_FILE, read_split

MIN_SSIM_SIDE = 11
MAX_EXAMPLES = 6
STAGED_PICTURES = 256  # how many are decoded after each grid


@dataclass(frozen=True)
class Evaluation:
    """What was measured: ``figures`` for machines, pictures and the code histogram for the report."""

    figures: dict[str, Any]
    examples: list[Example]
    histogram: Tensor
    skipped: list[Skipped]


@dataclass(frozen=True)
class _Grid:
    """One grid of the layout over all pictures: its codes, its sizes, the PSNR of what it makes together with those before it."""

    histogram: Tensor
    sizes: set[tuple[int, int]]
    psnr: list[float]

    def figures(self) -> dict[str, Any]:
        share, ceiling = used(self.histogram)
        return {
            "grid": "x".join(map(str, *self.sizes)) if len(self.sizes) == 1 else "varies",
            "tokens": int(self.histogram.sum()),
            "used": share,
            "ceiling": ceiling,
            "perplexity": perplexity(self.histogram),
            "psnr": _mean(self.psnr) if self.psnr else None,
            "psnr_num_images": len(self.psnr),
        }


class Measurement:
    """Adds up what is measured, picture by picture."""

    def __init__(self, codebook_size: int, max_examples: int = MAX_EXAMPLES) -> None:
        self._meter = CodebookMeter(codebook_size)
        self._grids: list[_Grid] = []
        self._psnr: list[float] = []
        self._ssim: list[float] = []
        self._pixels = self._tokens = 0
        self._seconds = 0.0
        self._max_examples = max_examples
        self._examples: list[Example] = []
        self._has_ssim = True

    def add(
        self,
        names: list[str],
        images: Tensor,
        reconstructions: Tensor,
        tokens: Tensor,
        layout: TokenLayout,
        seconds: float,
        stages: Sequence[Tensor] = (),
    ) -> None:
        """Take in a batch: images and reconstructions float [B, C, H, W] in [-1, 1], tokens [B, L], seconds to encode and decode.

        ``stages``: where the first grids alone make a picture, the pictures after each grid.
        """
        self._meter.add(tokens)
        values = psnr(reconstructions, images).tolist()
        self._psnr += values
        if self._has_ssim and min(images.shape[2:]) >= MIN_SSIM_SIDE:
            try:
                self._ssim += ssim(reconstructions, images).tolist()
            except MissingExtra:
                self._has_ssim = False
        self._pixels += images.shape[0] * images.shape[2] * images.shape[3]
        self._tokens += tokens.numel()
        self._seconds += seconds
        stage_values = [psnr(stage, images).tolist() for stage in stages]
        if len(layout.grids) > 1:
            self._count_grids(tokens, layout, stage_values)
        shown = max(range(len(layout.grids)), key=lambda number: layout.lengths[number])  # the first of the finest
        finest = tokens.split(layout.lengths, dim=1)[shown]
        for i in range(min(len(names), self._max_examples - len(self._examples)) if images.shape[1] == 3 else 0):
            earlier = tuple((to_uint8(stage[i]), value[i]) for stage, value in zip(stages, stage_values, strict=True))[:-1]
            self._examples.append(
                Example(
                    printable(names[i]),
                    picture=to_uint8(images[i]),
                    reconstruction=to_uint8(reconstructions[i]),
                    tokens=finest[i],
                    grid=layout.grids[shown],
                    num_tokens=tokens.shape[1],
                    psnr=values[i],
                    credit=credit(names[i]),
                    stages=earlier,
                )
            )

    def _count_grids(self, tokens: Tensor, layout: TokenLayout, stage_values: list[list[float]]) -> None:
        size = len(self._meter.histogram)
        self._grids = self._grids or [_Grid(torch.zeros(size, dtype=torch.int64), set(), []) for _ in layout.grids]
        for number, (grid, block) in enumerate(zip(self._grids, tokens.split(layout.lengths, dim=1), strict=True)):
            grid.histogram.add_(torch.bincount(block.flatten(), minlength=size))
            grid.sizes.add(layout.grids[number])
            grid.psnr.extend(stage_values[number] if stage_values else [])

    @property
    def wants_stages(self) -> bool:
        """Whether pictures after each grid are still asked for: decoding them takes as many times as long as there are grids."""
        return len(self._psnr) < STAGED_PICTURES

    def result(self, tokenizer: ImageTokenizer, on: str, transform: str, precision: str, skipped: list[Skipped]) -> Evaluation:
        """The figures, over all pictures added.

        Raises:
            DataError: none was added.
        """
        if not self._psnr:
            raise DataError(f"there was no picture to measure. {summary(skipped)}")
        share, window = self._meter.usage()
        used_share, ceiling = used(self._meter.histogram)
        size = tokenizer.quantize.codebook_size
        figures = {
            "measured_on": on,
            "num_images": len(self._psnr),
            "transform": transform,
            "precision": precision,
            "psnr": _mean(self._psnr),
            "ssim": _mean(self._ssim) if self._ssim else None,
            "usage": share,
            "usage_window": window,
            "used": used_share,
            "used_ceiling": ceiling,
            "num_tokens": self._tokens,
            "perplexity": self._meter.perplexity(),
            "codebook_size": size,
            "bits_per_pixel": self._tokens * math.log2(size) / self._pixels,
            "images_per_second": len(self._psnr) / self._seconds if self._seconds else None,
            "pixels_per_image": self._pixels / len(self._psnr),
            "grids": [grid.figures() for grid in self._grids],
            "parameters": sum(p.numel() for p in tokenizer.parameters()),
            "skipped": [{"name": printable(name), "reason": reason} for name, reason in skipped],
        }
        return Evaluation(figures, self._examples, self._meter.histogram, skipped)


@reused_memory()
def evaluate(
    source: str | Path,
    tokenizer: ImageTokenizer | str | Path,
    *,
    everything: bool = False,
    longer_side: int | None = LONGER_SIDE,
    size: int | None = None,
    batch: int = 8,
    device: str = "auto",
    precision: Precision = "float32",
    workers: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure PSNR, SSIM, codebook use and speed on whole pictures.

    On the folder that the tokenizer was trained on, only the held-out pictures are measured, unless ``everything``.

    Args:
        source: a folder, one picture, or ``"bundled"``.
        tokenizer: a tokenizer, or the folder of one.
        longer_side: larger pictures are reduced to this; None or 0 keeps their size.
        size: cut a square of this side from the middle; None keeps the shape.

    Returns:
        Evaluation: ``.figures["psnr"]`` and so on.
    """
    progress = progress or Progress()
    runner = Runner.of(tokenizer, device, precision, batch, progress)
    opened = open_source(source)
    files, on = opened.files, "all pictures"
    if not everything and not isinstance(tokenizer, ImageTokenizer):
        files, on = _unseen(opened, Path(tokenizer))
    reader = PictureReader(files, runner.tokenizer.stride, progress, longer_side=longer_side, size=size, workers=workers)
    reader.skipped += opened.skipped
    progress.begin("evaluating", len(files), "pictures")
    measurement = measure(runner, reader)
    progress.end()
    return measurement.result(runner.tokenizer, on, reader.transform, precision, reader.skipped)


def measure(runner: Runner, pictures: Any, max_examples: int = MAX_EXAMPLES) -> Measurement:
    """Encode and decode (name, [C, H, W]) pictures and compare."""
    measurement = Measurement(runner.tokenizer.quantize.codebook_size, max_examples)
    for names, stacked in batches_of_one_shape(pictures, runner.batch):
        images = to_unit_range(stacked)
        tokens, reconstructions, seconds = runner.roundtrip(images)
        layout = runner.tokenizer.layout(*images.shape[2:])
        stages = []
        if runner.tokenizer.is_progressive and len(layout.grids) > 1 and measurement.wants_stages:
            stages = [*runner.decode_each(tokens[:, : -layout.lengths[-1]], layout), reconstructions]
        measurement.add(names, images, reconstructions, tokens, layout, seconds, stages)
    return measurement


def _unseen(source: Source, tokenizer: Path) -> tuple[list[PictureFile], str]:
    """The files of ``source`` that the run of ``tokenizer`` did not train on, and what to call them.

    Raises:
        DataError: it has trained on all of them.
    """
    split = next((p / SPLIT_FILE for p in (tokenizer, tokenizer.parent.parent) if (p / SPLIT_FILE).is_file()), None)
    if split is None:
        return source.files, "all pictures"
    facts = read_split(split)
    names = {file: _name_in(file, source, facts) for file in source.files}
    if not any(names.values()):
        return source.files, "pictures of another source than the training's"
    held_out = set(facts["held_out"])
    if not held_out:
        return source.files, "training pictures"
    unseen = [file for file, name in names.items() if name is None or name in held_out]
    if not unseen:
        raise DataError(f"the run trained on all {len(source.files)} pictures of {source.name}. Measure them all the same with --all.")
    return unseen, "held-out pictures"


def _name_in(file: PictureFile, source: Source, facts: dict[str, Any]) -> str | None:
    """The name of a file among the run's training pictures; None where it is not one of them."""
    moved = len(source.files) == facts["num_pictures"] and set(facts["held_out"]) <= {f.name for f in source.files}
    if source.name == facts["source"] or moved:
        return file.name
    path, folder = Path(file.path).resolve(), Path(facts["source"])
    inside = f"/{file.member}" if file.member else ""
    return path.relative_to(folder).as_posix() + inside if path.is_relative_to(folder) else None


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
