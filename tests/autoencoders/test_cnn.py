"""The convolutional autoencoder."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from smalto.autoencoders import CNNAutoencoderConfig, SimpleAutoencoderConfig
from smalto.autoencoders.layers import AttentionBlock, Downsample, ResBlock, Upsample
from smalto.autoencoders.locality import is_local
from smalto.core.config import parse_config
from smalto.core.errors import ConfigError, RunError


def config(**settings: object) -> CNNAutoencoderConfig:
    return CNNAutoencoderConfig(
        **({"ch": 32, "ch_mult": (1, 1, 2), "num_res_blocks": 1, "latent_dim": 4} | settings)
    )  # type: ignore[arg-type]


@pytest.mark.parametrize("levels", range(1, 7))
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_any_number_of_levels_and_channels(levels: int, channels: int) -> None:
    settings = config(ch_mult=(1,) * levels, in_channels=channels)
    assert settings.stride == 2 ** (levels - 1)
    images = torch.randn(2, channels, 2 * settings.stride, 3 * settings.stride)
    latents = settings.build_encoder()(images)
    assert latents.shape == (2, 4, 2, 3)
    assert settings.build_decoder()(latents).shape == images.shape


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"ch": 48}, "multiple of 32"),
        ({"ch_mult": (1, 0)}, "from 1 to 1024"),
        ({"ch_mult": ()}, "at least 1"),
        ({"quant_conv_kernel": 2}, "1 or 3"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_config(CNNAutoencoderConfig, settings, "test")


def test_attention_is_softmax_of_all_positions() -> None:
    torch.manual_seed(0)
    block, x = AttentionBlock(64), torch.randn(2, 64, 3, 5)
    nn.Conv2d.reset_parameters(block.proj_out)
    q, k, v = block.qkv(block.norm(x)).flatten(2).chunk(3, dim=1)
    weights = torch.einsum("bci,bcj->bij", q, k).mul(64**-0.5).softmax(dim=2)
    expected = x + block.proj_out(torch.einsum("bij,bcj->bci", weights, v).view_as(x))
    torch.testing.assert_close(block(x), expected)
    other = torch.randn(1, 64, 3, 5)
    torch.testing.assert_close(block(torch.cat([x, other]))[:2], block(x))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_attention_runs_in_the_fused_kernel(
    dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    block = AttentionBlock(64).to(dtype, memory_format=memory_format)
    x = torch.randn(2, 64, 3, 5, dtype=dtype).contiguous(memory_format=memory_format)
    # With one backend allowed, torch raises an error instead of a fallback to another one.
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        block(x.requires_grad_()).sum().backward()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-12)], ids=str
)
def test_fused_attention_and_its_gradients_agree_with_softmax_in_float64(
    dtype: torch.dtype, tolerance: float, memory_format: torch.memory_format
) -> None:
    torch.manual_seed(0)
    reference = AttentionBlock(64).double()
    nn.Conv2d.reset_parameters(reference.proj_out)
    block = copy.deepcopy(reference).to(dtype, memory_format=memory_format)
    x = torch.randn(2, 64, 7, 9, dtype=torch.float64)
    inputs = [
        x.clone().requires_grad_(),
        x.to(dtype).contiguous(memory_format=memory_format).requires_grad_(),
    ]
    q, k, v = reference.qkv(reference.norm(inputs[0])).flatten(2).chunk(3, dim=1)
    weights = torch.einsum("bci,bcj->bij", q, k).mul(64**-0.5).softmax(dim=2)
    h = torch.einsum("bij,bcj->bci", weights, v).view_as(x)
    outputs = [inputs[0] + reference.proj_out(h), block(inputs[1])]
    for output in outputs:
        output.sin().sum().backward()
    pairs = [outputs, [tensor.grad for tensor in inputs]]
    pairs += [
        [a.grad, b.grad] for a, b in zip(reference.parameters(), block.parameters(), strict=True)
    ]
    for expected, actual in pairs:
        error = (actual.double() - expected).abs().max()
        assert error <= tolerance * max(1.0, expected.abs().max().item())


PEAK_MEMORY = """
import json, resource, sys, torch
from smalto.autoencoders.layers import AttentionBlock

torch.set_num_threads(1)
block = AttentionBlock(64)
unit = 1 if sys.platform == "darwin" else 1024


def infer(x):
    with torch.inference_mode():
        block(x)


def train(x):
    block(x).sum().backward()


