"""ONNX files in onnxruntime: the tokens of torch, and its images within 1e-4."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

import smalto
from smalto.core.errors import ConfigError
from smalto.interop.onnx import write_onnx
from smalto.tokenizer import ImageTokenizer, TokenizerConfig

pytest.importorskip("onnxscript", reason="onnxscript is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

CNN = {"kind": "cnn", "latent_dim": 8, "ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1}
AUTOENCODERS: dict[str, dict[str, Any]] = {
    "simple": {"latent_dim": 8, "hidden_dim": 8},
    "attention": CNN,
    "local": CNN
    | {"norm": "rms", "attention": False, "shortcuts": True, "patch": 2, "quant_conv_kernel": 1},
    "spatial": CNN | {"norm": "spatial", "attention": False, "quant_conv_kernel": 1},
    "video": CNN | {"latent_dim": 8, "video_frames": 4, "attention": False},
    "maskgit": {"kind": "maskgit", "latent_dim": 8, "ch": 32, "ch_mult": (1, 2)},
}
VECTOR = {"kind": "vector", "codebook_size": 16, "latent_dim": 8}
QUANTIZERS: dict[str, dict[str, Any]] = {
    "vector": VECTOR,
    "cosine": VECTOR | {"code_dim": 4, "metric": "cosine", "unit_codes": True},
    "projected": VECTOR | {"codebook": "projected"},
    "residual": {"kind": "residual", "num_stages": 2, "stage": {"latent_dim": 8, "code_dim": 4}},
    "product": {"kind": "product", "num_heads": 2, "head": {"latent_dim": 4}},
    "logit": {"kind": "logit", "codebook_size": 16, "latent_dim": 8},
    "multiscale": {"kind": "multiscale", "scales": (1, 2), "scale": VECTOR},
}
SIZES = ((2, 32, 32), (1, 48, 32), (3, 16, 40))
slow = pytest.mark.slow


def tokenizer_of(autoencoder: str, quantizer: str) -> ImageTokenizer:
    torch.manual_seed(0)
    parts = {"autoencoder": AUTOENCODERS[autoencoder], "quantizer": QUANTIZERS[quantizer]}
    return TokenizerConfig.model_validate(parts).build().eval()


def check(tokenizer: ImageTokenizer, folder: Path) -> None:
    """Compare at several sizes: none is that of the exporter's example."""
    encoder = onnxruntime.InferenceSession(folder / "encoder.onnx")
    decoder = onnxruntime.InferenceSession(folder / "decoder.onnx")
    names = [value.name for value in encoder.get_outputs()]
    assert [value.name for value in decoder.get_inputs()] == names
    for batch, height, width in SIZES:
        generator = torch.Generator().manual_seed(height)
        images = torch.rand(batch, 3, height, width, generator=generator) * 2 - 1
        layout = tokenizer.layout(height, width)
        with torch.no_grad():
            expected = tokenizer.encode(images)
            image = tokenizer.decode(expected, layout)
        maps = encoder.run(None, {"images": images.numpy()})
        assert [found.shape[1:] for found in maps] == list(layout.grids)
        tokens = torch.cat([torch.from_numpy(found).flatten(1) for found in maps], dim=1)
        gaps = tokenizer.token_gaps(images, tokens, layout)
        assert float(gaps[tokens != expected].sum()) < 1e-6  # ties only
        blocks = [
            block.view(batch, *grid)
            for block, grid in zip(expected.split(layout.lengths, dim=1), layout.grids, strict=True)
        ]
        feed = dict(zip(names, (block.numpy() for block in blocks), strict=True))
        (found,) = decoder.run(None, feed)
        numpy.testing.assert_allclose(found, image.numpy(), atol=1e-4)


@pytest.mark.parametrize(
    ("autoencoder", "quantizer"),
    [
        ("simple", "multiscale"),
        *(pytest.param("simple", kind, marks=slow) for kind in QUANTIZERS if kind != "multiscale"),
        *(pytest.param(kind, "vector", marks=slow) for kind in AUTOENCODERS if kind != "simple"),
    ],
)
def test_tokens_and_images_at_any_size(autoencoder: str, quantizer: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(autoencoder, quantizer)
    write_onnx(tokenizer, tmp_path)
    check(tokenizer, tmp_path)


def test_convert(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("attention", "cosine")
    tokenizer.save(tmp_path / "own")
    converted = smalto.convert(tmp_path / "own", tmp_path / "onnx", "onnx")
    assert sorted(path.name for path in converted.path.iterdir()) == [
        "config.json",
        "decoder.onnx",
        "encoder.onnx",
    ]
    settings = json.loads((converted.path / "config.json").read_text())
    assert (settings["stride"], settings["codebook_size"], settings["tokens"]) == (
        2,
        16,
        ["tokens"],
    )
    assert settings["fingerprint"] == tokenizer.fingerprint()
    assert settings["search_bytes_per_token"] == 64
    assert "64 bytes per token" in converted.notes[1]
    check(tokenizer, converted.path)


def test_what_onnx_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not float32"):
        write_onnx(tokenizer_of("simple", "vector").double(), tmp_path)
    config = CNN | {"encoder_only": True}
    parts = {"autoencoder": config, "quantizer": VECTOR}
    with pytest.raises(ConfigError, match="has no decoder"):
        write_onnx(TokenizerConfig.model_validate(parts).build(), tmp_path)
    assert list(tmp_path.iterdir()) == []
