"""Exports of token stores: other libraries read them, and they import to the same rows."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors
import safetensors.torch
import torch
from pyarrow import dataset, parquet
from torch.utils.data import DataLoader

from smalto.core.errors import ConfigError, DataError, RunError
from smalto.core.layout import TokenLayout
from smalto.store.exports import FORMATS, export_store, import_store
from smalto.store.schema import TokenRow
from smalto.store.token_store import TokenStore
from tests.conftest import smalto_command, store_header, token_rows

HEADER = "_header.json"
SHARDED = [name for name, format in FORMATS.items() if format.max_rows_per_shard is not None]
SCALES = TokenLayout(((1, 1), (1, 2), (1, 3)))
ODD = {"id": "x%0Ay é?flip", "label": 'odd "label"\n', "height": 0}


def make_store(path: Path, rows: list[TokenRow], fixed: bool = True) -> TokenStore:
    store = TokenStore.create(path, store_header(fixed))
    store.append(rows)
    return store


def scale_store(path: Path, number: int) -> tuple[TokenStore, list[TokenRow]]:
    """A store whose rows have three scales."""
    header = store_header().model_copy(update={"grids": SCALES.grids})
    rows = [row._replace(layout=SCALES) for row in token_rows(number)]
    store = TokenStore.create(path, header)
    store.append(rows)
    return store, rows


def contents(store: TokenStore) -> list[tuple[Any, ...]]:
    """All that an export keeps of every row."""
    rows = store.token_rows(0, len(store))
    return [(row.id, list(map(int, row.tokens)), *row[2:7]) for row in rows]


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("format", FORMATS)
def test_every_export_imports_to_the_same_rows(tmp_path: Path, format: str, fixed: bool) -> None:
    rows = [*token_rows(25, fixed), token_rows(1, fixed)[0]._replace(**ODD)]
    store = make_store(tmp_path / "t", rows, fixed)
    export = tmp_path / "e"
    if format == "var" and not fixed:
        with pytest.raises(ConfigError, match="expected one layout for the format var"):
            export_store(store, format, export)
        assert not export.exists()
        return
    export_store(store, format, export)
    again = import_store(export, tmp_path / "again")
    assert again.header == store.header
    assert contents(again) == contents(store)
    with pytest.raises(RunError, match="exists already"):
        export_store(store, format, export)
    with pytest.raises(RunError, match="exists already"):
        import_store(export, tmp_path / "again")
    header = json.loads((export / HEADER).read_text())
    (export / HEADER).write_text(json.dumps(header | {"num_rows": 27}))
    with pytest.raises(DataError, match="got 26 rows; expected 27"):
        import_store(export, tmp_path / "short")
    assert not (tmp_path / "short").exists()


@pytest.mark.parametrize("codebook_size", [2**16, 2**16 + 1])
@pytest.mark.parametrize("format", FORMATS)
def test_large_codebooks_survive(tmp_path: Path, format: str, codebook_size: int) -> None:
    store = TokenStore.create(tmp_path / "t", store_header(codebook_size=codebook_size))
    store.append([TokenRow("a", [0, 1, 2, 3, 4, codebook_size - 1])])
    export_store(store, format, tmp_path / "e")
    again = import_store(tmp_path / "e", tmp_path / "again")
    assert contents(again) == contents(store)


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("format", FORMATS)
def test_an_empty_store_can_be_exported(tmp_path: Path, format: str, fixed: bool) -> None:
    if format == "var" and not fixed:
        pytest.skip("var needs one layout")
    store = TokenStore.create(tmp_path / "t", store_header(fixed))
    export_store(store, format, tmp_path / "e")
    assert len(import_store(tmp_path / "e", tmp_path / "again")) == 0


@pytest.mark.parametrize("format", FORMATS)
def test_files_and_folders_have_the_mode_of_the_umask(tmp_path: Path, format: str) -> None:
    store = make_store(tmp_path / "t", token_rows(70))
    before = os.umask(0o027)
    try:
        export = export_store(store, format, tmp_path / "e")
    finally:
        os.umask(before)
    paths = [export, *export.rglob("*")]
    modes = {str(path.relative_to(export)): path.stat().st_mode & 0o777 for path in paths}
    expected = {name: 0o750 if (export / name).is_dir() else 0o640 for name in modes}
    assert modes == expected


def test_numpy_reads_arrays_with_named_columns(tmp_path: Path) -> None:
    rows = token_rows(5)
    export = export_store(make_store(tmp_path / "t", rows), "numpy", tmp_path / "e")
    tokens = numpy.load(export / "tokens.npy", mmap_mode="r")
    assert tokens.dtype == numpy.uint16
    assert tokens.tolist() == [list(row.tokens) for row in rows]
    images = numpy.load(export / "images.npy", mmap_mode="r")
    assert images["height"].tolist() == [row.height for row in rows]
    assert images["width"].tolist() == [row.width for row in rows]
    crop = [images[f"crop_{name}"].tolist() for name in ("top", "left", "height", "width")]
    assert list(zip(*crop, strict=True)) == [row.crop for row in rows]
    labels = numpy.load(export / "labels.npy")
    classes = json.loads((export / "classes.json").read_text(encoding="utf-8"))
    assert (labels.dtype, labels.tolist()) == (numpy.int64, [-1, 0, 1, -1, 0])
    assert classes == ["a", "b"]
    ids = (export / "ids.txt").read_text(encoding="utf-8").split("\n")
    assert ids == [*(row.id for row in rows), ""]


def test_numpy_finds_rows_of_varying_layout(tmp_path: Path) -> None:
    rows = token_rows(5, fixed=False)
    export = export_store(make_store(tmp_path / "t", rows, False), "numpy", tmp_path / "e")
    tokens = numpy.load(export / "tokens.npy", mmap_mode="r")
    offsets = numpy.load(export / "offsets.npy")
    grids = numpy.load(export / "grids.npy")
    assert grids.shape == (5, 2, 2)
    for i, row in enumerate(rows):
        assert tokens[offsets[i] : offsets[i + 1]].tolist() == list(row.tokens)
        assert tuple(map(tuple, grids[i].tolist())) == row.layout.grids


def test_torch_trains_on_var_shards_without_a_cast(tmp_path: Path) -> None:
    store, rows = scale_store(tmp_path / "t", 5)
    export = export_store(store, "var", tmp_path / "e")
    shard = safetensors.torch.load_file(export / "shard-00000.safetensors")
    tokens = torch.cat([shard[f"idx_{k}"] for k in range(3)], dim=1)
    assert tokens.tolist() == [list(row.tokens) for row in rows]
    assert shard["label_B"].tolist() == [-1, 0, 1, -1, 0]
    assert shard["height"].tolist() == [row.height for row in rows]
    assert shard["width"].tolist() == [row.width for row in rows]
    assert [tuple(crop) for crop in shard["crop"].tolist()] == [row.crop for row in rows]
    logits = torch.nn.Embedding(512, 512)(tokens)
    assert logits.shape == (5, 6, 512)
    loss = torch.nn.functional.cross_entropy(logits.reshape(-1, 512), tokens.reshape(-1))
    assert loss.isfinite()
    assert tokens.max() == max(max(row.tokens) for row in rows)
    assert len(tokens.unique()) == len({token for row in rows for token in row.tokens})


def safetensors_metadata(path: Path) -> str:
    with safetensors.safe_open(path, "pt") as file:
        return file.metadata()["smalto"]


def parquet_metadata(path: Path) -> bytes:
    return parquet.read_schema(path).metadata[b"smalto"]


def tar_metadata(path: Path) -> str:
    with tarfile.open(path) as tar:
        return tar.pax_headers["comment"]


METADATA_OF: dict[str, Callable[[Path], str | bytes]] = {
    "var": safetensors_metadata,
    "parquet": parquet_metadata,
    "webdataset": tar_metadata,
}


@pytest.mark.parametrize("format", SHARDED)
def test_every_shard_holds_the_header(tmp_path: Path, format: str) -> None:
    store, _ = scale_store(tmp_path / "t", 20)
    export = export_store(store, format, tmp_path / "e")
    endings = {"var": "*.safetensors", "parquet": "rows/*.parquet", "webdataset": "*.tar"}
    shards = sorted(export.glob(endings[format]))
    assert len(shards) == 3
    for shard in shards:
        header = json.loads(METADATA_OF[format](shard))
        assert header == json.loads((export / HEADER).read_text())
        assert (header["format"], header["format_version"], header["num_rows"]) == (format, 2, 20)
        assert header["store"]["fingerprint"] == store.header.fingerprint
        assert header["store"]["grids"] == [list(grid) for grid in SCALES.grids]
        assert header["classes"] == ["a", "b"]


@pytest.mark.parametrize("number", [0, 20])
def test_pyarrow_pandas_polars_and_duckdb_open_the_rows(tmp_path: Path, number: int) -> None:
    pandas = pytest.importorskip("pandas")
    polars = pytest.importorskip("polars")
    duckdb = pytest.importorskip("duckdb")
    rows = token_rows(number, fixed=False)
    store = TokenStore.create(tmp_path / "t", store_header(fixed=False))
    store.append(rows)
    export = export_store(store, "parquet", tmp_path / "e")
    folder = str(export / "rows")
    expected = [(row.id, list(row.tokens), row.label, row.height) for row in rows]
    columns = ["id", "tokens", "label", "height"]

    def plain(found: list[Any]) -> list[tuple[Any, ...]]:
        return [(id, list(map(int, tokens)), *rest) for id, tokens, *rest in found]

    for path in (folder, str(export)):
        records = dataset.dataset(path).to_table(columns=columns).to_pylist()
        assert [tuple(record.values()) for record in records] == expected
        frame = pandas.read_parquet(path, columns=columns)
        assert plain(frame.to_numpy().tolist()) == expected
    for path in (folder, f"{folder}/*.parquet", f"{export}/**/*.parquet"):
        assert plain(polars.scan_parquet(path).select(columns).collect().rows()) == expected
    for path in (folder, f"{folder}/*.parquet", f"{export}/**/*.parquet"):
        query = f"select {', '.join(columns)} from read_parquet('{path}') order by id"
        assert plain(duckdb.sql(query).fetchall()) == expected


def test_two_workers_read_webdataset_shards(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    rows = token_rows(64)
    export = export_store(make_store(tmp_path / "t", rows), "webdataset", tmp_path / "e")
    urls = f"{export}/shard-{{00000..00007}}.tar"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # webdataset leaves files open
        samples = webdataset.WebDataset(urls, shardshuffle=False).decode()
        found = list(DataLoader(samples, batch_size=None, num_workers=2))
        gc.collect()
    found.sort(key=lambda sample: sample["__key__"])
    assert [sample["tokens.npy"].tolist() for sample in found] == [list(r.tokens) for r in rows]
    number_of = {"": -1, "a": 0, "b": 1}
    assert [sample["cls"] for sample in found] == [number_of[row.label] for row in rows]
    assert [sample["json"]["id"] for sample in found] == [row.id for row in rows]


def test_other_tar_programs_read_webdataset_shards(tmp_path: Path) -> None:
    export = export_store(make_store(tmp_path / "t", token_rows(1)), "webdataset", tmp_path / "e")
    command = ["tar", "-tf", str(export / "shard-00000.tar")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["000000000.tokens.npy", "000000000.cls", "000000000.json"]
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("number", "num_shards"), [(1, 1), (8, 1), (9, 2), (63, 8), (64, 8), (65, 8), (1000, 8)]
)
def test_default_shards_keep_workers_busy(tmp_path: Path, number: int, num_shards: int) -> None:
    store = make_store(tmp_path / "t", token_rows(number))
    export = export_store(store, "webdataset", tmp_path / "e")
    assert len(list(export.glob("*.tar"))) == num_shards


@pytest.mark.parametrize(("format", "most"), [("webdataset", 10_000), ("parquet", 100_000)])
def test_large_stores_have_shards_of_limited_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, most: int
) -> None:
    assert FORMATS[format].max_rows_per_shard == most
    limited = FORMATS[format]._replace(max_rows_per_shard=9)
    monkeypatch.setitem(FORMATS, format, limited)
    export = export_store(make_store(tmp_path / "t", token_rows(100)), format, tmp_path / "e")
    assert json.loads((export / HEADER).read_text())["rows_per_shard"] == 9
    assert len([path for path in export.rglob("*") if path.suffix in (".tar", ".parquet")]) == 12


@pytest.mark.parametrize("format", SHARDED)
def test_rows_per_shard_can_be_chosen(tmp_path: Path, format: str) -> None:
    store = make_store(tmp_path / "t", token_rows(10))
    export = export_store(store, format, tmp_path / "e", rows_per_shard=4)
    names = {path.name for path in export.rglob("*-0000?.*") if path.suffix != ".txt"}
    assert len(names) == 3
    assert contents(import_store(export, tmp_path / "again")) == contents(store)
    with pytest.raises(ConfigError, match="got 0 rows per shard; expected at least 1"):
        export_store(store, format, tmp_path / "f", rows_per_shard=0)
    with pytest.raises(ConfigError, match="got 4 rows per shard; expected none"):
        export_store(store, "numpy", tmp_path / "f", rows_per_shard=4)


def test_names_of_very_many_shards_sort_in_the_order_of_rows() -> None:
    from smalto.store.exports.export_header import ExportHeader, split_into_shards

    header = ExportHeader(
        format="var", num_rows=100_001, rows_per_shard=1, classes=[], store=store_header()
    )
    numbers = [number for number, _ in split_into_shards(token_rows(1) * 100_001, header)]
    assert numbers == sorted(numbers)
    assert (numbers[0], numbers[-1]) == ("000000", "100000")


def test_the_command_line_sets_rows_per_shard(tmp_path: Path) -> None:
    store = make_store(tmp_path / "t", token_rows(10))
    options = ["--format", "webdataset", "--rows-per-shard", 3, "--out", tmp_path / "e"]
    smalto_command("store", "export", store.path, *options)
    assert len(list((tmp_path / "e").glob("shard-*.tar"))) == 4


def test_wrong_formats_and_folders_are_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path / "t", token_rows(3))
    expected = "got the format 'csv'; expected one of numpy, var, parquet, webdataset"
    with pytest.raises(ConfigError, match=expected):
        export_store(store, "csv", tmp_path / "e")
    with pytest.raises(DataError, match="is not an export"):
        import_store(tmp_path, tmp_path / "again")
    export = export_store(store, "numpy", tmp_path / "e")
    header = json.loads((export / HEADER).read_text())
    (export / HEADER).write_text(json.dumps(header | {"format": "csv"}))
    with pytest.raises(DataError, match="got the export format 'csv'; expected one of numpy, var"):
        import_store(export, tmp_path / "again")


def test_damaged_exports_are_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path / "t", token_rows(3))
    numpy_export = export_store(store, "numpy", tmp_path / "n")
    tokens = numpy_export / "tokens.npy"
    tokens.write_bytes(tokens.read_bytes()[:-5])
    with pytest.raises(DataError, match="is damaged: "):
        import_store(numpy_export, tmp_path / "again")
    var_export = export_store(store, "var", tmp_path / "v")
    header = json.loads((var_export / HEADER).read_text())
    (var_export / HEADER).write_text(json.dumps(header | {"classes": ["a"]}))
    with pytest.raises(DataError, match=r"damaged: got class number 1; expected -1 to 0"):
        import_store(var_export, tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(("name", "version"), [("header.json", 1), (HEADER, 3)])
def test_exports_of_another_version_are_refused(tmp_path: Path, name: str, version: int) -> None:
    store = make_store(tmp_path / "t", token_rows(3))
    export = export_store(store, "numpy", tmp_path / "e")
    header = json.loads((export / HEADER).read_text())
    (export / HEADER).unlink()
    (export / name).write_text(json.dumps(header | {"format_version": version}))
    expected = f"got export format version {version}; expected version 2. Export .* again"
    with pytest.raises(DataError, match=expected):
        import_store(export, tmp_path / "again")
