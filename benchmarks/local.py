"""Claims: a tokenizer with a norm over channels and shortcuts decodes whole photographs as well as
tiles of them, and better than one with group norm after as many steps on as many pixels. All have
as many parameters within 10 %.

``python benchmarks/local.py PHOTOS FOLDER`` trains each contender on PHOTOS/train (see
``make photos``) into FOLDER, one after another, and measures it on PHOTOS/validation. What is
trained already is only measured; an interrupted training resumes.
"""

from __future__ import annotations

import argparse
import math
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import mean, median
from typing import Any
from unittest.mock import patch

import torch
from machine import store
from torch import nn
from training import group_norm_recipe, trained

from smalto.autoencoders.cnn import CNNAutoencoderConfig
from smalto.core.progress import Progress
from smalto.features.lite0 import Lite0
from smalto.images.image_reader import ImageReader
from smalto.images.sources import open_source
from smalto.images.tensors import to_unit_range
from smalto.inference.inference_tokenizer import InferenceTokenizer
from smalto.tokenizer import ImageTokenizer
from smalto.training.recipe import change_recipe
from smalto.training.run_folder import read_log

SIDE = 64  # of the tiles that the whole is compared with: the crops of the recipe
IMAGES = 16  # of the validation split
RECONSTRUCTION = {
    "losses.perceptual.weight": 0.0,
    "losses.adversarial.weight": 0.0,
    "evaluate.images": 1,
}
RMS = {"tokenizer.autoencoder.norm": "rms", "channels_last": True}
SHORTCUTS = {"tokenizer.autoencoder.shortcuts": True}
PATCH_2 = {"tokenizer.autoencoder.patch": 2, "tokenizer.autoencoder.ch_mult": [1, 2, 2]}
PATCH_4 = {
    "tokenizer.autoencoder.patch": 4,
    "tokenizer.autoencoder.ch": 136,
    "tokenizer.autoencoder.ch_mult": [1, 1],
}
CROPS_OF_128 = {"data.size": 128, "data.batch": 4}  # as many pixels a step
CONTENDERS: dict[str, dict[str, Any]] = {
    "group": {},
    "group-shortcuts": SHORTCUTS,
    "group-128": CROPS_OF_128,
    "rms": RMS,
    "rms-shortcuts": RMS | SHORTCUTS,
    "none": RMS,
    "none-shortcuts": RMS | SHORTCUTS,
    "rms-shortcuts-patch2": RMS | SHORTCUTS | PATCH_2,
    "rms-shortcuts-patch2-128": RMS | SHORTCUTS | PATCH_2 | CROPS_OF_128,
    "rms-shortcuts-patch4": RMS | SHORTCUTS | PATCH_4,
}


def main(photos: Path, folder: Path, steps: int, names: list[str]) -> None:
    result = {}
    for name in names:
        recipe = group_norm_recipe({"steps": steps} | RECONSTRUCTION)
        recipe = change_recipe(recipe, CONTENDERS[name])
        with without_norm() if name.startswith("none") else nullcontext():
            tokenizer = trained(recipe, folder / name, str(photos / "train"))
            times = read_log(folder / name / "times.jsonl")
            result[name] = {
                "parameters": sum(weight.numel() for weight in tokenizer.parameters()),
                "receptive_field": tokenizer.receptive_field,
                "seconds_a_step": median(row["seconds"] for row in times),
                **measured(tokenizer, photos / "validation"),
            }
            if name == "group":
                result[name]["with local_statistics"] = measured(
                    with_local_statistics(tokenizer), photos / "validation"
                )
        print(name, result[name], flush=True)
    if set(names) == set(CONTENDERS):
        print("stored in", store("local", {"steps": steps, "contenders": result}))
    sizes = [row["parameters"] for row in result.values()]
    assert max(sizes) <= 1.1 * min(sizes), sizes


def without_norm() -> AbstractContextManager[Any]:
    """Leave out every norm of the autoencoders that are built inside this context."""
    return patch.object(CNNAutoencoderConfig, "norm_of", lambda *_: lambda width: nn.Identity())


def with_local_statistics(tokenizer: ImageTokenizer) -> ImageTokenizer:
    """Return a tokenizer with the same weights whose GroupNorm computes statistics over windows
    of a crop's size.
    """
    autoencoder = tokenizer.config.autoencoder
    local = autoencoder.model_copy(update={"local_statistics": SIDE // tokenizer.stride})
    other = tokenizer.config.model_copy(update={"autoencoder": local}).build()
    other.load_state_dict(tokenizer.state_dict())
    return other.eval()


@torch.no_grad()
def measured(tokenizer: ImageTokenizer, photos: Path) -> dict[str, float]:
    """Return means over photographs, in float32: PSNR whole and in tiles of a crop's size; of the
    whole ones, the lite0 distance and how many are encoded and decoded per second.
    """
    features = Lite0()
    fast = InferenceTokenizer.on(tokenizer, "float32")
    fast.roundtrip(torch.zeros(1, 3, 512, 512))  # the first call is slower
    seconds = 0.0
    whole: list[float] = []
    tiled: list[float] = []
    distances: list[float] = []
    files = open_source(photos).files[:IMAGES]
    for _, original in ImageReader(files, SIDE, Progress(), workers=0):
        image = to_unit_range(original)[None]
        tiles = image.unfold(2, SIDE, SIDE).unfold(3, SIDE, SIDE)
        tiles = tiles.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, SIDE, SIDE)
        for found, images in ((whole, image), (tiled, tiles)):
            _, back, took = fast.roundtrip(images)
            found.append(10 * math.log10(4 / float((back - images).square().mean())))
            if images is image:
                seconds += took
                distances.append(float(features.distance(back, image).mean()))
    return {
        "images": len(whole),
        "psnr_whole": mean(whole),
        "psnr_in_tiles": mean(tiled),
        "lite0_distance": mean(distances),
        "images_per_second": len(whole) / seconds,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    options = parser.parse_args()
    main(options.photos, options.folder, options.steps, options.only)
