"""Drives and networks that fail for a moment, or for good: nothing is lost or wrongly given up."""

from __future__ import annotations

import builtins
import errno
import io
import os
import tarfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
from PIL import Image

import smalto
from smalto.core.errors import DataError
from smalto.images import archives, patience, retries
from smalto.images.finding import find_images
from smalto.images.image_file import Skipped
from smalto.images.image_set import ImageFiles
from smalto.images.reading import BadImage, UnreadableImage, bad_image_errors, read_image
from smalto.images.worker_pool import ReaderPool
from smalto.pipelines.verify import verify
from smalto.store.token_store import TokenStore
from smalto.training.recipe import change_recipe
from smalto.training.run_folder import RunFolder
from smalto.training.tokenizer_recipe import TokenizerRecipe
from tests.conftest import write_images

ERRNOS = ("EIO", "ENOENT", "ESTALE", "EACCES", "ETIMEDOUT", "EMFILE", "ENOMEM")
Fault = Callable[[str, int], Any]  # (path, how often it was opened before) -> what happens


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Callable[[Fault | None], Counter[str]]:
    """Injects faults into every reading of an image file; returns how often each was opened."""
    opened: Counter[str] = Counter()
    present: list[Fault | None] = [None]

    def open_(path: Any, *arguments: Any, **options: Any) -> Any:
        name = os.path.basename(path)
        times, opened[name] = opened[name], opened[name] + 1
        outcome = present[0](name, times) if present[0] else None
        if isinstance(outcome, BaseException):
            raise outcome
        if isinstance(outcome, int):
            return io.BytesIO(Path(path).read_bytes()[:outcome])
        if outcome is not None:
            return outcome(path)
        return builtins.open(path, *arguments, **options)

    monkeypatch.setattr(archives, "open", open_, raising=False)
    monkeypatch.setattr(retries, "PAUSES", (0.0, 0.0, 0.0))
    monkeypatch.setattr(retries, "_hopeless", set())
    monkeypatch.setattr(patience, "PAUSES", (0.0, 0.0, 0.0))

    def inject(fault: Fault | None) -> Counter[str]:
        present[0] = fault
        opened.clear()
        return opened

    return inject


