"""A folder of good, odd and broken image files, of more than 25 kinds."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy
from PIL import Image, PngImagePlugin

from smalto.images.image_formats import missing_reader
from tests.conftest import make_image

UNREAD = "an image format that smalto does not read"
GRAY = numpy.linspace(0, 255, 40 * 48).reshape(40, 48)


def _image(seed: int = 0) -> Image.Image:
    return Image.fromarray(make_image(seed))


def _bytes(format: str, image: Image.Image | None = None, **options: object) -> bytes:
    buffer = io.BytesIO()
    (image or _image()).save(buffer, format, **options)
    return buffer.getvalue()


def _rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter to look right
    return _bytes("JPEG", exif=exif)


def _with_alpha() -> Image.Image:
    image = _image().convert("RGBA")
    image.putalpha(Image.fromarray(GRAY.astype(numpy.uint8)))
    return image


def _bomb() -> bytes:
    """A PNG header that claims 60,000 x 60,000 pixels."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", header)
        + _chunk(b"IDAT", zlib.compress(bytes(1000)))
        + _chunk(b"IEND", b"")
    )


def _text_bomb() -> bytes:
    """A PNG whose compressed comment unpacks to far more than any comment."""
    plain = _bytes("PNG")
    comment = _chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(80_000_000)))
    return plain[:33] + comment + plain[33:]


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _commented() -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "a comment")
    return _bytes("PNG", pnginfo=info)


GOOD: dict[str, Callable[[], bytes]] = {
    "plain.png": lambda: _bytes("PNG"),
    "plain.jpg": lambda: _bytes("JPEG", quality=95),
    "progressive.jpeg": lambda: _bytes("JPEG", progressive=True),
    "plain.webp": lambda: _bytes("WEBP", lossless=True),
    "plain.bmp": lambda: _bytes("BMP"),
    "plain.tiff": lambda: _bytes("TIFF"),
    "lzw.tif": lambda: _bytes("TIFF", compression="tiff_lzw"),
    "UPPER.PNG": lambda: _bytes("PNG"),
    "nosuffix": lambda: _bytes("PNG"),
    "wrong-suffix.jpg": lambda: _bytes("PNG"),
    "comment.png": _commented,
    "rotated.jpg": _rotated,
    "gray.png": lambda: _bytes("PNG", Image.fromarray(GRAY.astype(numpy.uint8))),
    "gray-alpha.png": lambda: _bytes("PNG", _with_alpha().convert("LA")),
    "black-and-white.png": lambda: _bytes("PNG", _image().convert("1")),
    "palette.png": lambda: _bytes("PNG", _image().convert("P", palette=Image.Palette.ADAPTIVE)),
    "palette-clear.png": lambda: _bytes(
        "PNG", _image().convert("P", palette=Image.Palette.ADAPTIVE), transparency=3
    ),
    "alpha.png": lambda: _bytes("PNG", _with_alpha()),
    "alpha.webp": lambda: _bytes("WEBP", _with_alpha(), lossless=True),
    "deep-gray.png": lambda: _bytes("PNG", Image.fromarray((GRAY * 257).astype(numpy.uint16))),
    "deep-gray.tif": lambda: _bytes("TIFF", Image.fromarray((GRAY * 257).astype(numpy.uint16))),
    "float.tif": lambda: _bytes("TIFF", Image.fromarray((GRAY / 255).astype(numpy.float32))),
    "cmyk.jpg": lambda: _bytes("JPEG", _image().convert("CMYK"), quality=95),
    "cmyk.tif": lambda: _bytes("TIFF", _image().convert("CMYK")),
    "ycbcr.tif": lambda: _bytes("TIFF", _image().convert("YCbCr")),
    "animated.gif": lambda: _bytes("GIF", save_all=True, append_images=[_image(1), _image(2)]),
    "animated.webp": lambda: _bytes(
        "WEBP", save_all=True, append_images=[_image(1)], lossless=True
    ),
    "pages.tif": lambda: _bytes("TIFF", save_all=True, append_images=[_image(1)]),
    "plain.ppm": lambda: _bytes("PPM"),
    "plain.tga": lambda: _bytes("TGA"),
    "rle.tga": lambda: _bytes("TGA", compression="tga_rle"),
    "gray.pgm": lambda: _bytes("PPM", Image.fromarray(GRAY.astype(numpy.uint8))),
    "plain.jp2": lambda: _bytes("JPEG2000"),
    "codestream.j2k": lambda: _bytes("JPEG2000", no_jp2=True),
    "nosuffix-jp2": lambda: _bytes("JPEG2000"),
    "icon.ico": lambda: _bytes("ICO", sizes=[(16, 16), (48, 40)]),
    "tiny.png": lambda: _bytes("PNG", _image().resize((5, 6))),
    "thin.png": lambda: _bytes("PNG", _image().resize((900, 8))),
    "with space and ünïcode 图.png": lambda: _bytes("PNG"),
    "new\nline.png": lambda: _bytes("PNG"),
}

