"""Claims: the generator `emoji` predicts held-out emoji better than the histogram of each position,
and its samples look like emoji of the group that was asked for.

``python benchmarks/emoji.py RUN`` measures the run of recipes/emoji-generator.toml (``make emoji``
trains it). ``--install`` writes it in bfloat16 to src/smalto/pretrained/emoji, with its model card,
and draws docs/emoji.webp (samples) and docs/emoji-nearest.webp (samples beside the training images
that are most like them). ``--round TOKENIZER`` only writes the tokenizer TOKENIZER to RUN with its
weights rounded to bfloat16, so that the generator is trained on the tokens of the one that ships.

Images are compared in the features of EfficientNet-lite0. A sample's nearest group is that of the
nearest mean of training images, by cosine similarity.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from machine import store
from PIL import Image
from pretrained import PACKAGE, rounded
from torch import Tensor

import smalto
from smalto.core.model_files import write_model
from smalto.features.lite0 import Lite0
from smalto.generator import Generator
from smalto.images.contact_sheet import contact_sheet
from smalto.images.emoji import CREDIT, SOURCE, emoji
from smalto.images.reading import read_image
from smalto.images.tensors import to_tensor, to_uint8, to_unit_range
from smalto.metrics.frechet import FeatureMoments, Gaussian, frechet_distance
from smalto.pretrained import CARD_FILE, TOKENIZER_FOLDER

NAME = "emoji"
DOCS = Path(__file__).parent.parent / "docs"
PER_GROUP = 40  # samples
GUIDANCES = (0.0, 1.5, 3.0, 6.0)
SHOWN = 3.0  # guidance of the images in the documentation
NEAREST = 3


def main(run: Path, install_it: bool) -> None:
    generator = smalto.load_generator(run)
    generator.transformer.bfloat16().float()  # as it ships
    names = generator.config.class_names
    training, held_out = emoji_images()
    network = Lite0()
    features = {name: pooled(network, images) for name, images in training.items()}
    others = pooled(network, torch.cat(list(held_out.values())))
    everything = torch.cat(list(features.values()))
    means = torch.stack([F.normalize(features[name], dim=1).mean(dim=0) for name in names])
    metrics = json.loads((run / "metrics.json").read_text())
    del metrics["source"]  # a path of this machine
    result: dict[str, Any] = {
        "run": metrics,
        "tokenizer": tokenizer_metrics(run),
        "groups": len(names),
        "num_training": len(everything),
        "num_held_out": len(others),
        "fid_of_training": fid(everything, others),
        "accuracy_of_held_out": accuracy(
            {
                number: pooled(network, held_out[name])
                for number, name in enumerate(names)
                if name in held_out
            },
            means,
        ),
        "samples_per_group": PER_GROUP,
        "guidance": {},
        "seconds_for_16": seconds_for_16(generator),
    }
    for guidance in GUIDANCES:
        samples = [
            generator.generate(number, num_images=PER_GROUP, guidance=guidance, seeds=seeds(number))
            for number in range(len(names))
        ]
        own = [pooled(network, sample.images) for sample in samples]
        all_of_them = torch.cat(own)
        similarity = F.normalize(all_of_them, dim=1) @ F.normalize(everything, dim=1).T
        result["guidance"][f"{guidance:g}"] = {
            "accuracy": accuracy(dict(enumerate(own)), means),
            "fid": fid(all_of_them, others),
            "similarity_to_nearest_training_image": float(similarity.max(dim=1).values.median()),
        }
        print(guidance, result["guidance"][f"{guidance:g}"], flush=True)
        if guidance == SHOWN and install_it:
            draw(names, [s.images for s in samples], similarity, training)
    similarity = F.normalize(others, dim=1) @ F.normalize(everything, dim=1).T
    result["similarity_of_held_out"] = float(similarity.max(dim=1).values.median())
    print(json.dumps({k: v for k, v in result.items() if k != "run"}, indent=2))
    if install_it:
        install(generator, result)
        print("stored in", store("emoji", result))


def emoji_images() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the training images and the held-out images of each group, [N, 3, 72, 72]."""
    files, held_out = emoji()
    chosen = set(held_out)
    sides: tuple[dict[str, list[Tensor]], ...] = (defaultdict(list), defaultdict(list))
    for file in files:
        image = to_unit_range(to_tensor(read_image(file)))
        sides[file.name in chosen][file.label].append(image)
    training, others = ({k: torch.stack(v) for k, v in side.items()} for side in sides)
    return training, others


def pooled(network: Lite0, images: Tensor) -> Tensor:
    """Return the features of images, [N, D]."""
    with torch.no_grad():
        return torch.cat([network.pooled(part) for part in images.split(64)])


def fid(a: Tensor, b: Tensor) -> float:
    """Return the Fréchet distance of two sets of features."""
    return frechet_distance(gaussian(a), gaussian(b))


def gaussian(features: Tensor) -> Gaussian:
    moments = FeatureMoments(features.shape[1])
    moments.add(features)
    return moments.gaussian()


def accuracy(features: dict[int, Tensor], means: Tensor) -> float:
    """Return the mean over groups of the share of images whose nearest group is their own.

    Args:
        features: of the images of each group, by its number.
        means: of the features of all groups.
    """
    shares = [
        float(((F.normalize(own, dim=1) @ means.T).argmax(dim=1) == number).float().mean())
        for number, own in features.items()
    ]
    return sum(shares) / len(shares)


def seeds(number: int) -> list[int]:
    """Return the seeds of a group's samples."""
    return list(range(number * 2**32, number * 2**32 + PER_GROUP))


