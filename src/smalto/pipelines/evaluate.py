"""Measuring tokenizers on images that they were not trained on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from smalto.core.allocator import retain_freed_memory
from smalto.core.device import Precision
from smalto.core.errors import ConfigError, DataError
from smalto.core.files import check_writable, named_path
from smalto.core.progress import Progress
from smalto.core.text import printable
from smalto.evaluation.comparison import Comparison, Contender
from smalto.evaluation.evaluator import Evaluation, evaluate_tokenizer
from smalto.evaluation.feature_networks import FeatureNetworks
from smalto.images.image_file import ImageFile
from smalto.images.image_reader import ImageReader
from smalto.images.reading import LONGER_SIDE
from smalto.images.sources import Source, open_source
from smalto.inference.inference_tokenizer import InferenceTokenizer
from smalto.interop.open_tokenizer import load, open_tokenizer
from smalto.pretrained import tokenizer_folder
from smalto.report.comparison_page import ComparisonReport, write_comparison_report
from smalto.tokenizer import ImageTokenizer
from smalto.training.run_folder import SPLIT_FILE, Split, read_split


@retain_freed_memory()
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
    reference_stats: str | Path | None = None,
    inception_weights: str | Path | None = None,
    lpips_vgg: str | Path | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure how close reconstructions come, codebook use and speed on whole images.

    On the folder that the tokenizer was trained on, only held-out images are measured, unless
    ``everything``.

    Args:
        source: a folder, one image, ``"bundled"`` or ``"emoji"``.
        tokenizer: an ImageTokenizer, or the folder or name of one.
        everything: measure training images too.
        longer_side: larger images are reduced to this; None or 0 keeps their size.
        size: resize the shorter side to this and crop a square from the center; None keeps the
            aspect ratio.
        batch, device, precision, workers: as for ``tokenize``.
        reference_stats: an ``.npz`` file of ``mu`` and ``sigma`` for Fréchet distances; None: those
            of the images themselves.
        inception_weights: ``pt_inception-2015-12-05-6726825d.pth``, for rFID.
        lpips_vgg: the state of ``lpips.LPIPS(net="vgg")``, for LPIPS.
        progress: receives images and messages.

    Returns:
        Evaluation: ``.metrics.psnr`` and so on; each mean knows its ``num_images``.
    """
    progress = progress or Progress()
    inference = InferenceTokenizer.of(
        open_tokenizer(tokenizer, progress), device, precision, batch, progress
    )
    networks = FeatureNetworks.open(
        inference.device,
        reference_stats=reference_stats,
        inception_weights=inception_weights,
        lpips_vgg=lpips_vgg,
    )
    opened = open_source(source)
    files, measured_on = opened.files, "all images"
    if not everything and not isinstance(tokenizer, ImageTokenizer):
        files, measured_on = _unseen(opened, tokenizer_folder(tokenizer))
    reader = ImageReader(
        files,
        inference.tokenizer.stride,
        progress,
        longer_side=longer_side,
        size=size,
        workers=workers,
    )
    progress.start("evaluating", len(files), "images")
    return _measure(inference, reader, networks, measured_on, opened, progress)


