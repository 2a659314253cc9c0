"""VAR's transformers: the same weights give the same logits, tokens and images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

import smalto
from smalto.core.errors import ConfigError, DataError
from smalto.generator import Generator, GeneratorConfig
from smalto.generator import load_generator as load_folder
from smalto.generator.transformer import Transformer
from smalto.interop.var import generator_state_dict, load_generator
from smalto.interop.var_generator import buffers, generator_names
from smalto.tokenizer import ImageTokenizer
from tests.conftest import smalto_command
from tests.parity.golden import GOLDEN, near, read, weights
from tests.parity.test_var import loaded as loaded_tokenizer

both = pytest.mark.parametrize("name", ["a", "b"])
PUBLISHED = json.loads((GOLDEN / "var_transformers.json").read_text())


def loaded(name: str) -> tuple[Generator, dict[str, Any], dict[str, Tensor]]:
    tokenizer, _, _ = loaded_tokenizer(name)
    config, tensors = read(f"var_transformer_{name}")
    return load_generator(weights(config), tokenizer, config["num_heads"]), config, tensors


@both
def test_logits(name: str) -> None:
    generator, config, expected = loaded(name)
    blocks = [expected[f"idx.{k}"] for k in range(len(config["patch_nums"]))]
    inputs = generator.tokenizer.idxBl_to_var_input(blocks)
    near(generator(expected["label"], inputs), expected["logits"])


@both
def test_greedy_images(name: str) -> None:
    generator, config, expected = loaded(name)
    samples = generator.generate(expected["label"], guidance=config["cfg"], top_k=1)
    for k, block in enumerate(samples.idx_Bl):
        assert torch.equal(block, expected[f"greedy.idx.{k}"])
    near(samples.images / 2 + 0.5, expected["greedy.image"])


@both
def test_there_and_back_is_bitwise_the_same(name: str, tmp_path: Path) -> None:
    generator, config, _ = loaded(name)
    state = generator_state_dict(generator)
    assert {key: list(tensor.shape) for key, tensor in state.items()} == config["shapes"]
    for key, tensor in weights(config).items():
        assert torch.equal(state[key], tensor)
    nested = {"epoch": 3, "trainer": {"var_wo_ddp": state, "vae_local": {}}}
    torch.save(nested, tmp_path / "ar-ckpt-last.pth")
    again = load_generator(
        tmp_path / "ar-ckpt-last.pth", generator.tokenizer, generator.config.num_heads
    )
    assert again.config == generator.config
    for own, other in zip(
        again.state_dict().values(), generator.state_dict().values(), strict=True
    ):
        assert torch.equal(own, other)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_keys_and_shapes(name: str) -> None:
    published = PUBLISHED[name]["config"]
    config = GeneratorConfig(
        grids=tuple((side, side) for side in published["patch_nums"]),
        codebook_size=4096,
        code_dim=32,
        num_classes=published["num_classes"],
        depth=published["depth"],
        width=published["embed_dim"],
        num_heads=published["num_heads"],
        shared_adaln=published["shared_aln"],
        l2_attention=published["attn_l2_norm"],
    )
    with torch.device("meta"):
        transformer = Transformer(config)
    own = transformer.state_dict()
    names = generator_names(transformer)
    shapes = {name: list(own[key].shape) for key, name in names.items()}
    shapes |= {key: list(tensor.shape) for key, tensor in buffers(config).items()}
    assert shapes == PUBLISHED[name]["shapes"]


def test_buffers_are_those_of_var() -> None:
    config = GeneratorConfig(
        grids=((1, 1), (2, 2), (3, 3)), codebook_size=4, code_dim=2, depth=1, width=4, num_heads=1
    )
    d = torch.cat([torch.full((n * n,), k) for k, n in enumerate((1, 2, 3))]).view(1, 14, 1)
    found = buffers(config)
    assert torch.equal(found["lvl_1L"], d[..., 0])
    assert found["lvl_1L"].dtype == torch.int64
    mask = torch.where(d >= d.transpose(1, 2), 0.0, -torch.inf)
    assert torch.equal(found["attn_bias_for_masking"], mask[None])


def changed(**tensors: Tensor | None) -> dict[str, Tensor]:
    """The weights of transformer a, with some replaced, or removed if None."""
    config, _ = read("var_transformer_a")
    state = weights(config) | {key.replace("__", "."): value for key, value in tensors.items()}
    return {key: value for key, value in state.items() if value is not None}


@pytest.mark.parametrize(
    ("state", "says"),
    [
        (changed(head__bias=None), "'head.bias' is missing"),
        (changed(more=torch.zeros(3)), r"'more' \[3\] is not expected"),
        (changed(head__bias=torch.zeros(3)), r"'head.bias' is \[3\], expected \[256\]"),
        (changed(lvl_1L=torch.zeros(1, 30)), "'lvl_1L' differs"),
        (changed(pos_1LC=torch.zeros(1, 14, 64)), "14 positions; the tokenizer's scales"),
        (changed(head__bias=torch.full((256,), torch.nan)), "NaN"),
    ],
)
def test_other_weights_are_refused(state: dict[str, Tensor], says: str) -> None:
    tokenizer, _, _ = loaded_tokenizer("a")
    with pytest.raises(ConfigError, match=says):
        load_generator(state, tokenizer)


def test_what_is_not_a_transformer_is_refused(tmp_path: Path) -> None:
    tokenizer, config, _ = loaded_tokenizer("a")
    with pytest.raises(DataError, match="transformer of VAR"):
        load_generator(weights(config), tokenizer)
    with pytest.raises(ConfigError, match="4 heads"):
        load_generator(changed(), tokenizer, num_heads=2)
    safetensors.torch.save_file(changed(), tmp_path / "var.safetensors")
    assert load_generator(tmp_path / "var.safetensors", tokenizer).config.num_heads == 4


def test_a_tokenizer_without_scales_is_refused(small: ImageTokenizer) -> None:
    with pytest.raises(ConfigError, match="multi-scale"):
        load_generator(changed(), small)


@pytest.fixture
def small() -> ImageTokenizer:
    return smalto.SimpleVQVAE()


def test_the_command_line_converts_both_ways(tmp_path: Path) -> None:
    generator, config, _ = loaded("b")
    generator.tokenizer.save(tmp_path / "tokenizer")
    torch.save(weights(config), tmp_path / "var.pth")
    done = smalto_command(
        *("convert", tmp_path / "var.pth", "--to", "smalto", "--tokenizer", tmp_path / "tokenizer"),
        *("--num-heads", config["num_heads"], "--out", tmp_path / "generator"),
    )
    assert "2 blocks of width 96, 5 classes, scales 1x1 + 2x2 + 3x3" in done.stdout
    again = load_folder(tmp_path / "generator")
    first = generator.generate([1], seeds=[1])
    assert torch.equal(again.generate([1], seeds=[1]).images, first.images)
    done = smalto_command("convert", tmp_path / "generator", "--out", tmp_path / "back.pth")
    assert "VAR(vae, depth=2, embed_dim=96, num_heads=3, num_classes=5" in done.stdout
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert all(torch.equal(back[key], tensor) for key, tensor in weights(config).items())
    wrong = smalto_command(
        *("convert", tmp_path / "var.pth", "--to", "smalto", "--out", tmp_path / "x"), check=False
    )
    assert wrong.returncode == 1
    assert "--tokenizer TOKENIZER" in wrong.stderr
    with pytest.raises(ConfigError, match="--tokenizer"):
        smalto.convert(tmp_path / "var.pth", tmp_path / "x", "smalto", num_heads=3)
