"""Claims: how good the tokenizers of smalto.pretrained are, beside JPEG and WebP of as many bytes.

``python benchmarks/pretrained.py RUN PHOTOS`` measures a run on PHOTOS/validation (see ``make
photos``). ``--install NAME`` measures it on PHOTOS/test instead, and writes the weights in
bfloat16, the model card and the authors of the training images to src/smalto/pretrained/NAME.

The bytes of an image are those of an ideal entropy coder with a static table: how often each code
occurs in PHOTOS/train.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from machine import store
from torch import Tensor
from training import group_norm_recipe

import smalto
from smalto.core.model_files import write_model
from smalto.core.progress import Progress
from smalto.evaluation.codecs import CODECS, compress_to_size
from smalto.evaluation.evaluator import compare
from smalto.evaluation.feature_networks import FeatureNetworks
from smalto.images.image_reader import ImageReader
from smalto.images.sources import open_source
from smalto.images.tensors import to_uint8, to_unit_range
from smalto.inference.inference_tokenizer import InferenceTokenizer
from smalto.pretrained import CARD_FILE, RECIPE_FILE
from smalto.quantizers.codebook import EMACodebook
from smalto.tokenizer import ImageTokenizer

HERE = Path(__file__).parent
PACKAGE = HERE.parent / "src" / "smalto" / "pretrained"
SPEED_IMAGES = 8
MIN_PHOTOS = 340  # of the training split; fewer if a package could not be fetched
KINDS = (("tokens", "tokens"), ("JPEG", "JPEG"), ("WebP", "WEBP"))


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
        install(tokenizer, photos, name, result)
        print("stored in", store(f"pretrained-{name}", result))


def install(tokenizer: ImageTokenizer, photos: Path, name: str, result: dict[str, Any]) -> None:
    """Write weights, model card and authors to the package."""
    folder = PACKAGE / name
    folder.mkdir(parents=True, exist_ok=True)
    weights = {key: weight.bfloat16() for key, weight in tokenizer.state_dict().items()}
    write_model(folder, tokenizer.config, weights)
    head, *rows = (photos / "ATTRIBUTION.tsv").read_text(encoding="utf-8").splitlines()
    rows = [row for row in rows if row.startswith("train/")]
    (folder / "attribution.tsv").write_text("\n".join([head, *rows, ""]), encoding="utf-8")
    if len(rows) < MIN_PHOTOS:
        raise SystemExit(f"{photos}: got {len(rows)} photographs; expected {MIN_PHOTOS} or more.")
    if not (folder / RECIPE_FILE).is_file():
        raise SystemExit(f"{folder} lacks {RECIPE_FILE}, the recipe for fine-tuning.")
    licenses = Counter(row.split("\t")[-1] for row in rows)
    text = model_card(name, tokenizer, result, licenses)
    (folder / CARD_FILE).write_text(text, encoding="utf-8")


def model_card(
    name: str, tokenizer: ImageTokenizer, result: dict[str, Any], licenses: Counter[str]
) -> str:
    """Return the model card: Markdown whose first paragraph `smalto info` lists."""
    size = result["codebook_size"]
    stride = tokenizer.stride
    rows = [card_row(label, result[kind]) for label, kind in KINDS]
    megabytes = (PACKAGE / name / "model.safetensors").stat().st_size / 1e6
    counts = ", ".join(f"{number} {license}" for license, number in licenses.most_common())
    return f"""# {name}

One token of {size:,} for {stride} x {stride} pixels, for photographs of any size; \
{result["parameters"] / 1e6:.1f} million parameters, {megabytes:.1f} MB.

## Metrics

{result["images"]} photographs of the test split, which neither the training nor any choice has \
seen. They are measured whole, with a longer side of at most 768 pixels. JPEG and WebP files \
(Pillow) have at most as many bytes, headers included, or the lowest quality if none is so small \
({result["JPEG"]["too_large"]} JPEG and {result["WEBP"]["too_large"]} WebP files). The tokens have \
no header.

| | coded bits per pixel | PSNR | SSIM | MS-SSIM | lite0 distance |
|---|---|---|---|---|---|
{chr(10).join(rows)}

