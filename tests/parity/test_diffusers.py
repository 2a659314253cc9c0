"""VQModel of diffusers: the same weights give the same tokens and images, both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import smalto
from smalto.core.errors import ConfigError, DataError
from smalto.interop.diffusers import KEYS, load_tokenizer, tokenizer_state_dict
from smalto.interop.open_tokenizer import recognize
from smalto.interop.vqgan import fitting_tokenizer

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

PLAIN = ("DownEncoderBlock2D", "UpDecoderBlock2D")
ATTENTION = ("AttnDownEncoderBlock2D", "AttnUpDecoderBlock2D")
MODELS: dict[str, dict[str, Any]] = {
    "as it comes": {"block_out_channels": (32,), "latent_channels": 3},
    "two levels": {"block_out_channels": (32, 64), "levels": (PLAIN, PLAIN)},
    "attention at the lowest": {"block_out_channels": (32, 64), "levels": (PLAIN, ATTENTION)},
    "attention everywhere": {"block_out_channels": (32, 64), "levels": (ATTENTION, ATTENTION)},
    "spatial norm": {
        "block_out_channels": (32, 64),
        "levels": (PLAIN, ATTENTION),
        "norm_type": "spatial",
    },
    "widths without a common first": {
        "block_out_channels": (64, 96),
        "levels": (PLAIN, PLAIN),
    },
    "no attention": {"block_out_channels": (32,), "mid_block_add_attention": False},
    "projected codes": {
        "block_out_channels": (32, 32),
        "levels": (PLAIN, PLAIN),
        "vq_embed_dim": 2,
    },
}


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    settings = dict(MODELS[name])
    levels = settings.pop("levels", (PLAIN,))
    model = diffusers.VQModel(
        down_block_types=[down for down, _ in levels],
        up_block_types=[up for _, up in reversed(levels)],
        num_vq_embeddings=32,
        **({"latent_channels": 4} | settings),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
        model.quantize.embedding.weight.normal_()
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_tokens_and_images(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    tokenizer = load_tokenizer(model.state_dict())
    images = torch.rand(2, 3, 32, 48) * 2 - 1
    with torch.no_grad():
        latents = model.encode(images).latents
        _, _, (_, _, indices) = model.quantize(latents)
        expected = model.decode(latents).sample
        tokens = tokenizer.encode(images)
        image = tokenizer.decode(tokens, tokenizer.layout(32, 48), clamp=False)
    assert torch.equal(tokens.flatten(), indices.flatten())
    torch.testing.assert_close(image, expected, rtol=1e-4, atol=2e-5)

    state = tokenizer_state_dict(tokenizer)
    again = model_of(name)
    again.load_state_dict(state)
    for key, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key

    model.save_pretrained(tmp_path / "model")
    assert smalto.load(tmp_path / "model").fingerprint() == tokenizer.fingerprint()
    weights = tmp_path / "model" / "diffusion_pytorch_model.safetensors"
    assert recognize(weights).project == "diffusers"


def test_groups_are_read_from_the_configuration(tmp_path: Path) -> None:
    MODELS["groups"] = {"block_out_channels": (32,), "norm_num_groups": 8}
    model = model_of("groups")
    model.save_pretrained(tmp_path)
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    for path in (tmp_path, tmp_path / "diffusion_pytorch_model.safetensors"):
        tokenizer = smalto.load(path)
        with torch.no_grad():
            latents = model.encode(images).latents
            torch.testing.assert_close(tokenizer.encoder(images), latents, rtol=1e-4, atol=2e-5)
    with pytest.raises(ConfigError, match="norm_groups 8; expected 32"):
        tokenizer_state_dict(tokenizer)  # a state dict does not hold them


def test_settings_that_the_network_lacks_are_refused(tmp_path: Path) -> None:
    model_of("as it comes").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for name, value in (("act_fn", "relu"), ("norm_num_groups", True)):
        path.write_text(json.dumps(config | {name: value}))
        with pytest.raises(ConfigError, match=f"got {name} .*; expected"):
            smalto.load(tmp_path)
    path.write_text("[]")
    with pytest.raises(DataError, match="expected a table"):
        smalto.load(tmp_path)


def test_convert(tmp_path: Path) -> None:
    model = model_of("two levels")
    model.save_pretrained(tmp_path / "model")
    smalto.convert(tmp_path / "model", tmp_path / "own", "smalto")
    written = smalto.convert(tmp_path / "own", tmp_path / "back.pth", "diffusers")
    state = torch.load(written.path, weights_only=True)
    assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())


OFFICIAL: dict[str, dict[str, Any]] = {
    "aMUSEd": {
        "block_out_channels": (128, 256, 256, 512, 768),
        "down_block_types": ("DownEncoderBlock2D",) * 5,
        "up_block_types": ("UpDecoderBlock2D",) * 5,
        "layers_per_block": 2,
        "latent_channels": 64,
        "lookup_from_codebook": True,
        "mid_block_add_attention": False,
        "num_vq_embeddings": 8192,
    },
    "Kandinsky 2.2": {
        "block_out_channels": (128, 256, 256, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 3 + ("AttnDownEncoderBlock2D",),
        "up_block_types": ("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 3,
        "layers_per_block": 2,
        "latent_channels": 4,
        "norm_type": "spatial",
        "num_vq_embeddings": 16384,
        "vq_embed_dim": 4,
    },
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_sizes_fit(name: str) -> None:
    with torch.device("meta"):
        model = diffusers.VQModel(**OFFICIAL[name])
    tokenizer, _ = fitting_tokenizer(model.state_dict(), KEYS, name, 0.25)
    assert sum(p.numel() for p in tokenizer.parameters()) == sum(
        p.numel() for p in model.parameters()
    )
