"""Claims: a tokenizer with a norm over channels and shortcuts decodes whole photographs as well as
tiles of them, and better than one with group norm after as many steps on as many pixels.

``python benchmarks/local.py PHOTOS FOLDER`` trains each contender on PHOTOS/train (see
``make photos``) into FOLDER, one after another, and measures it on PHOTOS/validation. What is
trained already is only measured; an interrupted training resumes.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from machine import store
from training import trained

from smalto.core.progress import Progress
from smalto.features.lite0 import Lite0
from smalto.images.image_reader import ImageReader
from smalto.images.sources import open_source
from smalto.images.tensors import to_unit_range
from smalto.tokenizer import ImageTokenizer
from smalto.training.recipe import change_recipe
from smalto.training.recipe_file import load_recipe
from smalto.training.run_folder import read_log

RECIPE = Path(__file__).parent.parent / "recipes" / "photos-vqgan-small.toml"
SIDE = 64  # of the tiles that the whole is compared with: the crops of the recipe
RECONSTRUCTION = {"losses.perceptual.weight": 0.0, "losses.adversarial.weight": 0.0}
RMS = {"tokenizer.autoencoder.norm": "rms", "channels_last": True}
SHORTCUTS = {"tokenizer.autoencoder.shortcuts": True}
PATCH_2 = {"tokenizer.autoencoder.patch": 2, "tokenizer.autoencoder.ch_mult": [1, 2, 2]}
PATCH_4 = {"tokenizer.autoencoder.patch": 4, "tokenizer.autoencoder.ch_mult": [2, 2]}
CROPS_OF_128 = {"data.size": 128, "data.batch": 4}  # as many pixels a step
CONTENDERS: dict[str, dict[str, Any]] = {
    "group": {},
    "group-shortcuts": SHORTCUTS,
    "group-128": CROPS_OF_128,
    "rms": RMS,
    "rms-shortcuts": RMS | SHORTCUTS,
    "rms-shortcuts-128": RMS | SHORTCUTS | CROPS_OF_128,
    "rms-shortcuts-patch2": RMS | SHORTCUTS | PATCH_2,
    "rms-shortcuts-patch4": RMS | SHORTCUTS | PATCH_4,
}


def main(photos: Path, folder: Path, steps: int, names: list[str]) -> None:
    result = {}
    for name in names:
        recipe = load_recipe(RECIPE, {"steps": steps} | RECONSTRUCTION)
        recipe = change_recipe(recipe, CONTENDERS[name])
        tokenizer = trained(recipe, folder / name, str(photos / "train"))
        times = read_log(folder / name / "times.jsonl")
        result[name] = {
            "parameters": sum(weight.numel() for weight in tokenizer.parameters()),
            "receptive_field": tokenizer.receptive_field,
            "seconds_a_step": median(row["seconds"] for row in times),
            **measured(tokenizer, photos / "validation"),
        }
        print(name, result[name], flush=True)
    print("stored in", store("local", {"steps": steps, "contenders": result}))


@torch.no_grad()
def measured(tokenizer: ImageTokenizer, photos: Path) -> dict[str, float]:
    """PSNR of photographs decoded whole and in tiles of a crop's size, and their lite0 distance."""
    features, fast = Lite0(), tokenizer.for_inference()
    whole, tiled, distances = [], [], []
    for _, original in ImageReader(open_source(photos).files, SIDE, Progress(), workers=0):
        image = to_unit_range(original)[None]
        tiles = image.unfold(2, SIDE, SIDE).unfold(3, SIDE, SIDE)
        tiles = tiles.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, SIDE, SIDE)
        for found, images in ((whole, image), (tiled, tiles)):
            back = fast.decode(fast.encode(images), fast.layout(*images.shape[2:]))
            found.append(10 * math.log10(4 / float((back - images).square().mean())))
            if images is image:
                distances.append(float(features.distance(back, image).mean()))
    return {
        "images": len(whole),
        "psnr_whole": mean(whole),
        "psnr_in_tiles": mean(tiled),
        "lite0_distance": mean(distances),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    options = parser.parse_args()
    main(options.photos, options.folder, options.steps, options.only)