- Coded bits assume an ideal entropy coder with a static table of code frequencies, counted on the \
training split. A plain index takes {math.log2(size):g} bits, \
{result["tokens"]["bits_per_pixel"]:.3f} bits per pixel.
- The lite0 distance was also a training loss. This favors the tokens in its column.
- The photographs of the training split use {result["used_on_training_images"]:.1%} of the codes.
- The tokenizer is local: a token depends on {tokenizer.receptive_field} x \
{tokenizer.receptive_field} pixels. Large images are encoded and decoded in tiles, with the same \
tokens up to rounding.

## Training

`make {name}` fetches the photographs, trains with `recipes/{name}.toml` and measures. It needs a \
Debian-based system. The perceptual loss uses EfficientNet-lite0, which was trained on ImageNet.

## Authors and licenses

The {licenses.total()} photographs of the training split (a tenth of them held out to monitor the \
training) come from Debian packages: {counts}. The file \
`attribution.tsv` beside this card names package, author and license of each. The photographs keep \
their licenses. The weights are published under Apache-2.0, like the code.

## Limits

It was trained on few photographs, on two processor cores. Faces, small print and line drawings \
have not been measured. Measure your own images with `smalto evaluate MY_FOLDER --tokenizer \
{name}`, and fine-tune with `smalto train MY_FOLDER --from {name}`.
"""


def card_row(label: str, means: dict[str, float]) -> str:
    """Return one row of a model card's table."""
    cells = (
        f"{means['coded_bits_per_pixel']:.3f}",
        f"{means['psnr']:.2f} dB",
        f"{means['ssim']:.4f}",
        f"{means['ms_ssim']:.4f}",
        f"{means['lite0_distance']:.4f}",
    )
    return f"| {label} | {' | '.join(cells)} |"


def rounded(tokenizer: ImageTokenizer) -> ImageTokenizer:
    """Return the tokenizer with its weights as bfloat16 stores them.

    The moving averages of the codes start again from the codes: in bfloat16 sums and counts would
    no longer give them.
    """
    tokenizer = tokenizer.bfloat16().float()
    for codes in tokenizer.modules():
        if isinstance(codes, EMACodebook):
            codes.place(torch.arange(len(codes.weight)), codes.weight.clone())
    return tokenizer


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
    too_large: Counter[str] = Counter()
    for image in images_of(folder, tokenizer.stride):
        tokens, back, _ = fast.roundtrip(image)
        pixels = image.shape[2] * image.shape[3]
        size = math.ceil(float(bits_of_code[tokens].sum()) / 8)
        rows["tokens"]["bits_per_pixel"].append(tokens.numel() * math.log2(len(counts)) / pixels)
        add(rows["tokens"], compare(back, image, networks), 8 * size / pixels)
        for codec in CODECS:
            compressed = compress_to_size(to_uint8(image[0]), codec, size)
            assert compressed is not None
            too_large[codec] += compressed.size > size
            decoded = to_unit_range(compressed.image)[None]
            add(rows[codec], compare(decoded, image, networks), 8 * compressed.size / pixels)
    means: dict[str, Any] = {
        kind: {key: mean(values) for key, values in row.items()} for kind, row in rows.items()
    }
    for codec in CODECS:
        means[codec]["too_large"] = too_large[codec]
    return {"images": len(rows["tokens"]["psnr"]), **means}


def add(row: dict[str, list[float]], metrics: dict[str, list[float]], bits: float) -> None:
    """Append the values of one image to those of the others."""
    row["coded_bits_per_pixel"].append(bits)
    for name, values in metrics.items():
        row[name] += values


def speeds(tokenizer: ImageTokenizer, folder: Path) -> dict[str, float]:
    """Return the images per second, encoded and decoded in float32, and those of a small
    VQGAN network with GroupNorm.
    """
    peer = group_norm_recipe().tokenizer.build().eval()
    images = list(itertools.islice(images_of(folder, peer.stride), SPEED_IMAGES))
    found = {}
    for name, model in (("this", tokenizer), ("group norm", peer)):
        fast = InferenceTokenizer.on(model, "float32")
        fast.roundtrip(images[0])
        found[name] = len(images) / sum(fast.roundtrip(image)[2] for image in images)
    return found | {"ratio": found["this"] / found["group norm"]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--install", metavar="NAME")
    options = parser.parse_args()
    main(options.run, options.photos, options.install)
