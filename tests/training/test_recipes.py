"""The recipes that come with smalto are right, and every one of them trains."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

import smalto
from smalto.autoencoders import CNNAutoencoderConfig
from smalto.quantizers import MultiScaleVQConfig
from smalto.training.recipe import change_recipe
from smalto.training.recipe_file import load_recipe
from smalto.training.tokenizer_recipe import TokenizerRecipe
from smalto.training.tokenizer_task import TokenizerTask
from tests.features.test_networks import lpips_state
from tests.training.test_generator_training import make_store, make_tokenizer

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))
NAMES = {
    "photos-f4",
    "photos-f8",
    "photos-simple",
    "photos-vqgan-small",
    "var-small",
    "emoji-var",
    "emoji-tokenizer",
    "emoji-generator",
    "imagenet256-var",
    "imagenet256-vq16",
}

GENERATORS = [path for path in RECIPES if 'kind = "generator"' in path.read_text()]
TOKENIZERS = [path for path in RECIPES if path not in GENERATORS]

of_tokenizers = pytest.mark.parametrize("path", TOKENIZERS, ids=lambda path: path.stem)
of_generators = pytest.mark.parametrize("path", GENERATORS, ids=lambda path: path.stem)


def test_they_are_all_there() -> None:
    assert {path.stem for path in RECIPES} == NAMES


def made_tiny(recipe: TokenizerRecipe, folder: Path) -> TokenizerRecipe:
    """The recipe with narrow networks, few codes and small crops, so that a step takes a second;
    all else as it is.
    """
    settings: dict[str, object] = {"data.batch": 2, "steps": 3}
    if recipe.tokenizer.autoencoder.kind == "cnn":
        settings |= {
            "tokenizer.autoencoder.ch": 32,
            "data.size": 4 * recipe.tokenizer.autoencoder.stride,
        }
    if recipe.tokenizer.quantizer.kind == "multiscale":
        settings |= {
            "tokenizer.quantizer.scales": [1, 2, 4],
            "tokenizer.quantizer.scale.codebook_size": 32,
        }
    else:
        settings |= {"tokenizer.quantizer.codebook_size": 32}
    if recipe.losses.perceptual.network == "lpips-vgg":
        torch.save(lpips_state(), folder / "lpips.pth")
        settings |= {"losses.perceptual.weights": str(folder / "lpips.pth")}
    if recipe.losses.adversarial.weight:
        settings |= {
            "losses.adversarial.start": 1,
            "losses.adversarial.lead": 1,
            "losses.adversarial.width": 8,
        }
        settings |= {"losses.adversarial.layers": 2}
    return change_recipe(recipe, settings)


@of_tokenizers
def test_it_builds_and_takes_steps_at_tiny_size(path: Path, tmp_path: Path) -> None:
    recipe = made_tiny(load_recipe(path), tmp_path)
    images = (
        torch.rand(
            2, 3, recipe.data.size, recipe.data.size, generator=torch.Generator().manual_seed(0)
        )
        * 2
        - 1
    )
    torch.manual_seed(0)
    task = TokenizerTask(recipe.tokenizer.build(), recipe, images)
    before = {name: tensor.clone() for name, tensor in task.tokenizer.state_dict().items()}
    for step in (1, 2):
        metrics = task.train_step(images, step)
    assert "skipped" not in metrics
    assert ("adversarial_gradient" in metrics) == bool(recipe.losses.adversarial.weight)
    assert any(
        not torch.equal(tensor, task.tokenizer.state_dict()[name])
        for name, tensor in before.items()
    )


@of_generators
def test_a_generator_takes_steps_at_tiny_size(path: Path, tmp_path: Path) -> None:
    store = make_store(tmp_path, make_tokenizer())
    settings = {
        "generator.depth": 2,
        "generator.width": 16,
        "generator.num_heads": 2,
        "data.batch": 8,
        "data.tokenizer": str(tmp_path / "tokenizer-of-store"),
        "evaluate.samples": 0,
        "steps": 3,
    }
    trained = smalto.train(store, load_recipe(path, settings), out=tmp_path / "run")
    assert trained.metrics is not None
    assert trained.metrics.held_out.num_rows > 0


def test_the_simple_recipe_shows_every_setting() -> None:
    shown = tomllib.loads((RECIPES[0].parent / "photos-simple.toml").read_text())

    def keys(table: dict[str, Any], prefix: str = "") -> set[str]:
        return {
            key
            for name, value in table.items()
            for key in (
                keys(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name}
            )
        }

    assert keys(shown) == keys(TokenizerRecipe().model_dump(mode="json"))


UNCITED = (
    "seed",
    "kind",
    "in_channels",
    "latent_dim",
    "lead",
    "ramp",
    "flip",
    "revive_below",
)  # ours, or said on another line


@pytest.mark.parametrize("name", ["imagenet256-var", "imagenet256-vq16"])
def test_every_metric_for_gpus_cites_its_source(name: str) -> None:
    text = (RECIPES[0].parent / f"{name}.toml").read_text()
    for line in text[: text.index("[checkpoint]")].splitlines():
        if "=" in line and not line.startswith("#"):
            cited = any(
                mark in line for mark in ("# [L]", "# [V]", "# [T]", "# ours", "# written by")
            )
            assert cited or line.startswith(UNCITED), line


def test_vars_recipe_has_vars_sizes() -> None:
    config = json.loads(
        (Path(__file__).parents[1] / "golden" / "vae_ch160v4096z32.json").read_text()
    )["config"]
    recipe = load_recipe(RECIPES[0].parent / "imagenet256-var.toml")
    quantizer, autoencoder = recipe.tokenizer.quantizer, recipe.tokenizer.autoencoder
    assert isinstance(quantizer, MultiScaleVQConfig)
    assert isinstance(autoencoder, CNNAutoencoderConfig)
    assert [height for height, _ in quantizer.grids] == config["v_patch_nums"]
    assert (quantizer.scale.codebook_size, quantizer.latent_dim) == (
        config["vocab_size"],
        config["z_channels"],
    )
    assert (autoencoder.ch, quantizer.num_phis) == (config["ch"], config["share_quant_resi"])
