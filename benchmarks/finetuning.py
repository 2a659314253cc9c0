"""Claim: on a small folder of images of another kind, ten minutes of fine-tuning photos-f8 give a
higher PSNR and a lower lite0 distance than ten minutes of training the same network from scratch.

``python benchmarks/finetuning.py FOLDER`` trains both on the 153 animals of Twemoji into FOLDER,
with the losses of the recipe for fine-tuning, and measures held-out images. Interrupted trainings
resume. ``--all`` takes all 4,009 emoji, ``--images SOURCE`` images of your own; the textures of the
stored result are ``usr/share/games/colobot/textures`` of Debian's ``colobot-common-textures``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from machine import store
from training import trained

import smalto
from smalto.images.sources import open_source
from smalto.pretrained import finetuning_recipe
from smalto.training.recipe import change_recipe
from smalto.training.run_folder import read_jsonl
from smalto.training.tokenizer_recipe import TokenizerRecipe

NAME = "photos-f8"
GROUP = "animals-nature"
EMOJI = {  # images of 72 x 72 pixels
    "data.size": 64,
    "data.batch": 16,
    "data.longer_side": 72,
    "data.crops_per_image": 1,
    "data.flip": False,
}
LIKE_TUNED = {  # what must match in recipes/photos-f8.toml
    "precision": "float32",
    "losses.perceptual.start": 0,
    "losses.perceptual.ramp": 0,
    "data.color": 0.0,
}
RECIPES = Path(__file__).parent.parent / "recipes"
METRICS = ("psnr", "ssim", "lite0_distance", "num_images", "steps", "training_seconds")
PILOT_STEPS = 20


def main(
    folder: Path, minutes: float, source: str, data: dict[str, Any], name_of_result: str
) -> None:
    tuned, from_scratch = folder / "tuned", folder / "from-scratch"
    recipe = smalto.load_recipe(finetuning_recipe(NAME), data)
    if tuned.is_dir():
        steps = smalto.load_recipe(tuned / "recipe.toml").steps
    else:
        steps = round(60 * minutes / seconds_of_a_step(recipe, source))
    recipe = change_recipe(recipe, {"steps": steps})
    scratch = smalto.load_recipe(RECIPES / f"{NAME}.toml", data | LIKE_TUNED | {"steps": steps})
    result: dict[str, Any] = {"minutes": minutes, "images": Path(source).name}
    for name, run, chosen, start in (
        (f"from {NAME}", tuned, recipe, NAME),
        ("from scratch", from_scratch, scratch, None),
    ):
        trained(chosen, run, source, start)
        metrics = json.loads((run / "metrics.json").read_text())
        result[name] = {key: metrics[key] for key in METRICS}
        print(name, result[name], flush=True)
    result["gain"] = result[f"from {NAME}"]["psnr"] - result["from scratch"]["psnr"]
    print(f"{result['gain']:.2f} dB; stored in", store(name_of_result, result))


def seconds_of_a_step(recipe: TokenizerRecipe, source: str) -> float:
    """Return the median seconds of a fine-tuning step; one from scratch takes as long."""
    with tempfile.TemporaryDirectory() as folder:
        short = change_recipe(recipe, {"steps": PILOT_STEPS, "evaluate.images": 1})
        run = smalto.train(source, short, out=Path(folder) / "run", start=NAME).run
        return median(row["seconds"] for row in read_jsonl(run.path / "times.jsonl"))


def write_group(folder: Path) -> str:
    """Write the emoji of one group to a folder; return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in open_source("emoji").files:
        if file.label == GROUP:
            shutil.copy(file.path, folder)
    return str(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=10)
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--all", action="store_true", help="all emoji")
    chosen.add_argument("--images", help="a folder of images, in crops of the recipe's size")
    options = parser.parse_args()
    if options.images:
        name = f"finetuning-{Path(options.images).name}"
        main(options.folder, options.minutes, options.images, {}, name)
    else:
        images = "emoji" if options.all else write_group(options.folder / GROUP)
        main(options.folder, options.minutes, images, EMOJI, "finetuning")
