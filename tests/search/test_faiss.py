"""The faiss backend against the tiled one, which is the reference."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smalto.core.errors import InputError, MissingExtra
from smalto.search import Metric, faiss_search, nearest_codes
from tests.search.test_nearest import assert_within_bound

needs_faiss = pytest.mark.skipif(not faiss_search.is_installed(), reason="faiss is not installed")
every_metric = pytest.mark.parametrize("metric", ["l2", "cosine"])


@needs_faiss
@settings(max_examples=40, deadline=None)
@given(
    num_queries=st.sampled_from([0, 1, 70, 9000]),
    num_codes=st.sampled_from([1, 7, 256, 300]),
    dim=st.sampled_from([1, 3, 8, 16, 24]),
    spread=st.sampled_from([1e-3, 1.0, 1e3]),
    seed=st.integers(0, 2**20),
)
def test_the_best_code_up_to_rounding(
    num_queries: int, num_codes: int, dim: int, spread: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(num_queries, dim, generator=generator) * spread
    codebook = torch.randn(num_codes, dim, generator=generator) * spread
    indices = nearest_codes(queries, codebook, backend="faiss")
    assert indices.shape == (num_queries,)
    assert indices.dtype == torch.int64
    if num_queries:
        assert_within_bound(queries[:200], codebook, indices[:200])


@needs_faiss
@every_metric
def test_where_the_best_are_further_apart_than_rounding_both_backends_agree(metric: Metric) -> None:
    torch.manual_seed(0)
    codebook = torch.randn(5000, 8)
    queries = codebook[torch.randint(5000, (20_000,))] + 0.01 * torch.randn(20_000, 8)
    if metric == "cosine":
        queries *= torch.rand(20_000, 1) * 1e6
    tiled = nearest_codes(queries, codebook, metric, backend="tiled")
    assert torch.equal(nearest_codes(queries, codebook, metric, backend="faiss"), tiled)
    assert torch.equal(nearest_codes(queries, codebook, metric), tiled)  # the one that is chosen


@needs_faiss
@every_metric
@pytest.mark.parametrize("dim", [3, 8, 16])
def test_equal_codes_go_to_the_lowest_index(metric: Metric, dim: int) -> None:
    codes = torch.randn(4500, dim)
    codebook = torch.cat([codes, codes.flip(0), codes])  # in one tile and in several
    queries = codebook[torch.randint(len(codebook), (128_000 // dim + 1,))] + 1e-3 * torch.randn(
        128_000 // dim + 1, dim
    )
    assert int(nearest_codes(queries, codebook, metric, backend="faiss").max()) < 4500


@needs_faiss
@every_metric
def test_wild_queries_are_searched_by_the_reference(metric: Metric) -> None:
    queries, codebook = torch.randn(50, 4), torch.randn(60, 4)
    queries[3, 1], queries[7, 0], queries[11, 2], queries[20] = math.nan, math.inf, -math.inf, 1e30
    expected = nearest_codes(queries, codebook, metric, backend="tiled")
    assert torch.equal(nearest_codes(queries, codebook, metric, backend="faiss"), expected)
    assert expected[[3, 7, 11]].tolist() == [0, 0, 0]


@needs_faiss
def test_what_is_zero_has_no_angle() -> None:
    queries, codebook = torch.randn(20_000, 8), torch.randn(300, 8)
    queries[7] = 0
    assert torch.equal(
        nearest_codes(queries, codebook, "cosine"),
        nearest_codes(queries, codebook, "cosine", backend="tiled"),
    )
    codebook[5] = 0  # cosine 0: beats every code on the other side
    assert torch.equal(
        nearest_codes(queries, codebook, "cosine"),
        nearest_codes(queries, codebook, "cosine", backend="tiled"),
    )


@needs_faiss
def test_a_far_away_codebook_does_not_lose_precision() -> None:
    queries, codebook = torch.randn(500, 8) + 1e4, torch.randn(300, 8) + 1e4
    tiled = nearest_codes(queries, codebook, exact=True)
    assert torch.equal(nearest_codes(queries, codebook, backend="faiss"), tiled)


@needs_faiss
def test_the_rule() -> None:
    def chosen(num_queries: int, num_codes: int, dim: int) -> bool:
        return faiss_search.is_faster(
            torch.zeros(1).expand(num_queries, dim), torch.zeros(1).expand(num_codes, dim)
        )

    assert chosen(16384, 16384, 8)
    assert chosen(8192, 65536, 16)
    assert not chosen(16384, 1024, 64)  # matrix products either way
    assert not chosen(4096, 262144, 8)  # too few queries for faiss's fast loop
    assert not chosen(2**20, 2**20, 8)  # would copy a large codebook
    assert not faiss_search.is_faster(
        torch.zeros(16384, 8, device="meta"), torch.zeros(16384, 8, device="meta")
    )


def test_asking_for_what_is_not_there_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, codebook = torch.zeros(20_000, 8), torch.zeros(4, 8)
    with pytest.raises(InputError, match="got backend='annoy'; expected"):
        nearest_codes(queries, codebook, backend="annoy")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="float32 on the CPU"):
        nearest_codes(queries, codebook, backend="faiss", exact=True)
    monkeypatch.setattr(faiss_search, "is_installed", lambda: False)
    with pytest.raises(MissingExtra, match=r"smalto\[ann\]"):
        nearest_codes(queries, codebook, backend="faiss")
    assert int(nearest_codes(queries, codebook).sum()) == 0  # without faiss the tiled one does it