peaks = [0]
for work in (infer, train):
    work(torch.randn(1, 64, 4, 4))
    x = torch.randn(1, 64, 96, 96)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    work(x)
    peaks.append((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit)
print(json.dumps(peaks[1:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the resource module is not available")
def test_attention_keeps_no_matrix_of_all_pairs_of_positions() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PEAK_MEMORY], capture_output=True, text=True, check=True
    )
    one_matrix = 4 * (96 * 96) ** 2  # bytes: 324 MiB
    # Measured: +16 MiB in inference, then +22 MiB in training. Not fused: +744 and +260 MiB.
    assert sum(json.loads(done.stdout)) < one_matrix / 2


@pytest.mark.parametrize("layer", [nn.Conv2d, nn.ConvTranspose2d, nn.Linear])
@pytest.mark.parametrize("kind", [CNNAutoencoderConfig, SimpleAutoencoderConfig])
@pytest.mark.parametrize("part", ["build_encoder", "build_decoder"])
def test_layers_without_initialization_are_an_error(
    layer: type[nn.Module],
    kind: type[CNNAutoencoderConfig] | type[SimpleAutoencoderConfig],
    part: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(layer, "reset_parameters", lambda self: None)
    with pytest.raises(
        RunError, match=rf"{layer.__name__}\.reset_parameters was replaced .* separate process"
    ):
        getattr(kind(), part)()
    with torch.device("meta"):
        getattr(kind(), part)()  # the weights are loaded later
    monkeypatch.undo()
    getattr(kind(), part)()


def test_one_image_of_one_position() -> None:
    settings = config(ch_mult=(1, 1))
    encoder, decoder, images = (
        settings.build_encoder(),
        settings.build_decoder(),
        torch.rand(2, 3, 2, 2),
    )
    latents = encoder(images)
    torch.testing.assert_close(encoder(images[:1]), latents[:1])
    torch.testing.assert_close(decoder(latents[:1]), decoder(latents)[:1])


def test_blocks_begin_as_the_identity() -> None:
    x = torch.randn(1, 32, 4, 4)
    assert torch.equal(ResBlock(32, 32)(x), x)
    assert torch.equal(AttentionBlock(32)(x), x)


def test_downsampling_looks_over_the_lower_right_edge() -> None:
    block = Downsample(1, 1)
    nn.init.ones_(block.conv.weight)
    nn.init.zeros_(block.conv.bias)
    x = torch.arange(16.0).view(1, 1, 4, 4)
    expected = torch.tensor(
        [
            [
                [
                    [x[0, 0, :3, :3].sum(), x[0, 0, :3, 2:].sum()],
                    [x[0, 0, 2:, :3].sum(), x[0, 0, 2:, 2:].sum()],
                ]
            ]
        ]
    )
    assert torch.equal(block(x), expected)


@pytest.mark.parametrize("part", ["build_encoder", "build_decoder"])
def test_gradient_checkpointing_changes_no_number(part: str) -> None:
    torch.manual_seed(0)
    network = getattr(config(), part)()
    saving = copy.deepcopy(network)
    saving.gradient_checkpointing = True
    x = torch.randn(2, 3 if part == "build_encoder" else 4, 8, 8)
    results = []
    for model in (network, saving):
        inputs = x.clone().requires_grad_()
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: (kept.append(t.numel()), t)[1], lambda t: t
        ):
            out = model(inputs)
        out.square().sum().backward()
        assert inputs.grad is not None
        results.append((sum(kept), out, inputs.grad, *[p.grad for p in model.parameters()]))
    (plain, *expected), (saved, *got) = results
    assert saved < plain / 2
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (8, 2)])
def test_folded_upsampling_is_the_plain_one(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    plain = Upsample(6, 6).double()
    folded = copy.deepcopy(plain)
    folded.fold()
    x = torch.randn(2, 6, *size, dtype=torch.float64)
    torch.testing.assert_close(folded(x), plain(x), rtol=1e-12, atol=1e-12)
    assert folded.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(
        folded.bfloat16()(x.bfloat16()).double(), plain(x), rtol=0.1, atol=0.1
    )


def test_spatial_norm_follows_the_quantized_latents() -> None:
    torch.manual_seed(0)
    config = CNNAutoencoderConfig(
        latent_dim=4, ch=32, ch_mult=(1, 2), num_res_blocks=1, norm="spatial", quant_conv_kernel=1
    )
    decoder = config.build_decoder()
    latents = torch.randn(2, 4, 5, 6)
    plain = decoder(latents)
    decoder.gradient_checkpointing = True
    saved = decoder(latents.requires_grad_())
    assert torch.equal(saved, plain)
    saved.sum().backward()
    gradients = [name for name, p in decoder.named_parameters() if p.grad is None]
    assert gradients == []
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if "conv_y" in name or "conv_b" in name:
                parameter.zero_()
        black = decoder(latents)
    assert torch.equal(black, decoder.conv_out.bias[:, None, None].expand(2, -1, 10, 12))
    assert not is_local(config.build_encoder())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"norm_groups": 24}, "multiple of 24"),
        ({"norm": "rms", "norm_groups": 8}, "norm_groups is for norm"),
        ({"video_frames": 3}, "power of two"),
        ({"norm": "spatial", "local_statistics": 4}, "local_statistics"),
    ],
)
def test_settings_of_published_networks_are_checked(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        CNNAutoencoderConfig(ch=32, **settings)
