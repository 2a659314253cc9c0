"""ImageTokenizer and SimpleVQVAE: the contract, and every fault of the published sketch as a test
that would fail with it.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import smalto
from smalto.autoencoders import CNNAutoencoderConfig, SimpleAutoencoderConfig
from smalto.core.errors import ConfigError, InputError, RunError
from smalto.core.layout import TokenLayout
from smalto.quantizers import (
    MultiScaleVQConfig,
    ProductVQConfig,
    ProjectedCodebook,
    ResidualVQConfig,
    VectorQuantizerConfig,
)
from smalto.tokenizer import ImageTokenizer, TokenizerConfig


@pytest.fixture
def vqvae() -> smalto.SimpleVQVAE:
    torch.manual_seed(0)
    return smalto.SimpleVQVAE(vocab_size=16, embedding_dim=8, hidden_dim=8)


@pytest.fixture
def tokenizer() -> smalto.ImageTokenizer:
    torch.manual_seed(0)
    return smalto.default_tokenizer(32)


def test_the_published_example_runs() -> None:
    vqvae = smalto.SimpleVQVAE(vocab_size=16, embedding_dim=64)
    reconstruction, vq_loss, indices = vqvae(torch.randn(1, 3, 64, 64))
    assert reconstruction.shape == (1, 3, 64, 64)
    assert vq_loss.shape == ()
    assert bool(vq_loss.isfinite())
    assert indices.shape == (256,)
    blocks = vqvae.img_to_idxBl(torch.randn(2, 3, 64, 96))
    assert vqvae.idxBl_to_var_input(blocks).shape == (2, 16 * 24, 64)


def test_names_and_state_keys_are_the_published_ones(vqvae: smalto.SimpleVQVAE) -> None:
    assert (vqvae.vocab_size, vqvae.embedding_dim, vqvae.hidden_dim) == (16, 8, 8)
    layers = [
        f"{part}.{number}.{name}"
        for part in ("encoder", "decoder")
        for number in (0, 2)
        for name in ("weight", "bias")
    ]
    assert sorted(vqvae.state_dict()) == sorted([*layers, "quantize.embedding.weight"])
    assert torch.equal(vqvae.get_codebook(), vqvae.quantize.embedding.weight)


# Faults of the published sketch (design 3.3).


def test_sketch_fault_losses_compare_each_vector_with_its_own_code(
    vqvae: smalto.SimpleVQVAE,
) -> None:
    # The sketch compared [B,C,H,W] with [B,H,W,C]. Latents that are exactly codes have no loss, on
    # any shape.
    codes = vqvae.quantize.decode(torch.randint(16, (2, 15)), TokenLayout.single(3, 5))
    assert vqvae.quantize(codes).loss.item() == 0


def test_sketch_fault_straight_through_keeps_channels_in_place(vqvae: smalto.SimpleVQVAE) -> None:
    latents = torch.randn(1, 8, 3, 5, requires_grad=True)
    (gradient,) = torch.autograd.grad(vqvae.quantize(latents).quantized[0, 2, 1, 4], latents)
    assert gradient.nonzero().tolist() == [[0, 2, 1, 4]]


def test_sketch_fault_encoder_is_not_confined_to_one_orthant(vqvae: smalto.SimpleVQVAE) -> None:
    images = torch.randn(2, 3, 32, 32)
    assert float(vqvae.encoder(images).detach().min()) < 0
    sketch = smalto.SimpleVQVAE(encoder_relu=True)
    assert isinstance(sketch.encoder[3], torch.nn.ReLU)
    assert float(sketch.encoder(images).detach().min()) == 0


def test_sketch_fault_codes_do_not_start_in_a_tiny_ball() -> None:
    codes = smalto.SimpleVQVAE(512).get_codebook().detach()
    assert float(codes.norm(dim=1).mean()) == pytest.approx(1, abs=0.1)  # ±1/512 would be 0.009


def test_sketch_fault_blocks_hold_the_whole_index_map(vqvae: smalto.SimpleVQVAE) -> None:
    images = torch.randn(2, 3, 36, 20)  # 9 x 5 tokens: the halves differ
    blocks = vqvae.img_to_idxBl(images)
    assert [block.shape for block in blocks] == [(2, 20), (2, 25)]
    assert torch.equal(torch.cat(blocks, 1), vqvae.encode(images))


def test_sketch_fault_images_need_not_be_square(vqvae: smalto.SimpleVQVAE) -> None:
    images = torch.randn(1, 3, 16, 40)
    assert vqvae(images).reconstruction.shape == images.shape
    blocks = vqvae.img_to_idxBl(images)
    assert vqvae.idxBl_to_img(blocks, patch_hws=[(2, 10), (2, 10)]).shape == images.shape


def test_sketch_fault_no_one_hot_matrix() -> None:
    from tests.search.test_nearest import LargestTensor

    vqvae = smalto.SimpleVQVAE(vocab_size=4096, embedding_dim=4, hidden_dim=4)
    images = torch.randn(1, 3, 256, 256)
    with LargestTensor() as monitor:
        vqvae(images).vq_loss.backward()
    assert monitor.elements < 64 * 64 * 4096 / 10


# Blocks.


def test_diagonal_blocks_are_the_two_quadrants_and_cannot_be_decoded(
    vqvae: smalto.SimpleVQVAE,
) -> None:
    images = torch.randn(2, 3, 24, 16)
    index_map = vqvae.encode(images).view(2, 6, 4)
    blocks = vqvae.img_to_idxBl(images, blocks="diagonal")
    assert torch.equal(blocks[0], index_map[:, :3, :2].flatten(1))
    assert torch.equal(blocks[1], index_map[:, 3:, 2:].flatten(1))
    assert vqvae.idxBl_to_var_input(blocks).shape == (2, 12, 8)
    with pytest.raises(InputError, match="half of the image"):
        vqvae.idxBl_to_img(blocks, patch_hws=[(3, 2), (3, 2)])


def test_one_block_for_other_tokenizers(tokenizer: smalto.ImageTokenizer) -> None:
    images = torch.randn(2, 3, 16, 24)
    (block,) = tokenizer.img_to_idxBl(images)
    assert torch.equal(block, tokenizer.encode(images))


def test_var_input_is_the_codes_in_order(tokenizer: smalto.ImageTokenizer) -> None:
    images = torch.randn(2, 3, 16, 24)
    blocks = tokenizer.img_to_idxBl(images, blocks="halves")
    torch.testing.assert_close(
        tokenizer.idxBl_to_var_input(blocks), tokenizer.get_codebook()[torch.cat(blocks, 1)]
    )
    assert not blocks[0].requires_grad


def test_square_maps_decode_without_patch_hws(vqvae: smalto.SimpleVQVAE) -> None:
    images = torch.rand(2, 3, 20, 20) * 2 - 1
    expected = vqvae.decode(vqvae.encode(images), vqvae.layout(20, 20))
    assert torch.equal(vqvae.idxBl_to_img(vqvae.img_to_idxBl(images)), expected)
    assert torch.equal(vqvae.idxBl_to_img(vqvae.img_to_idxBl(images, blocks="whole")), expected)


@pytest.mark.parametrize(
    ("lengths", "patch_hws"),
    [
        ([6, 6], None),
        ([10, 6], None),
        ([6, 6], [(2, 3)]),
        ([6, 6], [(2, 3), (3, 2)]),
        ([6, 6], [(2, 3), (2, 4)]),
        ([0, 0], [(0, 3), (0, 3)]),
    ],
)
def test_blocks_that_do_not_fit_ask_for_patch_hws(
    vqvae: smalto.SimpleVQVAE, lengths: list[int], patch_hws: Any
) -> None:
    blocks = [torch.zeros(1, n, dtype=torch.int64) for n in lengths]
    with pytest.raises(InputError, match="patch_hws"):
        vqvae.idxBl_to_img(blocks, patch_hws)


def test_a_map_of_one_row_has_an_empty_upper_half(vqvae: smalto.SimpleVQVAE) -> None:
    images = torch.randn(1, 3, 4, 12)
    blocks = vqvae.img_to_idxBl(images)
    assert [block.shape[1] for block in blocks] == [0, 3]
    assert vqvae.idxBl_to_img(blocks, [(0, 3), (1, 3)]).shape == images.shape


@pytest.mark.parametrize(
    "blocks",
    [
        torch.zeros(1, 4),
        [],
        [torch.zeros(1, 4), torch.zeros(2, 4)],
        [torch.zeros(4)],
        None,
        [[1, 2]],
    ],
)
def test_what_is_no_list_of_blocks_is_named(vqvae: smalto.SimpleVQVAE, blocks: Any) -> None:
    with pytest.raises(InputError, match=r"idx_Bl must be a list|every token block must be"):
        vqvae.idxBl_to_var_input(blocks)


# Encoding and decoding.


def test_clamping(vqvae: smalto.SimpleVQVAE) -> None:
    with torch.no_grad():
        vqvae.decoder[2].bias.fill_(3)
    images = torch.rand(1, 3, 16, 16)
    tokens, layout = vqvae.encode(images), vqvae.layout(16, 16)
    assert float(vqvae.decode(tokens, layout).detach().max()) == 1
    raw = vqvae.decode(tokens, layout, clamp=False)
    assert float(raw.detach().max()) > 1
    torch.testing.assert_close(vqvae(images).reconstruction, raw)


def test_an_empty_batch_is_finite_and_empty(tokenizer: smalto.ImageTokenizer) -> None:
    images = torch.zeros(0, 3, 16, 24)
    out = tokenizer(images)
    assert out.reconstruction.shape == images.shape
    assert out.indices.shape == (0,)
    assert bool(out.vq_loss.isfinite())
    assert tokenizer.encode(images).shape == (0, 24)
    assert tokenizer.idxBl_to_img(tokenizer.img_to_idxBl(images), [(4, 6)]).shape == images.shape


def test_any_number_of_channels() -> None:
    tokenizer = TokenizerConfig(
        autoencoder=SimpleAutoencoderConfig(in_channels=5, latent_dim=4, hidden_dim=4),
        quantizer=VectorQuantizerConfig(codebook_size=8, latent_dim=4),
    ).build()
    images = torch.randn(2, 5, 8, 12)
    assert tokenizer(images).reconstruction.shape == images.shape


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (torch.zeros(3, 16, 16), r"images\[None\]"),
        (torch.zeros(1, 1, 16, 16), r"got torch.float32 \[1, 1, 16, 16\]; .*\[B, 3, H, W\]"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), r"images.float\(\) / 127.5 - 1"),
        (
            torch.zeros(1, 3, 18, 16),
            "got images of 18 x 16 pixels; .* multiples of 4.* for example to 16 x 16",
        ),
        (torch.zeros(1, 3, 16, 0), "got images of 16 x 0 pixels; .* multiples of 4"),
        (
            torch.zeros(1, 3, 16, 16, dtype=torch.float64),
            r"got images of torch.float64; the tokenizer is torch.float32",
        ),
        (torch.zeros(1, 3, 16, 16).numpy(), "must be a tensor"),
    ],
)
def test_wrong_images_say_what_to_do(vqvae: smalto.SimpleVQVAE, images: Tensor, says: str) -> None:
    for call in (vqvae, vqvae.encode, vqvae.img_to_idxBl):
        with pytest.raises(ValueError, match=says):
            call(images)


def test_tokens_of_another_layout_or_tokenizer_are_named(vqvae: smalto.SimpleVQVAE) -> None:
    with pytest.raises(ValueError, match=r"\[B, 16\] for this layout; got torch.int64 \[1, 15\]"):
        vqvae.decode(torch.zeros(1, 15, dtype=torch.int64), vqvae.layout(16, 16))
    with pytest.raises(ValueError, match=r"in \[0, 16\); got values from 0 to 16"):
        vqvae.decode(torch.tensor([[0, 16, 1, 2]]), vqvae.layout(8, 8))
    with pytest.raises(ValueError, match="one grid"):
        vqvae.decode(torch.zeros(1, 5, dtype=torch.int64), TokenLayout(((1, 1), (2, 2))))


# Files.


@pytest.mark.parametrize(
    "make",
    [lambda: smalto.SimpleVQVAE(16, 8, 8, encoder_relu=True), lambda: smalto.default_tokenizer(32)],
)
def test_saved_and_loaded_is_the_same(make: Any, tmp_path: Path) -> None:
    tokenizer = make().eval()
    tokenizer.save(tmp_path / "t")
    loaded = smalto.load(tmp_path / "t")
    assert type(loaded) is type(tokenizer)
    assert loaded.config == tokenizer.config
    assert loaded.fingerprint() == tokenizer.fingerprint()
    assert all(
        torch.equal(value, tokenizer.state_dict()[name])
        for name, value in loaded.state_dict().items()
    )
    assert sorted(p.name for p in (tmp_path / "t").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_loading_does_not_import_the_compiler(tmp_path: Path) -> None:
    smalto.SimpleVQVAE(8).save(tmp_path / "t")
    code = (
        f"import sys, smalto; smalto.load({str(tmp_path / 't')!r}); "
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_precision_of_the_weights_is_kept(
    tokenizer: smalto.ImageTokenizer, tmp_path: Path, dtype: torch.dtype
) -> None:
    narrow = tokenizer.to(dtype)
    narrow.save(tmp_path)
    loaded = smalto.load(tmp_path)
    assert loaded.fingerprint() == narrow.fingerprint()
    assert not loaded.quantize.embedding.weight.requires_grad
    assert loaded.encoder[0].weight.requires_grad


def test_equal_models_are_equal_files(tokenizer: smalto.ImageTokenizer, tmp_path: Path) -> None:
    for name in ("a", "b"):
        tokenizer.save(tmp_path / name)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_the_fingerprint_tells_weights_and_settings_apart(vqvae: smalto.SimpleVQVAE) -> None:
    first = vqvae.fingerprint()
    with torch.no_grad():
        vqvae.quantize.embedding.weight[3, 2] += 1e-6
    assert vqvae.fingerprint() != first
    torch.manual_seed(5)
    a = smalto.SimpleVQVAE(16, 8, 8)
    torch.manual_seed(5)
    b = smalto.SimpleVQVAE(16, 8, 8, encoder_relu=True)  # the same weights, other tokens
    assert a.fingerprint() != b.fingerprint()


def test_what_cannot_be_loaded_is_named(vqvae: smalto.SimpleVQVAE, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="does not exist"):
        smalto.load(tmp_path / "nowhere")
    with pytest.raises(RunError, match="does not hold a tokenizer"):
        smalto.load(tmp_path)
    vqvae.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_dimm": 8}))
    with pytest.raises(ConfigError, match="unknown key 'hidden_dimm': did you mean 'hidden_dim'"):
        smalto.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"format_version": 99}))
    with pytest.raises(ConfigError, match="format_version 99"):
        smalto.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 17}))
    with pytest.raises(RunError, match=r"does not fit config\.json"):
        smalto.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(
        (tmp_path / "model.safetensors").read_bytes()[:500]
    )
    with pytest.raises(RunError, match="cannot be read"):
        smalto.load(tmp_path)


def test_parts_that_do_not_fit_are_an_error() -> None:
    with pytest.raises(ValueError, match="must be equal"):
        TokenizerConfig(quantizer=VectorQuantizerConfig(latent_dim=32))


# Layouts of several grids.


def several_grids(kind: str) -> smalto.ImageTokenizer:
    torch.manual_seed(0)
    if kind == "residual":
        stage = VectorQuantizerConfig(
            codebook_size=20, latent_dim=8, code_dim=4, codebook="projected"
        )
        return TokenizerConfig(
            autoencoder=SMALL, quantizer=ResidualVQConfig(num_stages=3, stage=stage)
        ).build()
    head = VectorQuantizerConfig(codebook_size=20, latent_dim=4, codebook="ema")
    return TokenizerConfig(
        autoencoder=SMALL, quantizer=ProductVQConfig(num_heads=2, head=head)
    ).build()


SMALL = SimpleAutoencoderConfig(latent_dim=8, hidden_dim=8)


@pytest.mark.parametrize("kind", ["residual", "product"])
def test_several_grids_are_several_blocks(kind: str, tmp_path: Path) -> None:
    tokenizer, images = several_grids(kind), torch.rand(2, 3, 16, 24) * 2 - 1
    number = {"residual": 3, "product": 2}[kind]
    layout = tokenizer.layout(16, 24)
    assert layout.grids == ((4, 6),) * number
    blocks = tokenizer.img_to_idxBl(images)
    assert [block.shape for block in blocks] == [(2, 24)] * number
    assert torch.equal(torch.cat(blocks, 1), tokenizer.encode(images))
    assert tokenizer.idxBl_to_var_input(blocks).shape == (2, number * 24, 4)
    reconstruction = tokenizer(images).reconstruction
    decoded = tokenizer.idxBl_to_img(blocks, [(4, 6)] * number, clamp=False)
    assert torch.equal(decoded, reconstruction)
    with pytest.raises(InputError, match="Pass patch_hws"):
        tokenizer.idxBl_to_img(blocks)
    with pytest.raises(InputError, match="splits a single grid"):
        tokenizer.img_to_idxBl(images, blocks="halves")
    square = tokenizer.img_to_idxBl(images[:, :, :, :16])
    assert tokenizer.idxBl_to_img(square).shape == (2, 3, 16, 16)
    tokenizer.save(tmp_path)
    assert torch.equal(smalto.load(tmp_path).encode(images), tokenizer.encode(images))


def test_the_first_blocks_are_a_image_of_the_first_stages() -> None:
    tokenizer, images = several_grids("residual"), torch.rand(2, 3, 16, 16) * 2 - 1
    blocks = tokenizer.img_to_idxBl(images)
    coarse = tokenizer(images, num_stages=2).reconstruction
    assert torch.equal(tokenizer.idxBl_to_img(blocks[:2], clamp=False), coarse)


def test_a_projected_codebook_folds_for_saving(tmp_path: Path) -> None:
    tokenizer, images = several_grids("residual"), torch.rand(2, 3, 16, 16) * 2 - 1
    folded = tokenizer.folded()
    assert any(
        isinstance(module, ProjectedCodebook) for module in tokenizer.modules()
    )  # the original stays
    folded.save(tmp_path)
    loaded = smalto.load(tmp_path)
    assert not any(isinstance(module, ProjectedCodebook) for module in loaded.modules())
    assert torch.equal(loaded.encode(images), tokenizer.encode(images))
    assert torch.equal(loaded(images).reconstruction, tokenizer(images).reconstruction)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_folded_tokenizer_decodes_in_its_own_precision(dtype: torch.dtype) -> None:
    tokenizer = several_grids("residual").to(dtype)
    images = (torch.rand(2, 3, 16, 16) * 2 - 1).to(dtype)
    folded, tokens, layout = tokenizer.folded(), tokenizer.encode(images), tokenizer.layout(16, 16)
    assert torch.equal(folded.encode(images), tokens)
    assert torch.equal(folded.decode(tokens, layout), tokenizer.decode(tokens, layout))
    assert folded.idxBl_to_var_input(tokenizer.img_to_idxBl(images)).dtype == dtype


def small_cnn() -> ImageTokenizer:
    torch.manual_seed(0)
    autoencoder = CNNAutoencoderConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1, latent_dim=8)
    quantizer = MultiScaleVQConfig(
        scales=(1, 2, 4, 8), scale=VectorQuantizerConfig(codebook_size=32, latent_dim=8)
    )
    return TokenizerConfig(autoencoder=autoencoder, quantizer=quantizer).build().eval()


FAST = {"cnn": small_cnn, "simple": lambda: smalto.default_tokenizer(16)}


@pytest.mark.parametrize("make", FAST.values(), ids=FAST)
def test_for_inference_in_float32_gives_the_same_tokens(make: Callable[[], ImageTokenizer]) -> None:
    tokenizer, images = make(), torch.rand(3, 3, 16, 24) * 2 - 1
    fast, state = tokenizer.for_inference(), copy.deepcopy(tokenizer.state_dict())
    tokens, layout = tokenizer.encode(images), tokenizer.layout(16, 24)
    assert torch.equal(fast.encode(images), tokens)
    torch.testing.assert_close(
        fast.decode(tokens, layout), tokenizer.decode(tokens, layout), rtol=1e-4, atol=1e-5
    )
    assert fast.fingerprint() == tokenizer.fingerprint()
    assert not any(p.requires_grad for p in fast.parameters())
    assert all(p.requires_grad for p in tokenizer.encoder.parameters())
    assert all(torch.equal(value, state[name]) for name, value in tokenizer.state_dict().items())


@pytest.mark.parametrize("make", FAST.values(), ids=FAST)
def test_for_inference_in_bf16_searches_in_float32(make: Callable[[], ImageTokenizer]) -> None:
    tokenizer, images = make(), torch.rand(8, 3, 32, 32) * 2 - 1
    fast, layout = tokenizer.for_inference("bf16"), tokenizer.layout(32, 32)
    latents = fast.encoder(images.bfloat16())
    assert latents.dtype == torch.bfloat16
    # Exactly the float32 search of what the bfloat16 encoder gave.
    tokens = fast.encode(images)
    assert torch.equal(tokens, tokenizer.quantize.encode(latents.float()))
    assert float((tokens == tokenizer.encode(images)).float().mean()) > 0.5
    with torch.no_grad():
        decoded, expected = fast.decode(tokens, layout), tokenizer.decode(tokens, layout)
    assert decoded.dtype == torch.float32
    assert float((decoded - expected).abs().max()) < 0.1
    assert fast(images).vq_loss.dtype == torch.float32
    assert fast(images).reconstruction.dtype == torch.float32
    with pytest.raises(InputError, match="Convert with"):
        fast.encode(images.double())
    with pytest.raises(ConfigError, match='expected "float32" or "bf16"'):
        tokenizer.for_inference("float16")  # type: ignore[arg-type]


@torch.no_grad()
def test_images_after_each_scale() -> None:
    tokenizer, images = small_cnn(), torch.rand(2, 3, 16, 24) * 2 - 1
    blocks, grids = tokenizer.img_to_idxBl(images), tokenizer.layout(16, 24).grids
    assert [tuple(block.shape) for block in blocks] == [(2, h * w) for h, w in grids]
    stages = tokenizer.idxBl_to_img(blocks, grids, last_one=False)
    assert len(stages) == 4
    for number, expected in enumerate(stages, start=1):
        assert torch.equal(tokenizer.idxBl_to_img(blocks[:number], grids), expected)
    assert torch.equal(stages[-1], tokenizer(images).reconstruction.clamp(-1, 1))
    assert float(
        tokenizer.idxBl_to_img(blocks, grids, False, clamp=False)[-1].abs().max()
    ) >= float(stages[-1].abs().max())
    square = torch.rand(1, 3, 16, 16)
    own = tokenizer.img_to_idxBl(square)  # the configured scales: no patch_hws needed
    assert torch.equal(
        tokenizer.idxBl_to_img(own[:2]), tokenizer.idxBl_to_img(own, last_one=False)[1]
    )
    assert tokenizer.idxBl_to_var_input(own).shape == (1, 4 + 16 + 64, 8)
    chosen = tokenizer.img_to_idxBl(square, [1, (2, 3), 8])
    assert tokenizer.idxBl_to_img(chosen, [1, (2, 3), 8]).shape == square.shape
    with pytest.raises(InputError, match=r"the configured scales are .* Pass patch_hws"):
        tokenizer.idxBl_to_img(chosen)
    with pytest.raises(InputError, match=r"expected one \(rows, columns\) per block"):
        tokenizer.idxBl_to_img(chosen, [1, 2, 8])
    with pytest.raises(InputError, match="expected integers or pairs"):
        tokenizer.idxBl_to_img(chosen, ["1", 2, 8])  # type: ignore[list-item]


def test_only_multi_scale_tokenizers_have_a_choice_of_grids() -> None:
    tokenizer, images = smalto.default_tokenizer(16), torch.rand(1, 3, 16, 16)
    assert torch.equal(tokenizer.img_to_idxBl(images, [4])[0], tokenizer.encode(images))
    with pytest.raises(InputError, match="no choice of grids"):
        tokenizer.img_to_idxBl(images, [1, 4])
    with pytest.raises(InputError, match="blocks='halves'"):
        tokenizer.img_to_idxBl(images, "halves")  # type: ignore[arg-type]
    assert len(tokenizer.idxBl_to_img([tokenizer.encode(images)], last_one=False)) == 1
