"""Several stores read as one, and data sets over some of their rows."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch

from smalto.core.errors import ConfigError, DataError, InputError
from smalto.core.layout import TokenLayout
from smalto.store.dataset import Shuffle, TokenDataset, TokenLoader
from smalto.store.joined_stores import JoinedStores, find_stores
from smalto.store.schema import StoreHeader, TokenRow
from smalto.store.token_store import TokenStore

LENGTHS = (7, 1, 12)


def header(codebook_size: int = 1000) -> StoreHeader:
    return StoreHeader(
        fingerprint="f" * 64,
        kind="vector",
        codebook_size=codebook_size,
        grids=((1, 2),),
        transform="none",
        precision="float32",
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three stores whose rows are numbered over all of them."""
    number = 0
    for name, length in zip("abc", LENGTHS, strict=True):
        store = TokenStore.create(tmp_path / f"{name}.lance", header())
        rows = []
        for _ in range(length):
            tokens = numpy.array([number, 2 * number])
            rows.append(TokenRow(f"image{number}", tokens, label="xyz"[number % 3]))
            number += 1
        store.append(rows)
    return tmp_path


def test_rows_are_numbered_over_all_stores(folder: Path) -> None:
    stores = JoinedStores.open(folder)
    total = sum(LENGTHS)
    assert len(stores) == total
    assert list(stores.ids()) == [f"image{i}" for i in range(total)]
    assert stores.classes() == ["x", "y", "z"]
    expected = numpy.stack([numpy.arange(total), 2 * numpy.arange(total)], axis=1)
    for start in range(total + 1):
        for stop in range(start, total + 1):
            tokens, labels = stores.tokens(start, stop, stores.classes())
            assert numpy.array_equal(tokens, expected[start:stop].reshape(-1, 2))
            assert numpy.array_equal(labels, numpy.arange(start, stop) % 3)
    for indices in ([19, 0, 7, 8, 7], [3], [8, 9, 10], []):
        chosen = numpy.array(indices, numpy.int64)
        tokens, labels = stores.tokens_at(chosen, stores.classes())
        assert numpy.array_equal(tokens, expected[chosen])
        assert numpy.array_equal(labels, chosen % 3)


def test_rows_that_are_added_later_change_nothing(folder: Path) -> None:
    stores = JoinedStores.open(folder)
    TokenStore.open(folder / "a.lance").append([TokenRow("late", numpy.array([999, 999]))])
    stores.refresh()
    assert len(stores) == sum(LENGTHS)
    assert "late" not in list(stores.ids())
    assert stores.tokens(6, 9, [])[0][:, 0].tolist() == [6, 7, 8]


@pytest.mark.parametrize("shuffle", ["chunks", "rows", "none"])
@pytest.mark.parametrize("chosen", [None, [0, 5, 6, 7, 8, 19], range(1, 20, 2), range(20)])
def test_a_data_set_reads_the_chosen_rows_once(
    folder: Path, shuffle: Shuffle, chosen: list[int] | range | None
) -> None:
    rows = None if chosen is None else numpy.array(chosen)
    dataset = TokenDataset(
        folder, 4, shuffle=shuffle, rows=rows, chunk_rows=3, chunks_mixed=2, seed=1
    )
    seen = [token for batch in dataset for token in batch["tokens"][:, 0].tolist()]
    assert sorted(seen) == list(range(20) if chosen is None else chosen)
    if shuffle == "none":
        assert seen == sorted(seen)
    loader = TokenLoader(dataset)
    first = next(iter(loader))
    position = loader.state_dict()
    rest = [batch["tokens"].tolist() for batch in TokenLoader(dataset)][1:]
    again = TokenLoader(dataset)
    again.load_state_dict(position)
    assert [batch["tokens"].tolist() for batch in again] == rest
    assert first["tokens"].tolist() not in rest


def test_a_loader_draws_nothing_from_the_generator_of_the_process(folder: Path) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(TokenLoader(TokenDataset(folder, 4)))
    assert torch.equal(before, torch.get_rng_state())


def test_what_does_not_fit_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="empty list"):
        JoinedStores.open([])
    with pytest.raises(DataError, match="does not exist"):
        JoinedStores.open(folder / "d.lance")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="none in it"):
        find_stores(tmp_path / "nothing")
    TokenStore.create(folder / "other.lance", header(codebook_size=500))
    with pytest.raises(InputError, match=r"codebook_size 1000 and .*with 500"):
        JoinedStores.open(folder)
    for rows in ([3, 2], [0, 0], [-1], [8], [0.5]):
        with pytest.raises(ConfigError, match="increasing indices"):
            TokenDataset(folder / "a.lance", 1, rows=numpy.array(rows))


def test_the_layout_is_that_of_the_stores(folder: Path) -> None:
    assert JoinedStores.open(folder).header.layout == TokenLayout(((1, 2),))
