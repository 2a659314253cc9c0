"""Claims: a tokenizer with a discriminator trains in half an hour on 2 cores; its held-out PSNR
falls by at most half a dB after the adversarial term begins, though that term is felt; and its
images look nearer to the originals for it. Beside it: JPEG and WebP of as many bytes.

``python benchmarks/vqgan.py FOLDER`` trains ``recipes/photos-vqgan-small.toml`` on the bundled
photographs into FOLDER/photos-vqgan-small. An interrupted run resumes.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from machine import store
from training import trained

import smalto
from smalto.core.progress import Progress
from smalto.images.bundled import HELD_OUT, bundled_photographs
from smalto.images.image_reader import ImageReader
from smalto.images.tensors import to_unit_range
from smalto.tokenizer import ImageTokenizer
from smalto.training.recipe_file import load_recipe
from smalto.training.run_folder import read_jsonl

RECIPE = Path(__file__).parent.parent / "recipes" / "photos-vqgan-small.toml"


def main(folder: Path) -> None:
    run, recipe = folder / RECIPE.stem, load_recipe(RECIPE)
    trained(recipe, run)
    result = {
        "held_out": json.loads((run / "metrics.json").read_text()),
        "adversarial": adversarial(read_jsonl(run / "log.jsonl"), recipe.losses.adversarial.start),
    }
    result["whole_and_in_tiles"] = whole_and_in_tiles(smalto.load(run), recipe.data.size)
    print(json.dumps(result, indent=2))
    print("stored in", store("vqgan", result))


@torch.no_grad()
def whole_and_in_tiles(tokenizer: ImageTokenizer, side: int) -> dict[str, float]:
    """Return the PSNR of the held-out photographs decoded whole, and decoded in tiles of a training
    crop's size: nearly equal, because the network is local.
    """
    files = [file for file in bundled_photographs() if file.name in HELD_OUT]
    whole, tiled = [], []
    for _, original in ImageReader(files, side, Progress(), workers=0):
        image = to_unit_range(original)[None]
        tiles = (
            image.unfold(2, side, side)
            .unfold(3, side, side)
            .permute(0, 2, 3, 1, 4, 5)
            .reshape(-1, 3, side, side)
        )
        for found, images in ((whole, image), (tiled, tiles)):
            back = tokenizer.decode(tokenizer.encode(images), tokenizer.layout(*images.shape[2:]))
            found.append(10 * math.log10(4 / float((back - images).square().mean())))
    return {"whole": mean(whole), "tiles": mean(tiled)}


def adversarial(log: list[dict[str, Any]], start: int) -> dict[str, Any]:
    """What the adversarial term did: held-out crops before it began and after, and how much it was
    felt.
    """
    looks = [row for row in log if "held_out_psnr" in row]
    first = next(number for number, row in enumerate(looks) if row["step"] > start)
    # A look at 64 crops of three photographs goes up and down by a dB, before the start as after
    # it: means of five tell more.
    means = [
        mean(row["held_out_psnr"] for row in looks[max(0, end - 4) : end + 1])
        for end in range(len(looks))
    ]
    last_quarter = log[-(len(log) // 4) :]
    return {
        "starts_after_step": start,
        "psnr_before": looks[first - 1]["held_out_psnr"],
        "lowest_psnr_after": min(row["held_out_psnr"] for row in looks[first:]),
        "mean_of_five_before": means[first - 1],
        "lowest_mean_of_five_after": min(means[first:]),
        "last_psnr": looks[-1]["held_out_psnr"],
        "lite0_distance_before": looks[first - 1]["held_out_distance"],
        "last_lite0_distance": looks[-1]["held_out_distance"],
        "gradient_share_in_the_last_quarter": mean(
            row["adversarial_gradient"] for row in last_quarter
        ),
        "discriminator_loss_in_the_last_quarter": mean(
            row["discriminator_loss"] for row in last_quarter
        ),
        "usage": log[-1]["usage"],
        "steps": log[-1]["step"],
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
