"""Crops are a function of seed, epoch and image; a resumed stream continues."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from smalto.core.errors import DataError, InputError
from smalto.images import crops
from smalto.images.crops import CropStream
from smalto.images.finding import find_images
from smalto.images.image_file import ImageFile
from smalto.images.image_set import DatasetImages, ImageFiles
from smalto.images.reading import read_image
from smalto.images.splits import split, split_by_name
from smalto.images.tensors import center_crop, enlarge, to_uint8, to_unit_range
from smalto.images.worker_pool import ReaderPool
from tests.conftest import write_images


class Numbered(torch.utils.data.Dataset[Tensor]):
    """Image i is uint8 and i everywhere, but for its first row and column, which tell where one
    is.
    """

    def __init__(
        self, number: int, height: int = 20, width: int = 24, dtype: torch.dtype = torch.uint8
    ) -> None:
        self.number, self.shape, self.dtype = number, (1, height, width), dtype

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> Tensor:
        return torch.full(self.shape, index, dtype=self.dtype)


class Recorded(DatasetImages):
    """Numbered images that record which of them were requested."""

    def __init__(self, number: int) -> None:
        super().__init__(Numbered(number))
        self.requested: set[int] = set()

    def prefetch(self, indices: Sequence[int]) -> None:
        self.requested.update(indices)


def stream(
    number: int = 10, images: DatasetImages | None = None, states: Any = None, **settings: Any
) -> CropStream:
    defaults = {"size": 8, "batch": 4, "seed": 0, "crops_per_image": 3}
    images = images or DatasetImages(Numbered(number))
    made = CropStream(images, list(range(number)), **(defaults | settings))
    if states is not None:
        made.load_state_dict(states)
    return made


def numbers(batch: Tensor) -> list[int]:
    return [round((float(crop[0, 0, 0]) + 1) * 127.5) for crop in batch]


def test_an_epoch_shows_every_image_equally_and_in_another_order_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(crops, "WINDOW", 4)  # one image a row
    source = stream(number=12)
    epochs = [[number for _ in range(9) for number in numbers(next(source))] for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(list(range(12)) * 3)
    assert epochs[0] != epochs[1]


def test_crops_of_a_few_images_are_mixed_in_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crops, "WINDOW", 16)  # four images a row
    source = stream(number=100)
    rows = numpy.array([numbers(next(source)) for _ in range(30)])
    assert all(len(set(batch)) == 4 for batch in rows)  # no image twice in a batch
    for row, column in enumerate(rows.T):
        first = 3 * (1 + row % 4)  # rows change their images at different times
        assert len(set(column[:first])) == 1 + row % 4
        window = list(column[first : first + 12])
        assert {window.count(number) for number in window} == {3}
        assert window != sorted(window, key=window.index)  # and not one image after the other


def test_processes_that_share_the_rows_make_the_same_batches_of_their_own_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(crops, "WINDOW", 8)  # two images a row: twelve batches stay in one epoch
    whole = stream(number=40)
    images = [Recorded(40), Recorded(40)]
    halves = [stream(40, images[0], rows=range(2)), stream(40, images[1], rows=range(2, 4))]
    for _ in range(12):
        assert torch.equal(next(whole), torch.cat([next(half) for half in halves]))
    assert len(images[0].requested) >= 8
    assert len(images[1].requested) >= 8
    assert not images[0].requested & images[1].requested  # each reads its share
    assert sorted(halves[0].state_dict() + halves[1].state_dict()) == whole.state_dict()


def test_with_another_batch_it_goes_on_about_where_it_was() -> None:
    before = stream(number=200)
    for _ in range(90):
        next(before)
    visited = sum(visit for _, visit, _ in before.state_dict())
    after = stream(number=200, batch=6, states=[before.state_dict()])
    assert abs(sum(visit for _, visit, _ in after.state_dict()) - visited) < 6
    halves = [
        stream(number=200, batch=6, states=[before.state_dict()], rows=rows)
        for rows in (range(3), range(3, 6))
    ]
    assert torch.equal(next(after), torch.cat([next(half) for half in halves]))


def test_images_that_lie_in_blocks_are_visited_a_few_blocks_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(crops, "WINDOW", 1)  # one image at a time: crops come in order of visits
    images = DatasetImages(Numbered(60))
    images.row_groups = numpy.arange(60) // 5
    source = stream(60, images, batch=1, crops_per_image=1)
    order, second = ([number for _ in range(60) for number in numbers(next(source))] for _ in "ab")
    assert sorted(order) == list(range(60))
    first = [index // 5 for index in order[:20]]
    assert len(set(first)) == crops.MIXED_ROW_GROUPS
    assert first != sorted(first)
    assert sorted(second) == list(range(60))
    assert order != second


def test_colors_change_within_bounds_and_greys_only_in_brightness_and_contrast() -> None:
    images = torch.rand(50, 3, 4, 4) * 2 - 1
    chances = numpy.random.default_rng(0).random((50, 4))
    assert torch.allclose(
        crops.jitter_colors(images, numpy.full((50, 4), 0.5), 1.0), images, atol=1e-6
    )  # in the middle nothing changes
    changed = crops.jitter_colors(images, chances, 1.0)
    assert changed.abs().max() <= 1
    assert (changed - images).abs().mean() > 0.1
    gray = crops.jitter_colors(images[:, :1].expand(-1, 3, -1, -1), chances, 1.0)
    assert (gray - gray.mean(dim=1, keepdim=True)).abs().max() < 1e-5
    assert torch.equal(crops.jitter_colors(images[:, :1], chances, 1.0), images[:, :1])


def test_the_same_seed_gives_the_same_crops_and_another_seed_others(image_folder: Path) -> None:
    files, _ = find_images(image_folder)

    def batches(seed: int, workers: int, cache_bytes: int) -> Tensor:
        with ReaderPool(workers, read_image) as decoder:
            source = CropStream(
                ImageFiles(files, decoder, cache_bytes), list(range(6)), size=16, batch=5, seed=seed
            )
            return torch.stack([next(source) for _ in range(12)])

    here = batches(0, 0, 2**20)
    assert torch.equal(here, batches(0, 2, 0))  # neither workers nor the cache have a say
    assert not torch.equal(here, batches(1, 0, 2**20))
    assert here.min() >= -1
    assert here.max() <= 1


def test_it_goes_on_from_any_position(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crops, "WINDOW", 8)
    whole = stream()
    batches = [next(whole) for _ in range(25)]
    for stop in (0, 1, 7, 8, 15, 24):
        first = stream()
        for _ in range(stop):
            next(first)
        rest = stream(states=[first.state_dict()])
        assert torch.equal(next(rest), batches[stop])


def test_flips_can_be_off_and_crops_stay_inside() -> None:
    class Ramp(torch.utils.data.Dataset[Tensor]):
        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> Tensor:
            return torch.arange(200, dtype=torch.uint8).expand(3, 9, 200)

    def rising(flip: bool) -> set[bool]:
        source = CropStream(DatasetImages(Ramp()), [0], size=8, batch=60, seed=0, flip=flip)
        return {bool((crop[0, 0, 1:] > crop[0, 0, :-1]).all()) for crop in next(source)}

    assert rising(False) == {True}
    assert rising(True) == {True, False}


def test_small_images_are_enlarged_and_counted() -> None:
    source = CropStream(DatasetImages(Numbered(3, 5, 9)), [0, 1, 2], size=8, batch=3, seed=0)
    assert next(source).shape == (3, 1, 8, 8)
    assert source.enlarged <= {0, 1, 2}
    for _ in range(16):  # two windows of each row at least
        next(source)
    assert source.enlarged == {0, 1, 2}
    strip = CropStream(
        DatasetImages(Numbered(1, 1, 100_000)), [0], size=64, batch=8, seed=0
    )  # the whole strip enlarged has 400 M pixels
    assert next(strip).shape == (8, 1, 64, 64)
    assert enlarge(torch.zeros(3, 5, 10, dtype=torch.uint8), 20).shape == (3, 20, 40)


def test_broken_images_are_passed_over_and_none_left_is_an_error(image_folder: Path) -> None:
    (image_folder / "photo00.png").write_bytes(b"broken")
    files, _ = find_images(image_folder)
    with ReaderPool(0, read_image) as decoder:
        source = ImageFiles(files, decoder, 0)
        next(CropStream(source, list(range(6)), size=16, batch=40, seed=0))
        assert [s.name for s in source.skipped] == ["photo00.png"]
    only_bad = [ImageFile("x", str(image_folder / "photo00.png"))]
    with (
        ReaderPool(0, read_image) as decoder,
        pytest.raises(DataError, match="none of the images can be read"),
    ):
        next(CropStream(ImageFiles(only_bad, decoder, 0), [0], size=16, batch=1, seed=0))
    with pytest.raises(DataError, match="got no images to crop"):
        stream(number=1).__class__(DatasetImages(Numbered(1)), [], size=8, batch=1, seed=0)


def test_the_cache_holds_what_fits(image_folder: Path) -> None:
    files, _ = find_images(image_folder)
    with ReaderPool(0, read_image) as decoder:
        source = ImageFiles(files, decoder, 2 * 40 * 48 * 3)
        first = [source.get(i) for i in range(6)]
        again = [source.get(i) for i in range(6)]
    assert [a is b for a, b in zip(first, again, strict=True)] == [
        True,
        True,
        False,
        False,
        False,
        False,
    ]


def test_datasets_of_floats_tuples_and_nonsense() -> None:
    floats = DatasetImages(Numbered(2, dtype=torch.float32))
    assert torch.equal(
        next(CropStream(floats, [1], size=4, batch=1, seed=0)), torch.ones(1, 1, 4, 4)
    )

    class Labelled(Numbered):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:  # type: ignore[override]
            return super().__getitem__(index), 7

    assert DatasetImages(Labelled(2)).get(1) is not None
    for wrong in (
        torch.zeros(8, 8),
        torch.zeros(3, 8, 8, dtype=torch.int64),
        numpy.zeros((3, 8, 8)),
    ):
        with pytest.raises(InputError, match=r"tensor \[C, H, W\]"):
            DatasetImages([wrong]).get(0)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="empty"):
        DatasetImages([])  # type: ignore[arg-type]


def test_the_split_holds_out_at_least_one_readable_image(tmp_path: Path) -> None:
    files, _ = find_images(write_images(tmp_path / "six", 6))
    with ReaderPool(0, read_image) as decoder:
        training, held_out = split(ImageFiles(files, decoder, 0))
        assert len(held_out) == 1
        assert sorted(training + held_out) == list(range(6))
        (tmp_path / "six" / files[held_out[0]].name).write_bytes(b"broken")
        _, others = split(ImageFiles(files, decoder, 0))
        assert len(set(others) - set(held_out)) == 1
    files, _ = find_images(write_images(tmp_path / "three", 3))
    with ReaderPool(0, read_image) as decoder:
        assert split(ImageFiles(files, decoder, 0)) == ([0, 1, 2], [])
        for file in files:
            Path(file.path).write_bytes(b"broken")
        with pytest.raises(DataError, match=r"none of the 3 images can be read: photo00\.png"):
            split(ImageFiles(files, decoder, 0))
        assert split_by_name(ImageFiles(files, decoder, 0), ["photo01.png"]) == ([0, 2], [1])


def test_ranges_and_center_crops() -> None:
    values = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    assert torch.equal(to_uint8(to_unit_range(values)), values)
    assert center_crop(values, 6).shape == (1, 12, 12)
    assert center_crop(values, 6)[0, 0, 0] == values[0, 2, 2]
    assert center_crop(torch.zeros(3, 2, 9), 4).shape == (3, 4, 16)


def test_a_image_that_two_rows_wait_for_is_decoded_once(image_folder: Path) -> None:
    """Without room in the cache, what one row takes must not be lost to the other."""
    files, _ = find_images(image_folder)
    decoded = []
    with ReaderPool(0, read_image) as decoder:
        submit = decoder.submit
        decoder.submit = lambda files: decoded.append(files[0].name) or submit(files)  # type: ignore[method-assign, func-returns-value]
        source = ImageFiles(files, decoder, 0)
        source.prefetch([0, 1, 0])
        for index in (0, 0, 1):
            assert source.get(index) is not None
        assert decoded == [files[0].name, files[1].name]
        source.get(0)
        assert len(decoded) == 3  # nothing was still requested
