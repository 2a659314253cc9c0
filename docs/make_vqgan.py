"""Make docs/vqgan.webp from a finished run of recipes/photos-vqgan-small.toml: python docs/make_vqgan.py RUN"""

from __future__ import annotations

import math
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import smalto
from smalto.core.progress import Progress
from smalto.evaluation.codecs import CODECS, code
from smalto.images.bundled import HELD_OUT, bundled_photographs
from smalto.images.image_reader import PictureReader
from smalto.images.tensors import to_uint8, to_unit_range
from smalto.inference.runner import Runner

HEIGHT, GAP, MARGIN = 300, 6, 66


def main(run: Path) -> None:
    runner = Runner.on(smalto.load(run), "float32")
    files = [file for file in bundled_photographs() if file.name in HELD_OUT]
    rows: dict[str, list[Tensor]] = {name: [] for name in ("original", "tokens", *CODECS)}
    for _, picture in PictureReader(files, runner.tokenizer.stride, Progress(), workers=0):
        tokens, back, _ = runner.roundtrip(to_unit_range(picture)[None])
        size = tokens.numel() * math.log2(runner.tokenizer.quantize.codebook_size) / 8
        rows["original"].append(picture)
        rows["tokens"].append(to_uint8(back[0]))
        for codec in CODECS:
            rows[codec].append(code(picture, codec, size).picture)
    pictures = {name: [scaled(pixels) for pixels in row] for name, row in rows.items()}
    width = MARGIN + sum(image.width + GAP for image in pictures["original"])
    sheet = Image.new("RGB", (width, (HEIGHT + GAP) * len(rows)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=15)
    for number, (name, row) in enumerate(pictures.items()):
        left, top = MARGIN, number * (HEIGHT + GAP)
        draw.text((4, top + HEIGHT // 2), {"JPEG": "JPEG", "WEBP": "WebP"}.get(name, name), "black", font)
        for image in row:
            sheet.paste(image, (left, top))
            left += image.width + GAP
    sheet.save(Path(__file__).parent / "vqgan.webp", quality=88)


def scaled(pixels: Tensor) -> Image.Image:
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    return image.resize((round(image.width * HEIGHT / image.height), HEIGHT), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
