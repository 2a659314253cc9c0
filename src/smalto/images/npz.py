"""Images as one .npz file, which the usual evaluators of FID read."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy
from PIL import Image

from smalto.core.files import atomic_path
from smalto.core.progress import Progress

ARRAY = "arr_0.npy"  # the name that numpy.savez gives to an array without one


def write_npz(path: Path, files: Sequence[Path], progress: Progress) -> None:
    """Write PNG files of one size as uint8 [N, H, W, 3] in ``arr_0``, one after the other.

    Memory does not grow with their number. The file appears whole.
    """
    with Image.open(files[0]) as first:
        width, height = first.size
    header = {
        "descr": "|u1",
        "fortran_order": False,
        "shape": (len(files), height, width, 3),
    }
    progress.start("writing", len(files), "images")
    with (
        atomic_path(path) as temporary,
        zipfile.ZipFile(temporary, "w") as archive,
        archive.open(ARRAY, "w", force_zip64=True) as stream,
    ):
        numpy.lib.format.write_array_header_1_0(stream, header)
        for file in files:
            with Image.open(file) as image:
                stream.write(numpy.asarray(image.convert("RGB")).tobytes())
            progress.advance()
    progress.finish()
