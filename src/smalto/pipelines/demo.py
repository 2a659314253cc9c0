"""The whole way on bundled photographs: train, write tokens, read them back, measure, report."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from smalto.core.allocator import retain_freed_memory
from smalto.core.device import resolve_device
from smalto.core.progress import Progress
from smalto.evaluation.evaluator import Evaluator, FeatureNetworks
from smalto.evaluation.run_summary import write_results
from smalto.images.bundled import SOURCE, bundled_photographs
from smalto.images.reading import read_image
from smalto.images.tensors import center_crop, to_tensor, to_unit_range
from smalto.inference.inference_tokenizer import InferenceTokenizer
from smalto.pipelines.decode import decode, image_name
from smalto.pipelines.tokenize import tokenize
from smalto.pipelines.train import Trained, fit, open_training_images, resume_run
from smalto.store.token_store import TokenStore
from smalto.training.recipe import Recipe, change_recipe
from smalto.training.run_folder import RunFolder


def demo_recipe() -> Recipe:
    """What the demo trains; ``recipes/photos-simple.toml`` says the same."""
    return Recipe()


@retain_freed_memory()
def demo(
    folder: str | Path = "runs",
    *,
    settings: dict[str, Any] | None = None,
    device: str = "auto",
    workers: int | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Train on the bundled photographs, write the held-out ones as tokens, and show what comes back.

    An unfinished demo in ``folder`` is continued; else a new one is made: ``demo``, ``demo-2``, and so on.

    Args:
        folder: where runs lie.
        settings: changes to the recipe, such as ``{"steps": 100}``.
        device, workers, progress: as for ``train``.
    """
    progress, target = progress or Progress(), resolve_device(device)
    path, unfinished = _place(Path(folder))
    if unfinished:
        run = RunFolder(path)
        recipe = change_recipe(run.recipe(), settings or {})
        with open_training_images(SOURCE, recipe, workers, run.split()) as images_of_run:
            run, recipe, tokenizer = resume_run(images_of_run, run, recipe, target, progress)
    else:
        recipe = change_recipe(demo_recipe(), settings or {})
        with open_training_images(SOURCE, recipe, workers) as images_of_run:
            run, recipe, tokenizer = fit(images_of_run, recipe, path, False, target, progress)
    inference = InferenceTokenizer.on(tokenizer, recipe.precision)
    held_out = [file for file in bundled_photographs() if file.name in set(run.split()["held_out"])]
    tokens, longer_side = run.path / "tokens.lance", recipe.data.longer_side
    tokenize(
        held_out,
        run.path,
        tokens,
        longer_side=longer_side,
        overwrite=True,
        device=device,
        precision=recipe.precision,
        workers=0,
        progress=progress,
    )
    images = decode(
        tokens,
        run.path / "decoded",
        overwrite=True,
        device=device,
        precision=recipe.precision,
        progress=progress,
    )
    # From here on only files count: the originals on one side, the PNGs that were decoded from tokens on disk on the other.
    stored = TokenStore.open(tokens)
    evaluator = Evaluator(stored.header.codebook_size, FeatureNetworks.open(inference.device))
    originals = {file.name: file.path for file in held_out}
    rows = stored.rows()
    for id, row, layout, png in zip(
        rows["id"], rows["tokens"], rows["layout"], images, strict=True
    ):
        name = image_name(id)
        original = to_unit_range(
            center_crop(
                to_tensor(read_image(originals[name], longer_side)), inference.tokenizer.stride
            )
        )
        decoded = to_unit_range(to_tensor(read_image(str(png), None)))
        _, _, seconds = inference.roundtrip(original[None])
        evaluator.add([name], original[None], decoded[None], row[None], layout, seconds)
    evaluation = evaluator.result(
        inference.tokenizer,
        "held-out images",
        f"{stored.header.transform}, decoded from tokens on disk",
        recipe.precision,
        images_of_run.skipped,
    )
    return Trained(run, tokenizer, write_results(run, recipe, inference, evaluation))


def _place(folder: Path) -> tuple[Path, bool]:
    """The demo to go on with, or the name of a new one."""
    for number in itertools.count(1):
        path = folder / ("demo" if number == 1 else f"demo-{number}")
        if not path.exists():
            return path, False
        if (path / "recipe.toml").is_file() and not (path / "metrics.json").is_file():
            return path, True
    raise AssertionError("count() does not end")