class FailingRead(io.FileIO):
    """A file whose third read fails."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.reads = 0

    def _count(self) -> None:
        self.reads += 1
        if self.reads == 3:
            raise os_error("EIO")

    def read(self, size: int | None = -1) -> bytes | None:
        self._count()
        return super().read(-1 if size is None else size)


def os_error(name: str) -> OSError:
    number = getattr(errno, name)
    return OSError(number, os.strerror(number), "a.png")


def from_photo_12_on() -> Fault:
    """The source vanishes while the thirteenth image is read."""
    gone: list[str] = []

    def vanish(name: str, times: int) -> OSError | None:
        gone.extend([name] if name >= "photo12.png" else [])
        return os_error("ENOENT") if gone else None

    return vanish


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., Any]:
    write_images(tmp_path / "images", 48, 16, 16)
    smalto.SimpleVQVAE(16, 8, 8).save(tmp_path / "tokenizer")

    def run(out: str = "t", **options: Any) -> Any:
        return smalto.tokenize(
            tmp_path / "images", tmp_path / "tokenizer", tmp_path / out, workers=0, **options
        )

    return run


def rows_of(store: Path) -> dict[str, list[int]]:
    rows = TokenStore.open(store).rows()
    tokens = [row.tolist() for row in rows["tokens"]]
    return dict(zip(rows["id"], tokens, strict=True))


@pytest.mark.parametrize("name", ERRNOS)
def test_an_error_of_the_system_is_not_one_of_the_image(name: str) -> None:
    with pytest.raises(UnreadableImage, match=r"^unreadable: "), bad_image_errors():
        raise os_error(name)


def test_memory_and_decoders() -> None:
    with (
        pytest.raises(UnreadableImage, match=r"^unreadable: not enough memory"),
        bad_image_errors(),
    ):
        raise MemoryError
    with (
        pytest.raises(BadImage, match=r"^damaged: image file is truncated") as bad,
        bad_image_errors(),
    ):
        raise OSError("image file is truncated (3 bytes not processed)")  # as Pillow does
    assert not isinstance(bad.value, UnreadableImage)


@pytest.mark.parametrize(
    "fault",
    [
        lambda name, times: os_error("EIO") if times < 3 else None,
        lambda name, times: os_error("ENOENT") if name > "photo40" and not times else None,
        lambda name, times: 200 if times == 0 else None,  # a short read
        lambda name, times: FailingRead if times == 0 else None,
        lambda name, times: time.sleep(0.02),
    ],
    ids=["three errors each", "away once", "short reads", "the third read fails", "slow reads"],
)
def test_passing_faults_leave_no_trace(fault: Fault, job: Any, faults: Any, tmp_path: Path) -> None:
    job("calm")
    faults(fault)
    done = job("shaken")
    assert (done.num_images, done.skipped, done.unreadable) == (48, [], [])
    assert rows_of(tmp_path / "shaken") == rows_of(tmp_path / "calm")
    assert TokenStore.open(tmp_path / "shaken").errors() == {}


@pytest.mark.parametrize("name", ERRNOS)
def test_what_cannot_be_read_now_is_tried_again_by_the_next_run(
    name: str, job: Any, faults: Any, tmp_path: Path
) -> None:
    faults(lambda file, times: os_error(name) if file == "photo03.png" else None)
    done = job(max_errors=0)
    assert (done.num_images, done.skipped) == (47, [])
    ((unreadable, reason),) = done.unreadable
    assert unreadable == "photo03.png"
    assert reason.startswith("unreadable: ")
    assert TokenStore.open(tmp_path / "t").errors() == {}
    faults(None)
    assert (job().num_images, len(TokenStore.open(tmp_path / "t"))) == (1, 48)


def test_a_source_that_vanishes_stops_the_job_and_keeps_what_is_done(
    job: Any, faults: Any, tmp_path: Path
) -> None:
    job("calm")
    opened = faults(from_photo_12_on())
    with pytest.raises(DataError, match=r"images in a row could not be read.*is connected"):
        job()
    assert max(opened.values()) == 1 + len(retries.PAUSES)
    assert len(TokenStore.open(tmp_path / "t")) == 12
    assert opened["photo40.png"] == 1  # the drive is known to be away: no pauses
    faults(None)
    job()
    assert rows_of(tmp_path / "t") == rows_of(tmp_path / "calm")


def test_errors_that_earlier_versions_recorded_are_tried_again(job: Any, tmp_path: Path) -> None:
    job()
    path = tmp_path / "images" / "photo03.png"
    store = TokenStore.open(tmp_path / "t")
    kept = [row for row in store.token_rows(0, 48) if row.id != "photo03.png"]
    again = TokenStore.create(tmp_path / "u", store.header)
    again.append(kept)
    status = path.stat()
    recorded = Skipped("photo03.png", "damaged: [Errno 5] Input/output")
    again.add_errors([(recorded, status.st_size, status.st_mtime_ns)])
    assert (job("u").num_images, TokenStore.open(tmp_path / "u").errors()) == (1, {})


def test_known_bad_images_do_not_count_against_the_limit(job: Any, tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / "images" / f"bad{number}.png").write_bytes(b"\x89PNG\r\n\x1a\nno image")
    assert len(job(max_errors=3).skipped) == 3
    again = job(max_errors=0)
    assert (len(again.skipped), again.num_known) == (3, 48)


def test_a_zip_is_opened_again_after_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo = write_images(tmp_path / "images", 1) / "photo00.png"
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(photo, "a.png")
    ((file,), _) = find_images(tmp_path / "a.zip")
    stale: list[zipfile.ZipFile] = []  # a file handle from before the drive was away
    real = zipfile.ZipFile.open

    def open_(self: zipfile.ZipFile, *arguments: Any, **options: Any) -> Any:
        stale.append(self)
        if self is stale[0]:
            raise os_error("ESTALE")
        return real(self, *arguments, **options)

    monkeypatch.setattr(retries, "PAUSES", (0.0,))
    monkeypatch.setattr(retries, "_hopeless", set())
    monkeypatch.setattr(patience, "PAUSES", (0.0, 0.0, 0.0))
    monkeypatch.setattr(zipfile.ZipFile, "open", open_)
    assert isinstance(retries.read_with_retries(read_image, file), numpy.ndarray)


def test_training_reads_it_again_in_the_next_epoch(faults: Any, tmp_path: Path) -> None:
    files, _ = find_images(write_images(tmp_path / "images", 2))
    away = 2 * (1 + len(retries.PAUSES)) - 3  # two visits: pauses at the first one alone
    faults(lambda name, times: os_error("EIO") if name == "photo00.png" and times < away else None)
    with ReaderPool(0, read_image) as pool:
        images = ImageFiles(files, pool, 2**20)
        assert images.get(0) is None
        assert images.get(0) is None
        assert images.get(0) is not None
    assert images.skipped == []
    assert images.unreadable == {"photo00.png": "unreadable: input/output error"}


def test_a_run_does_not_skip_what_was_unreadable_once(
    faults: Any, tmp_path: Path, tiny_recipe: TokenizerRecipe
) -> None:
    write_images(tmp_path / "images", 6)
    faults(lambda name, times: os_error("ESTALE") if name == "photo02.png" and times < 6 else None)
    trained = smalto.train(
        tmp_path / "images", tiny_recipe, out=tmp_path / "run", device="cpu", workers=0
    )
    assert trained.metrics.skipped == ()


def test_an_evaluation_names_it_and_stops_when_the_source_is_gone(
    job: Any, faults: Any, tmp_path: Path
) -> None:
    faults(lambda file, times: os_error("EIO") if file == "photo03.png" else None)
    run = lambda: smalto.evaluate(tmp_path / "images", tmp_path / "tokenizer", workers=0)  # noqa: E731
    metrics = run().metrics
    assert metrics.num_images == 47
    assert metrics.skipped == (("photo03.png", "unreadable: input/output error"),)
    faults(from_photo_12_on())
    with pytest.raises(DataError, match="images in a row could not be read"):
        run()


def test_verify_reads_again_too(job: Any, faults: Any, tmp_path: Path) -> None:
    job()
    faults(lambda file, times: os_error("EIO") if times < 2 else None)
    found = verify(tmp_path / "t", 48, tokenizer=tmp_path / "tokenizer")
    assert found.ok
    assert (found.sample.num_rows, found.sample.not_found) == (48, [])


def test_training_stops_and_saves_when_the_source_is_gone(
    faults: Any, tmp_path: Path, tiny_recipe: TokenizerRecipe
) -> None:
    write_images(tmp_path / "images", 160, 16, 16)
    options: dict[str, Any] = {"device": "cpu", "workers": 0}
    settings = {"steps": 60, "data.crops_per_image": 1, "data.cache_mb": 0}
    recipe = change_recipe(tiny_recipe, settings)
    opened = iter(range(10_000))
    faults(lambda name, times: os_error("ESTALE") if next(opened) >= 100 else None)
    with pytest.raises(DataError, match=r"in a row could not be read \(unreadable: stale"):
        smalto.train(tmp_path / "images", recipe, out=tmp_path / "run", **options)
    log = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    saved = RunFolder(tmp_path / "run").steps()[-1]
    assert 0 < saved == len(log) < recipe.steps
    faults(None)
    resumed = smalto.resume(tmp_path / "run", **options)
    assert resumed.metrics.skipped == ()
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == recipe.steps


def test_an_image_that_stays_unreadable_does_not_stop_training(faults: Any, tmp_path: Path) -> None:
    files, _ = find_images(write_images(tmp_path / "images", 3))
    faults(lambda name, times: os_error("EACCES") if name == "photo00.png" else None)
    with ReaderPool(0, read_image) as pool:
        images = ImageFiles(files, pool, 2**20)
        seen = [[images.get(index) is None for index in range(3)] for _ in range(50)]
    assert seen == [[True, False, False]] * 50


def test_a_drive_that_is_away_for_many_images_and_back_does_not_end_the_job(
    faults: Any, tmp_path: Path
) -> None:
    write_images(tmp_path / "images", 200, 16, 16)
    smalto.SimpleVQVAE(16, 8, 8).save(tmp_path / "tokenizer")
    run = lambda: smalto.tokenize(  # noqa: E731
        tmp_path / "images", tmp_path / "tokenizer", tmp_path / "t", workers=0
    )
    opened = iter(range(10_000))
    faults(lambda name, times: os_error("EIO") if 50 <= next(opened) < 93 else None)
    done = run()
    assert len(done.unreadable) > retries.UNREADABLE_IN_A_ROW
    assert done.num_images + len(done.unreadable) == 200
    faults(None)
    run()
    assert len(TokenStore.open(tmp_path / "t")) == 200


def test_files_that_stay_unreadable_do_not_end_the_job(faults: Any, tmp_path: Path) -> None:
    write_images(tmp_path / "images", 99, 16, 16)
    smalto.SimpleVQVAE(16, 8, 8).save(tmp_path / "tokenizer")
    paused: list[float] = []
    faults(lambda name, times: os_error("EACCES") if "photo20" < name < "photo80" else None)
    retries.time.sleep, sleep = paused.append, retries.time.sleep  # type: ignore[assignment]
    try:
        done = smalto.tokenize(
            tmp_path / "images", tmp_path / "tokenizer", tmp_path / "t", workers=0
        )
    finally:
        retries.time.sleep = sleep
    assert (done.num_images, len(done.unreadable)) == (39, 60)
    assert len(paused) == len(retries.PAUSES)  # not for each of the 60


def test_a_position_beyond_all_files_is_damage() -> None:
    with pytest.raises(BadImage, match=r"^damaged: ") as bad, bad_image_errors():
        raise os_error("EINVAL")
    assert not isinstance(bad.value, UnreadableImage)


def test_a_source_that_is_gone_leaves_no_empty_store(faults: Any, tmp_path: Path) -> None:
    write_images(tmp_path / "images", 60, 16, 16)
    smalto.SimpleVQVAE(16, 8, 8).save(tmp_path / "tokenizer")
    faults(lambda name, times: os_error("EIO"))
    for size in (None, 16):  # another kind of tokens in the second attempt
        with pytest.raises(DataError, match="could not be read"):
            smalto.tokenize(
                tmp_path / "images",
                tmp_path / "tokenizer",
                tmp_path / "t",
                workers=0,
                size=size,
            )
        assert not (tmp_path / "t").exists()


def test_a_listed_file_that_is_gone_is_named(tmp_path: Path) -> None:
    files, _ = find_images(write_images(tmp_path / "images", 3, 16, 16))
    smalto.SimpleVQVAE(16, 8, 8).save(tmp_path / "tokenizer")
    (tmp_path / "images" / "photo01.png").unlink()
    done = smalto.tokenize(files, tmp_path / "tokenizer", tmp_path / "t", workers=0)
    assert done.num_images == 2
    assert done.unreadable == [Skipped("photo01.png", "unreadable: no such file or directory")]


class FailsFrom(io.FileIO):
    """A file that cannot be read at its end, where a zip has its directory, and a TIFF its tags."""

    def read(self, size: int | None = -1) -> bytes | None:
        if self.tell() > 100:
            raise os_error("EIO")
        return super().read(-1 if size is None else min(size, 100))


@pytest.mark.parametrize("suffix", ["zip", "tif", "tar"])
def test_errors_that_libraries_hide_are_not_a_verdict(
    suffix: str, faults: Any, tmp_path: Path
) -> None:
    photo = write_images(tmp_path / "one", 1) / "photo00.png"
    (tmp_path / "images").mkdir()
    path = tmp_path / "images" / f"a.{suffix}"
    if suffix == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.write(photo, "a.png")
    elif suffix == "tar":
        with tarfile.open(path, "w") as tar:
            tar.add(photo, "a.png")
    else:
        Image.open(photo).save(path)
    smalto.SimpleVQVAE(16, 8, 8).save(tmp_path / "tokenizer")
    run = lambda: smalto.tokenize(  # noqa: E731
        tmp_path / "images", tmp_path / "tokenizer", tmp_path / "t", workers=0
    )
    faults(lambda name, times: FailsFrom if name.startswith("a.") else None)
    with pytest.raises(DataError, match=r"unreadable"):
        run()
    faults(None)
    assert run().num_images == 1


def test_short_reads_are_not_a_verdict(job: Any, faults: Any, tmp_path: Path) -> None:
    faults(lambda name, times: 200 if name == "photo03.png" else None)
    ((name, reason),) = job().unreadable
    assert (name, reason) == ("photo03.png", retries.SHORT)
    faults(None)
    assert job().num_images == 1


def test_an_old_store_stays_if_its_source_is_gone(job: Any, faults: Any, tmp_path: Path) -> None:
    job()
    before = rows_of(tmp_path / "t")
    faults(lambda name, times: os_error("EIO"))
    with pytest.raises(DataError, match="could not be read"):
        job(overwrite=True)
    assert rows_of(tmp_path / "t") == before
    faults(None)
    assert job(overwrite=True).num_images == 48
    assert [path.name for path in tmp_path.glob(".t*")] == []


def test_listing_is_tried_again(job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = iter([True, True, False, True])
    scandir = os.scandir
    monkeypatch.setattr(patience, "PAUSES", (0.0, 0.0, 0.0))

    def scan(path: Any = ".") -> Any:
        if str(path).endswith("images") and next(failures, False):
            raise os_error("EIO")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)
    assert job().num_images == 48


def test_an_update_names_what_it_could_not_compare(job: Any, faults: Any, tmp_path: Path) -> None:
    job()
    os.utime(tmp_path / "images" / "photo03.png", (0, 0))
    faults(lambda name, times: os_error("EIO"))
    done = job(update=True)
    assert done.unreadable == [Skipped("photo03.png", "unreadable: input/output error")]
