"""Files that are complete or absent: write to a temporary path, flush to disk, rename."""

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

_ASIDE = re.compile(r"\..+\.[a-z0-9_]{8}")  # the names that tempfile makes in atomic_path


def write_atomic(path: str | Path, data: str | bytes) -> None:
    """Replace ``path`` by ``data`` (text as UTF-8) in one step.

    After a crash it holds either the old bytes or the new ones.
    """
    path = Path(path)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder, and rename it to ``path`` at the end.

    The temporary path may be a file or a folder. It is removed if the block raises an error.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The prefix is cut, because the name may already be as long as the file system allows.
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name[:20]}.", dir=path.parent))
    try:
        yield folder / "new"
        os.replace(folder / "new", path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_writable(path: Path) -> None:
    """Raise an error if ``path`` cannot be written, before long work whose result goes there.

    Creates its parent folder.

    Raises:
        RunError: it cannot be written; the message gives the reason.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".try."):
            pass
        path.is_dir()  # raises OSError if the name is too long
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror}. Name another path.") from None


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary folders in ``folder`` that killed writers have left."""
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
    """Flush the list of names of a folder to disk, on systems that support it."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def name_hash(name: str, salt: str = "") -> int:
    """Return an integer in [0, 2**64) that depends only on the text.

    It is the same on every machine and in every process.
    """
    return int.from_bytes(
        hashlib.sha256(f"{salt}\0{name}".encode("utf-8", "surrogateescape")).digest()[:8], "big"
    )


def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
