"""One image as a tensor and back."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

import smalto
from smalto.core.errors import DataError, InputError, RunError
from tests.conftest import write_images


def test_an_image_is_read_as_tokenize_reads_it_and_written_without_loss(tmp_path: Path) -> None:
    pixels = numpy.random.default_rng(0).integers(0, 256, (41, 67, 3), dtype=numpy.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = smalto.read_image(tmp_path / "a.png", 8)
    assert image.shape == (1, 3, 40, 64)
    assert image.dtype == torch.float32
    smalto.write_png(tmp_path / "b.png", image)
    with Image.open(tmp_path / "b.png") as back:
        assert numpy.array_equal(numpy.asarray(back), pixels[:40, 1:65])
    assert smalto.read_image(tmp_path / "a.png", 8, longer_side=32).shape == (1, 3, 16, 32)


def test_what_is_not_one_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no")
    with pytest.raises(DataError, match=r"bad\.png cannot be read"):
        smalto.read_image(tmp_path / "bad.png")
    with pytest.raises(DataError, match="expected one image"):
        smalto.read_image(tmp_path)
    for image in (torch.zeros(2, 3, 8, 8), torch.zeros(1, 8, 8), torch.zeros(3, 8, 8).byte()):
        with pytest.raises(InputError, match="expected one image"):
            smalto.write_png(tmp_path / "c.png", image)
    assert not (tmp_path / "c.png").exists()
    (tmp_path / "folder.png").mkdir()
    for name in ("c.jpg", "folder.png", "c"):
        with pytest.raises(RunError, match=r"ends with \.png"):
            smalto.write_png(tmp_path / name, torch.zeros(3, 8, 8))


def test_an_archive_is_not_one_image(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", 2)
    shutil.make_archive(str(tmp_path / "two"), "zip", folder)
    with pytest.raises(DataError, match="holds 2 images; expected one"):
        smalto.read_image(tmp_path / "two.zip")
