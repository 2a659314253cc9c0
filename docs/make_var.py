"""Draw docs/var.webp from the run that benchmarks/var.py made: held-out photographs after one
scale, two scales, ... and as they are.

``python docs/make_var.py RUN``
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

import smalto
from smalto.images.bundled import HELD_OUT, bundled_photographs
from smalto.images.reading import read_image
from smalto.images.tensors import to_tensor, to_uint8, to_unit_range
from smalto.metrics import psnr

SIDE, GAP, TITLE = 192, 6, 22


def main(run: Path) -> None:
    tokenizer = smalto.load(run)
    layout = tokenizer.layout(SIDE, SIDE)
    titles = [
        f"{number} scale{'s' if number > 1 else ''}" for number in range(1, len(layout.grids) + 1)
    ] + ["photograph"]
    files = [file for file in bundled_photographs() if file.name in HELD_OUT]
    page = Image.new(
        "RGB", (len(titles) * (SIDE + GAP) - GAP, TITLE + len(files) * (SIDE + GAP) - GAP), "white"
    )
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(13)
    for column, title in enumerate(titles):
        draw.text((column * (SIDE + GAP) + SIDE / 2, TITLE / 2), title, "black", font, anchor="mm")
    for row, file in enumerate(files):
        original = to_tensor(read_image(file.path, 384))
        top, left = (original.shape[1] - SIDE) // 2, (original.shape[2] - SIDE) // 2
        image = to_unit_range(original[None, :, top : top + SIDE, left : left + SIDE])
        with torch.no_grad():
            stages = tokenizer.decode_each(tokenizer.encode(image), layout)
        print(file.name, [round(float(psnr(stage, image)), 2) for stage in stages])
        for column, shown in enumerate([*stages, image]):
            pixels = Image.fromarray(to_uint8(shown[0]).permute(1, 2, 0).numpy())
            page.paste(pixels, (column * (SIDE + GAP), TITLE + row * (SIDE + GAP)))
    page.save(Path(__file__).parent / "var.webp", quality=88)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
