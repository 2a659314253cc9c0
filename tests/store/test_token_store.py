"""The token store as a library: rows are read back, misfits are refused, damage is found."""

from __future__ import annotations

import errno
import os
from datetime import timedelta
from pathlib import Path

import numpy
import pyarrow
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import smalto
from smalto.core.errors import ConfigError, DataError, InputError, RunError
from smalto.core.identity import TokenizerIdentity
from smalto.core.layout import TokenLayout
from smalto.images.image_file import Skipped
from smalto.store.check import check_store
from smalto.store.lance_table import LanceTable
from smalto.store.schema import StoreHeader, TokenRow, row_id, split_id
from smalto.store.token_store import TokenStore
from tests.conftest import store_header, token_rows


@given(st.binary(min_size=1, max_size=40), st.sampled_from(["", "flip", "top-left-flip"]))
def test_any_file_name_becomes_an_id_and_comes_back(name: bytes, view: str) -> None:
    text = os.fsdecode(name)
    id = row_id(text, view)
    assert split_id(id) == (text, view)
    assert id.encode("utf-8").decode("utf-8").isprintable() or not text.isprintable()
    assert "\n" not in id


def test_ids_of_different_names_differ() -> None:
    names = ["a%20b", "a b", "a?flip", "a", "a%3Fflip", "a\nb", "a%0Ab", "a\udcffb", "a%FFb"]
    assert len({row_id(name, view) for name in names for view in ("", "flip")}) == 2 * len(names)


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("codebook_size", [512, 2**16, 2**16 + 1])
def test_what_is_appended_is_read_back(tmp_path: Path, fixed: bool, codebook_size: int) -> None:
    store = TokenStore.create(tmp_path / "t", store_header(fixed, codebook_size))
    rows = token_rows(30, fixed, codebook_size)
    store.append(rows[:20])
    store.append(rows[20:])
    store = TokenStore.open(tmp_path / "t")
    assert len(store) == 30
    asked = [29, 3, 3, 0, 21]
    batch = store.batch(asked)
    for place, i in enumerate(asked):
        assert batch["id"][place] == rows[i].id
        assert batch["tokens"][place].tolist() == list(rows[i].tokens)
        assert batch["layout"][place] == rows[i].layout
        assert (
            batch["label"][place],
            int(batch["height"][place]),
            batch["crop"][place].tolist(),
        ) == (
            rows[i].label,
            rows[i].height,
            list(rows[i].crop),
        )
    assert store[-1]["id"] == rows[29].id
    assert store[-1]["tokens"].dtype == torch.int64
    assert [row._replace(tokens=()) for row in store.token_rows(0, 30)] == [
        row._replace(tokens=()) for row in rows
    ]
    assert store.classes() == sorted({row.label for row in rows if row.label})
    assert check_store(store).ok
    for rows_table in store.tables():
        assert isinstance(rows_table, pyarrow.Table)
        width = str(rows_table.schema.field("tokens").type)
        assert ("uint16" if codebook_size <= 2**16 else "uint32") in width
    with pytest.raises(IndexError):
        store[30]
    with pytest.raises(InputError, match="got row indices from 30 to 30; expected 0 to 29"):
        store.batch([30])
    for odd in ("a\nb", "\udcff"):
        with pytest.raises(InputError, match=r"from any name with row_id\(name\)"):
            store.append([rows[0]._replace(id=odd)])
    for no_numbers in ([1.5], [True, False], ["a"]):  # a mask would give rows 0 and 1
        with pytest.raises(InputError, match="expected integers"):
            store.batch(no_numbers)
    assert store.batch([])["id"] == []


def test_tokens_of_another_kind_are_refused_with_both_values(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, other = smalto.SimpleVQVAE(16, hidden_dim=8), smalto.SimpleVQVAE(16, hidden_dim=8)
    layout = TokenLayout.single(2, 2)
    header = StoreHeader.of(model.identity(), layout=layout, transform="center crop")
    store = TokenStore.create(tmp_path / "t", header)
    row = TokenRow("a", [1, 2, 3, 4])
    store.append([row], header=header)
    for metadata, says in (
        (
            {"fingerprint": other.fingerprint()},
            f"tokenizer: {model.fingerprint()}.* in the store, {other.fingerprint()}",
        ),
        ({"grids": ((4, 1),)}, "layout: 2x2 in the store, 4x1 now"),
        ({"transform": "squeezed"}, "transform: center crop in the store, squeezed now"),
        ({"precision": "bf16"}, "precision: float32 in the store, bf16 now"),
    ):
        with pytest.raises(RunError, match=says):
            store.append([row._replace(id="b")], header=header.model_copy(update=metadata))
    assert len(TokenStore.open(tmp_path / "t")) == 1


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (TokenRow("b", [0] * 5), r"got int64 \[5\]; expected integers \[6\]"),
        (TokenRow("b", [0, 1, 2, 3, 4, 512]), r"got tokens from 0 to 512; expected \[0, 512\)"),
        (TokenRow("b", [-1, 1, 2, 3, 4, 5]), r"got tokens from -1 to 5"),
        (TokenRow("b", numpy.zeros(6)), r"got float64 \[6\]; expected integers"),
        (
            TokenRow("b", [0] * 6, TokenLayout.single(3, 2)),
            "got the layout 3x2; expected 2x3, the layout of this store",
        ),
        (TokenRow("", [0] * 6), "expected an id for every row"),
        (
            TokenRow("image0000.png", [0] * 6),
            r"got ids that are in .* already \(1, such as 'image0000\.png'\)",
        ),
    ],
)
def test_rows_that_make_no_sense_are_refused(tmp_path: Path, row: TokenRow, says: str) -> None:
    store = TokenStore.create(tmp_path / "t", store_header())
    store.append(token_rows(3))
    with pytest.raises(InputError, match=says):
        store.append([row])
    with pytest.raises(InputError, match="got the id 'c' more than once"):
        store.append([TokenRow("c", [0] * 6), TokenRow("c", [0] * 6)])
    assert len(store) == 3


