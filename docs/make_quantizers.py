"""Draw docs/quantizers.webp: what each kind of quantizer does to a latent space of two dimensions.

Colors are tokens, gray dots latents, black dots what can be decoded. Every panel is a quantizer of
smalto, placed by its updater.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from smalto.quantizers import (
    CodebookUpdater,
    ProductVQConfig,
    Quantizer,
    QuantizerConfig,
    ResidualVQConfig,
    VectorQuantizerConfig,
)

SIDE, GAP, TITLE, REACH = 300, 16, 44, 3.2  # pixels, and how far the image looks each way


def vector(codes: int, **settings: object) -> VectorQuantizerConfig:
    return VectorQuantizerConfig(**({"codebook_size": codes, "latent_dim": 2} | settings))  # type: ignore[arg-type]


PANELS: list[tuple[str, str, QuantizerConfig]] = [
    ("VectorQuantizer, l2", "24 codes, anywhere", vector(24, codebook="ema")),
    (
        "cosine, stored codes",
        "24 codes, chosen by angle",
        vector(24, codebook="ema", metric="cosine"),
    ),
    (
        "cosine, unit codes",
        "24 codes on a circle",
        vector(24, codebook="ema", metric="cosine", unit_codes=True),
    ),
    ("projected (SimVQ)", "24 frozen codes, one linear map", vector(24, codebook="projected")),
    (
        "ResidualVQ, 2 stages",
        "6 x 6 sums of two codes",
        ResidualVQConfig(num_stages=2, stage=vector(6, codebook="ema")),
    ),
    (
        "ProductVQ, 2 heads",
        "6 x 6 pairs of halves",
        ProductVQConfig(num_heads=2, head=vector(6, latent_dim=1, codebook="ema")),
    ),
]


def latents(number: int) -> Tensor:
    """A bent band of vectors, [1, 2, N, 1]."""
    generator = torch.Generator().manual_seed(3)
    angle = torch.rand(number, generator=generator) * 1.5 * math.pi
    spread = 0.25 * torch.randn(number, 2, generator=generator)
    points = (
        torch.stack([angle.cos() * (1 + 0.3 * angle), angle.sin() * (1 + 0.3 * angle)], dim=1)
        + spread
    )
    return points.T[None, :, :, None]


def place(config: QuantizerConfig) -> Quantizer:
    """The quantizer after its codes have been brought to the latents."""
    torch.manual_seed(1)
    quantizer, data = config.build(), latents(4000)
    optimizer = torch.optim.Adam(
        [p for p in quantizer.parameters() if p.requires_grad]
        or [torch.zeros(1, requires_grad=True)],
        lr=0.01,
    )
    updater = CodebookUpdater(quantizer, optimizer, decay_tokens=20.0)
    updater.start(data)
    for _ in range(100):
        loss = quantizer(data).loss
        optimizer.zero_grad()
        if loss.requires_grad:
            loss.backward()
        optimizer.step()
        updater.step()
    return quantizer.eval()


@torch.no_grad()
def panel(quantizer: Quantizer) -> Image.Image:
    """The plane, colored by what each of its points becomes."""
    axis = torch.linspace(-REACH, REACH, SIDE)
    y, x = torch.meshgrid(-axis, axis, indexing="ij")
    plane = torch.stack([x, y])[None]
    values = quantizer(plane).quantized[0].permute(1, 2, 0).reshape(-1, 2)
    codes, cell = values.unique(dim=0, return_inverse=True)
    hues = torch.rand(len(codes), 3, generator=torch.Generator().manual_seed(5)) * 90 + 160
    colors = hues.round().to(torch.uint8)[cell].view(SIDE, SIDE, 3)
    cells = cell.view(SIDE, SIDE)
    edges = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    edges[1:] |= cells[1:] != cells[:-1]
    edges[:, 1:] |= cells[:, 1:] != cells[:, :-1]
    colors[edges] = 255
    image = Image.fromarray(colors.numpy())
    draw = ImageDraw.Draw(image)
    for point in latents(350)[0, :, :, 0].T.tolist():
        dot(draw, point, 1.2, (105, 105, 105))
    for point in codes.tolist():
        dot(draw, point, 3.2, (0, 0, 0))
    return image


def dot(
    draw: ImageDraw.ImageDraw, point: list[float], radius: float, color: tuple[int, int, int]
) -> None:
    x, y = ((REACH + point[0]) / (2 * REACH) * SIDE, (REACH - point[1]) / (2 * REACH) * SIDE)
    draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=color)


def main() -> None:
    columns = 3
    rows = -(-len(PANELS) // columns)
    sheet = Image.new(
        "RGB", (columns * (SIDE + GAP) + GAP, rows * (SIDE + TITLE + GAP) + GAP), "white"
    )
    draw = ImageDraw.Draw(sheet)
    for number, (title, text, config) in enumerate(PANELS):
        left = GAP + number % columns * (SIDE + GAP)
        top = GAP + number // columns * (SIDE + TITLE + GAP)
        draw.text((left, top), title, fill="black", font=ImageFont.load_default(18))
        draw.text((left, top + 22), text, fill=(90, 90, 90), font=ImageFont.load_default(14))
        sheet.paste(panel(place(config)), (left, top + TITLE))
    sheet.save(Path(__file__).parent / "quantizers.webp", quality=80, method=6)


if __name__ == "__main__":
    main()
