"""Gray of more than 8 bits: the two scales, and the note on images that come out dark."""

from __future__ import annotations

import os
from pathlib import Path

import numpy
import pytest
from PIL import Image
from pydantic import ValidationError

from smalto.images.image_file import ImageFile
from smalto.images.reading import read_image, read_image_with_note
from smalto.images.transforms import Transform
from smalto.images.worker_pool import ReaderPool

RAMP = numpy.linspace(0, 1, 40 * 48).reshape(40, 48)
BY_RANGE = 'scale by range with deep_gray = "range"'


def write(path: Path, values: numpy.ndarray) -> str:
    Image.fromarray(values).save(path)
    return str(path)


@pytest.mark.parametrize("suffix", ["png", "tif", "jp2"])
def test_twelve_bits_in_sixteen_are_noted_and_scaled_by_range(tmp_path: Path, suffix: str) -> None:
    values = numpy.rint(RAMP * 4095).astype(numpy.uint16)
    path = write(tmp_path / f"microscope.{suffix}", values)
    dark, note = read_image_with_note(path)
    assert dark.max() == 16  # 255 * 4095 / 65535
    assert note == (
        f"16-bit image uses values up to 4,095 of 65,535 and comes out dark; {BY_RANGE}"
    )
    assert numpy.array_equal(read_image(path), dark)
    scaled, note = read_image_with_note(path, deep_gray="range")
    assert note == ""
    assert numpy.abs(scaled.astype(int) - (RAMP * 255)[:, :, None]).max() <= 1


@pytest.mark.parametrize(
    ("values", "note"),
    [
        (numpy.uint16(RAMP * 65535), ""),
        (numpy.uint16(RAMP * 4096), ""),
        (numpy.uint16(RAMP * 0), ""),  # black in any scale
        (numpy.uint8(RAMP * 10), ""),  # 8 bits are never scaled
        (
            numpy.int32(RAMP * 3000 - 1024),
            "integer image uses values up to 1,976 of 65,535 and comes out dark, uses values from "
            f"-1,024 and is black below 0; {BY_RANGE}",
        ),
        (
            numpy.int32(RAMP * 100_000),
            f"integer image uses values up to 100,000 and is white above 65,535; {BY_RANGE}",
        ),
        (numpy.float32(RAMP), ""),
        (numpy.float32(RAMP * 255), ""),
        (
            numpy.float32(RAMP * 300),
            f"float image uses values up to 300 of 65,535 and comes out dark; {BY_RANGE}",
        ),
        (
            numpy.float32(RAMP * 2 - 1),
            f"float image uses values from -1 and is black below 0; {BY_RANGE}",
        ),
    ],
)
def test_the_note_names_what_is_lost(tmp_path: Path, values: numpy.ndarray, note: str) -> None:
    path = write(tmp_path / "a.tif", values)
    assert read_image_with_note(path)[1] == note
    image, quiet = read_image_with_note(path, deep_gray="range")
    assert quiet == ""
    if values.dtype != numpy.uint8 and values.any():
        assert (image.min(), image.max()) == (0, 255)
        assert numpy.abs(image.astype(int) - (RAMP * 255)[:, :, None]).max() <= 1


def test_range_ignores_what_is_not_finite_and_needs_two_values(tmp_path: Path) -> None:
    values = numpy.float32(RAMP * 50 + 100)
    values[0, 0], values[0, 1] = numpy.nan, numpy.inf
    image = read_image(write(tmp_path / "nan.tif", values), deep_gray="range")
    assert (image[0, 0, 0], image[-1, -1, 0]) == (0, 255)
    assert image[20].mean() == pytest.approx(255 * RAMP[20].mean(), abs=2)
    for name, one_value, gray in (("a", numpy.uint16(32768), 128), ("b", numpy.float32(0.5), 128)):
        path = write(tmp_path / f"{name}.tif", numpy.full((40, 48), one_value))
        assert numpy.unique(read_image(path, deep_gray="range")).tolist() == [gray]
    empty = write(tmp_path / "nothing.tif", numpy.full((40, 48), numpy.float32(numpy.nan)))
    for deep_gray in ("full", "range"):
        image, note = read_image_with_note(empty, deep_gray=deep_gray)
        assert not image.any()
        assert note == ""


def test_dark_color_of_sixteen_bits_is_noted(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    color = numpy.stack([RAMP, RAMP[::-1], RAMP], axis=-1)
    for name, scale, is_dark in (("dark", 4095, True), ("bright", 65535, False)):
        path = tmp_path / f"{name}.tif"
        tifffile.imwrite(path, numpy.uint16(color * scale), photometric="rgb")
        note = read_image_with_note(str(path))[1]
        assert note == (
            "16-bit color image uses values up to at most 4,095 of 65,535 and comes out dark; "
            "convert it to 8 bits per channel"
            if is_dark
            else ""
        )


def test_notes_come_back_from_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    path = write(tmp_path / "a.png", numpy.uint16(RAMP * 1000))
    file = ImageFile("a.png", path)
    for workers in (0, 1):
        with ReaderPool(workers, Transform(stride=4).prepare) as reader:
            ((_, prepared),) = reader.in_order([file])
        assert prepared.note.startswith("16-bit image uses values up to 1,000 of 65,535")
        assert prepared.views.max() == 4
    by_range = Transform(stride=4, deep_gray="range").prepare(file)
    assert by_range.note == ""
    assert (by_range.views.min(), by_range.views.max()) == (0, 255)


def test_the_transform_of_an_earlier_store_is_the_default() -> None:
    earlier = '{"stride": 4, "size": null, "longer_side": 768, "crops": 1, "flip": false}'
    assert Transform.model_validate_json(earlier) == Transform(stride=4)
    assert Transform(stride=4) != Transform(stride=4, deep_gray="range")
    assert str(Transform(stride=4)) == "longer side at most 768, center crop to a multiple of 4"
    assert str(Transform(stride=4, size=32, flip=True, deep_gray="range")) == (
        "shorter side to 32, center crop to 32 x 32, each mirrored too, deep gray scaled by range"
    )
    with pytest.raises(ValidationError):
        Transform(stride=4, deep_gray="auto")
