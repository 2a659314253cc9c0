"""Make docs/vqgan.webp from a finished run of recipes/photos-vqgan-small.toml: python
docs/make_vqgan.py RUN
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import smalto
from smalto.core.progress import Progress
from smalto.evaluation.codecs import CODECS, compress_to_size
from smalto.images.bundled import HELD_OUT, bundled_photographs
from smalto.images.image_reader import ImageReader
from smalto.images.tensors import to_uint8, to_unit_range
from smalto.inference.inference_tokenizer import InferenceTokenizer

HEIGHT, GAP, MARGIN = 300, 6, 66


def main(run: Path) -> None:
    inference = InferenceTokenizer.on(smalto.load(run), "float32")
    files = [file for file in bundled_photographs() if file.name in HELD_OUT]
    rows: dict[str, list[Tensor]] = {name: [] for name in ("original", "tokens", *CODECS)}
    for _, original in ImageReader(files, inference.tokenizer.stride, Progress(), workers=0):
        tokens, back, _ = inference.roundtrip(to_unit_range(original)[None])
        size = tokens.numel() * math.log2(inference.tokenizer.quantize.codebook_size) / 8
        rows["original"].append(original)
        rows["tokens"].append(to_uint8(back[0]))
        for codec in CODECS:
            rows[codec].append(compress_to_size(original, codec, size).image)
    images = {name: [scaled(pixels) for pixels in row] for name, row in rows.items()}
    width = MARGIN + sum(image.width + GAP for image in images["original"])
    sheet = Image.new("RGB", (width, (HEIGHT + GAP) * len(rows)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=15)
    for number, (name, row) in enumerate(images.items()):
        left, top = MARGIN, number * (HEIGHT + GAP)
        draw.text(
            (4, top + HEIGHT // 2), {"JPEG": "JPEG", "WEBP": "WebP"}.get(name, name), "black", font
        )
        for image in row:
            sheet.paste(image, (left, top))
            left += image.width + GAP
    sheet.save(Path(__file__).parent / "vqgan.webp", quality=88)


def scaled(pixels: Tensor) -> Image.Image:
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    return image.resize(
        (round(image.width * HEIGHT / image.height), HEIGHT), Image.Resampling.LANCZOS
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
