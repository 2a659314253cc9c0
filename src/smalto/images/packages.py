"""Images inside installed packages."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from smalto.core.errors import MissingExtra


def package_folder(module: str, package: str, extra: str, purpose: str) -> Path:
    """Return the folder of an installed package, without importing it.

    Raises:
        MissingExtra: the package is not installed.
    """
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise MissingExtra(package, extra, purpose)
    return Path(spec.origin).parent
