"""Frozen, validated settings, built the same way from code, TOML or JSON."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from smalto.core.errors import ConfigError


class Config(BaseModel):
    """Base of all settings: immutable; unknown keys, NaN and infinity are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Beta = Annotated[float, Field(ge=0, lt=1)]  # decay rate of a moving average
ConfigT = TypeVar("ConfigT", bound=Config)


def over_defaults(default: Config) -> Any:
    """Return a validator for a field whose value is a table of settings.

    Settings that are given as a table replace those of ``default`` one by one. The other settings
    of ``default`` remain.
    """

    def fill(value: Any) -> Any:
        return {**default.model_dump(), **value} if isinstance(value, dict) else value

    return BeforeValidator(fill)


def parse_config(kind: type[ConfigT], data: Any, source: str) -> ConfigT:
    """Validate ``data`` and build a ``kind`` from it.

    Raises:
        ConfigError: names ``source``, every wrong key with its value, and the nearest valid key
            for a misspelled one.
    """
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        lines = [
            _explain(kind, e["loc"], e["type"], e["msg"], e.get("input"))
            for e in error.errors(include_url=False)
        ]
        raise ConfigError(f"{source}: " + "; ".join(lines)) from None
    except RecursionError:
        raise ConfigError(f"{source}: got a value that is nested too deeply.") from None


def nearest_key(key: str, keys: list[str]) -> str:
    """Return ``did you mean ...?`` for an unknown dotted key, or the list of valid keys."""
    elsewhere = key in keys  # a setting of another kind has this key
    keys = [k for k in keys if k != key]
    last = key.rsplit(".", 1)[-1]
    same_name = [k for k in keys if k.rsplit(".", 1)[-1] == last]
    if elsewhere and not same_name:
        return f"it belongs to another kind; set {key.rpartition('.')[0] + '.kind'!r} too."
    close = same_name or difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
    if not close:
        by_name = {k.rsplit(".", 1)[-1]: k for k in keys}
        names = difflib.get_close_matches(last, list(by_name), n=1, cutoff=0.6)
        close = [by_name[name] for name in names]
    if close:
        return f"did you mean {' or '.join(map(repr, close[:3]))}?"
    return f"the keys are {', '.join(sorted(keys))}."


def dotted_keys(kind: type[BaseModel], prefix: str = "") -> list[str]:
    """Return all settings of a model and of the models inside it, as ``a.b.c``."""
    return list(dict.fromkeys(_walk(kind, prefix)))


def _walk(kind: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in kind.model_fields.items():
        parts = (
            getattr(t, "__origin__", t) for t in (field.annotation, *get_args(field.annotation))
        )
        inner = [t for t in parts if isinstance(t, type) and issubclass(t, BaseModel)]
        if inner:
            for model in inner:
                yield from _walk(model, f"{prefix}{name}.")
        else:
            yield prefix + name


def _explain(
    kind: type[BaseModel], loc: tuple[int | str, ...], error: str, message: str, value: Any
) -> str:
    """Return one error of pydantic as a sentence."""
    names = {name for path in dotted_keys(kind) for name in path.split(".")}
    # pydantic adds the kind of a union's member to the location; that is not a key.
    named = error in ("extra_forbidden", "missing")
    key = ".".join(
        str(part)
        for part in loc
        if part in names or isinstance(part, int) or (named and part == loc[-1])
    )
    if error == "union_tag_invalid":
        got = value.get("kind") if isinstance(value, dict) else value
        return f"{key}.kind: got {got!r}; expected one of {message.split('expected tags: ')[-1]}."
    if error == "union_tag_not_found":
        return f"{key}: got {value!r}; expected a table with a kind."
    if error == "extra_forbidden":
        return f"unknown key {key!r}: {nearest_key(key, dotted_keys(kind))}"
    if error == "missing":
        return f"{key!r} is missing."
    shown = "" if isinstance(value, dict) else f" (got {value!r})"
    return f"{key + ': ' if key else ''}{message.removeprefix('Value error, ')}{shown}"