def test_rows_are_replaced_in_one_commit(tmp_path: Path) -> None:
    store = TokenStore.create(tmp_path / "t", store_header())
    rows = token_rows(10)
    store.append(rows)
    new = [rows[4]._replace(tokens=[7] * 6), TokenRow("more.png", [8] * 6)]
    store.append(new, replace=True)
    assert len(store) == 11
    found = dict(zip(store.rows()["id"], store.rows()["tokens"].tolist(), strict=True))
    assert found[rows[4].id] == [7] * 6
    assert found["more.png"] == [8] * 6
    store.compact()
    assert dict(zip(store.rows()["id"], store.rows()["tokens"].tolist(), strict=True)) == found
    assert check_store(store).ok


def test_a_store_is_created_for_a_tokenizer(tmp_path: Path) -> None:
    model = smalto.SimpleVQVAE(16, 8, 8)
    layout = model.layout(16, 24)
    store = TokenStore.create(tmp_path / "t", model, layout=layout, transform="noise")
    assert store.header == StoreHeader.of(model.identity(), layout=layout, transform="noise")
    with pytest.raises(ConfigError, match="precision"):
        TokenStore.create(tmp_path / "u", model, precision="int4")
    assert not (tmp_path / "u").exists()


def test_errors_are_noted_once_and_forgotten(tmp_path: Path) -> None:
    store = TokenStore.create(tmp_path / "t", store_header())
    store.add_errors(
        [(Skipped("bad\udcff.png", "empty"), 0, 0), (Skipped("b.png", "damaged: x"), 12, 5)]
    )
    store.add_errors([(Skipped("b.png", "damaged: y"), 13, 6)])
    assert store.errors() == {"bad\udcff.png": ("empty", 0, 0), "b.png": ("damaged: y", 13, 6)}
    store.forget_errors(["b.png"])
    store.compact()
    assert list(TokenStore.open(tmp_path / "t").errors()) == ["bad\udcff.png"]


def test_compaction_keeps_rows_in_their_places(tmp_path: Path) -> None:
    store = TokenStore.create(tmp_path / "t", store_header())
    rows = token_rows(40)
    for i in range(0, 40, 4):
        store.append(rows[i : i + 4])
    assert store.num_small_files == 10
    files = lambda: set((tmp_path / "t" / "data").iterdir())  # noqa: E731
    before = files()
    store.compact()
    assert before < files()  # a reader of the version before still finds its files
    store.compact(timedelta(0))
    assert store.num_small_files == 1
    assert len(files()) == 1
    again = TokenStore.open(tmp_path / "t")
    assert again.ids() == [row.id for row in rows]
    version = again.version
    again.compact()
    assert TokenStore.open(tmp_path / "t").version == version  # nothing to do


def test_what_is_no_store_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist; expected a token store"):
        TokenStore.open(tmp_path / "nowhere")
    with pytest.raises(DataError, match="is not a token store"):
        TokenStore.open(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="is not a token store"):
        TokenStore.open(tmp_path / "file")
    store = TokenStore.create(tmp_path / "t", store_header())
    with pytest.raises(RunError, match="exists already"):
        TokenStore.create(store.path, store_header())
    with pytest.raises(ConfigError, match="codebook_size"):
        StoreHeader.of(TokenizerIdentity("f", "vector", 0))


def test_an_empty_store_is_a_store(tmp_path: Path) -> None:
    store = TokenStore.create(tmp_path / "t", store_header())
    assert (len(store), store.classes(), store.ids(), check_store(store).ok) == (0, [], [], True)
    assert store.rows()["tokens"].shape == (0, 6)


@pytest.mark.parametrize("replace", [False, True])
def test_a_full_disk_is_not_called_damage(
    replace: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = TokenStore.create(tmp_path / "t", store_header())
    store.append(token_rows(3))
    monkeypatch.setattr(
        LanceTable, "_check_whole", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full"))
    )
    with pytest.raises(OSError, match="full") as error:
        store.append(token_rows(3, first=0 if replace else 3), replace=replace)
    assert error.value.errno == errno.ENOSPC
