"""VQGAN of taming-transformers and of LlamaGen: the same weights give the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import smalto
from smalto.autoencoders import CNNAutoencoderConfig
from smalto.autoencoders.layers import Downsample, ResBlock
from smalto.core.errors import ConfigError, DataError, InputError
from smalto.core.progress import Progress
from smalto.interop import llamagen, taming, var
from smalto.interop.open_tokenizer import open_tokenizer
from smalto.quantizers import LogitVQConfig, MultiScaleVQConfig, VectorQuantizerConfig
from smalto.tokenizer import ImageTokenizer, TokenizerConfig
from tests.parity.golden import near, read, weights

PROJECTS = {"taming_a": taming, "llamagen_a": llamagen}
both = pytest.mark.parametrize("name", PROJECTS)


def loaded(name: str) -> tuple[ImageTokenizer, dict[str, Tensor], dict[str, Tensor]]:
    config, tensors = read(name)
    state = weights(config)
    return PROJECTS[name].load_tokenizer(state), tensors, state


@both
def test_tokens_and_images(name: str) -> None:
    tokenizer, expected, _ = loaded(name)
    with torch.no_grad():
        tokens = tokenizer.encode(expected["image"])
        layout = tokenizer.layout(64, 96)
        image = tokenizer.decode(tokens, layout, clamp=False)
    assert torch.equal(tokens, expected["indices"].view(1, -1))
    near(image, expected["reconstruction"])


def test_latents_and_codes() -> None:
    tokenizer, expected, _ = loaded("taming_a")
    with torch.no_grad():
        near(tokenizer.encoder(expected["image"]), expected["feature"])
        quantized = tokenizer.quantize.decode(expected["indices"], tokenizer.layout(64, 96))
    near(quantized, expected["quantized"])
    tokenizer, expected, _ = loaded("llamagen_a")
    with torch.no_grad():
        latents = tokenizer.encoder(expected["image"]).movedim(1, -1)
        near(tokenizer.quantize.project_in(latents).movedim(-1, 1), expected["feature"])
        codes = tokenizer.quantize.embed(expected["indices"].view(1, -1))
    near(codes.movedim(2, 1).view(1, 8, 4, 6), expected["quantized"])


@both
def test_there_and_back_is_bitwise_the_same(name: str, tmp_path: Path) -> None:
    tokenizer, _, state = loaded(name)
    project = PROJECTS[name]
    back = project.tokenizer_state_dict(tokenizer)
    assert back.keys() == state.keys()
    for key, tensor in state.items():
        assert torch.equal(back[key], tensor), key
    tokenizer.save(tmp_path / "own")
    own = smalto.load(tmp_path / "own")
    again = project.tokenizer_state_dict(own)
    assert all(torch.equal(again[key], tensor) for key, tensor in state.items())


def test_weights_nested_beside_those_of_a_loss(tmp_path: Path) -> None:
    _, _, state = loaded("taming_a")
    beside = {"loss.discriminator.main.0.weight": torch.zeros(4), "model_ema.decay": torch.zeros(1)}
    torch.save({"state_dict": state | beside, "global_step": 7}, tmp_path / "last.ckpt")
    tokenizer = taming.load_tokenizer(tmp_path / "last.ckpt")
    assert torch.equal(tokenizer.quantize.embedding.weight, state["quantize.embedding.weight"])
    _, _, state = loaded("llamagen_a")
    torch.save({"model": state, "steps": 7}, tmp_path / "vq.pt")
    assert llamagen.load_tokenizer(tmp_path / "vq.pt").quantize.codebook_size == 256


def test_averages_are_preferred_if_the_project_evaluates_with_them(tmp_path: Path) -> None:
    _, _, state = loaded("llamagen_a")
    other = {key: tensor + 1 for key, tensor in state.items()}
    torch.save({"model": other, "ema": state, "discriminator": {}}, tmp_path / "vq.pt")
    expected = llamagen.load_tokenizer(state).fingerprint()
    messages = Messages()
    assert open_tokenizer(tmp_path / "vq.pt", messages).fingerprint() == expected
    assert messages.texts[0].endswith("16 x 16 pixels per token; weights of ['ema']")
    torch.save({"model": other, "teacher": state}, tmp_path / "two.pt")
    with pytest.raises(DataError, match=r"2 sets of weights .* \['model'\]; \['teacher'\]"):
        llamagen.load_tokenizer(tmp_path / "two.pt")


class Messages(Progress):
    """Keeps what a job reports."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def message(self, text: str) -> None:
        self.texts.append(text)


