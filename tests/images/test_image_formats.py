"""Image formats: what optional packages read, and what is named without them."""

from __future__ import annotations

import io
import os
import struct
import sys
import tarfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy
import pytest
from PIL import Image, features

from smalto.core.errors import DataError
from smalto.images import image_formats, pillow_plugins
from smalto.images.finding import find_images
from smalto.images.image_file import ImageFile
from smalto.images.reading import BadImage, read_image
from smalto.images.worker_pool import ReaderPool
from tests.conftest import make_image
from tests.odd_images import UNREAD

needs_heif = pytest.mark.skipif(find_spec("pillow_heif") is None, reason="no smalto[heif]")
needs_jxl = pytest.mark.skipif(find_spec("pillow_jxl") is None, reason="no smalto[jxl]")

HEIC_HEAD = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40)
JXL_HEAD = b"\xff\x0a" + bytes(40)
JXL_CONTAINER = b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(40)


def saved(format: str, turned: bool = False, image: Image.Image | None = None) -> bytes:
    """Return an image file; ``turned`` marks it as lying on its side in its EXIF."""
    exif = Image.Exif()
    if turned:
        exif[0x0112] = 6
    options = {"JXL": {"lossless": True}, "HEIF": {"quality": 95}, "AVIF": {"quality": 95}}
    buffer = io.BytesIO()
    image = image or Image.fromarray(make_image(0))
    image.save(buffer, format, exif=exif.tobytes(), **options.get(format, {}))
    return buffer.getvalue()


def heic(turned: bool = False) -> bytes:
    assert pillow_plugins.register("HEIF")
    return saved("HEIF", turned)


def jxl(turned: bool = False) -> bytes:
    assert pillow_plugins.register("JXL")
    return saved("JXL", turned)


def near(image: numpy.ndarray, expected: numpy.ndarray) -> bool:
    return image.shape == expected.shape and bool(
        numpy.abs(image.astype(int) - expected).mean() < 8
    )


