"""The one way to describe things: frozen, checked settings that come from code, TOML or JSON alike."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from smalto.core.errors import ConfigError


class Config(BaseModel):
    """Base of all settings: they cannot change once made, and a key that does not exist is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def over_defaults(default: Config) -> Any:
    """For a field whose value is a table: settings that are given as a table replace those of ``default`` one by one, not all together."""

    def fill(value: Any) -> Any:
        return {**default.model_dump(), **value} if isinstance(value, dict) else value

    return BeforeValidator(fill)


ConfigT = TypeVar("ConfigT", bound=Config)


def parse_config(kind: type[ConfigT], data: Any, source: str) -> ConfigT:
    """Check ``data`` and build a ``kind`` from it.

    Raises:
        ConfigError: names ``source``, every wrong key with its value, and for a misspelt one the nearest right one.
    """
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        lines = [
            _explain(kind, e["loc"], e["type"], e["msg"], e.get("input"))
            for e in error.errors(include_url=False)
        ]
        raise ConfigError(f"{source}: " + "; ".join(lines)) from None


def nearest_key(key: str, keys: list[str]) -> str:
    """`` Did you mean ...?`` for a dotted key, or the keys there are."""
    elsewhere = key in keys  # another kind has this very key
    keys = [k for k in keys if k != key]
    last = key.rsplit(".", 1)[-1]
    same_name = [k for k in keys if k.rsplit(".", 1)[-1] == last]
    if elsewhere and not same_name:
        return f"it belongs to another kind; set {key.rpartition('.')[0] + '.kind'!r} too."
    close = same_name or difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
    if not close:
        by_name = {k.rsplit(".", 1)[-1]: k for k in keys}
        close = [
            by_name[n] for n in difflib.get_close_matches(last, list(by_name), n=1, cutoff=0.6)
        ]
    return (
        f"did you mean {' or '.join(map(repr, close[:3]))}?"
        if close
        else f"the keys are {', '.join(sorted(keys))}."
    )


def dotted_keys(kind: type[BaseModel], prefix: str = "") -> list[str]:
    """All settings of a model and of the models inside it, as ``a.b.c``."""
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
    names = {name for path in dotted_keys(kind) for name in path.split(".")}
    # pydantic names the member of a union too, by its kind; that is no key.
    named = error in ("extra_forbidden", "missing")
    key = ".".join(
        str(part)
        for part in loc
        if part in names or isinstance(part, int) or (named and part == loc[-1])
    )
    if error == "union_tag_invalid":
        got = value.get("kind") if isinstance(value, dict) else value
        return f"{key}.kind must be one of {message.split('expected tags: ')[-1]} (got {got!r})"
    if error == "union_tag_not_found":
        return f"{key} must be a table with a kind (got {value!r})"
    if error == "extra_forbidden":
        return f"unknown key {key!r}: {nearest_key(key, dotted_keys(kind))}"
    if error == "missing":
        return f"{key!r} is missing."
    shown = "" if isinstance(value, dict) else f" (got {value!r})"
    return f"{key + ': ' if key else ''}{message.removeprefix('Value error, ')}{shown}"
