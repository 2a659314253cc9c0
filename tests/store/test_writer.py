"""Writing beside other work: when it commits, and what becomes of its errors."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from smalto.core.errors import InputError
from smalto.store import writer as store_writer
from smalto.store.token_store import TokenStore
from smalto.store.writer import StoreWriter
from tests.conftest import store_header, token_rows


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    return TokenStore.create(tmp_path / "t", store_header())


def test_rows_are_committed_by_number_by_time_and_at_the_end(
    store: TokenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_writer, "ROWS_PER_COMMIT", 10)
    monkeypatch.setattr(store_writer, "SECONDS_PER_COMMIT", 0.5)

    def rows_within(seconds: float, expected: int) -> bool:
        end = time.monotonic() + seconds
        while len(TokenStore.open(store.path)) < expected and time.monotonic() < end:
            time.sleep(0.01)
        return len(TokenStore.open(store.path)) == expected

    with StoreWriter(store) as writer:
        writer.put(token_rows(12))
        assert rows_within(30, 12)
        writer.put(token_rows(3, first=12))
        assert rows_within(30, 15)  # though nothing else comes
        writer.put(token_rows(1, first=15))
    assert len(TokenStore.open(store.path)) == 16


@pytest.mark.timeout(60)
@pytest.mark.parametrize("rows_per_commit", [1, 4096], ids=["at once", "with the last commit"])
def test_an_error_of_the_writing_reaches_whoever_puts(
    store: TokenStore, rows_per_commit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_writer, "ROWS_PER_COMMIT", rows_per_commit)
    store.append(token_rows(1))
    with pytest.raises(InputError, match=r"are in .* already"), StoreWriter(store) as writer:
        for _ in range(50 if rows_per_commit == 1 else 1):
            writer.put(token_rows(1))
    assert len(TokenStore.open(store.path)) == 1


def test_an_error_elsewhere_is_the_one_that_is_raised_and_what_was_put_is_kept(
    store: TokenStore,
) -> None:
    with pytest.raises(ZeroDivisionError), StoreWriter(store) as writer:
        writer.put(token_rows(5))
        raise ZeroDivisionError
    assert len(TokenStore.open(store.path)) == 5
