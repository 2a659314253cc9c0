"""Make docs/demo.webp, the README's image, from a finished demo: python docs/make_image.py
runs/demo
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from PIL import Image

from smalto.images.bundled import bundled_photographs
from smalto.images.reading import read_image

HEIGHT, GAP = 300, 6


def main(run: Path) -> None:
    originals = {file.name: file.path for file in bundled_photographs()}
    pairs = []
    for name in json.loads((run / "split.json").read_text())["held_out"]:
        decoded = Image.open(run / "decoded" / f"{Path(name).stem}.png")
        original = Image.fromarray(read_image(originals[name])).crop((0, 0, *decoded.size))
        size = (round(decoded.width * HEIGHT / decoded.height), HEIGHT)
        pairs.append(
            [image.resize(size, Image.Resampling.LANCZOS) for image in (original, decoded)]
        )
    width = sum(pair[0].width for pair in pairs) + GAP * (len(pairs) - 1)
    sheet = Image.new("RGB", (width, 2 * HEIGHT + GAP), "white")
    left = 0
    for pair in pairs:
        for row, image in enumerate(pair):
            sheet.paste(image, (left, row * (HEIGHT + GAP)))
        left += pair[0].width + GAP
    sheet.save(Path(__file__).parent / "demo.webp", quality=88)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
