"""Reading recipes from TOML. Recipes are told apart by ``kind``."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from smalto.core.config import parse_config
from smalto.core.errors import ConfigError
from smalto.core.files import read_regular
from smalto.training.earlier_formats import rename_tables
from smalto.training.generator_recipe import GeneratorRecipe
from smalto.training.recipe import NONE, Recipe, change_recipe, replace_values
from smalto.training.tokenizer_recipe import TokenizerRecipe

RECIPES: dict[str, type[Recipe]] = {
    "tokenizer": TokenizerRecipe,
    "generator": GeneratorRecipe,
}


def load_recipe(path: str | Path | None = None, settings: dict[str, Any] | None = None) -> Any:
    """Read a recipe from TOML, with some settings replaced.

    Args:
        path: a ``.toml`` file; None: the default recipe of a tokenizer.
        settings: dotted keys to values, such as ``{"data.size": 64, "optimizer.lr": 5e-4}``.

    Returns:
        A TokenizerRecipe, or a GeneratorRecipe if the file has ``kind = "generator"``.

    Raises:
        ConfigError: the file cannot be read or is not TOML, a key is unknown (with the nearest
            right one), or a value is out of range.
    """
    data = rename_tables(_read_toml(Path(path)), str(path)) if path else {}
    if path and not data:
        raise ConfigError(
            f"{path} is empty; expected at least one setting. Restore it from a copy, or leave it "
            "out to use the defaults."
        )
    kind = data.get("kind", "tokenizer")
    if not isinstance(kind, str) or kind not in RECIPES:
        raise ConfigError(f"{path}: kind is {kind!r}; expected one of {', '.join(RECIPES)}.")
    recipe = RECIPES[kind]
    defaults = recipe.model_validate({}).model_dump(mode="json")
    parsed = parse_config(recipe, _merge(defaults, data), str(path))
    return change_recipe(parsed, settings or {})


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        tables: dict[str, Any] = tomllib.loads(read_regular(path).decode())
        return dict(replace_values(tables, NONE, None))
    except OSError as error:
        raise ConfigError(f"the recipe {path} cannot be read ({error.strerror}).") from None
    except RecursionError:
        raise ConfigError(f"the recipe {path} is nested too deeply.") from None
    except ValueError as error:  # of tomllib, of decoding, or a number of thousands of digits
        raise ConfigError(f"the recipe {path} is not valid TOML: {error}.") from None


def _merge(base: Any, over: Any) -> Any:
    if not isinstance(base, dict) or not isinstance(over, dict):
        return over
    if "kind" in over and over["kind"] != base.get("kind"):
        return over  # the settings of another kind mean nothing to this one
    return {**base, **{key: _merge(base.get(key), value) for key, value in over.items()}}
