"""Recipes: checked, complete, and helpful about mistakes."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from smalto.core.errors import ConfigError
from smalto.quantizers import ProductVQConfig, ResidualVQConfig
from smalto.training.recipe import change_recipe, parse_setting, recipe_toml
from smalto.training.recipe_file import load_recipe
from smalto.training.tokenizer_recipe import TokenizerRecipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))


def test_written_and_read_is_the_same(tmp_path: Path) -> None:
    recipe = change_recipe(
        TokenizerRecipe(),
        {"data.source": 'a "quoted" \\ path\nü', "tokenizer.quantizer.codebook_size": 99},
    )
    (tmp_path / "r.toml").write_text(recipe_toml(recipe), encoding="utf-8")
    assert load_recipe(tmp_path / "r.toml") == recipe


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_valid(path: Path) -> None:
    load_recipe(path)


def test_photos_simple_holds_the_defaults() -> None:
    assert load_recipe(RECIPES[0].parent / "photos-simple.toml") == TokenizerRecipe()


def test_a_recipe_may_say_only_what_differs(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text("steps = 7\n[optimizer]\nlr = 0.5\n")
    recipe = load_recipe(tmp_path / "r.toml", {"data.batch": 3})
    assert (recipe.steps, recipe.optimizer.lr, recipe.data.batch) == (7, 0.5, 3)
    assert recipe.tokenizer == TokenizerRecipe().tokenizer


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("stepz = 7", "unknown key 'stepz': did you mean 'steps'"),
        ("[optimzer]\nlr = 1", "unknown key 'optimzer'"),
        ("kind = []", r"kind is \[\]; expected one of tokenizer"),
        ("lr = 1", "unknown key 'lr': did you mean 'optimizer.lr'"),
        ("[data]\nsizee = 64", "unknown key 'data.sizee': did you mean 'data.size'"),
        (
            "[tokenizer.quantizer]\ncodebook_sise = 4",
            "did you mean 'tokenizer.quantizer.codebook_size'",
        ),
        ("[optimizer]\nlr = -1", r"optimizer.lr: .*greater than 0 \(got -1\)"),
        ("[tokenizer.quantizer]\ncodebook = 'neural'", "'learned', 'ema' or 'projected'"),
        ("[data]\nsize = 66", "multiple of the tokenizer's stride 4"),
        ("[tokenizer.quantizer]\nlatent_dim = 32", "must be equal"),
        ("steps = ", "not valid TOML"),
    ],
)
def test_mistakes_are_named_with_the_nearest_right_thing(
    tmp_path: Path, text: str, says: str
) -> None:
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(ConfigError, match=says):
        load_recipe(tmp_path / "r.toml")


def test_gradient_checkpointing_is_for_the_cnn() -> None:
    with pytest.raises(ConfigError, match=r"for autoencoder\.kind 'cnn'; this one is 'simple'"):
        change_recipe(TokenizerRecipe(), {"gradient_checkpointing": True})
    cnn = {
        "tokenizer.autoencoder.kind": "cnn",
        "tokenizer.autoencoder.latent_dim": 64,
        "gradient_checkpointing": True,
        "data.size": 64,
    }
    assert change_recipe(TokenizerRecipe(), cnn).tokenizer.autoencoder.stride == 16


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.toml cannot be read \(No such file"):
        load_recipe(tmp_path / "nowhere.toml")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("steps=5", ("steps", 5)),
        ("optimizer.lr = 5e-4", ("optimizer.lr", 5e-4)),
        ("data.flip=false", ("data.flip", False)),
        ("tokenizer.quantizer.codebook=ema", ("tokenizer.quantizer.codebook", "ema")),
    ],
)
def test_settings_from_the_command_line(text: str, expected: tuple[str, object]) -> None:
    assert parse_setting(text) == expected


def test_settings_that_are_wrong(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="takes key=value"):
        parse_setting("steps")
    with pytest.raises(ConfigError, match=r"did you mean 'checkpoint\.every'"):
        change_recipe(TokenizerRecipe(), {"checkpoint.evry": 5})


def test_every_setting_is_written_out() -> None:
    written = tomllib.loads(recipe_toml(TokenizerRecipe()))
    assert written["tokenizer"]["quantizer"]["code_dim"] == 16
    assert written["codebook"] == {"decay_tokens": 160.0, "revive_below": 0.1}


def test_another_kind_of_quantizer_begins_with_its_own_defaults(tmp_path: Path) -> None:
    text = (
        '[tokenizer.quantizer]\nkind = "residual"\nnum_stages = '
        "3\n[tokenizer.quantizer.stage]\ncodebook_size = 64\n"
    )
    (tmp_path / "r.toml").write_text(text)
    recipe = load_recipe(tmp_path / "r.toml", {"tokenizer.quantizer.stage.beta": 0.5})
    quantizer = recipe.tokenizer.quantizer
    assert isinstance(quantizer, ResidualVQConfig)
    assert (quantizer.num_stages, quantizer.codebook_size, quantizer.stage.beta) == (3, 64, 0.5)
    (tmp_path / "again.toml").write_text(recipe_toml(recipe))
    assert load_recipe(tmp_path / "again.toml") == recipe
    product = load_recipe(None, {"tokenizer.quantizer.kind": "product"})
    assert product.tokenizer.quantizer == ProductVQConfig()
    one = load_recipe(
        None, {"tokenizer.quantizer.stage.code_dim": 8, "tokenizer.quantizer.kind": "residual"}
    ).tokenizer.quantizer
    assert isinstance(one, ResidualVQConfig)  # in whatever order
    assert one.stage == ResidualVQConfig().stage.model_copy(
        update={"code_dim": 8}
    )  # the rest of the stage stays
    head = load_recipe(
        None, {"tokenizer.quantizer.kind": "product", "tokenizer.quantizer.head.code_dim": 16}
    ).tokenizer.quantizer
    assert head.latent_dim == 64
    same = load_recipe(None, {"tokenizer.quantizer.kind": "vector"})
    assert same == load_recipe()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"tokenizer.quantizer.kind": "nearest"},
            "quantizer.kind: got 'nearest'; expected one of 'vector', 'residual', 'product', "
            "'multiscale'",
        ),
        (
            {"tokenizer.quantizer.codebook": "learned", "tokenizer.quantizer.unit_codes": True},
            "tokenizer.quantizer: unit_codes needs",
        ),
        ({"tokenizer.quantizer.num_stages": 3}, "unknown key 'tokenizer.quantizer.num_stages'"),
        (
            {"tokenizer.quantizer.kind": "residual", "tokenizer.quantizer.codebook_size": 64},
            "unknown key 'tokenizer.quantizer.codebook_size': did you mean "
            "'tokenizer.quantizer.stage.codebook_size'",
        ),
        (
            {"tokenizer.quantizer.kind": "residual", "tokenizer.quantizer.num_stages": 0},
            r"tokenizer.quantizer.num_stages: .*\(got 0\)",
        ),
        (
            {"tokenizer.quantizer.kind": "residual", "tokenizer.quantizer.stage.beta": -1},
            r"tokenizer.quantizer.stage.beta: .*\(got -1\)",
        ),
        (
            {
                "tokenizer.quantizer.kind": "residual",
                "tokenizer.quantizer.stage.metric": "cosine",
                "tokenizer.quantizer.stage.unit_codes": True,
            },
            "stage.unit_codes must be false",
        ),
    ],
)
def test_mistakes_in_a_quantizer_are_named(settings: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_recipe(None, settings)


def test_what_is_not_set_is_not_set_after_reading_either(tmp_path: Path) -> None:
    recipe = change_recipe(
        TokenizerRecipe(), dict([parse_setting("tokenizer.quantizer.code_dim=none")])
    )
    assert recipe.tokenizer.quantizer.code_dim is None
    (tmp_path / "r.toml").write_text(recipe_toml(recipe))
    assert 'code_dim = "none"' in (tmp_path / "r.toml").read_text()
    assert load_recipe(tmp_path / "r.toml") == recipe


def test_an_earlier_table_beside_a_setting_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text("monitor = 3\n[guard]\naction = 'warn'")
    with (
        pytest.warns(FutureWarning, match=r"guard\.action is now monitor\.action"),
        pytest.raises(ConfigError, match=r"monitor: .*\(got 3\)"),
    ):
        load_recipe(tmp_path / "r.toml")
