"""Reading images: every kind correctly, everything else skipped with a reason."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from PIL import Image

from smalto.core.errors import DataError
from smalto.images.finding import find_images
from smalto.images.image_file import Skipped, printable, summary
from smalto.images.reading import BadImage, read_image
from smalto.images.splits import is_held_out
from tests.conftest import make_image, write_images
from tests.odd_images import GOOD, GRAY, UNREAD, write_odd_folder

EXACT = [
    "plain.png",
    "plain.webp",
    "plain.bmp",
    "plain.tiff",
    "lzw.tif",
    "UPPER.PNG",
    "nosuffix",
    "wrong-suffix.jpg",
    "comment.png",
]
EXACT += ["plain.ppm", "plain.tga", "rle.tga", "plain.jp2", "codestream.j2k", "nosuffix-jp2"]
EXACT += [
    "icon.ico",
    "with space and ünïcode 图.png",
    "animated.webp",
    "pages.tif",
    "new\nline.png",
]


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("odd")
    return folder, write_odd_folder(folder)


def test_the_folder_holds_more_than_25_kinds(odd: tuple[Path, dict[str, str]]) -> None:
    assert len(GOOD) + len(odd[1]) > 25 * 1.5


def test_every_file_is_found_or_named(odd: tuple[Path, dict[str, str]]) -> None:
    folder, bad = odd
    files, skipped = find_images(folder)
    reasons = dict(skipped)
    for file in files:
        try:
            read_image(file.path)
        except BadImage as error:
            reasons[file.name] = str(error)
    assert set(reasons) == set(bad)
    for name, says in bad.items():
        assert reasons[name].startswith(says), (name, reasons[name])
    assert {f.name for f in files} - set(bad) == {*GOOD, "deep/deeper/linked.png"}
    assert [f.name for f in files] == sorted(f.name for f in files)


@pytest.mark.parametrize("name", EXACT)
def test_lossless_kinds_come_out_exactly(odd: tuple[Path, dict[str, str]], name: str) -> None:
    assert numpy.array_equal(read_image(str(odd[0] / name)), make_image(0))


@pytest.mark.parametrize(
    "name",
    [
        "plain.jpg",
        "progressive.jpeg",
        "cmyk.jpg",
        "cmyk.tif",
        "ycbcr.tif",
        "palette.png",
        "animated.gif",
        "plain.avif",
        "really-avif.jpg",
        "nosuffix-avif",
    ],
)
def test_other_kinds_come_out_nearly(odd: tuple[Path, dict[str, str]], name: str) -> None:
    if name not in GOOD:
        pytest.skip("the installed Pillow does not read AVIF")
    difference = read_image(str(odd[0] / name)).astype(int) - make_image(0)
    assert numpy.abs(difference).mean() < 8  # an inverted CMYK is off by 60 and more


@pytest.mark.parametrize(
    "name", ["gray.png", "gray.pgm", "deep-gray.png", "deep-gray.tif", "float.tif"]
)
def test_gray_of_any_depth_is_the_same_gray(odd: tuple[Path, dict[str, str]], name: str) -> None:
    got = read_image(str(odd[0] / name)).astype(int)
    assert numpy.abs(got - GRAY[:, :, None]).max() <= 1


@pytest.mark.parametrize("name", ["alpha.png", "alpha.webp"])
def test_alpha_is_laid_over_white(odd: tuple[Path, dict[str, str]], name: str) -> None:
    alpha = GRAY.astype(numpy.uint8)[:, :, None] / 255
    assert (
        numpy.abs(
            read_image(str(odd[0] / name)) - (make_image(0) * alpha + 255 * (1 - alpha))
        ).max()
        <= 2
    )


def test_orientation_is_applied(odd: tuple[Path, dict[str, str]]) -> None:
    upright = read_image(str(odd[0] / "rotated.jpg"))
    assert upright.shape == (48, 40, 3)
    assert numpy.abs(upright.astype(int) - numpy.rot90(make_image(0), -1)).mean() < 8


@pytest.mark.parametrize(
    ("suffix", "options"), [("jpg", {"quality": 95}), ("png", {}), ("tif", {})]
)
def test_orientation_is_applied_once_in_every_format(
    tmp_path: Path, suffix: str, options: dict[str, int]
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(make_image(0)).save(tmp_path / f"p.{suffix}", exif=exif, **options)
    assert (
        numpy.abs(
            read_image(str(tmp_path / f"p.{suffix}")).astype(int) - numpy.rot90(make_image(0), 2)
        ).mean()
        < 8
    )


def test_the_longer_side_is_reduced(tmp_path: Path) -> None:
    Image.fromarray(make_image(0, 1000, 1800)).save(tmp_path / "big.jpg")
    assert read_image(str(tmp_path / "big.jpg"), 768).shape == (427, 768, 3)
    assert read_image(str(tmp_path / "big.jpg"), None).shape == (1000, 1800, 3)
    Image.fromarray(make_image(0, 2, 1800)).save(tmp_path / "line.png")
    assert read_image(str(tmp_path / "line.png"), 768).shape == (1, 768, 3)


def test_nothing_left_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        find_images(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"holds no image.*It is empty"):
        find_images(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"holds no image.*1 not an image"):
        find_images(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="names of bytes")
def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    write_images(tmp_path, 1)
    os.rename(tmp_path / "photo00.png", os.fsencode(tmp_path) + b"/caf\xe9.png")
    files, _ = find_images(tmp_path)
    assert printable(files[0].name) == "caf\\udce9.png"
    assert printable("a\x1b[31m\x07\nb") == "a\\x1b[31m\\x07\\nb"
    assert read_image(files[0].path).shape == (40, 48, 3)
    assert isinstance(is_held_out(files[0].name), bool)


def test_one_image_may_be_named(tmp_path: Path) -> None:
    write_images(tmp_path, 2)
    files, _ = find_images(tmp_path / "photo01.png")
    assert [f.name for f in files] == ["photo01.png"]


def test_held_out_is_a_tenth_and_depends_on_the_name_alone() -> None:
    share = sum(is_held_out(f"image{i}.jpg") for i in range(20_000)) / 20_000
    assert share == pytest.approx(0.1, abs=0.01)
    assert [is_held_out(f"{i}.png") for i in range(30)].index(
        True
    ) == 5  # the same on every machine


def test_the_summary_counts_and_names() -> None:
    text = summary(
        [Skipped(f"{i}.png", "empty") for i in range(9)]
        + [Skipped("a\nb.jpg", "damaged: cut short")]
    )
    assert text.startswith("Skipped 10 files (9 empty, 1 damaged): 0.png (empty)")
    assert text.endswith("and 2 more.")
    assert summary([]) == ""


def test_the_summary_counts_formats_and_names_each_kind() -> None:
    skipped = [Skipped(f"{i}.txt", "not an image") for i in range(20)]
    skipped += [Skipped(f"{i}.heic", 'HEIC: install "smalto[heif]"') for i in range(12)]
    skipped += [Skipped(f"{i}.cr2", f"{UNREAD}: CR2") for i in range(3)]
    text = summary(skipped, 3)
    assert text.startswith("Skipped 35 files (20 not an image, 12 HEIC, 3 CR2): 0.txt")
    assert '0.heic (HEIC: install "smalto[heif]"); 0.cr2' in text
    assert text.endswith("and 32 more.")
    assert [file.is_unread_format for file in skipped[-4:]] == [False, True, True, True]


def test_decoding_needs_no_torch() -> None:
    script = (
        "import sys, smalto.images.finding, smalto.images.transforms, smalto.images.worker_pool; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'pillow_heif', 'pillow_jxl')))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
