"""Claim: on 2 cores a multi-scale tokenizer trains in 20 minutes; each scale adds to the image;
with all scales it is better than a single-scale tokenizer of the same network, steps and final
map; it uses its codebook; and VAR's file of it gives the same tokens.

``python benchmarks/var.py FOLDER`` trains ``recipes/var-small.toml`` on the bundled photographs
into FOLDER/var-small, then the single-scale one into FOLDER/single, and measures both on held-out
photographs. An interrupted run resumes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from machine import store
from torch import Tensor
from training import trained

import smalto
from smalto.core.progress import Progress
from smalto.evaluation.evaluator import evaluate_tokenizer
from smalto.evaluation.feature_networks import FeatureNetworks
from smalto.images.bundled import HELD_OUT, bundled_photographs
from smalto.images.image_reader import ImageReader
from smalto.inference.inference_tokenizer import InferenceTokenizer
from smalto.interop.var import load_tokenizer
from smalto.metrics import psnr
from smalto.tokenizer import ImageTokenizer
from smalto.training.recipe import change_recipe
from smalto.training.recipe_file import load_recipe
from smalto.training.tokenizer_recipe import TokenizerRecipe

RECIPE = Path(__file__).parent.parent / "recipes" / "var-small.toml"


def main(folder: Path) -> None:
    recipe = load_recipe(RECIPE)
    multi = trained(recipe, folder / "var-small")
    single = trained(single_scale(recipe), folder / "single")
    result = {
        "multi_scale": measured(folder / "var-small", multi),
        "single_scale": measured(folder / "single", single),
        "same_tokens_from_vars_file": same_tokens(folder / "var-small", multi),
        "bf16": in_bf16(multi),
    }
    print(json.dumps(result, indent=2))
    print("stored in", store("var", result))


def single_scale(recipe: TokenizerRecipe) -> TokenizerRecipe:
    """The same recipe with the multi-scale quantizer's one scale as a quantizer of its own."""
    scale = recipe.tokenizer.quantizer.scale.model_dump()
    settings = {f"tokenizer.quantizer.{name}": value for name, value in scale.items()}
    return change_recipe(recipe, settings)


def measured(run: Path, tokenizer: ImageTokenizer) -> dict[str, Any]:
    """On held-out photographs, and how much of the codebook the training photographs use."""
    metrics = json.loads((run / "metrics.json").read_text())
    files = [file for file in bundled_photographs() if file.name not in HELD_OUT]
    inference = InferenceTokenizer.on(tokenizer, "float32")
    reader = ImageReader(files, tokenizer.stride, Progress(), workers=0)
    training = evaluate_tokenizer(
        inference,
        reader,
        FeatureNetworks(),
        measured_on="training images",
        transform=str(reader.transform),
        skipped=lambda: reader.skipped,
    ).metrics.as_json()
    keep = (
        "psnr",
        "ssim",
        "usage",
        "usage_window",
        "used",
        "perplexity",
        "grids",
        "bits_per_pixel",
        "num_images",
        "num_tokens",
    )
    keep += ("codebook_size", "parameters", "steps", "training_seconds", "transform", "precision")
    return {
        "held_out": {name: metrics[name] for name in keep},
        "training": {
            name: training[name]
            for name in ("used", "num_tokens", "num_images", "perplexity", "psnr", "grids")
        },
    }


def same_tokens(run: Path, tokenizer: ImageTokenizer) -> dict[str, Any]:
    """Write VAR's file, read it back, and compare the tokens of the held-out photographs."""
    smalto.convert(run, run.with_suffix(".pth"), overwrite=True)
    back = load_tokenizer(run.with_suffix(".pth"), [h for h, _ in tokenizer.quantize.scales])
    equal = total = 0
    for images in held_out(tokenizer):
        own, other = tokenizer.encode(images), back.encode(images)
        equal, total = equal + int((own == other).sum()), total + own.numel()
    return {"equal": equal, "of": total}


def in_bf16(tokenizer: ImageTokenizer) -> dict[str, float]:
    """What bfloat16 changes in held-out photographs: the share of equal tokens, and the PSNR of
    both ways.
    """
    exact, fast = (InferenceTokenizer.on(tokenizer, precision) for precision in ("float32", "bf16"))
    equal, total, values = 0, 0, {"float32": [], "bf16": []}
    for images in held_out(tokenizer):
        tokens = {}
        for inference in (exact, fast):
            tokens[inference.precision], reconstruction, _ = inference.roundtrip(images)
            values[inference.precision].append(float(psnr(reconstruction, images)))
        equal, total = (
            equal + int((tokens["float32"] == tokens["bf16"]).sum()),
            total + tokens["bf16"].numel(),
        )
    return {"equal": equal / total} | {
        f"psnr_{name}": sum(found) / len(found) for name, found in values.items()
    }


def held_out(tokenizer: ImageTokenizer) -> Iterator[Tensor]:
    files = [file for file in bundled_photographs() if file.name in HELD_OUT]
    for _, image in ImageReader(files, tokenizer.stride, Progress(), workers=0):
        yield image[None] / 127.5 - 1


if __name__ == "__main__":
    main(Path(sys.argv[1]))
