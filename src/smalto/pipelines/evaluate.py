"""Measuring a tokenizer on images that it has not seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from smalto.core.allocator import retain_freed_memory
from smalto.core.device import Precision
from smalto.core.errors import DataError
from smalto.core.progress import Progress
from smalto.evaluation.evaluator import Evaluation, FeatureNetworks, measure
from smalto.images.image_file import ImageFile
from smalto.images.image_reader import ImageReader
from smalto.images.reading import LONGER_SIDE
from smalto.images.sources import Source, open_source
from smalto.inference.inference_tokenizer import InferenceTokenizer
from smalto.tokenizer import ImageTokenizer
from smalto.training.run_folder import SPLIT_FILE, read_split


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
    """Measure how near reconstructions come, codebook use and speed on whole images.

    On the folder that the tokenizer was trained on, only the held-out images are measured, unless ``everything``.

    Args:
        source: a folder, one image, or ``"bundled"``.
        tokenizer: a tokenizer, or the folder of one.
        longer_side: larger images are reduced to this; None or 0 keeps their size.
        size: bring the shorter side to this and cut a square from the middle; None keeps the shape.
        reference_stats: an ``.npz`` file of ``mu`` and ``sigma`` that Fréchet distances are measured from; None: the images themselves.
        inception_weights: ``pt_inception-2015-12-05-6726825d.pth``, for rFID.
        lpips_vgg: the state of ``lpips.LPIPS(net="vgg")``, for LPIPS.

    Returns:
        Evaluation: ``.metrics["psnr"]`` and so on, each with the number of images behind it, such as ``["psnr_num_images"]``.
    """
    progress = progress or Progress()
    inference = InferenceTokenizer.of(tokenizer, device, precision, batch, progress)
    networks = FeatureNetworks.open(
        inference.device,
        reference_stats=reference_stats,
        inception_weights=inception_weights,
        lpips_vgg=lpips_vgg,
    )
    opened = open_source(source)
    files, on = opened.files, "all images"
    if not everything and not isinstance(tokenizer, ImageTokenizer):
        files, on = _unseen(opened, Path(tokenizer))
    reader = ImageReader(
        files,
        inference.tokenizer.stride,
        progress,
        longer_side=longer_side,
        size=size,
        workers=workers,
    )
    reader.skipped += opened.skipped
    progress.start("evaluating", len(files), "images")
    evaluator = measure(inference, reader, networks)
    progress.finish()
    return evaluator.result(
        inference.tokenizer, on, str(reader.transform), precision, reader.skipped
    )


def _unseen(source: Source, tokenizer: Path) -> tuple[list[ImageFile], str]:
    """The files of ``source`` that the run of ``tokenizer`` did not train on, and what to call them.

    Raises:
        DataError: it has trained on all of them.
    """
    tokenizer = tokenizer.resolve()
    split = next(
        (
            p / SPLIT_FILE
            for p in (tokenizer, tokenizer.parent.parent)
            if (p / SPLIT_FILE).is_file()
        ),
        None,
    )
    if split is None:
        return source.files, "all images"
    metadata = read_split(split)
    digest = source.digest
    names = {file: _name_in(file, source, digest, metadata) for file in source.files}
    if not any(names.values()):
        return source.files, "images of another source than the training's"
    held_out = set(metadata["held_out"])
    if not held_out:
        return source.files, "training images"
    unseen = [file for file, name in names.items() if name is None or name in held_out]
    if not unseen:
        raise DataError(
            f"the run trained on all {len(source.files)} images of {source.name}. Measure them all the same with --all."
        )
    return unseen, "held-out images"


def _name_in(file: ImageFile, source: Source, digest: str, metadata: dict[str, Any]) -> str | None:
    """The name of a file among the run's training images; None where it is not one of them."""
    if source.name == metadata["source"] or digest == metadata.get("digest"):
        return file.name
    path, folder = Path(file.path).resolve(), Path(metadata["source"])
    inside = f"/{file.member}" if file.member else ""
    return path.relative_to(folder).as_posix() + inside if path.is_relative_to(folder) else None
