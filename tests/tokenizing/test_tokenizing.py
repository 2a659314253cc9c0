"""The parts of a tokenizing job, each used alone."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy
import pytest
import torch

import smalto
from smalto.core.errors import DataError
from smalto.core.progress import Progress
from smalto.images.finding import find_images
from smalto.images.transforms import Transform
from smalto.inference.inference_tokenizer import InferenceTokenizer
from smalto.store.token_store import TokenStore
from smalto.tokenizing import plan
from smalto.tokenizing.encode_shard import encode_shard
from smalto.tokenizing.local import encode_locally
from tests.conftest import write_images


@pytest.fixture
def inference() -> InferenceTokenizer:
    torch.manual_seed(0)
    return InferenceTokenizer.of(smalto.default_tokenizer(16), "cpu", "float32", 2, Progress())


def test_a_shard_reads_its_own_files_where_no_reader_did(
    image_folder: Path, inference: InferenceTokenizer
) -> None:
    (image_folder / "bad.png").write_bytes(b"no image")
    files, _ = find_images(image_folder)
    transform = Transform(stride=4, size=16, flip=True)
    alone = encode_shard(files, transform, inference)
    shards = list(encode_locally(files, transform, inference, workers=0))
    assert len(alone.files) == 7
    assert [error.skipped.name for error in alone.errors] == ["bad.png"]
    read = [row for shard in shards for row in shard.rows]
    assert [row.id for row in alone.rows] == [row.id for row in read]
    assert len(read) == 12
    assert all(numpy.array_equal(a.tokens, b.tokens) for a, b in zip(alone.rows, read, strict=True))


def test_off_the_cpu_images_of_several_shapes_fill_batches(
    tmp_path: Path, inference: InferenceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(4):  # shapes alternate
        write_images(tmp_path / f"{number}a", 1, 16, 16)
        write_images(tmp_path / f"{number}b", 1, 16, 24)
    files, _ = find_images(tmp_path)
    encode, batches = InferenceTokenizer.encode_finite, []

    def recorded(
        self: InferenceTokenizer, images: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        batches.append(len(images))
        return encode(inference, images)

    monkeypatch.setattr(InferenceTokenizer, "encode_finite", recorded)
    elsewhere = InferenceTokenizer(
        inference.tokenizer, inference.identity, torch.device("meta"), "float32", 2
    )
    list(encode_locally(files, Transform(stride=4), elsewhere, workers=0))
    assert batches == [2, 2, 2, 2]


def test_a_job_that_fails_leaves_no_thread_and_no_setting(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smalto.default_tokenizer(16).save(tmp_path / "tokenizer")
    files, _ = find_images(image_folder)

    def fail(*arguments: object, **settings: object) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr("smalto.pipelines.tokenize.commit", fail)
    before, cores = threading.active_count(), torch.get_num_threads()
    with pytest.raises(OSError, match="the disk is gone") as held:  # the traceback stays alive
        smalto.tokenize(
            files * 20,
            tmp_path / "tokenizer",
            tmp_path / "t",
            device="cpu",
            workers=0,
        )
    assert held.traceback
    assert threading.active_count() == before
    assert torch.get_num_threads() == cores


class Advances(Progress):
    def __init__(self) -> None:
        self.numbers: list[int] = []

    def advance(self, number: int = 1, **metrics: float) -> None:
        if number:
            self.numbers.append(number)


def test_progress_moves_while_nothing_is_missing(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smalto.default_tokenizer(16).save(tmp_path / "tokenizer")
    arguments = image_folder, tmp_path / "tokenizer", tmp_path / "t"
    smalto.tokenize(*arguments, device="cpu", workers=0)
    monkeypatch.setattr(plan, "FILES_PER_LOOKUP", 2)
    progress = Advances()
    done = smalto.tokenize(*arguments, device="cpu", workers=0, progress=progress)
    assert done.num_known == 6
    assert progress.numbers == [2, 2, 2]


def test_bad_files_end_a_job_that_encodes_nothing(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smalto.default_tokenizer(16).save(tmp_path / "tokenizer")
    arguments = image_folder, tmp_path / "tokenizer", tmp_path / "t"
    smalto.tokenize(*arguments, device="cpu", workers=0)
    for number in range(8):
        (image_folder / f"a{number}.zip").write_bytes(b"no archive")
    monkeypatch.setattr(plan, "FILES_PER_LOOKUP", 2)
    with pytest.raises(DataError, match="stopped at 4 bad images among the first"):
        smalto.tokenize(*arguments, device="cpu", workers=0, max_errors=3)
    assert len(TokenStore.open(tmp_path / "t")) == 6
