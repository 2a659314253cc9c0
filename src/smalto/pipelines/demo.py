"""The whole way on bundled photographs: fine-tune, tokenize, decode, evaluate, report."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from smalto.core.allocator import retain_freed_memory
from smalto.core.device import resolve_device
from smalto.core.progress import Progress
from smalto.evaluation.evaluator import Evaluation, Evaluator
from smalto.evaluation.feature_networks import FeatureNetworks
from smalto.evaluation.run_summary import write_results
from smalto.images.bundled import SOURCE, bundled_photographs
from smalto.images.image_file import ImageFile, Skipped
from smalto.images.reading import read_image
from smalto.images.tensors import center_crop, to_tensor, to_uint8, to_unit_range
from smalto.inference.inference_tokenizer import InferenceTokenizer
from smalto.metrics import psnr
from smalto.pipelines.decode import decode, image_name
from smalto.pipelines.tokenize import tokenize
from smalto.pipelines.train import Trained
from smalto.pretrained import RECIPE_FILE as FINETUNING_FILE
from smalto.pretrained import pretrained_folder
from smalto.report import Example
from smalto.store.token_store import TokenStore
from smalto.tokenizer import load
from smalto.training.recipe import change_recipe
from smalto.training.recipe_file import load_recipe
from smalto.training.run_folder import METRICS_FILE, RECIPE_FILE, RunFolder
from smalto.training.tokenizer_run import TrainedRun, resume_run, start_run
from smalto.training.training_images import open_training_images

START = "photos-f4"  # the tokenizer that the demo fine-tunes
COMPARED_WITH = (START, "photos-f8")  # in the report


@retain_freed_memory()
def demo(
    folder: str | Path = "runs",
    *,
    settings: dict[str, Any] | None = None,
    device: str = "auto",
    workers: int | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Fine-tune ``photos-f4`` on the bundled photographs, tokenize the held-out ones, decode them,
    and report.

    An unfinished demo in ``folder`` is resumed; otherwise a new one is created: ``demo``,
    ``demo-2``, and so on.

    Args:
        folder: where runs lie.
        settings: changes to the recipe for fine-tuning ``photos-f4``, such as ``{"steps": 100}``.
        device, workers, progress: as for ``train``.
    """
    progress = progress or Progress()
    target = resolve_device(device)
    path, is_unfinished = _choose_path(Path(folder))
    if is_unfinished:
        run = RunFolder(path)
        recipe = change_recipe(load_recipe(path / RECIPE_FILE), settings or {})
        with open_training_images(SOURCE, recipe, workers, run.split()) as images:
            trained = resume_run(images, run, recipe, target, progress)
    else:
        recipe = load_recipe(pretrained_folder(START) / FINETUNING_FILE, settings)
        start = load(pretrained_folder(START))
        with open_training_images(SOURCE, recipe, workers) as images:
            trained = start_run(
                images, recipe, path, target, progress, start=start, start_name=START
            )
    names = set(trained.folder.split().held_out)
    held_out = [file for file in bundled_photographs() if file.name in names]
    tokens, decoded = _tokenize_and_decode(trained, held_out, device, progress)
    inference = InferenceTokenizer.on(trained.tokenizer, recipe.precision)
    evaluation = _evaluate_files(trained, inference, held_out, tokens, decoded, images.skipped)
    evaluation = replace(evaluation, examples=_compare(evaluation.examples, target))
    training = write_results(trained.folder, trained.recipe, inference, evaluation)
    return Trained(trained.folder, trained.tokenizer, evaluation.metrics, training)


def _compare(examples: list[Example], device: torch.device) -> list[Example]:
    """Return the examples with reconstructions by the tokenizers COMPARED_WITH added."""
    for name in COMPARED_WITH:
        inference = InferenceTokenizer.on(load(pretrained_folder(name)).to(device), "float32")
        examples = [_add_reconstruction(example, name, inference) for example in examples]
    return examples


def _add_reconstruction(example: Example, name: str, inference: InferenceTokenizer) -> Example:
    image = to_unit_range(center_crop(example.image, inference.tokenizer.stride))[None]
    tokens, back, _ = inference.roundtrip(image)
    bits = tokens.numel() * math.log2(inference.tokenizer.quantize.codebook_size)
    caption = (
        f"{name}, as it comes with smalto: {float(psnr(back, image)):.2f} dB at "
        f"{bits / image[0, 0].numel():.3f} bits per pixel"
    )
    return replace(example, beside=(*example.beside, (caption, to_uint8(back[0]))))


def _tokenize_and_decode(
    trained: TrainedRun, files: list[ImageFile], device: str, progress: Progress
) -> tuple[Path, list[Path]]:
    """Write the tokens of images to a store and decode them from there to PNG files."""
    run, recipe = trained.folder.path, trained.recipe
    tokens = run / "tokens.lance"
    tokenize(
        files,
        run,
        tokens,
        longer_side=recipe.data.longer_side,
        overwrite=True,
        device=device,
        precision=recipe.precision,
        workers=0,
        progress=progress,
    )
    decoded = decode(
        tokens,
        run / "decoded",
        overwrite=True,
        device=device,
        precision=recipe.precision,
        progress=progress,
    )
    return tokens, decoded


def _evaluate_files(
    trained: TrainedRun,
    inference: InferenceTokenizer,
    files: list[ImageFile],
    tokens: Path,
    decoded: list[Path],
    skipped: list[Skipped],
) -> Evaluation:
    """Compare the original files with the PNG files that were decoded from tokens on disk."""
    recipe = trained.recipe
    stride = inference.tokenizer.stride
    evaluator = Evaluator(inference.tokenizer, FeatureNetworks.open(inference.device))
    paths = {file.name: file.path for file in files}
    store = TokenStore.open(tokens)
    rows = store.rows()
    for id, row, layout, png in zip(
        rows["id"], rows["tokens"], rows["layout"], decoded, strict=True
    ):
        name = image_name(id)
        whole = to_tensor(read_image(paths[name], recipe.data.longer_side))
        original = to_unit_range(center_crop(whole, stride))
        reconstruction = to_unit_range(to_tensor(read_image(str(png), None)))
        _, _, seconds = inference.roundtrip(original[None])
        evaluator.add([name], original[None], reconstruction[None], row[None], layout, seconds)
    transform = f"{store.header.transform}, decoded from tokens on disk"
    return evaluator.result("held-out images", transform, recipe.precision, skipped)


def _choose_path(folder: Path) -> tuple[Path, bool]:
    """The demo to resume and True, or the path of a new one and False."""
    for number in itertools.count(1):
        path = folder / ("demo" if number == 1 else f"demo-{number}")
        if not path.exists():
            return path, False
        if (path / RECIPE_FILE).is_file() and not (path / METRICS_FILE).is_file():
            return path, True
    raise AssertionError("count() does not end")