def compare(
    source: str | Path,
    tokenizers: Sequence[str | Path],
    report: str | Path | None = None,
    *,
    everything: bool = False,
    longer_side: int | None = LONGER_SIDE,
    size: int | None = None,
    batch: int = 8,
    device: str = "auto",
    precision: Precision = "float32",
    workers: int | None = None,
    reference_stats: str | Path | None = None,
    inception_weights: str | Path | None = None,
    lpips_vgg: str | Path | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Measure several tokenizers on the same images, one after another.

    The images are cropped to multiples of all strides. Those that one of the tokenizers was trained
    on are left out, unless ``everything``.

    Args:
        source: a folder, one image, ``"bundled"`` or ``"emoji"``.
        tokenizers: folders, names or weight files, as for ``smalto.load``.
        report: HTML file to write, with the reconstructions side by side; None writes none.
        everything, longer_side, size, batch, device, precision, workers, reference_stats,
            inception_weights, lpips_vgg, progress: as for ``evaluate``.

    Returns:
        Comparison: ``.table()``, ``.as_json()`` and the ``.contenders``.

    Raises:
        ConfigError: no tokenizer is named, or one cannot decode.
        RunError, DataError: a tokenizer cannot be loaded, or the source holds no image.
    """
    progress = progress or Progress()
    path = None if report is None else named_path(report, "the report")
    if path is not None:
        check_writable(path)
    if not tokenizers:
        raise ConfigError("got no tokenizer; expected at least one folder, name or weight file.")
    stride = 1
    for tokenizer in tokenizers:  # all mistakes are found before the long work
        loaded = load(tokenizer)
        if not loaded.has_decoder:
            raise ConfigError(
                f"{tokenizer} has no decoder: its weights were published without one. Compare "
                "tokenizers that can decode."
            )
        stride = math.lcm(stride, loaded.stride)
    opened = open_source(source)
    files, measured_on = opened.files, "all images"
    if not everything:
        for tokenizer in tokenizers:
            unseen, words = _unseen(opened, tokenizer_folder(tokenizer))
            kept = set(unseen)
            files = [file for file in files if file in kept]
            measured_on = words if words != "all images" else measured_on

    @retain_freed_memory()  # in each, so that the next one starts without what it kept
    def measured(tokenizer: str | Path) -> Contender:
        inference = InferenceTokenizer.of(
            open_tokenizer(tokenizer, progress), device, precision, batch, progress
        )
        networks = FeatureNetworks.open(
            inference.device,
            reference_stats=reference_stats,
            inception_weights=inception_weights,
            lpips_vgg=lpips_vgg,
        )
        reader = ImageReader(
            files, stride, progress, longer_side=longer_side, size=size, workers=workers
        )
        progress.start(f"evaluating {tokenizer}", len(files), "images")
        evaluation = _measure(
            inference, reader, networks, measured_on, opened, progress, measure_memory=True
        )
        return Contender(str(tokenizer), evaluation)

    comparison = Comparison([measured(tokenizer) for tokenizer in tokenizers])
    if path is not None:
        write_comparison_report(path, _page(comparison))
    return comparison


def _measure(
    inference: InferenceTokenizer,
    reader: ImageReader,
    networks: FeatureNetworks,
    measured_on: str,
    opened: Source,
    progress: Progress,
    measure_memory: bool = False,
) -> Evaluation:
    evaluation = evaluate_tokenizer(
        inference,
        reader,
        networks,
        measured_on=measured_on,
        transform=str(reader.transform),
        skipped=lambda: [*reader.skipped, *opened.skipped],
        measure_memory=measure_memory,
    )
    progress.finish()
    return evaluation


def _page(comparison: Comparison) -> ComparisonReport:
    contenders = comparison.contenders
    return ComparisonReport(
        names=[printable(contender.name) for contender in contenders],
        table=comparison.table(),
        metrics=[contender.evaluation.metrics for contender in contenders],
        examples=[contender.evaluation.examples for contender in contenders],
    )


def _unseen(source: Source, tokenizer: Path) -> tuple[list[ImageFile], str]:
    """The files of ``source`` that the run of ``tokenizer`` was not trained on, and their name.

    Raises:
        DataError: it was trained on all of them.
    """
    tokenizer = tokenizer.resolve()
    folders = (tokenizer, tokenizer.parent.parent)  # a run, or a checkpoint of one
    paths = [folder / SPLIT_FILE for folder in folders if (folder / SPLIT_FILE).is_file()]
    if not paths:
        return source.files, "all images"
    split = read_split(paths[0])
    digest = source.digest
    names = {file: _name_in(file, source, digest, split) for file in source.files}
    if not any(names.values()):
        return source.files, "images of another source than the training's"
    held_out = set(split.held_out)
    if not held_out:
        return source.files, "training images"
    unseen = [file for file, name in names.items() if name is None or name in held_out]
    if not unseen:
        raise DataError(
            f"the run was trained on all {len(source.files)} images of {source.name}. "
            "Measure them with --all."
        )
    return unseen, "held-out images"


def _name_in(file: ImageFile, source: Source, digest: str, split: Split) -> str | None:
    """The name of a file among the run's images; None if it is not one of them."""
    if source.name == split.source or digest == split.digest:
        return file.name
    path, folder = Path(file.path).resolve(), Path(split.source)
    inside = f"/{file.member}" if file.member else ""
    return path.relative_to(folder).as_posix() + inside if path.is_relative_to(folder) else None