def gumbel(code_dim: int | None = None) -> ImageTokenizer:
    torch.manual_seed(0)
    autoencoder = CNNAutoencoderConfig(
        latent_dim=8,
        ch=32,
        ch_mult=(1, 2),
        num_res_blocks=1,
        quant_conv_kernel=0 if code_dim else 1,
    )
    quantizer = LogitVQConfig(codebook_size=32, latent_dim=8, code_dim=code_dim)
    return TokenizerConfig(autoencoder=autoencoder, quantizer=quantizer).build().eval()


@pytest.mark.parametrize("code_dim", [None, 4])
def test_gumbel_takes_the_highest_logit(code_dim: int | None, tmp_path: Path) -> None:
    tokenizer = gumbel(code_dim)
    state = taming.tokenizer_state_dict(tokenizer)
    torch.save({"state_dict": state | {"loss.x": torch.zeros(1)}}, tmp_path / "last.ckpt")
    again = smalto.load(tmp_path / "last.ckpt")
    assert again.fingerprint() == tokenizer.fingerprint()
    images = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        latents = again.encoder(images)
        if code_dim:  # behind quant_conv, which is outside of the encoder here
            weight, bias = state["quant_conv.weight"], state["quant_conv.bias"]
            latents = torch.nn.functional.conv2d(latents, weight, bias)
        # GumbelQuantize.forward of taming, which adds noise in training only
        proj = state["quantize.proj.weight"], state["quantize.proj.bias"]
        expected = torch.nn.functional.conv2d(latents, *proj).argmax(dim=1).flatten(1)
        tokens = again.encode(images)
    assert tokens.unique().numel() >= 6
    assert torch.equal(tokens, expected)
    codes = again.quantize.decode(tokens, again.layout(32, 48))
    values = state["quantize.embed.weight"][tokens]
    if code_dim:
        weight, bias = state["post_quant_conv.weight"], state["post_quant_conv.bias"]
        values = torch.nn.functional.linear(values, weight[:, :, 0, 0], bias)
    near(codes.permute(0, 2, 3, 1).flatten(1, 2), values)
    with pytest.raises(ConfigError, match=r'quantizer\.kind .logit.; expected "cnn" and "vector"'):
        llamagen.tokenizer_state_dict(tokenizer)


def small(**changes: Any) -> ImageTokenizer:
    """A tokenizer of another shape than the golden ones."""
    torch.manual_seed(0)
    settings = {
        "latent_dim": 4,
        "ch": 32,
        "ch_mult": (1, 2),
        "num_res_blocks": 1,
        "attention": True,
        "quant_conv_kernel": 1,
    }
    return TokenizerConfig(
        autoencoder=CNNAutoencoderConfig(**(settings | changes)),  # type: ignore[arg-type]
        quantizer=VectorQuantizerConfig(codebook_size=16, latent_dim=4),
    ).build()


@pytest.mark.parametrize(
    "changes",
    [
        {"attention": False},
        {"attention_levels": ()},  # the middle alone, as in latent-diffusion's f4
        {"attention_levels": (0,)},
        {"attention_levels": (0, 1)},
        {"ch_mult": (1, 1, 2, 4), "num_res_blocks": 2},
    ],
)
def test_networks_are_read_off_keys_and_shapes(changes: dict[str, Any]) -> None:
    tokenizer = small(**changes)
    again = taming.load_tokenizer(taming.tokenizer_state_dict(tokenizer))
    images = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        own, other = tokenizer.eval()(images), again(images)
    assert torch.equal(own.reconstruction, other.reconstruction)
    assert torch.equal(own.indices, other.indices)


