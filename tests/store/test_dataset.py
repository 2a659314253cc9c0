"""Reading a store for training: every row once, the same batches whatever reads them, on from where
it was.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import smalto
from smalto.core.errors import ConfigError, DataError, InputError
from smalto.store.dataset import TokenDataset, TokenLoader
from smalto.store.schema import StoreHeader, TokenRow
from smalto.store.token_store import TokenStore
from tests.conftest import store_header, token_rows

NUMBER = 203


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """203 rows in several files; the first two tokens of each are its number."""
    made = TokenStore.create(tmp_path_factory.mktemp("store") / "t", store_header())
    rows = [
        row._replace(tokens=[i // 100, i % 100, 1, 2, 3, 4])
        for i, row in enumerate(token_rows(NUMBER))
    ]
    for start in range(0, NUMBER, 30):
        made.append(rows[start : start + 30])
    return made.path


def numbers(batches: Any) -> list[list[int]]:
    return [(batch["tokens"][:, 0] * 100 + batch["tokens"][:, 1]).tolist() for batch in batches]


def flat(lists: Iterable[list[int]]) -> list[int]:
    return list(itertools.chain(*lists))


def loader(store: Path, workers: int = 0, **settings: Any) -> TokenLoader:
    return TokenLoader(
        TokenDataset(store, 16, **({"chunk_rows": 8, "chunks_mixed": 5} | settings)), workers
    )


@pytest.mark.parametrize("shuffle", ["chunks", "rows", "none"])
def test_an_epoch_has_every_row_once(store: Path, shuffle: Any) -> None:
    batches = numbers(loader(store, shuffle=shuffle))
    assert [len(batch) for batch in batches] == [16] * 12 + [11]
    rows = flat(batches)
    assert sorted(rows) == list(range(NUMBER))
    assert (rows == list(range(NUMBER))) == (shuffle == "none")


@pytest.mark.parametrize("shuffle", ["chunks", "rows"])
@pytest.mark.parametrize("keep", [timedelta(0), None])
def test_a_compaction_does_not_disturb_a_reader(
    store: Path, shuffle: Any, keep: timedelta | None, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(store, tmp_path / "t"))
    expected = numbers(loader(copy, shuffle=shuffle))
    batches = iter(loader(copy, shuffle=shuffle))
    found = [next(batches)]
    TokenStore.open(copy).compact(*([] if keep is None else [keep]))
    assert numbers([*found, *batches]) == expected


def test_a_store_that_lost_its_files_to_a_compaction_says_so(store: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(store, tmp_path / "t"))
    opened = TokenStore.open(copy)
    TokenStore.open(copy).compact(timedelta(0))
    with pytest.raises(DataError, match="compacted after it was opened, open it again") as error:
        opened.batch(range(100))
    assert "--overwrite" not in str(error.value)
    opened.refresh()
    assert len(opened.batch(range(100))["id"]) == 100


@pytest.mark.parametrize("chunk_rows", [1, 7, 16, 64, 4096])
@pytest.mark.parametrize("chunks_mixed", [1, 3, 100])
@pytest.mark.parametrize("batch", [1, 16, 50, 500])
def test_any_sizes_give_every_row_once(
    store: Path, chunk_rows: int, chunks_mixed: int, batch: int
) -> None:
    dataset = TokenDataset(store, batch, chunk_rows=chunk_rows, chunks_mixed=chunks_mixed)
    batches = numbers(dataset)
    assert len(batches) == len(dataset)
    assert sorted(flat(batches)) == list(range(NUMBER))
    shares = [
        numbers(
            TokenDataset(
                store, batch, chunk_rows=chunk_rows, chunks_mixed=chunks_mixed, rank=r, world_size=3
            )
        )
        for r in range(3)
    ]
    assert len({len(share) for share in shares}) == 1
    seen = flat(flat(share) for share in shares)
    assert len(seen) == len(set(seen)) == NUMBER // 3 * 3


def test_block_shuffling_mixes_blocks(store: Path) -> None:
    first = numbers(loader(store))[0]
    assert len({number // 8 for number in first}) >= 4  # of five blocks that are mixed
    assert numbers(loader(store)) == numbers(loader(store))
    assert numbers(loader(store)) != numbers(loader(store, seed=1))
    both = loader(store)
    assert numbers(both) != numbers(both)  # another epoch, another order


@pytest.mark.parametrize("shuffle", ["chunks", "rows", "none"])
def test_it_goes_on_with_the_batch_that_would_have_come(store: Path, shuffle: Any) -> None:
    whole = loader(store, shuffle=shuffle)
    expected = numbers(whole) + numbers(whole)
    for stop in (0, 1, 5, 12, 13, 14, 20):
        begun = loader(store, shuffle=shuffle)
        got = []
        while len(got) < stop:
            for batch in begun:
                got += numbers([batch])
                if len(got) == stop:
                    state = begun.state_dict()
                    break
        state = begun.state_dict() if stop == 0 else state
        again = loader(store, shuffle=shuffle)
        again.load_state_dict(state)
        while len(got) < len(expected):
            got += numbers(again)
        assert got == expected


@pytest.mark.parametrize("shuffle", ["chunks", "rows"])
def test_spawned_workers_give_the_same_batches_in_the_same_order(
    store: Path, shuffle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    expected = numbers(loader(store, shuffle=shuffle))
    assert numbers(loader(store, workers=2, shuffle=shuffle)) == expected
    later = loader(store, workers=1, shuffle=shuffle)
    later.load_state_dict(later.state_dict() | {"batches": 4})
    assert numbers(later) == expected[4:]


@pytest.mark.timeout(60)
@pytest.mark.filterwarnings(
    "ignore:lance is not fork-safe", "ignore:This process.*is multi-threaded:DeprecationWarning"
)
def test_a_forked_worker_is_refused_and_does_not_hang(store: Path) -> None:
    forked: DataLoader[Any] = DataLoader(
        TokenDataset(store, 16), batch_size=None, num_workers=1, multiprocessing_context="fork"
    )
    with pytest.raises(InputError, match=r'forked.*multiprocessing_context="spawn"'):
        next(iter(forked))


def test_labels_are_numbers_of_the_classes(store: Path) -> None:
    reader = loader(store, shuffle="none")
    assert reader.dataset.classes == ["a", "b"]
    labels = torch.cat([batch["label"] for batch in reader])
    assert labels.tolist() == [(-1, 0, 1)[i % 3] for i in range(NUMBER)]


def test_next_scale_models_get_blocks_and_their_input(tmp_path: Path) -> None:
    torch.manual_seed(0)
    quantizer = {
        "kind": "multiscale",
        "scale": {"codebook_size": 32, "latent_dim": 8},
        "scales": [1, 2, 4],
    }
    config = smalto.TokenizerConfig(
        autoencoder={"latent_dim": 8, "hidden_dim": 8}, quantizer=quantizer
    )
    model = config.build().eval()
    layout = model.layout(16, 16)
    images = torch.rand(10, 3, 16, 16) * 2 - 1
    made = TokenStore.create(tmp_path / "t", StoreHeader.of(model.identity(), layout=layout))
    made.append([TokenRow(str(i), row) for i, row in enumerate(model.encode(images))])
    (batch,) = TokenDataset(made.path, 10, shuffle="none", model=model)
    blocks = model.img_to_idxBl(images)
    assert all(
        torch.equal(ours, theirs) for ours, theirs in zip(batch["idx_Bl"], blocks, strict=True)
    )
    assert torch.equal(batch["var_input"], model.idxBl_to_var_input(blocks).detach())


def test_images_that_keep_their_shape_come_as_lists(tmp_path: Path) -> None:
    made = TokenStore.create(tmp_path / "t", store_header(fixed=False))
    rows = token_rows(20, fixed=False)
    made.append(rows)
    for shuffle in ("chunks", "rows"):
        (batch,) = TokenDataset(made.path, 20, shuffle=shuffle)
        assert sorted(row.tolist() for row in batch["tokens"]) == sorted(
            list(row.tokens) for row in rows
        )
    with pytest.raises(InputError, match="whose images keep their shapes, and a model"):
        TokenDataset(made.path, 4, model=object())


def test_wrong_settings_and_positions_are_named(store: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected at least 1"):
        TokenDataset(store, 0)
    with pytest.raises(ConfigError, match="got shuffle='all'; expected"):
        TokenDataset(store, 1, shuffle="all")  # type: ignore[arg-type]
    state = loader(store).state_dict()
    with pytest.raises(InputError, match="got num_rows 203; expected 7"):
        loader(store).load_state_dict(state | {"num_rows": 7})
    for key, other in (("seed", 5), ("batch_size", 3), ("chunk_rows", 7), ("shuffle", "rows")):
        with pytest.raises(InputError, match=f"got {key} .*; expected {other}"):
            loader(store).load_state_dict(state | {key: other})
    with pytest.raises(InputError, match="expected the position of a TokenLoader"):
        loader(store).load_state_dict({})
    made = TokenStore.create(tmp_path / "t", store_header())
    assert list(TokenDataset(made.path, 4)) == []


def test_rows_that_are_added_meanwhile_wait_for_the_next_reader(tmp_path: Path) -> None:
    made = TokenStore.create(tmp_path / "t", store_header())
    made.append(token_rows(10))
    dataset = TokenDataset(made.path, 4)
    made.append(token_rows(10, first=10))
    assert sum(len(batch["label"]) for batch in dataset) == 10
    assert sum(len(batch["label"]) for batch in TokenDataset(made.path, 4)) == 20


def test_a_position_of_the_first_version_is_read(store: Path) -> None:
    state = loader(store).state_dict()
    names = {"chunk_rows": "block_rows", "chunks_mixed": "blocks_mixed"}
    earlier = {names.get(key, key): value for key, value in state.items()}
    later = loader(store)
    later.load_state_dict(earlier | {"shuffle": "blocks", "epoch": 3, "batches": 2})
    assert later.state_dict() == state | {"epoch": 3, "batches": 2}


def test_rows_that_were_replaced_end_an_epoch_instead_of_mixing_it_up(tmp_path: Path) -> None:
    store = TokenStore.create(tmp_path / "t", store_header())
    for first in range(0, 40, 10):
        store.append(token_rows(10, first=first))
    dataset = TokenDataset(tmp_path / "t", 4, shuffle="rows")
    loader = TokenLoader(dataset)
    position = loader.state_dict()
    batches = iter(dataset)
    next(batches)
    store.append(token_rows(10, first=40), replace=True)  # new rows only: the others keep places
    next(batches)
    store.append(token_rows(10), replace=True)
    store.compact(timedelta(0))
    with pytest.raises(InputError, match="were replaced after the data set was created"):
        list(batches)
    store.append(token_rows(10, first=20), replace=True)
    now = TokenLoader(TokenDataset(tmp_path / "t", 4, shuffle="rows"))
    with pytest.raises(InputError, match=r"got num_(rows|replacements)"):
        now.load_state_dict(position)
