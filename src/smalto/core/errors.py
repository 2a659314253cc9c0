"""Errors that smalto raises for a user's mistake: what it got, what it expected, what to do."""

from typing import Any


def describe(value: Any) -> str:
    """Return a value for an error message: dtype and shape of a tensor, else the type."""
    dtype = getattr(value, "dtype", None)
    shape = getattr(value, "shape", None)
    return (
        f"{dtype} {list(shape)}"
        if dtype is not None and shape is not None
        else f"{type(value).__name__}"
    )


class SmaltoError(Exception):
    """Base of every error that smalto raises on purpose.

    The command line prints its message without a traceback.
    """


class InputError(SmaltoError, ValueError):
    """A tensor, an index or an argument is not valid."""


class ConfigError(SmaltoError, ValueError):
    """A recipe, a setting or a configuration file is not valid."""


class DataError(SmaltoError):
    """Images, or a file made from images, cannot be used."""


class RunError(SmaltoError):
    """A run or tokenizer directory is not in a state that allows the operation."""


class RenamedSettingWarning(FutureWarning):
    """A recipe uses the earlier name of a setting."""


class MissingExtra(SmaltoError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs {package}, which is not installed. "
            f'Install it with: pip install "smalto[{extra}]"'
        )
