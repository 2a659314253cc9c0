"""Local autoencoders: receptive fields are exact, and tiles give what the whole image gives."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smalto.autoencoders import CNNAutoencoderConfig, SimpleAutoencoderConfig, locality
from smalto.autoencoders.layers import GroupNorm, RMSNorm
from smalto.autoencoders.locality import input_range, run_in_tiles
from smalto.quantizers import MultiScaleVQConfig, ResidualVQConfig, VectorQuantizerConfig
from smalto.tokenizer import ImageTokenizer, TokenizerConfig
from smalto.training.recipe_file import load_recipe
from tests.conftest import ENVIRONMENT

RECIPES = [
    path
    for path in sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))
    if 'kind = "generator"' not in path.read_text()
]

SMALL: dict[str, Any] = {"ch": 8, "latent_dim": 4, "num_res_blocks": 1, "attention": False}
RMS = SMALL | {"norm": "rms", "ch_mult": (1, 2)}
LOCAL: dict[str, CNNAutoencoderConfig | SimpleAutoencoderConfig] = {
    "simple": SimpleAutoencoderConfig(latent_dim=4, hidden_dim=8),
    "rms": CNNAutoencoderConfig(**RMS),
    "shortcuts": CNNAutoencoderConfig(**RMS, shortcuts=True),
    "patch 2": CNNAutoencoderConfig(**RMS, patch=2, shortcuts=True),
    "patch 4": CNNAutoencoderConfig(**SMALL, norm="rms", ch_mult=(1,), patch=4),
    "kernel 1": CNNAutoencoderConfig(**RMS, quant_conv_kernel=1),
}


def build(config: CNNAutoencoderConfig | SimpleAutoencoderConfig) -> tuple[nn.Module, nn.Module]:
    """An encoder and a decoder without layers that start at zero, in float64."""
    torch.manual_seed(0)
    networks = config.build_encoder(), config.build_decoder()
    for network in networks:
        for parameter in network.double().parameters():
            nn.init.uniform_(parameter, -0.5, 0.5)
    return networks


def rows_that_count(network: nn.Module, maps: Tensor, row: int) -> tuple[int, int]:
    """First and last row of the input that change the output's row."""
    maps = maps.clone().requires_grad_()
    network(maps)[:, :, row].square().sum().backward()
    assert maps.grad is not None
    counting = maps.grad.abs().sum((0, 1, 3)).nonzero().flatten()
    return int(counting[0]), int(counting[-1])


@pytest.mark.parametrize("name", LOCAL)
def test_receptive_fields_are_exact(name: str) -> None:
    config = LOCAL[name]
    encoder, decoder = build(config)
    images = torch.randn(1, 3, 40 * config.stride, 2 * config.stride, dtype=torch.float64)
    expected = input_range(encoder, 20, 20)
    assert rows_that_count(encoder, images, 20) == expected
    latents = torch.randn(1, 4, 40, 2, dtype=torch.float64)
    for phase in range(config.stride):
        row = 20 * config.stride + phase
        assert rows_that_count(decoder, latents, row) == input_range(decoder, row, row)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locality, "TILE", 24)
    monkeypatch.setattr(locality, "WHOLE", 32 * 32)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("name", LOCAL)
@pytest.mark.parametrize("gradients", [False, True])
def test_tiles_are_the_whole(name: str, gradients: bool) -> None:
    config = LOCAL[name]
    encoder, decoder = build(config)
    images = torch.randn(2, 3, 96, 136, dtype=torch.float64)
    with torch.set_grad_enabled(gradients):
        whole = encoder(images)
        tiled = run_in_tiles(encoder, images, torch.float64, down=config.stride)
        torch.testing.assert_close(tiled, whole, rtol=1e-12, atol=1e-12)
        decoded = decoder(whole)
        tiled = run_in_tiles(decoder, whole, torch.float64, up=config.stride)
        torch.testing.assert_close(tiled, decoded, rtol=1e-12, atol=1e-12)
    if gradients:
        parameters = list(decoder.parameters())
        expected = torch.autograd.grad(decoded.square().mean(), parameters, retain_graph=True)
        found = torch.autograd.grad(tiled.square().mean(), parameters)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def tokenizer_of(quantizer: Any, **settings: Any) -> ImageTokenizer:
    torch.manual_seed(0)
    autoencoder = CNNAutoencoderConfig(**(RMS | settings))
    tokenizer = TokenizerConfig(autoencoder=autoencoder, quantizer=quantizer).build()
    for parameter in tokenizer.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    return tokenizer.eval().requires_grad_(False)


