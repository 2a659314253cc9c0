"""What smalto raises for a user's mistake: one sentence each on what was got, what is expected, what to do."""

from typing import Any


def describe(value: Any) -> str:
    """What was got, for an error message: dtype and shape of a tensor, the type of anything else."""
    dtype, shape = getattr(value, "dtype", None), getattr(value, "shape", None)
    return (
        f"{dtype} {list(shape)}"
        if dtype is not None and shape is not None
        else f"{type(value).__name__}"
    )


class SmaltoError(Exception):
    """Base of every error that smalto raises on purpose. The command line prints its message and nothing else."""


class InputError(SmaltoError, ValueError):
    """A tensor, an index or an argument does not fit."""


class ConfigError(SmaltoError, ValueError):
    """A recipe, a setting or a configuration file does not fit."""


class DataError(SmaltoError):
    """ImageSet, or a file made from them, cannot be used."""


class RunError(SmaltoError):
    """A run or tokenizer directory is not in a state that allows what was asked."""


class RenamedSettingWarning(FutureWarning):
    """A recipe uses the earlier name of a setting."""


class MissingExtra(SmaltoError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f'{purpose} needs {package}, which is not installed. Install it with: pip install "smalto[{extra}]"'
        )
