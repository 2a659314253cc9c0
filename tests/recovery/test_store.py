"""What LevelDB's recovery tests ask, asked of the token store; then jobs that are killed, doubled,
and run out of space.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

import smalto
from smalto.core.errors import DataError, RunError
from smalto.images.image_file import Skipped
from smalto.store.check import check_store
from smalto.store.lance_table import LanceTable
from smalto.store.schema import rows_to_table
from smalto.store.token_store import TokenStore
from tests.conftest import ENVIRONMENT, store_header, token_rows, write_images


def make(path: Path, commits: int = 5, rows: int = 6) -> TokenStore:
    store = TokenStore.create(path, store_header())
    for i in range(commits):
        store.append(token_rows(rows, first=i * rows))
    return store


def everything(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def contents(path: Path) -> dict[str, Any]:
    """All that is known of every row, by id."""
    store = TokenStore.open(path)
    return {
        row.id: (*row._replace(tokens=()), list(row.tokens))
        for row in store.token_rows(0, len(store))
    }


def data_files(path: Path) -> list[Path]:
    return sorted((path / "data").iterdir(), key=lambda file: file.stat().st_mtime_ns)


def manifests(path: Path) -> list[Path]:
    return sorted((path / "_versions").glob("*.manifest"))


def test_1_opening_again_and_again_adds_nothing(tmp_path: Path) -> None:
    make(tmp_path / "t")
    before = everything(tmp_path / "t")
    for _ in range(50):
        store = TokenStore.open(tmp_path / "t")
        assert len(store.batch([0, 29])["id"]) == 2
        store.errors()
        assert check_store(store).ok
    assert everything(tmp_path / "t") == before


def bloat(path: Path, commits: int) -> None:
    store = TokenStore.create(path, store_header())
    table = LanceTable.open(path)
    for row in token_rows(commits):
        # As TokenStore.append does, which looks for the id in all files too.
        table.append(rows_to_table([row], store.header))
    assert len(manifests(path)) >= commits
    store.compact(timedelta(0))
    assert len(manifests(path)) <= 2
    assert len(data_files(path)) == 1
    assert (
        sum(
            len(data)
            for name, data in everything(path).items()
            if name.startswith(("_versions", "_transactions"))
        )
        < 20_000
    )
    assert [row.id for row in TokenStore.open(path).token_rows(0, commits)] == [
        row.id for row in token_rows(commits)
    ]


def test_2_metadata_of_many_small_commits_is_compacted(tmp_path: Path) -> None:
    bloat(tmp_path / "t", 200)


@pytest.mark.slow
def test_2_metadata_of_thousands_of_small_commits_is_compacted(tmp_path: Path) -> None:
    bloat(tmp_path / "t", 3000)


@pytest.mark.parametrize("name", ["t", "data/_indices/t, tokens.lance"])
def test_3_a_missing_data_file_is_an_error_that_names_it(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    make(path)
    (tmp_path / "moved").mkdir()
    gone = data_files(path)[2]
    shutil.move(gone, tmp_path / "moved")
    store = TokenStore.open(path)
    assert len(store) == 30  # not fewer
    for read in (
        lambda: store.batch([0, 13]),
        store.rows,
        lambda: store.tokens(0, 30, []),
        store.ids,
        lambda: store.token_rows(12, 18),
    ):
        with pytest.raises(
            DataError,
            match=f"^{re.escape(str(gone))} is missing\\. .*restore that file from a copy",
        ):
            read()
    others = [*range(12), *range(18, 30)]
    assert store.batch(others)["id"] == [
        row.id for row in token_rows(30) if row.id not in {r.id for r in token_rows(6, first=12)}
    ]
    found = check_store(store)
    assert (found.ok, found.num_checked, found.num_problems) == (False, 24, 1)
    assert gone.name in found.problems[0]
    shutil.move(tmp_path / "moved" / gone.name, gone)
    assert check_store(TokenStore.open(path)).ok


@pytest.mark.parametrize("whole_folder", [True, False])
def test_3_a_missing_index_is_made_anew(tmp_path: Path, whole_folder: bool) -> None:
    make(tmp_path / "t.lance")
    TokenStore.open(tmp_path / "t.lance").compact()
    (folder,) = (tmp_path / "t.lance" / "_indices").iterdir()
    shutil.rmtree(folder) if whole_folder else (folder / "page_lookup.lance").unlink()
    store = TokenStore.open(tmp_path / "t.lance")
    (problem,) = check_store(store).problems
    assert "the index of ids is damaged" in problem
    with pytest.raises(
        DataError,
        match=rf"^{re.escape(str(folder))}.* is missing\. No row is lost: `smalto "
        rf"store compact .*t\.lance`",
    ):
        store.known([token_rows(1)[0].id])
    store.compact()
    assert check_store(store).ok
    assert set(TokenStore.open(tmp_path / "t.lance").known([row.id for row in token_rows(31)])) == {
        row.id for row in token_rows(30)
    }


def test_a_flipped_byte_in_the_index_is_found_and_mended(tmp_path: Path) -> None:
    make(tmp_path / "t")
    TokenStore.open(tmp_path / "t").compact()
    (page,) = (tmp_path / "t" / "_indices").glob("*/page_data.lance")
    data = page.read_bytes()
    name = token_rows(20)[17].id.encode()
    assert name in data
    page.write_bytes(data.replace(name, name[:-1] + b"~"))
    store = TokenStore.open(tmp_path / "t")
    (problem,) = check_store(store).problems
    assert (
        f"does not find {name.decode()!r}. No row is lost; remove {tmp_path / 't' / '_indices'}"
        in problem
    )
    shutil.rmtree(tmp_path / "t" / "_indices")
    store.compact()
    assert check_store(TokenStore.open(tmp_path / "t")).ok


@pytest.mark.parametrize("from_end", [9, 13])
def test_a_footer_that_claims_too_much_is_damage_and_no_abort(
    tmp_path: Path, from_end: int
) -> None:
    make(tmp_path / "t")
    file = data_files(tmp_path / "t")[1]
    data = bytearray(file.read_bytes())
    data[-from_end] ^= 0x80  # two milliards of columns or buffers
    file.write_bytes(data)
    found = check_store(TokenStore.open(tmp_path / "t"))
    assert found.num_checked == 24
    assert f"{file} is damaged" in found.problems[0]


def test_the_footer_of_an_index_too(tmp_path: Path) -> None:
    make(tmp_path / "t").compact()
    for file in (tmp_path / "t" / "_indices").glob("*/*.lance"):
        whole = file.read_bytes()
        file.write_bytes(whole[:-13] + bytes([whole[-13] ^ 0x80]) + whole[-12:])
        assert (
            "the index of ids is damaged"
            in check_store(TokenStore.open(tmp_path / "t")).problems[0]
        )
        file.write_bytes(whole)
    assert check_store(TokenStore.open(tmp_path / "t")).ok


def test_verify_finds_a_damaged_table_of_bad_images(tmp_path: Path) -> None:
    store = make(tmp_path / "t")
    store.add_errors([(Skipped("x.png", "damaged"), 1, 2)])
    assert check_store(store).ok
    for file in (tmp_path / "t" / "_errors" / "data").iterdir():
        file.unlink()
    (problem,) = check_store(TokenStore.open(tmp_path / "t")).problems
    assert problem.startswith(f"the table of bad images: {file} is missing")


def test_4_appending_after_reopening_rewrites_nothing(tmp_path: Path) -> None:
    make(tmp_path / "t")
    before = {
        path: (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in [*data_files(tmp_path / "t"), *manifests(tmp_path / "t")]
    }
    TokenStore.open(tmp_path / "t").append(token_rows(6, first=30))
    assert before == {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in before}
    assert len(data_files(tmp_path / "t")) == 6
    assert TokenStore.open(tmp_path / "t").ids() == [row.id for row in token_rows(36)]


_KILLED_WRITE = """
import os, sys
from smalto.store import lance_table
from smalto.store.token_store import TokenStore
from tests.conftest import token_rows
store = TokenStore.open(sys.argv[1])
store.append(token_rows(6, first=30))
def die(*_): os._exit(9)
{where}
store.append(token_rows(6, first=36))
"""


@pytest.mark.parametrize(
    ("where", "rows"),
    [
        ("os.fsync = die", 36),  # data written, not committed
        ("lance_table.LanceTable.commit = die", 36),
        ("lance_table.sync_folder = die", 42),  # committed, and nobody was told
        ("lance_table.write_atomic = die", 42),
    ],
)
def test_5_a_write_killed_in_the_middle_leaves_the_committed_batches(
    tmp_path: Path, where: str, rows: int
) -> None:
    make(tmp_path / "t")
    script = _KILLED_WRITE.format(where=where)
    environment = ENVIRONMENT | {"PYTHONPATH": os.getcwd()}
    assert (
        subprocess.run(
            [sys.executable, "-c", script, tmp_path / "t"], env=environment, check=False
        ).returncode
        == 9
    )
    store = TokenStore.open(tmp_path / "t")
    assert store.ids() == [row.id for row in token_rows(rows)]
    store.append(token_rows(50 - rows, first=rows))
    assert TokenStore.open(tmp_path / "t").ids() == [row.id for row in token_rows(50)]
    assert check_store(store).ok


def test_6_orphaned_files_are_ignored_and_then_cleaned(tmp_path: Path) -> None:
    store = make(tmp_path / "t", 2)
    stale = token_rows(6, first=900)
    table = LanceTable.open(tmp_path / "t")
    for _ in range(40):
        table.write(rows_to_table(stale, store.header))  # never committed
    aside = tmp_path / "t" / ".head.json.smalto-abcd1234"  # what a writer that was killed left
    aside.mkdir()
    (aside / "writer.lock").touch()
    assert len(data_files(tmp_path / "t")) == 42
    again = TokenStore.open(tmp_path / "t")
    assert again.ids() == [row.id for row in token_rows(12)]
    assert again.known([row.id for row in stale]) == {}
    again.compact(timedelta(0))
    assert len(data_files(tmp_path / "t")) == 1
    assert not aside.exists()
    assert TokenStore.open(tmp_path / "t").ids() == [row.id for row in token_rows(12)]


@pytest.mark.parametrize(
    "damage",
    ["missing", "all missing", "cut", "empty", "zeros", "flipped", "head missing", "head damaged"],
)
def test_7_a_missing_or_damaged_manifest_is_an_error(tmp_path: Path, damage: str) -> None:
    make(tmp_path / "t")
    newest = manifests(tmp_path / "t")[0]
    data, head = newest.read_bytes(), tmp_path / "t" / "head.json"
    match damage:
        case "missing":
            newest.unlink()
        case "all missing":
            shutil.rmtree(tmp_path / "t" / "_versions")
        case "head missing":
            head.unlink()
        case "head damaged":
            head.write_text("{")
        case _:
            middle = len(data) // 2
            flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
            newest.write_bytes(
                {"cut": data[:middle], "empty": b"", "zeros": bytes(len(data)), "flipped": flipped}[
                    damage
                ]
            )
    before = everything(tmp_path / "t")
    for attempt in (
        lambda: TokenStore.open(tmp_path / "t"),
        lambda: TokenStore.create(tmp_path / "t", store_header()),
    ):
        with pytest.raises((DataError, RunError), match=r"damaged|missing|exists already"):
            attempt()
    with pytest.raises(DataError, match=r"damaged|missing|not whole"):
        TokenStore.open(tmp_path / "t")
    assert everything(tmp_path / "t") == before


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: bytes(len(data))],
    ids=["cut", "empty", "zeros"],
)
@pytest.mark.parametrize("table", ["", "_errors"])
def test_a_commit_that_a_power_failure_cut_off_is_none(
    tmp_path: Path, damage: Callable[[bytes], bytes], table: str
) -> None:
    """Its manifest is there and not whole, and nobody was told of it: head.json names the one
    before.
    """
    store = make(tmp_path / "t")
    store.add_errors([(Skipped("bad.png", "empty"), 0, 0)])
    folder = tmp_path / "t" / table
    head = (folder / "head.json").read_bytes()
    store.append(token_rows(6, first=30))
    store.add_errors([(Skipped("worse.png", "empty"), 0, 0)])
    (folder / "head.json").write_bytes(head)
    newest = manifests(folder)[0]
    newest.write_bytes(damage(newest.read_bytes()))
    again, rows = TokenStore.open(tmp_path / "t"), 36 if table else 30
    assert again.ids() == [row.id for row in token_rows(rows)]
    assert list(again.errors()) == (["bad.png"] if table else ["bad.png", "worse.png"])
    again.append(token_rows(40 - rows, first=rows))
    again.add_errors([(Skipped("worse.png", "empty"), 0, 0)])
    again.compact()
    assert TokenStore.open(tmp_path / "t").ids() == [row.id for row in token_rows(40)]
    assert list(again.errors()) == ["bad.png", "worse.png"]
    assert check_store(again).ok


def test_a_flipped_byte_in_a_data_file_is_found_or_changes_nothing(tmp_path: Path) -> None:
    """Bytes that say nothing (padding, statistics) may be flipped without harm; every other flip
    has to be seen.
    """
    make(tmp_path / "t", 1, 40)
    (file,) = data_files(tmp_path / "t")
    whole, original = contents(tmp_path / "t"), file.read_bytes()
    found = 0
    for place in range(0, len(original), 23):
        file.write_bytes(original[:place] + bytes([original[place] ^ 0x10]) + original[place + 1 :])
        if not check_store(TokenStore.open(tmp_path / "t")).ok:
            found += 1
        else:
            assert contents(tmp_path / "t") == whole, place
    assert found > len(original) / 23 / 3


# Whole jobs

JOB = """
import sys
from smalto.store import writer as store_writer
store_writer.ROWS_PER_COMMIT, store_writer.MANY_SMALL_FILES = 8, 5
from smalto.cli import main
main()
"""


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images in folders and a tokenizer."""
    folder = tmp_path_factory.mktemp("collection")
    for label in ("cats", "dogs"):
        write_images(folder / "images" / label, 100, 24, 32)
    (folder / "images" / "bad.png").write_bytes(b"no image")
    torch.manual_seed(0)
    smalto.default_tokenizer(64).save(folder / "tokenizer")
    return folder