def test_what_does_not_fit_is_named() -> None:
    _, _, state = loaded("taming_a")
    key = "encoder.mid.attn_1.k.weight"
    with pytest.raises(ConfigError, match=r"attn_1\.k\.weight' is missing \(expected \[128, 128"):
        taming.load_tokenizer({k: v for k, v in state.items() if k != key})
    with pytest.raises(ConfigError, match=r"attn_1\.k\.weight' is \[3\], expected \[128, 128"):
        taming.load_tokenizer(state | {key: torch.zeros(3)})
    with pytest.raises(ConfigError, match=r"'extra' .* is not expected"):
        taming.load_tokenizer(state | {"extra": torch.zeros(3)})
    with pytest.raises(DataError, match="tokenizer of LlamaGen"):
        llamagen.load_tokenizer(state)
    with pytest.raises(InputError, match="expected an ImageTokenizer"):
        taming.tokenizer_state_dict("photos-f8")  # type: ignore[arg-type]


def test_networks_that_a_project_does_not_have_are_refused() -> None:
    photos = smalto.load("photos-f8")
    for project in (taming, llamagen):
        with pytest.raises(ConfigError, match=r"norm 'rms'.*shortcuts True.*patch 2"):
            project.tokenizer_state_dict(photos)
    with pytest.raises(ConfigError, match=r"quantizer\.metric 'l2'; expected 'cosine'"):
        llamagen.tokenizer_state_dict(small())
    scales = MultiScaleVQConfig(
        scales=[1, 2, 4], scale=VectorQuantizerConfig(codebook_size=16, latent_dim=4)
    )
    for changes, says in (
        ({"norm": "rms"}, "autoencoder.norm 'rms'"),
        ({"attention_levels": (0,)}, "attention_levels"),
        ({"quant_conv_kernel": 0}, "quant_conv_kernel 0"),
    ):
        config = CNNAutoencoderConfig(
            latent_dim=4, ch=32, ch_mult=(1, 2), num_res_blocks=1, **changes
        )
        with pytest.raises(ConfigError, match=says):
            var.tokenizer_state_dict(TokenizerConfig(autoencoder=config, quantizer=scales).build())


def test_levels_of_attention_are_checked() -> None:
    for levels, attention in (((2,), True), ((1, 0), True), ((0, 0), True), ((), False)):
        with pytest.raises(ValueError, match="attention_levels"):
            CNNAutoencoderConfig(
                ch=32, ch_mult=(1, 2), attention=attention, attention_levels=levels
            )


def test_details_that_ports_change_without_a_word() -> None:
    """Epsilon, one-sided padding, activation, the order of quant_conv, and what beta weighs."""
    tokenizer = small().eval()
    norms = [m for m in tokenizer.modules() if isinstance(m, torch.nn.GroupNorm)]
    assert {norm.eps for norm in norms} == {1e-6}
    assert {norm.num_groups for norm in norms} == {32}
    down = Downsample(1, 1)
    with torch.no_grad():
        down.conv.weight.fill_(1)
        down.conv.bias.zero_()
        taps = down(torch.ones(1, 1, 4, 4))[0, 0]
    assert taps.tolist() == [[9, 6], [6, 4]]  # zeros at the right and at the bottom only
    steps = [s for s in tokenizer.encoder.steps() if not isinstance(s, torch.nn.Identity)]
    assert steps[-2:] == [tokenizer.encoder.conv_out, tokenizer.encoder.quant_conv]
    assert next(tokenizer.decoder.steps()) is tokenizer.decoder.post_quant_conv
    block, x = ResBlock(32, 32), torch.randn(1, 32, 4, 4)
    with torch.no_grad():
        block.conv2.weight.normal_()
        h = block.conv1(block.norm1(x) * torch.sigmoid(block.norm1(x)))
        h = block.conv2(block.norm2(h) * torch.sigmoid(block.norm2(h)))
        near(block(x), x + h)
    # taming's own default (legacy) has beta at the other term: mse(sg[q], z) + beta mse(q, sg[z])
    latents = torch.randn(1, 4, 2, 2, requires_grad=True)
    out = tokenizer.quantize(latents)
    (gradient,) = torch.autograd.grad(out.loss, latents)
    near(gradient, 0.25 * 2 * (latents - out.quantized).detach() / latents.numel())
