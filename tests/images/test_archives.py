"""Images inside zip and tar archives."""

from __future__ import annotations

import io
import os
import tarfile
import zipfile
from pathlib import Path

import numpy
import pytest
from PIL import Image

import smalto
from smalto.core.errors import DataError
from smalto.images.archives import open_file
from smalto.images.finding import find_images
from smalto.images.reading import BadImage, read_image
from smalto.images.worker_pool import ReaderPool
from smalto.training.tokenizer_recipe import TokenizerRecipe
from tests.conftest import make_image
from tests.odd_images import UNREAD


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(make_image(seed)).save(buffer, "PNG")
    return buffer.getvalue()


def saved(format: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(make_image(0)).save(buffer, format)
    return buffer.getvalue()


def write_zip(path: Path, contents: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    return path


def write_tar(path: Path, contents: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


WRITERS = {"zip": write_zip, "tar": write_tar}


@pytest.mark.parametrize("kind", WRITERS)
def test_an_archive_is_a_folder(kind: str, tmp_path: Path) -> None:
    contents = {f"b/{i}.png": png(i) for i in range(4)} | {
        "a.png": png(9),
        "notes.txt": b"x",
        "empty.png": b"",
        "broken.png": b"\x89PNG",
    }
    contents |= {"__MACOSX/a.png": b"x", "b/.hidden.png": b"x"}
    files, skipped = find_images(WRITERS[kind](tmp_path / f"images.{kind}", contents))
    assert [file.name for file in files] == [
        "a.png",
        *(f"b/{i}.png" for i in range(4)),
        "broken.png",
    ]
    assert sorted(reason for _, reason in skipped) == ["empty", "not an image"]
    assert numpy.array_equal(read_image(files[2]), make_image(1))
    for workers in (0, 2):
        with ReaderPool(workers, read_image) as decoder:
            outcomes = {file.name: outcome for file, outcome in decoder.in_order(files)}
        assert numpy.array_equal(outcomes["b/3.png"], make_image(3))
        assert "damaged" in str(outcomes["broken.png"]) or "not an image" in str(
            outcomes["broken.png"]
        )


def test_archives_in_a_folder_are_folders_of_it(tmp_path: Path) -> None:
    (tmp_path / "plain.png").write_bytes(png(0))
    write_tar(tmp_path / "shard-000.tar", {"000.png": png(1), "000.txt": b"a caption"})
    write_zip(tmp_path / "more.ZIP", {"x/y.png": png(2)})
    files, skipped = find_images(tmp_path)
    assert [file.name for file in files] == [
        "more.ZIP/x/y.png",
        "plain.png",
        "shard-000.tar/000.png",
    ]
    assert [reason for _, reason in skipped] == ["not an image"]


@pytest.mark.parametrize("kind", WRITERS)
def test_members_of_other_image_formats_are_read_or_named(kind: str, tmp_path: Path) -> None:
    contents = {"a.JP2": saved("JPEG2000"), "b.tga": saved("TGA"), "c.ppm": saved("PPM")}
    named = {"d.cr2": b"II*\0", "e.svg": b"<svg/>", "f.pdf": b"%PDF-", "g.txt": b"x"}
    files, skipped = find_images(WRITERS[kind](tmp_path / f"images.{kind}", contents | named))
    assert [file.name for file in files] == list(contents)
    for file in files:
        assert numpy.array_equal(read_image(file), make_image(0))
    assert dict(skipped) == {
        "d.cr2": f"{UNREAD}: CR2",
        "e.svg": f"{UNREAD}: SVG",
        "f.pdf": f"{UNREAD}: PDF",
        "g.txt": "not an image",
    }


def test_labels_of_a_shard_come_from_cls_and_json_members(tmp_path: Path) -> None:
    samples: dict[str, tuple[dict[str, bytes], str]] = {
        "a": ({"cls": b"7\n", "json": b'{"label": 1}'}, "7"),  # cls wins
        "b": ({"json": b'{"width": 40, "label": 3}'}, "3"),
        "c": ({"json": b'{"cls": 0}'}, "0"),
        "d": ({"json": b'{"class": "cat"}'}, "cat"),
        "e": ({"json": b'{"class_id": 12, "category": 4}'}, "12"),
        "f": ({"json": b'{"category": 4}'}, "4"),
        "g": ({"json": b'{"label": [1, 2], "cls": true, "class": null, "category": 5}'}, "5"),
        "h": ({"json": b'{"caption": "a cat"}'}, ""),
        "i": ({"json": b"[1, 2]"}, ""),
        "j": ({"json": b"no json"}, ""),
        "k": ({"json": b"\xff\xfe"}, ""),
        "l": ({"json": b"[" * 100_000}, ""),
        "m": ({"json": b'{"label": "' + b"x" * 2000 + b'"}'}, ""),
        "n": ({"cls": b"", "json": b'{"label": 9}'}, "9"),
        "o": ({}, ""),
    }
    contents = {}
    for key, (others, _) in samples.items():
        contents |= {f"{key}.png": png(0)} | {
            f"{key}.{kind}": data for kind, data in others.items()
        }
    files, skipped = find_images(write_tar(tmp_path / "shard.tar", contents))
    assert {file.name[0]: file.label for file in files} == {
        key: label for key, (_, label) in samples.items()
    }
    assert {reason for _, reason in skipped} == {"not an image"}
    in_folder = {"dogs/p.png": png(0), "dogs/p.json": b"{}", "dogs/q.png": png(0)}
    in_folder["dogs/q.json"] = b'{"label": 2}'
    files, _ = find_images(write_tar(tmp_path / "folders.tar", in_folder))
    assert [file.label for file in files] == ["dogs", "2"]


def test_nothing_in_an_archive_escapes_or_blocks(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "odd.tar", "w") as archive:
        for name, kind in (
            ("link.png", tarfile.SYMTYPE),
            ("hard.png", tarfile.LNKTYPE),
            ("pipe.png", tarfile.FIFOTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        data = png(5)
        info = tarfile.TarInfo("../../outside.png")
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    files, skipped = find_images(tmp_path / "odd.tar")
    assert sorted(name for name, _ in skipped) == ["hard.png", "link.png", "pipe.png"]
    assert numpy.array_equal(read_image(files[0]), make_image(5))
    smalto.default_tokenizer(16).save(tmp_path / "tokenizer")
    smalto.tokenize(
        tmp_path / "odd.tar", tmp_path / "tokenizer", tmp_path / "t.safetensors", workers=0
    )
    (written,) = smalto.decode(tmp_path / "t.safetensors", tmp_path / "out" / "deep", workers=0)
    assert written.resolve().is_relative_to(tmp_path / "out" / "deep")


@pytest.mark.parametrize("kind", WRITERS)
def test_a_damaged_archive_is_named(kind: str, tmp_path: Path) -> None:
    whole = WRITERS[kind](
        tmp_path / f"whole.{kind}", {f"{i}.png": png(i) for i in range(3)}
    ).read_bytes()
    (tmp_path / f"cut.{kind}").write_bytes(whole[: len(whole) // 2])
    (tmp_path / f"text.{kind}").write_bytes(b"hello" * 300)
    (tmp_path / f"empty.{kind}").touch()
    files, skipped = find_images(tmp_path)
    assert {f"whole.{kind}/{i}.png" for i in range(3)} <= {file.name for file in files}
    named = {name for name, reason in skipped if "damaged archive" in reason}
    assert f"text.{kind}" in named
    assert f"cut.{kind}" in named or any(file.name.startswith(f"cut.{kind}/") for file in files)
    with pytest.raises(DataError, match=r"holds no image.*damaged archive"):
        find_images(tmp_path / f"text.{kind}")


@pytest.mark.parametrize("kind", WRITERS)
def test_a_run_trains_on_an_archive(
    kind: str, tmp_path: Path, tiny_recipe: TokenizerRecipe
) -> None:
    source = WRITERS[kind](tmp_path / f"images.{kind}", {f"{i}.png": png(i) for i in range(6)})
    trained = smalto.train(source, tiny_recipe, out=tmp_path / "run", workers=1)
    assert trained.metrics.measured_on == "held-out images"
    again = smalto.evaluate(source, tmp_path / "run", workers=0)
    assert again.metrics.num_images == trained.metrics.num_images
    assert smalto.resume(tmp_path / "run", settings={"steps": 8}, workers=0).training.steps == 8


def test_a_compressed_tar_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "images.tar.gz").write_bytes(b"x")
    with pytest.raises(DataError, match=r"compressed tar: unpack it, or write it as a plain \.tar"):
        find_images(tmp_path / "images.tar.gz")


def test_bytes_come_from_where_the_archive_says(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"x.png": png(0), "y.png": png(1)})
    files, _ = find_images(path)
    for file, seed in zip(files, (0, 1), strict=True):
        with open_file(file) as stream:
            assert stream.read() == png(seed)
    os.remove(path)
    with pytest.raises(BadImage, match="unreadable: no such file"):
        read_image(files[0])


def test_a_zip_that_was_written_again_is_read_again(tmp_path: Path) -> None:
    for seed in (0, 1):
        files, _ = find_images(write_zip(tmp_path / "a.zip", {"x.png": png(seed)}))
        os.utime(tmp_path / "a.zip", ns=(seed, seed))
        assert numpy.array_equal(read_image(files[0]), make_image(seed))
