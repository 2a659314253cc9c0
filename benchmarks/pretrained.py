"""Claims: how good the tokenizers of smalto.pretrained are, beside JPEG and WebP of as many bytes.

``python benchmarks/pretrained.py RUN PHOTOS`` measures a run on PHOTOS/validation (see ``make
photos``). ``--install NAME`` measures it on PHOTOS/test instead, and writes the weights in bfloat16
and the model card to src/smalto/pretrained/NAME.

The bytes of an image are those of an ideal entropy coder with a static table: how often each code
occurs in PHOTOS/train.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from machine import store
from torch import Tensor

import smalto
from smalto.core.progress import Progress
from smalto.evaluation.codecs import CODECS, compress_to_size
from smalto.evaluation.evaluator import compare
from smalto.evaluation.feature_networks import FeatureNetworks
from smalto.images.image_reader import ImageReader
from smalto.images.sources import open_source
from smalto.images.tensors import to_uint8, to_unit_range
from smalto.inference.inference_tokenizer import InferenceTokenizer
from smalto.tokenizer import ImageTokenizer
from smalto.tokenizer.saving import write_tokenizer
from smalto.training.recipe_file import load_recipe

HERE = Path(__file__).parent
PACKAGE = HERE.parent / "src" / "smalto" / "pretrained"
OLD_RECIPE = HERE.parent / "recipes" / "photos-vqgan-small.toml"
SPEED_IMAGES = 8


def main(run: Path, photos: Path, name: str | None) -> None:
    tokenizer = rounded(smalto.load(run))
    split = "test" if name else "validation"
    counts = code_counts(tokenizer, photos / "train")
    result = {
        "split": split,
        "codebook_size": tokenizer.quantize.codebook_size,
        "parameters": sum(weight.numel() for weight in tokenizer.parameters()),
        "used_on_training_images": float((counts > 0).double().mean()),
        **measured(tokenizer, photos / split, counts),
        "speed": speeds(tokenizer, photos / split),
    }
    print(json.dumps(result, indent=2))
    if name:
        write_tokenizer(
            PACKAGE / name,
            tokenizer.config,
            {key: weight.bfloat16() for key, weight in tokenizer.state_dict().items()},
        )
        print("stored in", store(f"pretrained-{name}", result))


def rounded(tokenizer: ImageTokenizer) -> ImageTokenizer:
    """Return the tokenizer with its weights as bfloat16 stores them."""
    return tokenizer.bfloat16().float()


def images_of(folder: Path, stride: int) -> Iterator[Tensor]:
    """Yield each image [1, 3, H, W] of a folder, its longer side at most 768 pixels."""
    for _, image in ImageReader(open_source(folder).files, stride, Progress(), workers=0):
        yield to_unit_range(image)[None]


def code_counts(tokenizer: ImageTokenizer, folder: Path) -> Tensor:
    """Return how often each code occurs in the images of a folder."""
    fast = InferenceTokenizer.on(tokenizer, "float32")
    size = tokenizer.quantize.codebook_size
    return sum(
        (
            torch.bincount(fast.encode(image).flatten(), minlength=size)
            for image in images_of(folder, tokenizer.stride)
        ),
        torch.zeros(size, dtype=torch.int64),
    )


def measured(tokenizer: ImageTokenizer, folder: Path, counts: Tensor) -> dict[str, Any]:
    """Return the means over the images of a folder, of tokens and of codecs of as many bytes."""
    table = (counts + 1).double()
    bits_of_code = -(table / table.sum()).log2()
    networks = FeatureNetworks.open(torch.device("cpu"))
    fast = InferenceTokenizer.on(tokenizer, "float32")
    rows: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for image in images_of(folder, tokenizer.stride):
        tokens, back, _ = fast.roundtrip(image)
        pixels = image.shape[2] * image.shape[3]
        size = math.ceil(float(bits_of_code[tokens].sum()) / 8)
        rows["tokens"]["bits_per_pixel"].append(tokens.numel() * math.log2(len(counts)) / pixels)
        add(rows["tokens"], compare(back, image, networks), 8 * size / pixels)
        for codec in CODECS:
            compressed = compress_to_size(to_uint8(image[0]), codec, size)
            assert compressed is not None
            decoded = to_unit_range(compressed.image)[None]
            add(rows[codec], compare(decoded, image, networks), 8 * compressed.size / pixels)
    return {
        "images": len(rows["tokens"]["psnr"]),
        **{kind: {key: mean(values) for key, values in row.items()} for kind, row in rows.items()},
    }


def add(row: dict[str, list[float]], metrics: dict[str, list[float]], bits: float) -> None:
    row["coded_bits_per_pixel"].append(bits)
    for name, values in metrics.items():
        row[name] += values


def speeds(tokenizer: ImageTokenizer, folder: Path) -> dict[str, float]:
    """Return the images per second, encoded and decoded in float32, and those of the network that
    recipes/photos-vqgan-small.toml had before.
    """
    old = load_recipe(OLD_RECIPE).tokenizer
    images = [image for _, image in zip(range(SPEED_IMAGES), images_of(folder, 8), strict=False)]
    found = {}
    for name, model in (("this", tokenizer), ("photos-vqgan-small", old.build().eval())):
        fast = InferenceTokenizer.on(model, "float32")
        fast.roundtrip(images[0])
        found[name] = len(images) / sum(fast.roundtrip(image)[2] for image in images)
    return found | {"ratio": found["this"] / found["photos-vqgan-small"]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--install", metavar="NAME")
    options = parser.parse_args()
    main(options.run, options.photos, options.install)