@pytest.mark.parametrize(
    "quantizer",
    [
        VectorQuantizerConfig(codebook_size=64, latent_dim=4),
        ResidualVQConfig(num_stages=2, stage=VectorQuantizerConfig(codebook_size=64, latent_dim=4)),
    ],
)
def test_a_tokenizer_that_is_local_tiles_its_images(
    quantizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tokenizer_of(quantizer)
    assert tokenizer.is_local
    assert tokenizer.receptive_field == 41
    images = torch.rand(1, 3, 96, 136) * 2 - 1
    tokens, layout = tokenizer.encode(images), tokenizer.layout(96, 136)
    image = tokenizer.decode(tokens, layout)
    monkeypatch.setattr(locality, "TILE", 24)
    monkeypatch.setattr(locality, "WHOLE", 32 * 32)
    gaps = tokenizer.token_gaps(images, tokenizer.encode(images), layout)
    assert gaps.max() < 1e-6
    torch.testing.assert_close(tokenizer.decode(tokens, layout), image, rtol=0, atol=1e-5)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_tiles_of_every_local_recipe_are_the_whole(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_recipe(path).tokenizer
    tokenizer = config.build().eval().requires_grad_(False)
    assert tokenizer.is_local == (config.quantizer.kind != "multiscale" and not uses_group(config))
    if not tokenizer.is_local:
        return
    for parameter in tokenizer.parameters():
        if not parameter.any():  # else most residual blocks would be the identity
            nn.init.normal_(parameter, std=0.02)
    images = torch.rand(1, 3, 96, 136) * 2 - 1
    tokens, layout = tokenizer.encode(images), tokenizer.layout(96, 136)
    image = tokenizer.decode(tokens, layout)
    monkeypatch.setattr(locality, "TILE", 48)
    monkeypatch.setattr(locality, "WHOLE", 32 * 32)
    different = tokenizer.encode(images) != tokens
    assert tokenizer.token_gaps(images, tokenizer.encode(images), layout)[different].sum() < 1e-4
    torch.testing.assert_close(tokenizer.decode(tokens, layout), image, rtol=0, atol=1e-4)


def uses_group(config: TokenizerConfig) -> bool:
    return getattr(config.autoencoder, "norm", "") == "group"


def test_a_photograph_of_24_megapixels_fits_into_a_gibibyte() -> None:
    program = """
import resource, torch
from smalto.tokenizer import TokenizerConfig
from smalto.autoencoders import CNNAutoencoderConfig
from smalto.quantizers import VectorQuantizerConfig

autoencoder = CNNAutoencoderConfig(
    ch=16, ch_mult=(1, 1), patch=4, latent_dim=16, num_res_blocks=1, attention=False, norm="rms"
)
quantizer = VectorQuantizerConfig(codebook_size=64, latent_dim=16)
tokenizer = TokenizerConfig(autoencoder=autoencoder, quantizer=quantizer).build().for_inference()
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
image = torch.rand(1, 3, 4000, 6000)
tokens = tokenizer.encode(image)
assert tokenizer.decode(tokens, tokenizer.layout(4000, 6000)).shape == image.shape
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) / 1024)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 1024, f"{done.stdout.strip()} MiB"


def test_others_say_that_they_are_not_local() -> None:
    vector = VectorQuantizerConfig(codebook_size=64, latent_dim=4)
    scales = MultiScaleVQConfig(scales=[1, 2], scale=vector)
    assert not tokenizer_of(scales).is_local
    for settings in ({"norm": "group", "ch": 32}, {"attention": True}):
        tokenizer = tokenizer_of(vector, **settings)
        assert not tokenizer.is_local
        assert tokenizer.receptive_field is None


@pytest.mark.usefixtures("small_tiles")
def test_a_network_that_is_not_local_runs_on_the_whole_map() -> None:
    encoder = CNNAutoencoderConfig(**(SMALL | {"ch": 32, "ch_mult": (1, 1)})).build_encoder()
    images = torch.randn(1, 3, 96, 96)
    tiled = run_in_tiles(encoder, images, torch.float32, down=2)
    assert torch.equal(tiled, encoder(images))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_rms_norm_is_torchs(memory_format: torch.memory_format) -> None:
    norm = RMSNorm(6).double()
    with torch.no_grad():
        norm.weight.uniform_(), norm.bias.uniform_()
    x = torch.randn(2, 6, 3, 5, dtype=torch.float64).to(memory_format=memory_format)
    x.requires_grad_()
    other = x.movedim(1, -1)
    expected = nn.functional.rms_norm(other, (6,), norm.weight, eps=1e-6) + norm.bias
    torch.testing.assert_close(norm(x), expected.movedim(-1, 1), rtol=1e-12, atol=1e-12)
    inputs = [x, norm.weight, norm.bias]
    weights = torch.randn_like(x)
    found = torch.autograd.grad((norm(x) * weights).sum(), inputs)
    wanted = torch.autograd.grad((expected.movedim(-1, 1) * weights).sum(), inputs)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("window", [3, 4, 9])
def test_local_statistics_are_those_of_each_window(window: int) -> None:
    norm = GroupNorm(64, window)
    with torch.no_grad():
        norm.weight.uniform_(), norm.bias.uniform_()
    x = torch.randn(2, 64, 7, 11)
    out = norm(x)
    for row in range(7):
        for column in range(11):
            top = min(max(row - window // 2, 0), max(7 - window, 0))
            left = min(max(column - window // 2, 0), max(11 - window, 0))
            part = x[:, :, top : top + window, left : left + window]
            expected = torch.group_norm(part, 32, norm.weight, norm.bias, 1e-6)
            here = expected[:, :, row - top, column - left]
            torch.testing.assert_close(out[:, :, row, column], here, rtol=1e-4, atol=1e-4)


def test_a_window_as_large_as_the_map_is_plain_group_norm() -> None:
    x = torch.randn(2, 64, 7, 11)
    assert torch.equal(GroupNorm(64, 11)(x), GroupNorm(64)(x))
