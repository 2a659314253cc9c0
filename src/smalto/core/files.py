"""Files that are whole or not there: write aside, flush to disk, rename."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from smalto.core.errors import RunError

_ASIDE = re.compile(r"\..+\.[a-z0-9_]{8}")  # what tempfile makes of the prefix below


def write_atomic(path: str | Path, data: str | bytes) -> None:
    """Replace ``path`` by ``data`` (text as UTF-8) in one step: after a crash it holds the old bytes or the new ones."""
    path = Path(path)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; when the block ends well, the file or folder made there becomes ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(
        tempfile.mkdtemp(prefix=f".{path.name[:20]}.", dir=path.parent)
    )  # short: the name itself may be as long as names can be
    try:
        yield folder / "new"
        os.replace(folder / "new", path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_writable(path: Path) -> None:
    """Find out before long work that ``path`` can be written after it. Makes its parent folder.

    Raises:
        RunError: it cannot, and why.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".try."):
            pass
        path.is_dir()  # a name that is too long says so here
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror}. Name another place.") from None


def remove_leftovers(folder: Path) -> None:
    """Remove what writers that were killed in the middle left aside in ``folder``."""
    for path in folder.glob(".*.*"):
        if path.is_dir() and _ASIDE.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def sync_tree(folder: Path) -> None:
    """Flush every file below ``folder`` to disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush a folder's list of names to disk, where the system lets one."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def name_hash(name: str, salt: str = "") -> int:
    """A number in [0, 2**64) that depends on the text alone: the same on every machine and in every process."""
    return int.from_bytes(
        hashlib.sha256(f"{salt}\0{name}".encode("utf-8", "surrogateescape")).digest()[:8], "big"
    )


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
