"""The images of a run, as its evaluation reads them."""

from __future__ import annotations

from pathlib import Path

import pytest

from smalto.core.progress import Progress
from smalto.images import worker_pool
from smalto.training import training_images
from smalto.training.tokenizer_recipe import TokenizerRecipe
from smalto.training.training_images import open_training_images


def test_whole_images_are_read_as_the_run_reads_and_bad_ones_are_reported(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without workers no process starts, however many images there are."""
    monkeypatch.setattr(training_images, "FEW_FILES", 2)
    monkeypatch.delattr(worker_pool, "ProcessPoolExecutor")
    with open_training_images(image_folder, TokenizerRecipe(), workers=0) as images:
        (image_folder / images.images.names[1]).write_bytes(b"no image")
        read = images.whole_images(list(range(6)), 4, 768, Progress())
        assert len(list(read)) == 5
        assert [skipped.name for skipped in images.skipped] == [images.images.names[1]]
