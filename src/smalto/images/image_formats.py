"""Image formats: which are read, by the suffix and the first bytes of a file. No torch here."""

from __future__ import annotations

import functools
import os
import re
import warnings

from PIL import features

from smalto.images import pillow_plugins
from smalto.images.image_file import NOT_AN_IMAGE, UNREAD_FORMAT

READABLE = "PNG, JPEG, WebP, GIF, BMP, TIFF, AVIF, JPEG 2000, PPM, TGA, ICO, HEIC or JPEG XL"
HEAD_BYTES = 256  # what `sniff` needs: the brands of an ISO media file, or the start of an SVG

# Pillow's name of every format that is read. Formats that run a program (EPS) or that are lists of
# drawing commands (WMF) are not among them.
_SUFFIXES = {
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp", ".dib"),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "ICO": (".ico",),
    "TGA": (".tga",),
    "AVIF": (".avif", ".avifs"),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    "HEIF": (".heic", ".heics", ".heif", ".heifs", ".hif"),
    "JXL": (".jxl",),
}
_BY_SUFFIX = {suffix: format for format, suffixes in _SUFFIXES.items() for suffix in suffixes}

# Tried in this order on a file whose first bytes say nothing else. TGA has no magic bytes, so it is
# tried only on files with its suffix.
_GENERAL = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO")

# Formats that not every installation reads: the user's name, and what to install.
FORMAT_NAMES = {"AVIF": "AVIF", "JPEG2000": "JPEG 2000", "HEIF": "HEIC", "JXL": "JPEG XL"}
_INSTALL = {
    "AVIF": '"pillow>=11.3"',
    "JPEG2000": "a Pillow that was built with OpenJPEG",
    "HEIF": '"smalto[heif]"',
    "JXL": '"smalto[jxl]"',
}

_CAMERA_RAW = "3fr arw cr2 cr3 crw dcr dng erf iiq kdc mef mos mrw nef nrw orf pef raf rw2 rwl"
_MORE_CAMERA_RAW = "sr2 srf srw x3f"
_DRAWINGS = "ai cdr emf eps pdf ps psb psd svg svgz wmf xcf"
_SCIENCE = "czi dcm dicom exr fits hdr lif nd2 nii svs"
_OTHERS = "bpg cur dds djvu flif icns jls jxr pcx qoi ras sgi wdp xbm xpm"
_UNREAD_SUFFIXES = frozenset(
    f".{suffix}"
    for suffixes in (_CAMERA_RAW, _MORE_CAMERA_RAW, _DRAWINGS, _SCIENCE, _OTHERS)
    for suffix in suffixes.split()
)

_MAGIC = (
    (b"\x89PNG", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG2000"),
    (b"\xff\x4f\xff\x51", "JPEG2000"),
    (b"\xff\x0a", "JXL"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "JXL"),
    (b"8BPS", "PSD"),
    (b"%PDF-", "PDF"),
    (b"%!PS", "EPS"),
    (b"\xc5\xd0\xd3\xc6", "EPS"),
    (b"FUJIFILMCCD-RAW", "RAF"),
    (b"IIRO", "ORF"),
    (b"IIU\0", "RW2"),
    (b"v/1\x01", "EXR"),
    (b"qoif", "QOI"),
    (b"DDS ", "DDS"),
)
_NETPBM = re.compile(rb"P[1-6f]\s+[#\d]")
_SVG = re.compile(rb"\s*(<\?xml.*)?<svg[\s>]", re.DOTALL)
_AVIF_BRANDS = frozenset({b"avif", b"avis"})
_HEIF_BRANDS = frozenset(
    {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}
)


def suffix_of(name: str) -> str:
    """Return the suffix of a file name in lower case, with its dot."""
    return os.path.splitext(name)[1].lower()


def reason_by_suffix(suffix: str) -> str:
    """Return why a file with this suffix cannot be read; empty if it can."""
    if suffix in _BY_SUFFIX:
        return missing_reader(_BY_SUFFIX[suffix])
    if suffix in _UNREAD_SUFFIXES:
        return f"{UNREAD_FORMAT}: {suffix[1:].upper()}"
    return NOT_AN_IMAGE


def reason_by_head(head: bytes) -> str:
    """Return why a file that begins with these bytes cannot be read; empty if it can."""
    format = sniff(head)
    if format in _SUFFIXES:
        return missing_reader(format)
    return f"{UNREAD_FORMAT}: {format}" if format else NOT_AN_IMAGE


@functools.cache
def missing_reader(format: str) -> str:
    """Return why the installed packages cannot read one of Pillow's formats; empty if they can."""
    if format == "AVIF":
        available = _pillow_reads_avif()
    elif format == "JPEG2000":
        available = features.check_codec("jpg_2000")
    else:
        available = pillow_plugins.is_installed(format)
    return "" if available else _to_install(format)


def pillow_formats(head: bytes, suffix: str) -> tuple[tuple[str, ...], str]:
    """Choose the formats in which Pillow may open a file, and register its plugin if it needs one.

    Args:
        head: the first bytes of the file; they override its suffix.
        suffix: of the file.

    Returns:
        The formats, as ``Image.open`` takes them, and the reason if there are none.
    """
    format = sniff(head)
    if format == "TIFF" and suffix in _UNREAD_SUFFIXES:  # camera raw: a TIFF of a thumbnail
        return (), reason_by_suffix(suffix)
    if not format or format in _GENERAL:
        return (*_GENERAL, "TGA") if suffix in _SUFFIXES["TGA"] else _GENERAL, ""
    reason = reason_by_head(head)
    if not reason and not pillow_plugins.register(format):
        reason = _to_install(format)
    return ((), reason) if reason else ((format,), "")


def sniff(head: bytes) -> str:
    """Return the format of a file by its first 256 bytes: Pillow's name, or that of an unread one.

    Empty if the bytes belong to no known image format.
    """
    if head[4:8] == b"ftyp":
        return _sniff_media(head)
    if head.startswith(b"RIFF"):
        return "WEBP" if head[8:12] == b"WEBP" else ""
    if head.startswith((b"II*\0", b"MM\0*")) and head[8:10] == b"CR":
        return "CR2"
    if head[128:132] == b"DICM":
        return "DICOM"
    if _NETPBM.match(head):
        return "PPM"
    if _SVG.match(head):
        return "SVG"
    return next((format for magic, format in _MAGIC if head.startswith(magic)), "")


def _to_install(format: str) -> str:
    return f"{FORMAT_NAMES[format]}: install {_INSTALL[format]}"


def _pillow_reads_avif() -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that libavif is there and cannot be loaded
        return "avif" in features.modules and features.check_module("avif")


def _sniff_media(head: bytes) -> str:
    """Return the format of an ISO media file; empty for a video, which shares the container."""
    end = min(len(head), int.from_bytes(head[:4], "big"))
    major = head[8:12]
    brands = {major} | {head[at : at + 4] for at in range(16, end, 4)}
    if major == b"crx ":
        return "CR3"
    # The major brand mif1 stands for any still image; only the others tell AVIF from HEIC.
    if major in _AVIF_BRANDS or (major in (b"mif1", b"msf1") and brands & _AVIF_BRANDS):
        return "AVIF"
    return "HEIF" if major in _HEIF_BRANDS else ""
