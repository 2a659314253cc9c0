"""Every quantizer there is, small: what the contract is checked on."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from smalto.quantizers import (
    MultiScaleVQConfig,
    ProductVQConfig,
    Quantizer,
    QuantizerConfig,
    ResidualVQConfig,
    VectorQuantizerConfig,
)

C = 6  # channels of the latents


def vector(**settings: object) -> VectorQuantizerConfig:
    return VectorQuantizerConfig(**({"codebook_size": 20, "latent_dim": C} | settings))  # type: ignore[arg-type]


def multiscale(**settings: object) -> MultiScaleVQConfig:
    own = {key: settings.pop(key) for key in ("scales", "num_phis", "phi_ratio") if key in settings}
    return MultiScaleVQConfig(**({"scales": (1, 2, 4)} | own), scale=vector(**settings))  # type: ignore[arg-type]


KINDS: dict[str, QuantizerConfig] = {
    "learned": vector(),
    "learned-cosine": vector(metric="cosine"),
    "learned-unit": vector(metric="cosine", unit_codes=True),
    "learned-code_dim": vector(code_dim=3),
    "learned-unit-code_dim": vector(metric="cosine", unit_codes=True, code_dim=3),
    "learned-rotation": vector(estimator="rotation"),
    "learned-diveq": vector(estimator="diveq"),
    "learned-diveq-code_dim": vector(estimator="diveq", code_dim=3, beta=0.0),
    "ema": vector(codebook="ema"),
    "ema-cosine": vector(codebook="ema", metric="cosine"),
    "ema-unit": vector(codebook="ema", metric="cosine", unit_codes=True),
    "ema-code_dim-rotation": vector(codebook="ema", code_dim=3, estimator="rotation"),
    "projected": vector(codebook="projected"),
    "projected-cosine-code_dim": vector(codebook="projected", metric="cosine", code_dim=4),
    "projected-diveq": vector(codebook="projected", estimator="diveq"),
    "residual-ema": ResidualVQConfig(num_stages=3, stage=vector(codebook="ema")),
    "residual-learned-code_dim": ResidualVQConfig(
        num_stages=4, stage=vector(code_dim=3, metric="cosine")
    ),
    "residual-projected-rotation": ResidualVQConfig(
        num_stages=2, stage=vector(codebook="projected", estimator="rotation")
    ),
    "residual-diveq": ResidualVQConfig(num_stages=2, stage=vector(estimator="diveq")),
    "residual-one-stage": ResidualVQConfig(num_stages=1, stage=vector()),
    "multiscale-learned": multiscale(num_phis=2),
    "multiscale-ema-cosine": multiscale(codebook="ema", metric="cosine", num_phis=1),
    "multiscale-projected": multiscale(
        codebook="projected", num_phis=None, scales=(1, (2, 1), (3, 4))
    ),
    "multiscale-code_dim-rotation": multiscale(code_dim=3, estimator="rotation", num_phis=2),
    "multiscale-diveq": multiscale(estimator="diveq", phi_ratio=0.3, num_phis=2),
    "multiscale-one-scale": multiscale(scales=(4,), phi_ratio=0.0),
    "product-ema": ProductVQConfig(num_heads=3, head=vector(codebook="ema", latent_dim=2)),
    "product-shared": ProductVQConfig(num_heads=2, shared=True, head=vector(latent_dim=3)),
    "product-diveq-code_dim": ProductVQConfig(
        num_heads=2, head=vector(latent_dim=3, code_dim=2, estimator="diveq")
    ),
}

TEACHING_BY_GRADIENT = [name for name in KINDS if "ema" not in name]


def build(name: str, seed: int = 0) -> Quantizer:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return KINDS[name].build()


def latents(
    batch: int = 2,
    height: int = 3,
    width: int = 4,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, C, height, width, generator=generator, dtype=torch.float64) * scale
    ).to(dtype)


shapes = st.tuples(st.integers(0, 3), st.integers(1, 5), st.integers(1, 5))
"""Batch, height and width of a latent map; the batch may be empty."""
