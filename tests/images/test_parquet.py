"""Images in parquet files, as Hugging Face datasets store them."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

import smalto
from smalto.core.errors import DataError, MissingExtra
from smalto.images import parquet
from smalto.images.archives import open_file
from smalto.images.finding import find_images
from smalto.images.image_set import ImageFiles
from smalto.images.reading import BadImage, read_image
from smalto.images.worker_pool import ReaderPool
from smalto.training.tokenizer_recipe import TokenizerRecipe
from tests.conftest import make_image


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(make_image(seed)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, column: str = "image", number: int = 7, struct: bool = True) -> Path:
    cells = [{"bytes": png(i), "path": f"{i}.png"} if struct else png(i) for i in range(number)]
    table = pyarrow.table({"label": list(range(number)), column: cells, "blob": [b"x"] * number})
    pyarrow.parquet.write_table(table, path, row_group_size=3)
    return path


@pytest.mark.parametrize(
    ("column", "struct"), [("image", True), ("jpg", False), ("photo_of_it", True), ("0.png", False)]
)
def test_every_row_is_an_image(tmp_path: Path, column: str, struct: bool) -> None:
    files, skipped = find_images(write(tmp_path / "train-00000.parquet", column, struct=struct))
    assert not skipped
    assert [file.name for file in files] == [f"{i:08d}" for i in range(7)]
    assert [(file.row_group, file.offset) for file in files] == [
        (0, 0),
        (0, 1),
        (0, 2),
        (1, 0),
        (1, 1),
        (1, 2),
        (2, 0),
    ]
    for number, file in enumerate(files):
        assert open_file(file).read() == png(number)
        assert (read_image(file) == make_image(number)).all()


def test_shards_in_a_folder_beside_other_images_and_the_order_of_blocks(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet")
    write(tmp_path / "b.parquet", number=2)
    (tmp_path / "c.png").write_bytes(png(0))
    files, _ = find_images(tmp_path)
    assert len(files) == 10
    assert files[0].name == "a.parquet/00000000"
    with ReaderPool(0, read_image) as decoder:
        blocks = ImageFiles(files, decoder, 0).row_groups
    assert blocks is not None
    assert list(blocks) == [0, 0, 0, 1, 1, 1, 2, 3, 3, 4]


def test_empty_cells_and_other_files_are_skipped_by_name(tmp_path: Path) -> None:
    cells = [
        {"bytes": png(0), "path": ""},
        {"bytes": None, "path": "lost"},
        None,
        {"bytes": b"no image", "path": ""},
    ]
    pyarrow.parquet.write_table(pyarrow.table({"image": cells}), tmp_path / "holes.parquet")
    files, _ = find_images(tmp_path / "holes.parquet")
    read_image(files[0])
    for file, reason in zip(
        files[1:], ("the cell is empty", "the cell is empty", "not an image"), strict=True
    ):
        with pytest.raises(BadImage, match=reason):
            read_image(file)
    pyarrow.parquet.write_table(
        pyarrow.table({"text": ["a"], "number": [1]}), tmp_path / "text.parquet"
    )
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1 no")
    _, skipped = find_images(tmp_path)
    reasons = dict(skipped)
    assert reasons["text.parquet"] == (
        "no image column: got the columns text (string), number (int64); expected one of type "
        "binary or struct<bytes: binary, path: string>, or a list of these"
    )
    assert "damaged archive" in reasons["damaged.parquet"]
    with pytest.raises(DataError, match="holds no image"):
        find_images(tmp_path / "text.parquet")


LISTS = [[0, 1], [], None, [2], [3, None, 4]]  # seeds of images, by row
BYTES = pyarrow.binary()
STRUCT = pyarrow.struct([("bytes", BYTES), ("path", pyarrow.string())])


def write_lists(path: Path, kind: pyarrow.DataType, rows: list[list[int | None] | None]) -> Path:
    def cell(seed: int | None) -> object:
        if seed is None:
            return None
        if kind.value_type in (BYTES, pyarrow.large_binary()):
            return png(seed)
        return {"bytes": png(seed)} | ({"path": ""} if kind.value_type == STRUCT else {})

    lists = [row if row is None else [cell(seed) for seed in row] for row in rows]
    table = pyarrow.table(
        {
            "texts": [["a", "b"]] * len(rows),
            "label": list(range(len(rows))),
            "blob": [b"x"] * len(rows),
            "images": pyarrow.array(lists, kind),
        }
    )
    pyarrow.parquet.write_table(table, path, row_group_size=2)
    return path


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.list_(BYTES),
        pyarrow.large_list(pyarrow.large_binary()),
        pyarrow.list_(STRUCT),
        pyarrow.large_list(STRUCT),
        pyarrow.list_(pyarrow.struct([("bytes", BYTES)])),
    ],
    ids=str,
)
def test_every_element_of_a_list_is_an_image(tmp_path: Path, kind: pyarrow.DataType) -> None:
    files, skipped = find_images(write_lists(tmp_path / "lists.parquet", kind, LISTS))
    assert not skipped
    assert [(file.name, file.label, file.row_group, file.offset) for file in files] == [
        ("00000000/0", "0", 0, 0),
        ("00000000/1", "0", 0, 0),
        ("00000003/0", "3", 1, 1),
        ("00000004/0", "4", 2, 0),
        ("00000004/1", "4", 2, 0),
        ("00000004/2", "4", 2, 0),
    ]
    for workers in (0, 1):
        with ReaderPool(workers, read_image) as reader:
            read = {file.name: image for file, image in reader.in_order(files)}
        empty = read.pop("00000004/1")
        assert "the cell is empty" in str(empty)
        for seed, image in enumerate(read.values()):
            assert (image == make_image(seed)).all()


def test_lists_of_one_length_are_read(tmp_path: Path) -> None:
    path = write_lists(tmp_path / "pairs.parquet", pyarrow.list_(BYTES, 2), [[0, 1], [2, 3]])
    files, _ = find_images(path)
    assert [file.name for file in files] == ["00000000/0", "00000000/1", "00000001/0", "00000001/1"]
    for seed, file in enumerate(files):
        assert (read_image(file) == make_image(seed)).all()


def test_tokens_of_listed_images_are_rows_of_their_own(tmp_path: Path) -> None:
    path = write_lists(tmp_path / "lists.parquet", pyarrow.list_(STRUCT), [[0, 1], [2]])
    smalto.default_tokenizer(16).save(tmp_path / "tokenizer")
    done = smalto.tokenize(path, tmp_path / "tokenizer", tmp_path / "t", workers=0, device="cpu")
    assert (done.num_images, done.skipped) == (3, [])
    again = smalto.tokenize(path, tmp_path / "tokenizer", tmp_path / "t", workers=0, device="cpu")
    assert (again.num_images, again.num_known) == (0, 3)


def test_a_row_group_in_several_chunks_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Columns of more than 2 GiB come in several chunks, which pyarrow cannot join."""
    chunks = pyarrow.chunked_array([[{"bytes": png(0)}], [{"bytes": png(1)}]])
    table = pyarrow.table({"image": chunks})
    monkeypatch.setattr(
        pyarrow.parquet.ParquetFile, "read_row_group", lambda self, row_group, columns: table
    )
    path = str(write(tmp_path / "p.parquet"))
    assert [parquet.read_cell(path, 0, "image.bytes", row) for row in (0, 1)] == [png(0), png(1)]


def test_training_reads_it_in_workers(tmp_path: Path, tiny_recipe: TokenizerRecipe) -> None:
    trained = smalto.train(
        write(tmp_path / "p.parquet", number=9),
        tiny_recipe,
        out=tmp_path / "run",
        device="cpu",
        workers=1,
    )
    assert trained.metrics.num_images >= 1
    assert not trained.metrics.skipped


def test_without_pyarrow_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "p.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingExtra, match=r'pip install "smalto\[parquet\]"'):
        find_images(tmp_path)


def test_a_column_of_images_is_told_from_other_bytes_by_its_name(tmp_path: Path) -> None:
    table = pyarrow.table({"audio": [b"sound"], "picture": [png(0)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    (file,), skipped = find_images(tmp_path)
    assert not skipped
    assert read_image(file).ndim == 3
