"""The tokenizing job: what it writes, that it resumes, what becomes of changed and bad images."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

import smalto
from smalto.core.errors import ConfigError, DataError, InputError, RunError
from smalto.core.layout import TokenLayout
from smalto.images.image_file import ImageFile
from smalto.images.reading import read_image
from smalto.images.tensors import to_tensor, to_unit_range
from smalto.pipelines.tokenize import Tokenized
from smalto.pipelines.verify import verify
from smalto.store.token_store import TokenStore
from tests.conftest import ENVIRONMENT, make_image, smalto_command, write_images
from tests.odd_images import write_odd_folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tokenizer")
    smalto.default_tokenizer(64).save(folder)
    return folder


def tokenize(source: Any, tokenizer: Path, out: Path, **settings: Any) -> Tokenized:
    return smalto.tokenize(source, tokenizer, out, **({"device": "cpu", "workers": 0} | settings))


def tokens_by_id(path: Path) -> dict[str, list[int]]:
    rows = TokenStore.open(path).rows()
    return dict(zip(rows["id"], (row.tolist() for row in rows["tokens"]), strict=True))


def test_a_second_run_writes_nothing(image_folder: Path, tokenizer: Path, tmp_path: Path) -> None:
    (image_folder / "bad.png").write_bytes(b"no image")
    (image_folder / "notes.txt").write_text("notes")
    first = tokenize(image_folder, tokenizer, tmp_path / "t")
    assert (
        first.num_images,
        first.num_known,
        [s.name for s in first.skipped],
        first.num_ignored,
    ) == (6, 0, ["bad.png"], 1)
    before = {
        path: path.stat().st_mtime_ns
        for path in (tmp_path / "t").rglob("*")
        if path.is_file() and path.name != ".lock"
    }
    second = tokenize(image_folder, tokenizer, tmp_path / "t")
    assert (second.num_images, second.num_known, second.num_rows) == (0, 6, 6)
    assert [s.name for s in second.skipped] == ["bad.png"]
    after = {
        path: path.stat().st_mtime_ns
        for path in (tmp_path / "t").rglob("*")
        if path.is_file() and path.name != ".lock"
    }
    assert before == after


def test_new_images_are_added_and_changed_ones_said(
    image_folder: Path, tokenizer: Path, tmp_path: Path
) -> None:
    tokenize(image_folder, tokenizer, tmp_path / "t", flip=True)
    before = tokens_by_id(tmp_path / "t")
    Image.fromarray(make_image(50)).save(image_folder / "new.png")
    os.utime(image_folder / "photo01.png", (1, 1))  # touched, and the same
    Image.fromarray(make_image(51)).save(image_folder / "photo02.png")
    done = tokenize(image_folder, tokenizer, tmp_path / "t", flip=True)
    assert (done.num_images, done.num_known, done.changed, done.num_rows) == (
        1,
        5,
        ["photo02.png"],
        14,
    )
    assert {
        id: row for id, row in tokens_by_id(tmp_path / "t").items() if "new" not in id
    } == before
    again = tokenize(image_folder, tokenizer, tmp_path / "t", flip=True, update=True)
    assert (again.num_images, again.changed, again.num_rows) == (1, ["photo02.png"], 14)
    after = tokens_by_id(tmp_path / "t")
    assert {id for id in before if before[id] != after[id]} == {"photo02.png", "photo02.png?flip"}
    assert tokenize(image_folder, tokenizer, tmp_path / "t", flip=True, update=True).changed == []
    assert verify(tmp_path / "t", 14, tokenizer=tokenizer).ok


def test_a_bad_image_that_is_mended_is_taken_and_forgotten(
    image_folder: Path, tokenizer: Path, tmp_path: Path
) -> None:
    (image_folder / "bad.png").write_bytes(b"no image")
    tokenize(image_folder, tokenizer, tmp_path / "t")
    assert list(TokenStore.open(tmp_path / "t").errors()) == ["bad.png"]
    Image.fromarray(make_image(9)).save(image_folder / "bad.png")
    done = tokenize(image_folder, tokenizer, tmp_path / "t")
    assert (done.num_images, done.skipped, done.num_rows) == (1, [], 7)
    assert TokenStore.open(tmp_path / "t").errors() == {}


def test_views_are_rows_of_their_own(tokenizer: Path, tmp_path: Path) -> None:
    source = write_images(tmp_path / "p", 2, 80, 120)
    done = tokenize(source, tokenizer, tmp_path / "t", size=40, crops=5, flip=True, batch=3)
    store = TokenStore.open(tmp_path / "t")
    assert (done.num_images, len(store)) == (2, 20)
    model, whole = smalto.load(tokenizer), to_tensor(read_image(str(source / "photo00.png")))
    small = to_tensor(
        numpy.asarray(
            Image.fromarray(make_image(0, 80, 120)).resize(
                (60, 40), Image.Resampling.BICUBIC, reducing_gap=3.0
            )
        )
    )
    assert whole.shape == (3, 80, 120)
    rows = {
        id: row
        for id, row in zip(store.rows()["id"], store.token_rows(0, 20), strict=True)
        if "photo00" in id
    }
    for view, left, crop in (
        ("", 10, (0, 20, 80, 80)),
        ("?top-left", 0, (0, 0, 80, 80)),
        ("?bottom-right", 20, (0, 40, 80, 80)),
    ):
        image = to_unit_range(small[:, :, left : left + 40])[None]
        row, flipped = (
            rows["photo00.png" + view],
            rows["photo00.png" + (f"{view}-flip" if view else "?flip")],
        )
        assert torch.equal(
            model.encode(image)[0], torch.from_numpy(numpy.asarray(row.tokens).astype(numpy.int64))
        )
        assert torch.equal(
            model.encode(image.flip(-1))[0],
            torch.from_numpy(numpy.asarray(flipped.tokens).astype(numpy.int64)),
        )
        assert (row.crop, row.height, row.width, row.layout) == (
            crop,
            80,
            120,
            TokenLayout.single(10, 10),
        )
    assert verify(tmp_path / "t", 20).ok
    paths = smalto.decode(tmp_path / "t", tmp_path / "decoded", device="cpu")
    assert len(set(paths)) == 20
    assert (tmp_path / "decoded" / "photo00.top-left-flip.png").is_file()


def test_a_batch_changes_no_token(tokenizer: Path, tmp_path: Path) -> None:
    source = write_images(tmp_path / "p", 7, 32, 48)
    for batch in (1, 3, 32):
        tokenize(source, tokenizer, tmp_path / f"t{batch}", batch=batch)
    assert (
        tokens_by_id(tmp_path / "t1")
        == tokens_by_id(tmp_path / "t3")
        == tokens_by_id(tmp_path / "t32")
    )


def test_labels_come_from_folders_shards_and_tables(tokenizer: Path, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    source = write_images(tmp_path / "p" / "cats", 1).parent
    write_images(source, 1)
    data = (source / "photo00.png").read_bytes()
    with tarfile.open(source / "shard.tar", "w") as tar:
        for name, content in (
            ("7.cls", b"12\n"),
            ("7.png", data),
            ("dogs/8.png", data),
            ("9.png", b"first"),
            ("9.png", data),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    pyarrow.parquet.write_table(
        pyarrow.table({"image": [data, data], "label": [3, None]}), source / "table.parquet"
    )
    done = tokenize(source, tokenizer, tmp_path / "t")
    assert done.skipped == []  # of two members of one name the last one counts
    store = TokenStore.open(tmp_path / "t")
    assert dict(zip(store.ids(), store.labels(), strict=True)) == {
        "cats/photo00.png": "cats",
        "photo00.png": "",
        "shard.tar/7.png": "12",
        "shard.tar/dogs/8.png": "dogs",
        "shard.tar/9.png": "",
        "table.parquet/00000000": "3",
        "table.parquet/00000001": "",
    }
    assert tokenize(source, tokenizer, tmp_path / "t").num_known == 7
    assert verify(tmp_path / "t", 7).sample.num_rows == 7


def test_the_original_size_is_that_of_the_upright_image(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(make_image(0, 400, 1200)).save(tmp_path / "p" / "turned.jpg", exif=exif)
    tokenize(tmp_path / "p", tokenizer, tmp_path / "t", size=64)
    row = TokenStore.open(tmp_path / "t")[0]
    assert (int(row["height"]), int(row["width"]), row["crop"].tolist()) == (
        1200,
        400,
        [400, 0, 400, 400],
    )


def test_odd_and_broken_files_are_noted_once(tokenizer: Path, tmp_path: Path) -> None:
    bad = write_odd_folder(tmp_path / "odd")
    (tmp_path / "odd" / os.fsdecode(b"not\xffutf8.png")).write_bytes(
        (tmp_path / "odd" / "plain.png").read_bytes()
    )
    done = tokenize(tmp_path / "odd", tokenizer, tmp_path / "t", size=32, workers=1)
    store = TokenStore.open(tmp_path / "t")
    ignored = {name for name in bad if name.endswith((".txt", ".html", ".mp4", ".eps"))}
    assert set(store.errors()) == set(bad) - ignored
    assert done.num_ignored == len(ignored)
    assert {"not%FFutf8.png", "new%0Aline.png"} <= set(store.ids())
    assert verify(tmp_path / "t", 100).sample.num_rows == len(store)
    version = store.version
    again = tokenize(tmp_path / "odd", tokenizer, tmp_path / "t", size=32)
    assert (again.num_images, again.num_known) == (0, len(store))
    assert TokenStore.open(tmp_path / "t").version == version


def test_a_folder_of_bad_images_stops_the_job(tokenizer: Path, tmp_path: Path) -> None:
    source = write_images(tmp_path / "p", 3)
    for i in range(8):
        (source / f"x{i}.png").write_bytes(b"no image")
    with pytest.raises(
        DataError,
        match=r"stopped at \d+ bad images among the first \d+: is this the right "
        r"folder\? .*--max-errors",
    ):
        tokenize(source, tokenizer, tmp_path / "t", max_errors=5, batch=1)
    assert len(TokenStore.open(tmp_path / "t")) == 3  # what was good is kept
    assert tokenize(source, tokenizer, tmp_path / "t", max_errors=8).num_known == 3
    with pytest.raises(ConfigError, match="max_errors"):
        tokenize(source, tokenizer, tmp_path / "t", max_errors=-1)
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "x.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"nothing in .*q could be used"):
        tokenize(tmp_path / "q", tokenizer, tmp_path / "u")
    assert not (tmp_path / "u").exists()  # the next attempt may be of another kind


def test_a_store_is_replaced_only_by_what_there_is(
    image_folder: Path, tokenizer: Path, tmp_path: Path
) -> None:
    tokenize(image_folder, tokenizer, tmp_path / "t", size=32)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty is empty"):
        tokenize(tmp_path / "empty", tokenizer, tmp_path / "t", size=32, overwrite=True)
    with pytest.raises(DataError, match="the list of files is empty"):
        tokenize([], tokenizer, tmp_path / "t", size=32, overwrite=True)
    with pytest.raises(ConfigError, match="workers"):
        tokenize(image_folder, tokenizer, tmp_path / "t", size=32, overwrite=True, workers=-1)
    (tmp_path / "link").symlink_to(tmp_path / "t")
    for same in ("t", "link"):
        with pytest.raises(ConfigError, match="cannot be its own source"):
            tokenize(tmp_path / "t", tokenizer, tmp_path / same, overwrite=True)
    assert len(TokenStore.open(tmp_path / "t")) == 6


def test_odd_labels_times_and_archives_stop_nothing(tokenizer: Path, tmp_path: Path) -> None:
    source = write_images(tmp_path / "p", 3)
    shutil.copytree(source, tmp_path / "p" / os.fsdecode(b"z\xff"))
    os.utime(source / "photo00.png", (13_569_465_600, 13_569_465_600))  # the year 2400
    (source / "bad.png").write_bytes(b"no image")
    os.utime(source / "bad.png", (13_569_465_600, 13_569_465_600))
    (source / "/".join("d" * 510)).mkdir(parents=True)
    with zipfile.ZipFile(source / "z.zip", "w") as archive:
        archive.write(source / "photo01.png", "a.png")
    done = tokenize(source, tokenizer, tmp_path / "t", size=32)
    assert (done.num_images, len(done.skipped)) == (7, 2)
    assert TokenStore.open(tmp_path / "t").classes() == ["z%FF"]
    version = TokenStore.open(tmp_path / "t").version
    assert tokenize(source, tokenizer, tmp_path / "t", size=32).num_known == 7
    assert TokenStore.open(tmp_path / "t").version == version
    data = bytearray((source / "z.zip").read_bytes())
    data[len(data) // 2] ^= 1
    (source / "z.zip").write_bytes(data)
    assert tokenize(source, tokenizer, tmp_path / "t", size=32).changed == ["z.zip/a.png"]
    Image.new("RGB", (8000, 1)).save(source / "strip.png")  # would be 524 megapixels
    skipped = dict(tokenize(source, tokenizer, tmp_path / "t", size=256, overwrite=True).skipped)
    assert skipped["strip.png"].startswith("oversized")


def test_a_image_that_turned_bad_is_noted_once(
    image_folder: Path, tokenizer: Path, tmp_path: Path
) -> None:
    tokenize(image_folder, tokenizer, tmp_path / "t", size=32)
    (image_folder / "photo01.png").write_bytes(b"no image any more")
    assert len(tokenize(image_folder, tokenizer, tmp_path / "t", size=32, update=True).skipped) == 1
    version = TokenStore.open(tmp_path / "t")._errors().version
    for update in (True, False, True):
        assert (
            len(tokenize(image_folder, tokenizer, tmp_path / "t", size=32, update=update).skipped)
            == 1
        )
    assert TokenStore.open(tmp_path / "t")._errors().version == version
    assert set(TokenStore.open(tmp_path / "t").errors()) == {"photo01.png"}
    write_images(image_folder, 2, 50, 50)
    tokenize(image_folder, tokenizer, tmp_path / "t", size=32, update=True)
    assert not TokenStore.open(tmp_path / "t").errors()


def test_settings_that_do_not_fit_are_named(
    image_folder: Path, tokenizer: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="multiple of the tokenizer's stride 4; got 30"):
        tokenize(image_folder, tokenizer, tmp_path / "t", size=30)
    with pytest.raises(ConfigError, match="crops of an image need a size"):
        tokenize(image_folder, tokenizer, tmp_path / "t", crops=5)
    with pytest.raises(DataError, match="nowhere does not exist"):
        tokenize(tmp_path / "nowhere", tokenizer, tmp_path / "t")
    assert not (tmp_path / "t").exists()
    tokenize(image_folder, tokenizer, tmp_path / "t", size=32)
    with pytest.raises(
        RunError,
        match=r"layout: 8x8 in the store, 16x16 now; transform: shorter side to "
        r"32.* store, shorter side to 64",
    ):
        tokenize(image_folder, tokenizer, tmp_path / "t", size=64)
    with pytest.raises(RunError, match=r"layout: 8x8 in the store, varying now"):
        tokenize(image_folder, tokenizer, tmp_path / "t")
    with pytest.raises(RunError, match="precision: float32 in the store, bf16 now"):
        tokenize(image_folder, tokenizer, tmp_path / "t", size=32, precision="bf16")
    assert (
        tokenize(image_folder, tokenizer, tmp_path / "t", size=64, overwrite=True).num_images == 6
    )
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="is not a token store"):
        tokenize(image_folder, tokenizer, tmp_path / "folder", overwrite=True)
    assert (
        "leave out --keep-shape"
        in smalto_command(
            "tokenize",
            image_folder,
            "--tokenizer",
            tokenizer,
            "--size",
            32,
            "--keep-shape",
            check=False,
        ).stderr
    )


def test_two_images_of_one_name_are_refused_wherever_they_stand(
    image_folder: Path, tokenizer: Path, tmp_path: Path
) -> None:
    files = [
        ImageFile(name, str(image_folder / f"photo0{i}.png"))
        for i, name in enumerate(["a", "b", "c", "a"])
    ]
    with pytest.raises(InputError, match="got the id 'a' more than once"):
        tokenize(files, tokenizer, tmp_path / "t", batch=1)
    assert not (tmp_path / "t").exists()


def test_shuffling_changes_the_order_and_nothing_else(tokenizer: Path, tmp_path: Path) -> None:
    source = write_images(tmp_path / "p", 20, 16, 16)
    tokenize(source, tokenizer, tmp_path / "t")
    tokenize(source, tokenizer, tmp_path / "s", shuffle=True)
    assert TokenStore.open(tmp_path / "t").ids() == sorted(TokenStore.open(tmp_path / "t").ids())
    assert TokenStore.open(tmp_path / "s").ids() != TokenStore.open(tmp_path / "t").ids()
    assert tokens_by_id(tmp_path / "s") == tokens_by_id(tmp_path / "t")


def test_another_store_is_a_source(tokenizer: Path, tmp_path: Path) -> None:
    for number, name in ((4, "a"), (6, "b")):
        tokenize(
            write_images(tmp_path / name, number), tokenizer, tmp_path / f"{name}.lance", size=32
        )
    done = tokenize(tmp_path / "a.lance", tokenizer, tmp_path / "all.lance")
    assert (done.num_images, done.num_known) == (4, 0)
    more = tokenize(tmp_path / "b.lance", tokenizer, tmp_path / "all.lance")
    assert (more.num_images, more.num_rows) == (2, 6)
    assert tokens_by_id(tmp_path / "all.lance") == tokens_by_id(tmp_path / "b.lance")
    store = TokenStore.open(
        tmp_path / "all.lance"
    )  # rows that know nothing of their files tell of no changes
    store.append(
        [row._replace(size=0, modified=0, digest=b"") for row in store.token_rows(0, 2)],
        replace=True,
    )
    again = tokenize(tmp_path / "b.lance", tokenizer, tmp_path / "all.lance", update=True)
    assert (again.changed, again.num_images) == ([], 0)
    with pytest.raises(ConfigError, match="are copied unchanged: leave out size"):
        tokenize(tmp_path / "a.lance", tokenizer, tmp_path / "all.lance", size=32)
    smalto.default_tokenizer(64).save(tmp_path / "other")
    with pytest.raises(RunError, match="was written by another tokenizer"):
        tokenize(tmp_path / "a.lance", tmp_path / "other", tmp_path / "c.lance")


def test_verify_finds_tokens_that_are_not_the_images(
    image_folder: Path, tokenizer: Path, tmp_path: Path
) -> None:
    tokenize(image_folder, tokenizer, tmp_path / "t", size=32)
    store = TokenStore.open(tmp_path / "t")
    row = store.token_rows(2, 3)[0]
    wrong = numpy.asarray(row.tokens).copy()
    wrong[5] = (int(wrong[5]) + 1) % 64
    store.append([row._replace(tokens=wrong)], replace=True)
    found = verify(tmp_path / "t", 6)
    assert (found.rows.num_problems, found.ok) == (0, False)
    (difference,) = found.sample.damaged
    assert (difference.id, difference.num_tokens, difference.first) == (row.id, 1, 5)
    done = smalto_command("store", "verify", tmp_path / "t", check=False)
    assert done.returncode == 1
    assert (
        f"row {row.id!r}: 1 tokens differ when the image is encoded again, the first at 5"
        in done.stdout
    )
    write_images(image_folder, 1, 50, 50)
    other, (first, *_) = verify(tmp_path / "t", 6), store.ids()
    assert (
        other.sample.changed,
        other.sample.num_rows,
        [difference.id for difference in other.sample.damaged],
    ) == (
        [first],
        5,
        [row.id],
    )  # no damage
    assert (
        "1 have changed since they were tokenized"
        in smalto_command("store", "verify", tmp_path / "t", check=False).stdout
    )
    tokenize(image_folder, tokenizer, tmp_path / "t", size=32, update=True)
    (image_folder / row.id).unlink()
    assert verify(tmp_path / "t", 6).sample.not_found == [row.id]
    (tmp_path / "elsewhere").mkdir()
    nothing = smalto_command(
        "store", "verify", tmp_path / "t", "--source", tmp_path / "elsewhere", check=False
    )
    assert nothing.returncode == 1
    assert "name their folder with --source" in nothing.stderr
    moved = shutil.move(image_folder, tmp_path / "moved")
    assert verify(tmp_path / "t", 6, source=moved).sample.num_rows == 5


def test_verify_takes_a_sample_without_the_index_and_names_what_is_lost_first(
    image_folder: Path, tokenizer: Path, tmp_path: Path
) -> None:
    tokenize(image_folder, tokenizer, tmp_path / "t", size=32)
    TokenStore.open(tmp_path / "t").compact()
    shutil.rmtree(tmp_path / "t" / "_indices")
    found = verify(tmp_path / "t", 6)
    assert (found.rows.num_problems, found.sample.num_rows, found.sample.damaged) == (1, 6, [])
    assert "index" in found.rows.problems[0]
    (data,) = (tmp_path / "t" / "data").iterdir()
    data.unlink()
    done = smalto_command("store", "verify", tmp_path / "t", check=False)
    assert done.returncode == 1
    assert f"{data} is missing" in done.stdout
    assert "0 of 6 rows checked" in done.stdout


def test_an_interrupted_job_keeps_what_it_made_and_goes_on(tokenizer: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "p", 90, 400, 600)
    script = (
        "from smalto.store import writer as store_writer; "
        "store_writer.ROWS_PER_COMMIT = 4; from smalto.cli import main; main()"
    )
    command = [
        sys.executable,
        "-c",
        script,
        "tokenize",
        "p",
        "--tokenizer",
        str(tokenizer),
        "--out",
        "t",
        "--batch",
        "2",
        "--workers",
        "1",
    ]
    process = subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    deadline = time.monotonic() + 60
    while (
        not ((tmp_path / "t").exists() and len(TokenStore.open(tmp_path / "t")))
        and time.monotonic() < deadline
    ):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "Traceback" not in said
    assert "the same command" in said
    kept = len(TokenStore.open(tmp_path / "t"))
    assert 0 < kept < 90
    done = tokenize(tmp_path / "p", tokenizer, tmp_path / "t")
    assert (done.num_known, done.num_rows) == (kept, 90)
