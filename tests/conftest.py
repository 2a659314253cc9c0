"""What the tests share: small images, small recipes, and the command line in a process of its
own.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from smalto.core.layout import TokenLayout
from smalto.images.bundled import bundled_photographs
from smalto.store.schema import StoreHeader, TokenRow
from smalto.training.recipe import change_recipe
from smalto.training.tokenizer_recipe import TokenizerRecipe
from tests.warm_process import WarmProcess

torch.set_num_threads(1)  # two test processes share two cores

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}  # sums depend on the number of threads
WARM = WarmProcess(ENVIRONMENT)

TINY = {
    "steps": 6,
    "data.size": 16,
    "data.batch": 4,
    "evaluate.every": 3,
    "evaluate.crops": 4,
    "checkpoint.every": 2,
    "tokenizer.quantizer.codebook_size": 16,
    "tokenizer.autoencoder.hidden_dim": 8,
    "tokenizer.autoencoder.latent_dim": 8,
    "tokenizer.quantizer.latent_dim": 8,
    "tokenizer.quantizer.code_dim": 4,
}


def pytest_sessionfinish() -> None:
    WARM.close()


def make_image(seed: int, height: int = 40, width: int = 48) -> numpy.ndarray:
    """A smooth colored image, uint8 [height, width, 3]."""
    random = numpy.random.default_rng(seed)
    small = Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=numpy.uint8))
    return numpy.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def write_images(folder: Path, number: int, height: int = 40, width: int = 48) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(number):
        Image.fromarray(make_image(i, height, width)).save(folder / f"photo{i:02d}.png")
    return folder


def write_small_photographs(folder: Path, side: int) -> Path:
    """Write the bundled photographs, at most ``side`` pixels wide and high, in their packages."""
    for file in bundled_photographs():
        path = Path(file.path)
        small = folder.joinpath(*path.parts[path.parts.index("site-packages") + 1 :])
        small.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as image:
            image.thumbnail((side, side))
            image.save(small)
    return folder


def smalto_command(
    *arguments: object, check: bool = True, cwd: Path | None = None, timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    """Run ``python -m smalto ...`` in a process of its own."""
    done = WARM.run(["-m", "smalto", *map(str, arguments)], cwd, timeout)
    if check:
        assert done.returncode == 0, done.stderr
    return done


def tiny_sets() -> list[str]:
    """The tiny recipe as ``--set`` arguments."""
    return [part for key, value in TINY.items() for part in ("--set", f"{key}={value}")]


@pytest.fixture
def tiny_recipe() -> TokenizerRecipe:
    return change_recipe(TokenizerRecipe(), TINY)


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images", 6)


def store_header(fixed: bool = True, codebook_size: int = 512) -> StoreHeader:
    """Of a small token store: 2 x 3 tokens a row, or any number."""
    grids = ((2, 3),) if fixed else None
    return StoreHeader(
        fingerprint="f" * 64,
        kind="vector",
        codebook_size=codebook_size,
        grids=grids,
        transform="none",
        precision="float32",
    )


def token_rows(
    number: int, fixed: bool = True, codebook_size: int = 512, first: int = 0
) -> list[TokenRow]:
    """Rows for such a store, with labels a, b and none."""
    rows = []
    for i in range(first, first + number):
        layout = TokenLayout.single(2, 3) if fixed else TokenLayout(((1, 1), (i % 3 + 1, 2)))
        tokens = numpy.random.default_rng(i).integers(0, codebook_size, layout.num_tokens).tolist()
        metadata = (
            ("", "a", "b")[i % 3],
            40 + i,
            50,
            (1, 2, 30, 40),
            1000 + i,
            7 * i,
            bytes([i % 256]) * 16,
        )
        rows.append(TokenRow(f"image{i:04d}.png", tokens, layout, *metadata))
    return rows