if not missing_reader("AVIF"):
    GOOD |= {
        "plain.avif": lambda: _bytes("AVIF", quality=95),
        "really-avif.jpg": lambda: _bytes("AVIF", quality=95),
        "nosuffix-avif": lambda: _bytes("AVIF", quality=95),
    }

BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty.png": (lambda: b"", "empty"),
    "text.jpg": (lambda: b"this is no image", "not an image"),
    "notes.txt": (lambda: b"notes", "not an image"),
    "page.html": (lambda: b"<html></html>", "not an image"),
    "movie.mp4": (lambda: b"\0\0\0\x18ftypmp42", "not an image"),
    "random.png": (lambda: numpy.random.default_rng(0).bytes(4000), "not an image"),
    "header-only.png": (lambda: _bytes("PNG")[:8], ""),
    "truncated.jpg": (lambda: _bytes("JPEG", quality=95)[:900], "damaged"),
    "truncated.png": (lambda: _bytes("PNG")[:1500], "damaged"),
    "truncated.webp": (lambda: _bytes("WEBP", lossless=True)[:1000], ""),
    "truncated.gif": (lambda: _bytes("GIF")[:900], "damaged"),
    "truncated.tif": (lambda: _bytes("TIFF", compression="tiff_lzw")[:400], ""),
    "truncated.jp2": (lambda: _bytes("JPEG2000")[:900], "damaged"),
    "truncated.ppm": (lambda: _bytes("PPM")[:900], "damaged"),
    "truncated.tga": (lambda: _bytes("TGA")[:900], "damaged"),
    "flipped.png": (lambda: _flip(_bytes("PNG")), "damaged"),
    "bomb.png": (_bomb, "oversized"),
    "textbomb.png": (_text_bomb, "damaged"),
    "readme.txt": (lambda: b"P1 is a file name here", "not an image"),
    "script.jpg": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", f"{UNREAD}: EPS"),
    "raw.CR2": (lambda: b"II*\0\x10\0\0\0CR\x02\0", f"{UNREAD}: CR2"),
}


def _flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes(b ^ 0xFF for b in data[middle : middle + 40]) + data[middle + 40 :]


def write_odd_folder(folder: Path) -> dict[str, str]:
    """Write all files, in subfolders too, with links, a pipe and a link loop.

    Return the names of the bad files, each with the beginning of the expected reason.
    """
    (folder / "deep" / "deeper").mkdir(parents=True)
    for name, make in GOOD.items():
        (folder / name).write_bytes(make())
    for name, (make, _) in BAD.items():
        (folder / "deep" / name).write_bytes(make())
    expected = {f"deep/{name}": says for name, (_, says) in BAD.items()}
    (folder / "deep" / "deeper" / "linked.png").symlink_to(folder / "plain.png")
    (folder / "deep" / "loop").symlink_to(folder)
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    (folder / "self.png").symlink_to(folder / "self.png")
    os.mkfifo(folder / "pipe.png")
    (folder / ".hidden.png").write_bytes(b"")
    return expected | {
        "gone.png": "broken link",
        "self.png": "broken link",
        "pipe.png": "not a file",
    }
