"""Files that are complete or absent: write to a temporary path, flush to disk, rename."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import filelock

from smalto.core.errors import ConfigError, RunError
from smalto.core.text import printable

_MARK = ".smalto-"  # in the names of temporary folders, before eight random characters
_TEMPORARY = re.compile(r"\..*" + re.escape(_MARK) + "[a-z0-9_]{8}")
_LOCK = "writer.lock"  # held by the process that made the folder
_SECONDS_TO_LOCK = 60  # after this a folder without a lock was abandoned
_CONTENTS = {_LOCK, "new", "old"}  # "old": what a rename has replaced


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

    Raises:
        RunError: a folder that is not empty has appeared at ``path``.
    """
    with _temporary_folder(path) as folder:
        yield folder / "new"
        _rename(folder / "new", path)
        sync_folder(path.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder: at one moment it is there, at the next it is not.

    What an interruption leaves has a temporary name, and is removed by ``remove_leftovers``.
    """
    with _temporary_folder(path) as folder:
        os.replace(path, folder / "old")


@contextmanager
def set_aside(path: Path) -> Iterator[None]:
    """Move a folder away for the duration of the block.

    At its end it is removed if something new is at ``path``, and otherwise put back.
    """
    with _temporary_folder(path) as folder:
        os.replace(path, folder / "old")
        try:
            yield
        finally:
            if not path.exists():
                os.replace(folder / "old", path)


@contextmanager
def _temporary_folder(path: Path) -> Iterator[Path]:
    """Yield a locked folder beside ``path``, and remove it at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=_prefix(path.name), dir=path.parent))
    lock = filelock.FileLock(folder / _LOCK, thread_local=False)
    with suppress(OSError, NotImplementedError):  # some network drives have no locks
        lock.acquire()
    try:
        yield folder
    finally:
        _clear(folder)
        lock.release()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def exclusive(lock: filelock.BaseFileLock, message: str) -> Iterator[None]:
    """Hold a lock for the duration of the block; never wait for it.

    Raises:
        RunError: another process holds it, with ``message``; or the file system has no locks.
    """
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise RunError(message) from None
    except (OSError, NotImplementedError) as error:
        raise RunError(
            f"{lock.lock_file} cannot be locked ({error}). Name a place on another drive."
        ) from None
    try:
        yield
    finally:
        lock.release()


def _clear(folder: Path) -> None:
    """Remove the contents of a temporary folder but for its lock, which marks it as ours."""
    for name in _CONTENTS - {_LOCK}:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _rename(new: Path, path: Path) -> None:
    try:
        os.replace(new, path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise RunError(
            f"{path} exists already: another process has just created it. Name another path."
        ) from None


def _prefix(name: str) -> str:
    # The name may already be as long as the file system allows.
    return f".{name[:20]}{_MARK}"


def read_regular(path: str | Path) -> bytes:
    """Return the content of a regular file.

    Raises:
        OSError: it cannot be read, or it is a pipe or a device, from which reading may never end.
    """
    check_regular(path)
    return Path(path).read_bytes()


def check_regular(path: str | Path) -> None:
    """Raise OSError unless a path is a regular file: reading from a pipe may never end."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def read_json(path: str | Path) -> Any:
    """Return the value in a JSON file.

    Raises:
        OSError: it cannot be read, or is not a regular file.
        ValueError: it is not JSON in UTF-8.
    """
    return parse_json(read_regular(path).decode())


def parse_json(text: str | bytes) -> Any:
    """Return the value in a JSON text.

    Raises:
        ValueError: it is not JSON, or is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def named_path(path: str | Path, what: str) -> Path:
    """Return a path; raise ConfigError if it is empty, which would be the current folder."""
    if path == "":
        raise ConfigError(f"got an empty path for {what}; expected the name of a file or folder.")
    return Path(path)


def is_utf8(path: Path) -> bool:
    """Return whether an absolute path is text that every library can take."""
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError:
        return False
    return True


def check_writable(path: Path) -> None:
    """Raise an error if ``path`` cannot be written, before long work whose result goes there.

    Creates its parent folder.

    Raises:
        RunError: it cannot be written, or its name is not UTF-8, which TensorBoard, Lance and
            Arrow require; the message gives the reason.
    """
    if not is_utf8(path):
        raise RunError(f"{printable(str(path))} is not UTF-8. Name another path.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink() and not path.exists():
            raise RunError(f"{path} is a link to nothing. Remove it, or name another path.")
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".try."):
            pass
        path.is_dir()  # raises OSError if the name is too long
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror}. Name another path.") from None


def remove_leftovers(folder: Path, name: str = "") -> None:
    """Remove the temporary folders in ``folder`` that killed writers have left.

    A folder is removed only if its name and contents are those of ``atomic_path`` and the process
    that made it has ended.

    Args:
        folder: where they are.
        name: of the file or folder that was written; empty: any.
    """
    for entry in os.scandir(folder):
        is_ours = _TEMPORARY.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
        if is_ours and (not name or entry.name.startswith(_prefix(name))):
            _remove_if_abandoned(Path(entry.path))


def _remove_if_abandoned(folder: Path) -> None:
    """Remove a temporary folder unless its writer is alive or it holds anything else."""
    try:
        names = {path.name for path in folder.iterdir()}
        if not names and time.time() - folder.stat().st_mtime > _SECONDS_TO_LOCK:
            folder.rmdir()  # killed before it was locked
        if _LOCK not in names or names - _CONTENTS or (folder / _LOCK).is_symlink():
            return
        with filelock.FileLock(folder / _LOCK, timeout=0):
            _clear(folder)
            shutil.rmtree(folder, ignore_errors=True)
    except (OSError, NotImplementedError, filelock.Timeout):
        return  # it has gone since, or its writer is alive


def foreign_names(folder: Path, own: Collection[str]) -> list[str]:
    """Return the names in a folder that are neither in ``own`` nor temporary, sorted."""
    names = {entry.name for entry in os.scandir(folder)} - set(own)
    return sorted(name for name in names if not _TEMPORARY.fullmatch(name))


def check_replaceable(path: Path, foreign: list[str], what: str) -> None:
    """Check that a folder holds nothing but our own files before it is replaced as a whole.

    Args:
        path: the folder.
        foreign: the names in it that are not ours.
        what: it is, for the message, such as "run".

    Raises:
        RunError: there are such names.
    """
    if foreign:
        raise RunError(
            f"{path} holds files that are not of the {what} ({', '.join(foreign[:3])}), so "
            "--overwrite does not replace it. Move them, or name another --out."
        )


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
    """Return the SHA-256 of a regular file, in hexadecimal."""
    check_regular(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
