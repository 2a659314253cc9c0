"""Readers of files that were changed: a SmaltoError or success, within bounded memory."""

from __future__ import annotations

import io
import random
import re
import resource
import shutil
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

import smalto
from smalto.core.errors import SmaltoError
from smalto.images.finding import find_images
from smalto.images.reading import BadImage, read_image
from smalto.store.exports import export_store, import_store
from smalto.store.token_store import TokenStore
from smalto.training.recipe_file import load_recipe
from smalto.training.run_folder import read_log, read_split
from tests.conftest import make_image, store_header, token_rows

EARLIER = Path(__file__).parents[1] / "earlier"
MUTATIONS = 150  # of each of the 14 kinds of file
NUMBERS = (b"-1", b"0", b"1e999", b"99999999999999999999", b"NaN", b"null", b"[]", b'"x"', b"{}")


def mutate(data: bytes, random: random.Random) -> bytes:
    """Change a file as a faulty disk, a wrong editor or an attacker would."""
    at = random.randrange(len(data) + 1)
    match random.randrange(6):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + random.randbytes(random.randrange(1, 9)) + data[at + 1 :]
        case 2:
            return data[:at] + data[at + random.randrange(1, 65) :]
        case 3:
            return data[:at] + data[random.randrange(len(data) + 1) :] + data[at:]
        case 4:
            flipped = bytearray(data or b"\0")
            flipped[at % len(flipped)] ^= 1 << random.randrange(8)
            return bytes(flipped)
        case _:
            values = list(re.finditer(rb'-?\d+(\.\d+)?|"[^"]*"|true|false|null', data))
            if not values:
                return data + data
            chosen = random.choice(values)
            return data[: chosen.start()] + random.choice(NUMBERS) + data[chosen.end() :]


def png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(make_image(0)).save(buffer, "PNG")
    return buffer.getvalue()


def make_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("a.png", "b/c.png"):
            archive.writestr(name, png())


def make_tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in (("a.png", png()), ("a.json", b'{"label": 3}'), ("a.cls", b"3")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def make_parquet(path: Path) -> None:
    cells = [{"bytes": png(), "path": "a.png"} for _ in range(3)]
    pyarrow.parquet.write_table(pyarrow.table({"image": cells, "label": [1, 2, 3]}), path)


def read_images(path: Path) -> None:
    for file in find_images(path)[0]:
        with suppress(BadImage):
            read_image(file)


def open_store(path: Path) -> None:
    TokenStore.open(path).rows()


def make_export(format: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        store = TokenStore.create(path.with_name("store"), store_header())
        store.append(token_rows(7))
        export_store(store, format, path)

    return make


def import_it(path: Path) -> None:
    out = path.with_name("imported")
    try:
        import_store(path, out)
    finally:
        shutil.rmtree(out, ignore_errors=True)


def make_tokenizer(path: Path) -> None:
    smalto.SimpleVQVAE(8, 4, 4).save(path)


def make_store(path: Path) -> None:
    TokenStore.create(path, store_header()).append(token_rows(7))


def copy_of(name: str) -> Callable[[Path], None]:
    return lambda path: shutil.copyfile(EARLIER / "run" / name, path) and None


# Kind -> (how to make one, what to change in it, how to read it).
READERS: dict[str, tuple[Callable[[Path], None], str, Callable[[Path], object]]] = {
    "config": (make_tokenizer, "config.json", smalto.load),
    "weights": (make_tokenizer, "model.safetensors", smalto.load),
    "head": (make_store, "head.json", open_store),
    "recipe": (copy_of("recipe.toml"), "", load_recipe),
    "split": (copy_of("split.json"), "", read_split),
    "log": (copy_of("log.jsonl"), "", read_log),
    "numpy": (make_export("numpy"), "*", import_it),
    "var": (make_export("var"), "*", import_it),
    "parquet": (make_export("parquet"), "*", import_it),
    "webdataset": (make_export("webdataset"), "*", import_it),
    "a.zip": (make_zip, "", read_images),
    "a.tar": (make_tar, "", read_images),
    "a.parquet": (make_parquet, "", read_images),
    "a.png": (lambda path: path.write_bytes(png()) and None, "", read_images),
}


def fuzz(kind: str, number: int, tmp_path: Path) -> None:
    make, pattern, read = READERS[kind]
    path = tmp_path / kind
    make(path)
    files = sorted(path.glob(pattern)) if pattern else [path]
    contents = {file: file.read_bytes() for file in files if file.is_file()}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    chance = random.Random(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read(path)  # it is whole at first
        for _ in range(number):
            file, data = chance.choice(list(contents.items()))
            file.write_bytes(mutate(data, chance))
            with suppress(SmaltoError):
                read(path)
            file.write_bytes(data)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB


@pytest.mark.parametrize("kind", READERS)
def test_a_changed_file_is_named_or_read(kind: str, tmp_path: Path) -> None:
    fuzz(kind, MUTATIONS, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", READERS)
def test_many_changed_files(kind: str, tmp_path: Path) -> None:
    fuzz(kind, -(-100_000 // len(READERS)), tmp_path)
