"""Claim: VAR's tokenizer encodes and decodes faster than as it comes, in exact float32 and in
bfloat16.

The official configuration (109 million parameters, random weights) at 256 x 256, in three ways, one
after the other in every round: (a) plain: float32, contiguous, as ``torch.no_grad()`` runs it; (b)
``for_inference("float32")`` and (c) ``for_inference("bf16")`` inside ``reused_memory()``, as every
job of smalto runs. Targets on 2 cores: (b) at least 1.25 x (a) with equal indices up to ties, (c)
at least 5 x (a) on a processor with AMX; the quantizer at most 5 % of encoding.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from machine import store

from smalto.autoencoders import CNNAutoencoderConfig
from smalto.core.allocator import retain_freed_memory
from smalto.images.bundled import bundled_photographs
from smalto.images.reading import read_image
from smalto.images.tensors import to_tensor, to_unit_range
from smalto.quantizers import MultiScaleVQConfig
from smalto.tokenizer import ImageTokenizer, TokenizerConfig

SIZE = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.manual_seed(0)
    plain = (
        TokenizerConfig(
            autoencoder=CNNAutoencoderConfig(ch=160, latent_dim=32), quantizer=MultiScaleVQConfig()
        )
        .build()
        .eval()
    )
    for module in plain.modules():
        if isinstance(
            module, torch.nn.Conv2d
        ):  # residual branches begin at zero; here every layer is to count
            torch.nn.Conv2d.reset_parameters(module)
    images = photographs(options.batch)
    spread_codes(plain, images)
    ways: dict[str, tuple[ImageTokenizer, Callable[[], Any]]] = {
        "plain": (plain, nullcontext),
        "float32": (plain.for_inference("float32"), retain_freed_memory),
        "bf16": (plain.for_inference("bf16"), retain_freed_memory),
    }
    seconds: dict[str, dict[str, list[float]]] = {
        name: {"encode": [], "decode": [], "quantizer": []} for name in ways
    }
    tokens: dict[str, torch.Tensor] = {}
    layout = plain.layout(SIZE, SIZE)
    with torch.no_grad():
        for _ in range(options.rounds):
            for name, (tokenizer, surroundings) in ways.items():
                with surroundings():
                    tokens[name] = tokenizer.encode(images)  # the heap settles, caches are warm
                    latents = tokenizer.encoder(
                        images.to(next(tokenizer.encoder.parameters()).dtype)
                    )
                    for what, job in (
                        ("encode", lambda t=tokenizer: t.encode(images)),
                        ("decode", lambda t=tokenizer, n=name: t.decode(tokens[n], layout)),
                        ("quantizer", lambda t=tokenizer, z=latents: t.quantize.encode(z)),
                    ):
                        begun = time.perf_counter()
                        job()
                        seconds[name][what].append(time.perf_counter() - begun)
    result = {"batch": options.batch, "rounds": options.rounds, "size": SIZE, "ways": {}}
    print(
        f"{'':8} {'encode':>10} {'':>7} {'decode':>10} {'':>7} {'quantizer':>10} "
        f"{'indices as plain':>17}"
    )
    for name, times in seconds.items():
        middle = {what: statistics.median(values) for what, values in times.items()}
        row = {
            "encode_images_per_second": options.batch / middle["encode"],
            "decode_images_per_second": options.batch / middle["decode"],
            "encode_ratio": statistics.median(
                a / b for a, b in zip(seconds["plain"]["encode"], times["encode"], strict=True)
            ),
            "decode_ratio": statistics.median(
                a / b for a, b in zip(seconds["plain"]["decode"], times["decode"], strict=True)
            ),
            "quantizer_share": middle["quantizer"] / middle["encode"],
            **agreement(tokens[name], tokens["plain"], layout.lengths),
        }
        result["ways"][name] = row
        print(
            f"{name:8} {row['encode_images_per_second']:7.2f}/s "
            f"{row['encode_ratio']:6.2f}x {row['decode_images_per_second']:7.2f}/s "
            f"{row['decode_ratio']:6.2f}x {row['quantizer_share']:10.1%} {row['equal']:17.2%}"
        )
    print("stored in", store("encode", result))


def photographs(number: int) -> torch.Tensor:
    """Squares from the middle of bundled photographs."""
    images = [to_tensor(read_image(file.path, SIZE * 2)) for file in bundled_photographs()]
    large = [image for image in images if min(image.shape[1:]) >= SIZE]
    cut = [
        image[:, (image.shape[1] - SIZE) // 2 :][:, :SIZE, (image.shape[2] - SIZE) // 2 :][
            :, :, :SIZE
        ]
        for image in large
    ]
    return to_unit_range(torch.stack([cut[i % len(cut)] for i in range(number)]))


def spread_codes(tokenizer: ImageTokenizer, images: torch.Tensor) -> None:
    """Random codes as long as what they are to stand for; otherwise one of them would win
    everywhere.
    """
    with torch.no_grad():
        latents = tokenizer.encoder(images[:1])
        weight = tokenizer.quantize.scale.embedding.weight
        weight.copy_(torch.randn_like(weight) * latents.std())


def agreement(
    tokens: torch.Tensor, reference: torch.Tensor, lengths: tuple[int, ...]
) -> dict[str, Any]:
    """Shares of equal indices: of all, and of each scale, where an earlier difference changes what
    the later ones see.
    """
    blocks = zip(tokens.split(lengths, dim=1), reference.split(lengths, dim=1), strict=True)
    return {
        "equal": float((tokens == reference).float().mean()),
        "equal_by_scale": [round(float((a == b).float().mean()), 4) for a, b in blocks],
    }


if __name__ == "__main__":
    main()