def job(collection: Path, out: Path, *more: str) -> list[str]:
    arguments = [
        "tokenize",
        str(collection / "images"),
        "--tokenizer",
        str(collection / "tokenizer"),
        "--out",
        str(out),
        "--batch",
        "4",
    ]
    return [
        sys.executable,
        "-c",
        JOB,
        *arguments,
        "--flip",
        "--workers",
        "1",
        "--device",
        "cpu",
        *more,
    ]


def kill_jobs(collection: Path, tmp_path: Path, kills: int, seed: int) -> None:
    chance = random.Random(seed)
    environment = ENVIRONMENT | {"PYTHONPATH": os.getcwd()}
    subprocess.run(
        job(collection, tmp_path / "whole"), env=environment, check=True, capture_output=True
    )
    expected, before, killed, finished = contents(tmp_path / "whole"), 0, 0, 0
    assert len(expected) == 400
    out = tmp_path / "t"
    while killed < kills or not finished:
        process = subprocess.Popen(
            job(collection, out), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        assert process.stderr is not None
        process.stderr.readline()  # it says its device, and begins
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(chance.uniform(0, 0.6) if killed < kills else 60)
        ended = process.poll() is not None
        process.kill()
        errors = process.communicate()[1]
        assert not ended or process.returncode == 0, errors
        killed += not ended
        if out.exists():
            store = TokenStore.open(out)
            assert len(store) >= before
            assert check_store(store).ok
            before = len(store)
        if ended:  # and begin anew
            assert contents(out) == expected
            assert list(TokenStore.open(out).errors()) == ["bad.png"]
            shutil.rmtree(out)
            before, finished = 0, finished + 1


@pytest.mark.timeout(600)
def test_jobs_that_are_killed_lose_nothing_and_end_as_one_that_was_not(
    collection: Path, tmp_path: Path
) -> None:
    kill_jobs(collection, tmp_path, 5, seed=0)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_jobs_that_are_killed_fifty_times_lose_nothing(collection: Path, tmp_path: Path) -> None:
    kill_jobs(collection, tmp_path, 50, seed=1)


def test_two_jobs_on_one_store(collection: Path, tmp_path: Path) -> None:
    environment = ENVIRONMENT | {"PYTHONPATH": os.getcwd()}
    both = [
        subprocess.Popen(
            job(collection, tmp_path / "t"),
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    said = [process.communicate()[1] for process in both]
    codes = [process.returncode for process in both]
    assert 0 in codes, said
    for code, text in zip(codes, said, strict=True):
        assert code == 0 or "another process is writing to" in text or "exists already" in text, (
            text
        )
        assert "Traceback" not in text
    store = TokenStore.open(tmp_path / "t")
    assert len(store) == 400
    assert check_store(store).ok


def test_a_full_disk_ends_a_job_and_loses_nothing(collection: Path, tmp_path: Path) -> None:
    """No file may grow beyond 9 KiB, which is too little once files are joined: to the writer a
    disk with no room left.
    """
    environment = ENVIRONMENT | {"PYTHONPATH": os.getcwd()}
    command = job(collection, tmp_path / "t")
    limited = ["bash", "-c", 'ulimit -f 9; exec "$0" "$@"', *command]
    full = subprocess.run(limited, env=environment, capture_output=True, text=True, check=False)
    assert full.returncode == 1
    assert "Traceback" not in full.stderr
    assert "File too large" in full.stderr or "No space left" in full.stderr
    rows = len(TokenStore.open(tmp_path / "t"))
    assert 0 < rows < 400
    assert check_store(TokenStore.open(tmp_path / "t")).ok
    subprocess.run(command, env=environment, capture_output=True, check=True)
    store = TokenStore.open(tmp_path / "t")
    assert len(store) == 400
    assert check_store(store).ok


def test_head_names_the_newest_version(tmp_path: Path) -> None:
    store = make(tmp_path / "t", 3)
    head = json.loads((tmp_path / "t" / "head.json").read_text())
    assert (head["version"], head["rows"]) == (store.version, 18)