def seconds_for_16(generator: Generator) -> float:
    """Return the median seconds to make 16 images, as ``smalto generate`` does."""
    times = []
    for _ in range(4):
        begin = time.perf_counter()
        generator.generate(0, num_images=16)
        times.append(time.perf_counter() - begin)
    return median(times[1:])


def tokenizer_metrics(run: Path) -> dict[str, float]:
    """Return how well the generator's tokenizer restores all emoji."""
    found = smalto.evaluate(SOURCE, run, size=72).metrics
    assert found.psnr is not None
    assert found.lite0_distance is not None
    return {
        "psnr": float(found.psnr),
        "lite0_distance": float(found.lite0_distance),
        "num_images": found.num_images,
        "bits_per_pixel": found.bits_per_pixel,
    }


def draw(
    names: tuple[str, ...], samples: list[Tensor], similarity: Tensor, training: dict[str, Tensor]
) -> None:
    """Draw the contact sheet, and samples beside the training images most like them."""
    rows = [to_uint8(image) for images in samples for image in images[:12]]
    save(contact_sheet(rows, columns=12), DOCS / "emoji.webp")
    known = torch.cat(list(training.values()))
    beside = []
    for number in range(len(names)):
        for index in range(2):
            beside.append(to_uint8(samples[number][index]))
            closest = similarity[number * PER_GROUP + index].topk(NEAREST).indices
            beside += list(to_uint8(known[closest]))
    save(contact_sheet(beside, columns=2 * (NEAREST + 1)), DOCS / "emoji-nearest.webp")


def save(sheet: Tensor, path: Path) -> None:
    Image.fromarray(sheet.permute(1, 2, 0).numpy()).save(path, quality=85)
    print(path, path.stat().st_size, "bytes")


def install(generator: Generator, result: dict[str, Any]) -> None:
    """Write weights and model card to the package."""
    folder = PACKAGE / NAME
    (folder / TOKENIZER_FOLDER).mkdir(parents=True, exist_ok=True)
    for place, config, module in (
        (folder, generator.config, generator.transformer),
        (folder / TOKENIZER_FOLDER, generator.tokenizer.config, generator.tokenizer),
    ):
        write_model(place, config, {k: w.bfloat16() for k, w in module.state_dict().items()})
    (folder / CARD_FILE).write_text(model_card(generator, result, folder), encoding="utf-8")


def model_card(generator: Generator, result: dict[str, Any], folder: Path) -> str:
    """Return the model card: Markdown whose first paragraph `smalto info` lists."""
    run, tokenizer = result["run"], result["tokenizer"]
    size = sum(path.stat().st_size for path in folder.rglob("*.safetensors")) / 1e6
    parameters = sum(p.numel() for p in generator.transformer.parameters()) / 1e6
    rows = "\n".join(
        f"| {guidance} | {row['accuracy']:.1%} | {row['fid']:.1f} | "
        f"{row['similarity_to_nearest_training_image']:.3f} |"
        for guidance, row in result["guidance"].items()
    )
    layout = generator.config.layout
    return f"""# {NAME}

A generator of emoji in {result["groups"]} groups, 72 x 72 pixels, and its multi-scale tokenizer; \
{parameters:.1f} million parameters, {size:.1f} MB together. Make some with \
`smalto generate {NAME} --label animals`.

## Metrics

- Cross-entropy on {run["held_out"]["num_rows"]} held-out rows: {run["held_out"]["loss"]:.3f} nats \
per token, {run["below_histogram"]:.1%} below the histogram of each position \
({run["histogram"]["loss"]:.3f}); a uniform guess has {run["uniform"]:.3f}. On training rows it is \
{run["training"]["loss"]:.3f}.
- Accuracy: {run["held_out"]["accuracy"]:.1%} of held-out tokens are the likeliest.
- The tokenizer restores all {tokenizer["num_images"]:,} emoji, held-out ones included, with \
{tokenizer["psnr"]:.2f} dB at {tokenizer["bits_per_pixel"]:.3f} bits per pixel \
({layout.num_tokens} tokens of {generator.config.codebook_size:,} codes).

Samples, {result["samples_per_group"]} per group, by guidance. "Own group" is the share of samples \
whose nearest mean of a group, in the features of EfficientNet-lite0, is that of their label; \
chance is {1 / result["groups"]:.1%}, and held-out emoji have \
{result["accuracy_of_held_out"]:.1%}. The distances are lite0-FID to the \
{result["num_held_out"]} held-out emoji, which the {result["num_training"]:,} training emoji have \
at {result["fid_of_training"]:.1f}; with so few images they compare only with each other.

| guidance | own group | lite0-FID | similarity to the nearest training image |
|---|---|---|---|
{rows}

The last column is a median of cosine similarities; held-out emoji have \
{result["similarity_of_held_out"]:.3f}, because many emoji are alike. Samples are farther from the \
training images: most do not repeat one as a whole, and they are less clean. The cross-entropy on \
training rows, far below that on held-out rows, shows that the generator has memorized parts.

## Training

`make emoji` trains tokenizer and generator with `recipes/emoji-tokenizer.toml` and \
`recipes/emoji-generator.toml`, and measures. The perceptual loss of the tokenizer uses \
EfficientNet-lite0, which was trained on ImageNet.

## Authors and licenses

The images are {CREDIT}: https://creativecommons.org/licenses/by/4.0/. The weights, and images \
made with them, derive from that art: credit it. The weights are published under CC BY 4.0.

## Limits

It has seen {result["num_training"]:,} small drawings, and it repeats parts of them. It is a \
demonstration of the whole way from images to new images, not a source of original art.
"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--install", action="store_true")
    parser.add_argument("--round", metavar="TOKENIZER")
    options = parser.parse_args()
    if options.round:
        rounded(smalto.load(options.round)).save(options.run)
    else:
        main(options.run, options.install)