@pytest.fixture
def without_extras(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for module in ("pillow_heif", "pillow_jxl"):
        monkeypatch.setitem(sys.modules, module, None)
    image_formats.missing_reader.cache_clear()
    pillow_plugins.register.cache_clear()
    yield
    image_formats.missing_reader.cache_clear()
    pillow_plugins.register.cache_clear()


def write_files(folder: Path, contents: dict[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.usefixtures("without_extras")
def test_without_the_extras_files_are_skipped_by_their_name(tmp_path: Path) -> None:
    heic_reason, jxl_reason = 'HEIC: install "smalto[heif]"', 'JPEG XL: install "smalto[jxl]"'
    contents = {f"{i:02}.HEIC": HEIC_HEAD for i in range(12)}
    contents |= {"a.heif": HEIC_HEAD, "b.hif": HEIC_HEAD, "c": HEIC_HEAD, "d.jxl": JXL_HEAD}
    contents |= {"e": JXL_CONTAINER, "notes.txt": b"x"}
    expected = dict.fromkeys(contents, heic_reason) | dict.fromkeys("e", jxl_reason)
    expected |= {"d.jxl": jxl_reason, "notes.txt": "not an image"}
    folder = write_files(tmp_path / "photos", contents)
    with pytest.raises(DataError, match=r"holds no image.*15 HEIC, 2 JPEG XL, 1 not an image"):
        find_images(folder)
    Image.fromarray(make_image(0)).save(folder / "good.png")
    files, skipped = find_images(folder)
    assert [file.name for file in files] == ["good.png"]
    assert dict(skipped) == expected
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        archive.add(folder / "00.HEIC", "x.heic")
        archive.add(folder / "good.png", "y.png")
    files, skipped = find_images(tmp_path / "shard.tar")
    assert dict(skipped) == {"x.heic": heic_reason}


@pytest.mark.usefixtures("without_extras")
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (HEIC_HEAD, 'HEIC: install "smalto[heif]"'),
        (JXL_HEAD, 'JPEG XL: install "smalto[jxl]"'),
        (JXL_CONTAINER, 'JPEG XL: install "smalto[jxl]"'),
        (b"8BPS" + bytes(40), f"{UNREAD}: PSD"),
        (b"<?xml version='1.0'?>\n<svg xmlns=''></svg>", f"{UNREAD}: SVG"),
        (b"%PDF-1.7", f"{UNREAD}: PDF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", f"{UNREAD}: EPS"),
        (b"II*\0\x10\0\0\0CR\x02\0", f"{UNREAD}: CR2"),
        (b"\0\0\0\x18ftypcrx \0\0\0\1crx isom", f"{UNREAD}: CR3"),
        (bytes(128) + b"DICM", f"{UNREAD}: DICOM"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0isommp42", "not an image"),
        (b"hello", "not an image"),
    ],
)
def test_contents_are_named_whatever_their_suffix(tmp_path: Path, data: bytes, reason: str) -> None:
    """Phones export HEIC as .jpg, and the cells of a parquet file have no names."""
    (tmp_path / "renamed.jpg").write_bytes(data)
    with pytest.raises(BadImage) as bad:
        read_image(str(tmp_path / "renamed.jpg"))
    assert str(bad.value) == reason


@pytest.mark.parametrize(
    "suffix", ["cr2", "CR3", "nef", "arw", "dng", "psd", "svg", "eps", "pdf", "dcm", "wmf"]
)
def test_known_formats_that_are_not_read_are_named(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"a.{suffix}").write_bytes(b"II*\0 a thumbnail that Pillow would read")
    with pytest.raises(DataError, match=rf"holds no image.*1 {suffix.upper()}\)"):
        find_images(tmp_path)
    (tmp_path / f"a.{suffix}").write_bytes(saved("TIFF"))
    if suffix in ("nef", "arw", "dng"):  # TIFF files whose first image is a thumbnail
        with pytest.raises(BadImage, match=f"{UNREAD}: {suffix.upper()}"):
            read_image(str(tmp_path / f"a.{suffix}"))


def test_avif_is_named_if_pillow_lacks_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "modules", {})
    image_formats.missing_reader.cache_clear()
    try:
        write_files(tmp_path, {"a.avif": b"\0\0\0\x18ftypavif\0\0\0\0avifmif1"})
        with pytest.raises(DataError, match=r'1 AVIF.*AVIF: install "pillow>=11.3"'):
            find_images(tmp_path)
    finally:
        image_formats.missing_reader.cache_clear()


@pytest.mark.parametrize(
    ("head", "format"),
    [
        (b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf", "AVIF"),
        (b"\0\0\0\x1cftypavis\0\0\0\0avifmif1miaf", "AVIF"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf", "AVIF"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "HEIF"),
        (b"\0\0\0\x10ftypmif1\0\0\0\0avif is not a brand", "HEIF"),
        (b"\0\0\0\x18ftypheix\0\0\0\0mif1heix", "HEIF"),
        (b"\0\0\0\x14ftypqt  \0\0\0\0qt  ", ""),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG2000"),
        (b"\xff\x4f\xff\x51", "JPEG2000"),
        (b"P6\n48 40\n255\n", "PPM"),
        (b"P6 is a file name", ""),
        (b"RIFF\0\0\0\0WAVE", ""),
        (b"", ""),
    ],
)
def test_formats_are_told_by_their_first_bytes(head: bytes, format: str) -> None:
    assert image_formats.sniff(head) == format


@pytest.mark.parametrize("format", ["AVIF", "JPEG2000"])
def test_a_cut_file_is_damaged(tmp_path: Path, format: str) -> None:
    if image_formats.missing_reader(format):
        pytest.skip(image_formats.missing_reader(format))
    for length in (40, 200):
        (tmp_path / "cut").write_bytes(saved(format)[:length])
        with pytest.raises(BadImage, match="damaged"):
            read_image(str(tmp_path / "cut"))


def test_avif_is_turned_upright_once(tmp_path: Path) -> None:
    if image_formats.missing_reader("AVIF"):
        pytest.skip(image_formats.missing_reader("AVIF"))
    (tmp_path / "turned.avif").write_bytes(saved("AVIF", turned=True))
    image = read_image(str(tmp_path / "turned.avif"))
    assert near(image, numpy.rot90(make_image(0), -1))


@needs_heif
def test_heic_is_read_upright_in_folders_archives_and_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    contents = {"IMG_1.HEIC": heic(), "b": heic(), "renamed.jpg": heic(), "t.heif": heic(True)}
    folder = write_files(tmp_path / "photos", contents)
    with tarfile.open(folder / "shard.tar", "w") as archive:
        archive.add(folder / "IMG_1.HEIC", "x.heic")
    files, skipped = find_images(folder)
    assert not skipped
    assert len(files) == 5
    for workers in (0, 1):
        with ReaderPool(workers, read_image) as reader:
            for file, image in reader.in_order(files):
                assert isinstance(image, numpy.ndarray), (file.name, image)
                upright = make_image(0)
                assert near(image, numpy.rot90(upright, -1) if file.name == "t.heif" else upright)


@needs_heif
def test_a_thumbnail_never_stands_in_for_a_heic(tmp_path: Path) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    image = Image.fromarray(make_image(0, 256, 320))
    file = pillow_heif.from_pillow(image)
    file.save(tmp_path / "plain.heic", quality=95)
    pillow_heif.from_pillow(image).save(tmp_path / "with.heic", quality=95, thumbnails=[128])
    small = [read_image(str(tmp_path / f"{name}.heic"), 64) for name in ("plain", "with")]
    assert numpy.array_equal(*small)


@needs_heif
def test_a_broken_heic_is_damaged(tmp_path: Path) -> None:
    whole = heic()
    for name, data in {"cut": whole[: len(whole) // 2], "head": HEIC_HEAD}.items():
        (tmp_path / f"{name}.heic").write_bytes(data)
        with pytest.raises(BadImage, match="damaged"):
            read_image(str(tmp_path / f"{name}.heic"))


@needs_jxl
def test_jpeg_xl_is_read_in_folders_and_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    files, skipped = find_images(write_files(tmp_path / "p", {"a.jxl": jxl(), "b": jxl()}))
    assert not skipped
    for workers in (0, 1):
        with ReaderPool(workers, read_image) as reader:
            images = [image for _, image in reader.in_order(files)]
        assert len(images) == 2
        for image in images:
            assert numpy.array_equal(image, make_image(0))


def boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the kind of each box of an ISO media file, and the whole box."""
    start = 0
    while start < len(data):
        size, kind = struct.unpack(">I4s", data[start : start + 8])
        end = start + size if size else len(data)
        yield kind, data[start:end]
        start = end


@needs_jxl
@pytest.mark.filterwarnings("ignore:Using JPEG reconstruction")
def test_jpeg_xl_is_turned_upright_once(tmp_path: Path) -> None:
    """The decoder turns the pixels, except those of a JPEG file that is packed in a JPEG XL."""
    pillow_plugins.register("JXL")
    upright = numpy.rot90(make_image(0), -1)
    (tmp_path / "turned.jpg").write_bytes(saved("JPEG", turned=True))
    with Image.open(tmp_path / "turned.jpg") as packed:
        packed.save(tmp_path / "packed.jxl")
    assert near(read_image(str(tmp_path / "packed.jxl")), upright)
    whole = (tmp_path / "packed.jxl").read_bytes()
    exif = bytes(4) + packed.info["exif"].removeprefix(b"Exif\0\0")
    kept = b"".join(box for kind, box in boxes(whole) if kind not in (b"jbrd", b"brob"))
    pixels = kept + struct.pack(">I4s", len(exif) + 8, b"Exif") + exif
    (tmp_path / "pixels.jxl").write_bytes(pixels)
    assert near(read_image(str(tmp_path / "pixels.jxl")), upright)


@needs_jxl
@pytest.mark.parametrize(
    ("width", "height"), [(8, 8), (256, 256), (640, 480), (1000, 3), (77, 1201), (9000, 600)]
)
@pytest.mark.parametrize("container", [False, True])
def test_the_size_of_a_jpeg_xl_is_read_before_its_pixels(
    width: int, height: int, container: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pillow_plugins.register("JXL")
    stream = io.BytesIO()
    Image.new("RGB", (width, height)).save(stream, "JXL", use_container=container, effort=1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", width * height)
    pillow_plugins.check_jxl_size(stream)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", width * height - 1)
    with pytest.raises(Image.DecompressionBombError):
        pillow_plugins.check_jxl_size(stream)


@needs_jxl
def test_a_broken_or_huge_jpeg_xl_is_a_bad_image(tmp_path: Path) -> None:
    # SizeHeader: not small, height of 30 bits, ratio 1:1.
    bits = 0 | 3 << 1 | (60_000 - 1) << 3 | 1 << 33
    bomb = b"\xff\x0a" + bits.to_bytes(8, "little") + bytes(20)
    whole = jxl()
    for data, reason in (
        (bomb, "oversized: more than"),
        (whole[: len(whole) // 2], "damaged: invalid JPEG XL data"),
        (JXL_HEAD, "damaged"),
        (JXL_CONTAINER, "damaged: invalid JPEG XL data"),
    ):
        (tmp_path / "bad.jxl").write_bytes(data)
        with pytest.raises(BadImage, match=reason):
            read_image(str(tmp_path / "bad.jxl"))


def test_tga_needs_its_suffix(tmp_path: Path) -> None:
    """TGA has no magic bytes, so other files must not be mistaken for one."""
    (tmp_path / "a.tga").write_bytes(saved("TGA"))
    (tmp_path / "a.png").write_bytes(saved("TGA"))
    assert numpy.array_equal(read_image(str(tmp_path / "a.tga")), make_image(0))
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "a.tga", "x.tga")
    (file,) = find_images(tmp_path / "a.tar")[0]
    assert numpy.array_equal(read_image(file), make_image(0))
    with pytest.raises(BadImage, match="not an image"):
        read_image(ImageFile("a.png", str(tmp_path / "a.png")))
