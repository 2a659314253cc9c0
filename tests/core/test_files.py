"""Files are whole or not there."""

import os
from pathlib import Path

import filelock
import pytest

from smalto.core.errors import RunError
from smalto.core.files import (
    atomic_path,
    exclusive,
    name_hash,
    remove_folder,
    remove_leftovers,
    write_atomic,
)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", "old")
    with pytest.raises(KeyError), atomic_path(tmp_path / "a") as temporary:
        temporary.write_text("half of the ne")
        raise KeyError
    assert (tmp_path / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_folders_appear_whole(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "deep" / "folder") as new:
        new.mkdir()
        (new / "x").write_text("1")
        assert not (tmp_path / "deep" / "folder").exists()
    assert (tmp_path / "deep" / "folder" / "x").read_text() == "1"


def killed_writer(path: Path) -> Path:
    """A temporary folder as a writer leaves it that was killed."""
    folder = path.parent / f".{path.name[:20]}.smalto-abcd_123"
    folder.mkdir()
    (folder / "writer.lock").touch()
    (folder / "new").write_text("half")
    return folder


def test_leftovers_of_killed_writers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    killed_writer(tmp_path / "model.safetensors")
    mixed = killed_writer(tmp_path / "mine.json")
    (mixed / "notes").touch()
    keep = [mixed, *(tmp_path / name for name in (".git", ".my.settings", ".cache.20240101"))]
    for path in keep[1:]:
        path.mkdir()
    (tmp_path / ".a.smalto-abcd_123").symlink_to(tmp_path / ".git")
    with atomic_path(tmp_path / "live") as new:
        new.touch()
        remove_leftovers(tmp_path)
        assert sorted(tmp_path.iterdir()) == sorted(
            [*keep, tmp_path / ".a.smalto-abcd_123", new.parent]
        )


def test_a_writer_killed_while_it_cleans_up_leaves_nothing_for_good(tmp_path: Path) -> None:
    unlocked = tmp_path / ".a.smalto-abcd_123"
    unlocked.mkdir()
    remove_leftovers(tmp_path)
    assert unlocked.exists()  # its writer may be about to lock it
    os.utime(unlocked, (0, 0))
    remove_leftovers(tmp_path)
    assert not unlocked.exists()


def test_a_folder_is_removed_at_one_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t" / "data").mkdir(parents=True)
    with monkeypatch.context() as patched:
        patched.setattr("shutil.rmtree", lambda path, **options: None)  # as a kill would
        remove_folder(tmp_path / "t")
    assert not (tmp_path / "t").exists()
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_drive_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise NotImplementedError("flock is not implemented here")

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    lock = filelock.FileLock(tmp_path / "lock")
    with pytest.raises(RunError, match="cannot be locked"), exclusive(lock, "busy"):
        pass


def test_leftovers_of_one_name(tmp_path: Path) -> None:
    own = killed_writer(tmp_path / "export")
    other = killed_writer(tmp_path / "other")
    remove_leftovers(tmp_path, "export")
    assert not own.exists()
    assert other.exists()


def test_the_second_of_two_writers_is_told_who_is_there(tmp_path: Path) -> None:
    with (
        pytest.raises(RunError, match="another process has just created it"),
        atomic_path(tmp_path / "export") as second,
    ):
        second.mkdir()
        with atomic_path(tmp_path / "export") as first:
            first.mkdir()
            (first / "tokens").touch()


def test_hashes_are_the_same_everywhere() -> None:
    assert name_hash("a.png", "held out") == 0xC292B9E61FB9E442
    assert name_hash("a.png") != name_hash("b.png")
