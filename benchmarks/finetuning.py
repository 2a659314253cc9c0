"""Claim: on images of another kind, ten minutes of fine-tuning photos-f8 give at least 1 dB more
than ten minutes of training the same network from scratch.

``python benchmarks/finetuning.py FOLDER`` trains both on Twemoji into FOLDER, with the losses of
the recipe for fine-tuning, and measures held-out images. Interrupted trainings resume.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from machine import store
from training import trained

import smalto
from smalto.pretrained import finetuning_recipe
from smalto.training.recipe import change_recipe
from smalto.training.run_folder import read_jsonl
from smalto.training.tokenizer_recipe import TokenizerRecipe

NAME, SOURCE = "photos-f8", "emoji"
EMOJI = {  # images of 72 x 72 pixels
    "data.size": 64,
    "data.batch": 16,
    "data.longer_side": 72,
    "data.crops_per_image": 1,
    "data.flip": False,
}
LIKE_TUNED = {  # what must match in recipes/photos-f8.toml; learning rate and averages differ
    "precision": "float32",
    "losses.perceptual.start": 0,
    "losses.perceptual.ramp": 0,
    "data.color": 0.0,
}
RECIPES = Path(__file__).parent.parent / "recipes"
METRICS = ("psnr", "ssim", "lite0_distance", "num_images", "steps", "training_seconds")
PILOT_STEPS = 20


def main(folder: Path, minutes: float) -> None:
    tuned, from_scratch = folder / "tuned", folder / "from-scratch"
    recipe = smalto.load_recipe(finetuning_recipe(NAME), EMOJI)
    if tuned.is_dir():
        steps = smalto.load_recipe(tuned / "recipe.toml").steps
    else:
        steps = round(60 * minutes / seconds_of_a_step(recipe))
    recipe = change_recipe(recipe, {"steps": steps})
    scratch = smalto.load_recipe(RECIPES / f"{NAME}.toml", EMOJI | LIKE_TUNED | {"steps": steps})
    result: dict[str, Any] = {"minutes": minutes, "images": SOURCE}
    for name, run, chosen, start in (
        (f"from {NAME}", tuned, recipe, NAME),
        ("from scratch", from_scratch, scratch, None),
    ):
        trained(chosen, run, SOURCE, start)
        metrics = json.loads((run / "metrics.json").read_text())
        result[name] = {key: metrics[key] for key in METRICS}
        print(name, result[name], flush=True)
    result["gain"] = result[f"from {NAME}"]["psnr"] - result["from scratch"]["psnr"]
    print(f"{result['gain']:.2f} dB; stored in", store("finetuning", result))


def seconds_of_a_step(recipe: TokenizerRecipe) -> float:
    """Return the median seconds of a fine-tuning step; one from scratch takes as long."""
    with tempfile.TemporaryDirectory() as folder:
        short = change_recipe(recipe, {"steps": PILOT_STEPS, "evaluate.images": 1})
        run = smalto.train(SOURCE, short, out=Path(folder) / "run", start=NAME).run
        return median(row["seconds"] for row in read_jsonl(run.path / "times.jsonl"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=10)
    options = parser.parse_args()
    main(options.folder, options.minutes)
