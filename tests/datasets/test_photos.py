"""Photographs out of Debian packages: a small package and a small resource file of our own."""

from __future__ import annotations

import importlib.util
import io
import os
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from types import ModuleType

import numpy
import pytest
from PIL import Image, ImageOps

from tests.conftest import make_image

DATASETS = Path(__file__).parents[2] / "datasets"
needs_dpkg = pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="no dpkg-deb")


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("extract_photos", DATASETS / "extract_photos.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["extract_photos"] = module
    spec.loader.exec_module(module)
    return module


photos = load_script()


def jpeg(seed: int, mirrored: bool = False) -> bytes:
    image = Image.fromarray(make_image(seed, 80, 96))
    buffer = io.BytesIO()
    (ImageOps.mirror(image) if mirrored else image).save(buffer, "JPEG")
    return buffer.getvalue()


def rcc(files: dict[str, bytes], version: int = 3) -> bytes:
    """A Qt resource file with one folder; every second file is compressed."""
    nodes, names, data = [], b"", b""

    def add_name(text: str) -> int:
        nonlocal names
        at = len(names)
        names += struct.pack(">HI", len(text), 0) + text.encode("utf-16-be")
        return at

    nodes.append(struct.pack(">IHII", 0, 2, 1, 1))
    nodes.append(struct.pack(">IHII", add_name("images"), 2, len(files), 2))
    for number, (name, content) in enumerate(files.items()):
        packed = number % 2
        body = struct.pack(">I", len(content)) + zlib.compress(content) if packed else content
        nodes.append(struct.pack(">IHHHI", add_name(name), packed, 0, 0, len(data)))
        data += struct.pack(">I", len(body)) + body
    tree = b"".join(node + bytes(8 * (version > 1)) for node in nodes)
    start = 20 + 4 * (version > 2)
    header = b"qres" + struct.pack(
        ">4I", version, start, start + len(tree), start + len(tree) + len(data)
    )
    return header + bytes(4 * (version > 2)) + tree + data + names


def deb(folder: Path, name: str, files: dict[str, bytes]) -> None:
    root = folder / f"{name}.root"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN" / "control").write_text(
        f"Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: x\n"
    )
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    subprocess.run(
        ["dpkg-deb", "--build", root, folder / f"{name}_1_all.deb"], check=True, capture_output=True
    )
    shutil.rmtree(root)


@pytest.mark.parametrize("version", [1, 2, 3])
def test_a_resource_file_is_read(version: int) -> None:
    files = {"a.webp": b"first", "ü.webp": b"second" * 100, "empty": b""}
    found = dict(photos.read_rcc(rcc(files, version)))
    assert found == {f"/images/{name}": content for name, content in files.items()}
    with pytest.raises(ValueError, match="expected qres"):
        list(photos.read_rcc(b"no resources at all....."))


def test_near_duplicates_stay_together() -> None:
    images = {
        "a": Image.fromarray(make_image(1, 90, 120)),
        "b": Image.fromarray(make_image(2, 90, 120)),
        "c": ImageOps.mirror(Image.fromarray(make_image(1, 90, 120))).resize((60, 45)),
    }
    noisy = numpy.asarray(images["b"]).astype(int) + numpy.arange(120)[None, :, None] % 3
    images["d"] = Image.fromarray(noisy.clip(0, 255).astype(numpy.uint8))
    looks = {name: photos.look_of(image) for name, image in images.items()}
    assert photos.groups_of(looks) == {"a": "a", "b": "b", "c": "a", "d": "b"}


def test_the_catalog_holds_free_photographs_with_unique_names() -> None:
    catalog = photos.read_catalog()
    assert len({photo.name for photo in catalog}) == len(catalog) > 400
    assert {photo.license for photo in catalog} <= {
        "public domain",
        "CC0-1.0",
        *(f"CC-BY-{version}" for version in ("2.0", "3.0", "4.0")),
        *(f"CC-BY-SA-{version}" for version in ("3.0", "4.0")),
    }
    assert all(photo.author and photo.path.startswith("/") for photo in catalog)
    shares = [photos.split_of(photo.name) for photo in catalog]
    for split in ("validation", "test"):
        assert 0.05 < shares.count(split) / len(shares) < 0.15


@needs_dpkg
def test_photographs_come_out_of_packages(tmp_path: Path) -> None:
    deb(tmp_path, "scenes", {"usr/share/x.jpg": jpeg(1), "usr/share/no.jpg": jpeg(2)})
    inside = rcc({"p.jpg": jpeg(3), "q.jpg": jpeg(3, mirrored=True)})
    deb(tmp_path, "games", {"usr/share/all.rcc": inside})
    catalog = [
        photos.Photo("scenes", "/usr/share/x.jpg", "CC0-1.0", "Ada"),
        photos.Photo("games", "/images/p.jpg", "CC-BY-4.0", "Ben"),
        photos.Photo("games", "/images/q.jpg", "CC-BY-4.0", "Ben"),
        photos.Photo("games", "/images/gone.jpg", "CC-BY-4.0", "Ben"),
    ]
    number, missing = photos.extract(tmp_path, tmp_path / "out", catalog)
    assert (number, [photo.path for photo in missing]) == (3, ["/images/gone.jpg"])
    files = sorted(path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*.jpg"))
    assert len(files) == 3
    split = {path.name: path.parts[0] for path in files}
    assert split["games-images-p.jpg"] == split["games-images-q.jpg"]
    table = (tmp_path / "out" / "ATTRIBUTION.tsv").read_text().splitlines()
    assert len(table) == 4
    (line,) = (line for line in table if "Ada" in line)
    assert line.endswith("/usr/share/x.jpg\tAda\tCC0-1.0")


@needs_dpkg
def test_the_script_fetches_without_root(tmp_path: Path) -> None:
    catalog = photos.read_catalog()
    chosen = next(photo for photo in catalog if photo.package == "krank")
    deb(tmp_path, "krank", {chosen.path[1:]: jpeg(1)})
    fake = tmp_path / "bin" / "apt-get"
    fake.parent.mkdir()
    fake.write_text(
        f'#!/bin/sh\n[ "$1 $2" = "download krank" ] && cp {tmp_path}/krank_1_all.deb .\n'
    )
    fake.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{fake.parent}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
    }
    done = subprocess.run(
        [DATASETS / "photos.sh", tmp_path / "photos"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "scratch could not be fetched; going on without it" in done.stderr
    assert len(list((tmp_path / "photos").rglob("*.jpg"))) == 1
    assert not (tmp_path / "photos" / ".packages").exists()


def test_without_apt_the_script_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("sh", "mkdir", "pwd", "dirname"):
        if found := shutil.which(name):
            (tmp_path / "bin" / name).symlink_to(found)
    done = subprocess.run(
        [DATASETS / "photos.sh", tmp_path / "photos"],
        env={"PATH": str(tmp_path / "bin")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "it needs Debian" in done.stderr
    assert "train on a folder of your own photographs" in done.stderr
