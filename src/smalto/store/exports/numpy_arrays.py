"""Export as NumPy arrays: one memory-mappable ``tokens.npy`` and one file per column.

The folder holds:

- ``tokens.npy``: uint16, or uint32 above 65,536 codes. [N, L] if all images have one layout, else
  [sum of L_i], where row i is ``tokens[offsets[i] : offsets[i + 1]]``.
- ``ids.txt``: one id per line, UTF-8.
- ``labels.npy``: class numbers, int64 [N], -1 for a row without a label.
- ``classes.json``: names of the classes, a list whose index is the class number.
- ``images.npy``: structured array [N] with the int32 fields of ``IMAGE_FIELDS``, in pixels.
- ``offsets.npy`` int64 [N + 1] and ``grids.npy`` int32 [N, G, 2], padded with zeros: only if
  images have layouts of their own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy

from smalto.store.exports.export_header import (
    ROWS_AT_ONCE,
    ExportHeader,
    flat_grids,
    group_rows,
    layout_of,
)
from smalto.store.schema import TokenRow

IMAGE_FIELDS = ("height", "width", "crop_top", "crop_left", "crop_height", "crop_width")
_IMAGE_DTYPE = numpy.dtype([(name, numpy.int32) for name in IMAGE_FIELDS])
_COPY_BYTES = 2**22


def write_numpy(rows: Iterator[TokenRow], header: ExportHeader, folder: Path) -> None:
    """Write rows as NumPy arrays."""
    layout = header.store.layout
    images = _create_npy(folder / "images.npy", _IMAGE_DTYPE, header.num_rows)
    labels = _create_npy(folder / "labels.npy", numpy.dtype(numpy.int64), header.num_rows)
    offsets = [0]
    grids: list[list[int]] = []
    with (
        open(folder / "tokens.bin", "wb") as tokens,
        open(folder / "ids.txt", "w", encoding="utf-8", newline="\n") as ids,
    ):
        for group in group_rows(rows, ROWS_AT_ONCE):
            done = len(offsets) - 1
            labels[done : done + len(group)] = header.class_numbers(group)
            images[done : done + len(group)] = [(r.height, r.width, *r.crop) for r in group]
            for row in group:
                tokens.write(numpy.asarray(row.tokens, header.store.dtype).tobytes())
                ids.write(row.id + "\n")  # ids hold no control characters: one line is one id
                offsets.append(offsets[-1] + len(row.tokens))
            if layout is None:
                grids += map(flat_grids, group)
    images.flush()
    labels.flush()
    shape = (header.num_rows, layout.num_tokens) if layout is not None else (offsets[-1],)
    _add_npy_header(folder / "tokens.bin", folder / "tokens.npy", shape, header.store.dtype)
    classes = json.dumps(header.classes, ensure_ascii=False, indent=2)
    (folder / "classes.json").write_text(classes + "\n", encoding="utf-8")
    if layout is None:
        numpy.save(folder / "offsets.npy", numpy.array(offsets, numpy.int64))
        numpy.save(folder / "grids.npy", _padded(grids))


def read_numpy(header: ExportHeader, folder: Path) -> Iterator[TokenRow]:
    """Yield the rows of a NumPy export."""
    layout = header.store.layout
    tokens = numpy.load(folder / "tokens.npy", mmap_mode="r")
    images = numpy.load(folder / "images.npy", mmap_mode="r")
    labels = numpy.load(folder / "labels.npy", mmap_mode="r")
    if layout is None:
        offsets = numpy.load(folder / "offsets.npy")
        grids = numpy.load(folder / "grids.npy", mmap_mode="r")
    with open(folder / "ids.txt", encoding="utf-8", newline="\n") as ids:
        for i, (id, label, image) in enumerate(zip(ids, labels, images, strict=True)):
            if layout is None:
                row_layout = layout_of(grids[i][grids[i, :, 0] > 0].reshape(-1))
                row_tokens = tokens[offsets[i] : offsets[i + 1]]
            else:
                row_layout = layout
                row_tokens = tokens[i]
            height, width, *crop = image.item()
            yield TokenRow(
                id.removesuffix("\n"),
                numpy.asarray(row_tokens),
                row_layout,
                header.label(int(label)),
                height,
                width,
                tuple(crop),
            )


def _create_npy(path: Path, dtype: numpy.dtype[Any], length: int) -> numpy.memmap[Any, Any]:
    array = numpy.lib.format.open_memmap(path, "w+", dtype, (length,))
    if hasattr(os, "posix_fallocate"):  # a write through the map on a full disk ends the process
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, path.stat().st_size))
    return array


def _padded(grids: list[list[int]]) -> numpy.ndarray:
    longest = max(map(len, grids), default=0)
    padded = numpy.zeros((len(grids), longest), numpy.int32)
    for i, grid in enumerate(grids):
        padded[i, : len(grid)] = grid
    return padded.reshape(len(grids), longest // 2, 2)


def _add_npy_header(flat: Path, out: Path, shape: tuple[int, ...], dtype: numpy.dtype[Any]) -> None:
    """Turn a file of plain numbers into a .npy file."""
    description = {
        "descr": numpy.lib.format.dtype_to_descr(dtype),
        "fortran_order": False,
        "shape": shape,
    }
    with open(out, "wb") as file, open(flat, "rb") as numbers:
        numpy.lib.format.write_array_header_1_0(file, description)
        while data := numbers.read(_COPY_BYTES):
            file.write(data)
    flat.unlink()
