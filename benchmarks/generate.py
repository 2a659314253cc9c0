"""Claims: a KV cache makes an image in a fraction of the time without one, takes the bytes of its
formula, and bfloat16 on processors that have it is faster than VAR's own code.

``python benchmarks/generate.py [--var-code FOLDER]`` makes images of 256 x 256 pixels with random
weights of VAR d16 and its tokenizer, guidance 1.5. FOLDER is a clone of FoundationVision/VAR, whose
code then runs with the same weights; it needs ``pip install huggingface_hub``.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from machine import store
from torch import Tensor

from smalto.autoencoders import CNNAutoencoderConfig
from smalto.core.device import fastest_precision
from smalto.generator import Generator, GeneratorConfig, KVCache, Transformer
from smalto.generator.orders import NextScale
from smalto.generator.sampling import guided, sampled
from smalto.interop.var import generator_state_dict, tokenizer_state_dict
from smalto.quantizers import MultiScaleVQConfig, VectorQuantizerConfig
from smalto.tokenizer import TokenizerConfig

SCALES = [1, 2, 3, 4, 5, 6, 8, 10, 13, 16]
GUIDANCE = 1.5
REPEATS = {1: 3, 16: 1}
LABEL = 207


def main(var_code: Path | None, batches: list[int], depth: int) -> None:
    generator = var_generator(depth)
    fast = generator.for_inference(fastest_precision(torch.device("cpu")))
    ways: dict[str, Callable[[int], Tensor]] = {
        "float32 without a cache": lambda n: without_cache(generator, n),
        "float32": lambda n: images(generator, n),
        "default": lambda n: images(fast, n),
    }
    if var_code is not None:
        ways = {"VAR's code": var_function(var_code, generator, depth), **ways}
    with torch.no_grad():
        result: dict[str, Any] = {
            "depth": depth,
            "default_precision": fastest_precision(torch.device("cpu")),
            "cache": cache_bytes(generator),
            "decoding": decoding_seconds(generator),
            "decoding_default": decoding_seconds(fast),
            "seconds": {},
        }
        for number in batches:
            found = {name: seconds(way, number) for name, way in ways.items()}
            result["seconds"][str(number)] = found
            print(f"batch {number}:", {k: round(v, 2) for k, v in found.items()}, flush=True)
        result["ratios"] = {n: ratios(found) for n, found in result["seconds"].items()}
    print(result["ratios"])
    print("stored in", store("generate", result))


def var_generator(depth: int) -> Generator:
    """Return a generator of VAR's sizes with random weights."""
    torch.manual_seed(0)
    config = TokenizerConfig(
        autoencoder=CNNAutoencoderConfig(
            latent_dim=32,
            ch=160,
            ch_mult=[1, 1, 2, 2, 4],
            num_res_blocks=2,
            attention=True,
            quant_conv_kernel=3,
        ),
        quantizer=MultiScaleVQConfig(
            scales=SCALES, scale=VectorQuantizerConfig(codebook_size=4096, latent_dim=32)
        ),
    )
    tokenizer = config.build()
    shape = GeneratorConfig.for_tokenizer(
        tokenizer, (256, 256), depth=depth, width=64 * depth, num_heads=depth, num_classes=1000
    )
    transformer = Transformer(shape)
    with torch.no_grad():  # the initialization predicts a nearly uniform distribution
        transformer.head.weight.mul_(50)
    return Generator(transformer, tokenizer).eval()


def images(generator: Generator, number: int) -> Tensor:
    """Return images as ``generate`` makes them."""
    cache = generator.new_cache(number)
    seeds = range(number)
    return generator.generate([LABEL] * number, guidance=GUIDANCE, seeds=seeds, cache=cache).images


def without_cache(generator: Generator, number: int) -> Tensor:
    """Return the same images; every step computes all positions before it again."""
    config = generator.config
    layout = config.layout
    order = NextScale(generator.tokenizer.quantize, layout)
    labels = torch.tensor([LABEL] * number + [config.num_classes] * number)
    inputs = torch.zeros(number, 0, config.code_dim)
    tokens = torch.zeros(number, 0, dtype=torch.int64)
    for step, length in enumerate(layout.lengths):
        logits = generator.transformer(labels, inputs.repeat(2, 1, 1))[:, -length:]
        strength = order.guidance(GUIDANCE, step, len(layout.lengths))
        positions = torch.arange(tokens.shape[1], tokens.shape[1] + length)
        drawn = sampled(guided(*logits.chunk(2), strength), torch.arange(number), positions)
        tokens = torch.cat([tokens, drawn], dim=1)
        following = order.add(step, order.lookup(step, drawn))
        if following is not None:
            inputs = torch.cat([inputs, following], dim=1)
    return generator.tokenizer.decode_latents(order.quantized(tokens))


def var_function(folder: Path, generator: Generator, depth: int) -> Callable[[int], Tensor]:
    """Return a function that makes images with VAR's own code and the same weights."""
    sys.path.insert(0, str(folder))
    methods = {c: c.reset_parameters for c in (torch.nn.Linear, torch.nn.Conv2d)}
    from models import build_vae_var  # type: ignore[import-not-found]

    vae, var = build_vae_var("cpu", patch_nums=tuple(SCALES), depth=depth)
    for kind, method in methods.items():  # which the call above has switched off
        kind.reset_parameters = method
    var.load_state_dict(generator_state_dict(generator))
    vae.load_state_dict(tokenizer_state_dict(generator.tokenizer))
    var.eval()
    vae.eval()
    greedy = var.autoregressive_infer_cfg(1, torch.tensor([LABEL]), cfg=GUIDANCE, top_k=1)
    own = generator.generate([LABEL], guidance=GUIDANCE, top_k=1).images
    difference = float((greedy * 2 - 1 - own).abs().max())
    print(f"greedy images of VAR's code and ours differ by {difference:.1e}")

    def run(number: int) -> Tensor:
        labels = torch.tensor([LABEL] * number)
        made: Tensor = var.autoregressive_infer_cfg(number, labels, g_seed=0, cfg=GUIDANCE)
        return made

    return run


def seconds(way: Callable[[int], Tensor], number: int) -> float:
    """Return the median seconds per image, decoding included."""
    if number == 1:
        way(1)
    times = []
    for _ in range(REPEATS.get(number, 1)):
        begin = time.perf_counter()
        way(number)
        times.append((time.perf_counter() - begin) / number)
    return median(times)


def decoding_seconds(generator: Generator) -> float:
    """Return the median seconds to decode one image."""
    layout = generator.config.layout
    tokens = torch.randint(0, 4096, (1, layout.num_tokens))
    times = []
    for _ in range(4):
        begin = time.perf_counter()
        generator.tokenizer.decode(tokens, layout)
        times.append(time.perf_counter() - begin)
    return median(times[1:])


def cache_bytes(generator: Generator) -> dict[str, int]:
    """Return the bytes of the cache of one image with guidance, as allocated and by formula."""
    cache = generator.new_cache(1)
    return {
        "allocated": cache.num_bytes,
        "formula": 2 * KVCache.bytes_per_row(generator.config, torch.float32),
    }


def ratios(found: dict[str, float]) -> dict[str, float]:
    """Return how many times as fast each way is as those named before it."""
    pairs = itertools.combinations(found, 2)
    return {f"{fast} / {slow}": round(found[slow] / found[fast], 2) for slow, fast in pairs}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--var-code", type=Path)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--depth", type=int, default=16)
    options = parser.parse_args()
    main(options.var_code, options.batch, options.depth)
