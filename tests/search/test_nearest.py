"""Nearest-code search against a brute-force search in float64."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smalto.core.errors import InputError
from smalto.search import code_sums, faiss_search, nearest_codes, tiled
from smalto.search.code_sums import add_by_segment, code_sums_op
from smalto.search.nearest import nearest_op
from tests.contract.test_memory import LargestTensor


@pytest.fixture(params=["few", "tiles"], autouse=True)
def both_ways(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test runs as it is, where small cases are searched the plain way, and with tiles
    whatever the size.
    """
    before = tiled.FEW_FLOATS
    tiled.FEW_FLOATS = before if request.param == "few" else 0
    yield
    tiled.FEW_FLOATS = before


def brute_force_distances(queries: Tensor, codebook: Tensor) -> Tensor:
    return (queries.double()[:, None] - codebook.double()[None]).square().sum(-1)


def assert_within_bound(queries: Tensor, codebook: Tensor, indices: Tensor) -> None:
    """The promise of float32: the chosen code is the best up to rounding."""
    distances = brute_force_distances(queries, codebook)
    excess = distances.gather(1, indices[:, None])[:, 0] - distances.min(1).values
    scale = queries.double().norm(dim=1) + codebook.double().norm(dim=1).max()
    assert bool((excess <= 4 * 2**-24 * math.sqrt(queries.shape[1]) * scale.square()).all())


@settings(max_examples=60, deadline=None)
@given(
    num_queries=st.integers(0, 70),
    num_codes=st.sampled_from([1, 2, 7, 255, 256, 257, 600]),
    dim=st.integers(1, 20),
    spread=st.sampled_from([1e-3, 1.0, 1e3]),
    offset=st.sampled_from([0.0, 10.0]),
    seed=st.integers(0, 2**20),
)
def test_l2_is_the_best_code_up_to_rounding(
    num_queries: int, num_codes: int, dim: int, spread: float, offset: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(num_queries, dim, generator=generator) * spread + offset
    codebook = torch.randn(num_codes, dim, generator=generator) * spread + offset
    indices = nearest_codes(queries, codebook)
    assert indices.shape == (num_queries,)
    assert indices.dtype == torch.int64
    if num_queries:
        assert_within_bound(queries, codebook, indices)


def test_a_far_away_codebook_does_not_lose_precision() -> None:
    # Without the shift by the mean, |c|² of 1e8 leaves float32 no digits for distances near 1.
    queries = torch.randn(500, 8) + 1e4
    codebook = torch.randn(300, 8) + 1e4
    assert torch.equal(
        nearest_codes(queries, codebook), brute_force_distances(queries, codebook).argmin(1)
    )


def test_many_tiles_and_blocks_agree_with_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, codebook = torch.randn(5000, 6), torch.randn(700, 6)
    expected = brute_force_distances(queries, codebook).argmin(1)
    assert torch.equal(nearest_codes(queries, codebook), expected)
    monkeypatch.setattr(tiled, "CODES_PER_TILE", 32)
    monkeypatch.setattr(tiled, "QUERIES_PER_TILE", 37)
    monkeypatch.setattr(tiled, "QUERIES_PER_CHUNK", 101)
    assert torch.equal(nearest_codes(queries, codebook), expected)
    assert torch.equal(
        torch.cat([nearest_codes(part, codebook) for part in queries.split(999)]), expected
    )


def test_cosine_takes_the_smallest_angle() -> None:
    queries, codebook = torch.randn(400, 5), torch.randn(300, 5) * torch.rand(300, 1) * 10
    cosines = torch.nn.functional.normalize(codebook.double(), dim=1) @ queries.double().T
    assert torch.equal(nearest_codes(queries, codebook, "cosine"), cosines.argmax(0))


@pytest.mark.parametrize("length", [1e-30, 1e20])
def test_cosine_takes_codes_of_any_length(length: float) -> None:
    codebook = torch.tensor([[-1.0] * 4, [1.0] * 4]) * length
    for backend in ("tiled", "faiss") if faiss_search.is_installed() else ("tiled",):
        assert nearest_codes(torch.ones(1, 4), codebook, "cosine", backend=backend).tolist() == [1]  # type: ignore[arg-type]


def test_equal_codes_go_to_the_lowest_index() -> None:
    codes = torch.randn(300, 16)
    codebook = torch.cat([codes, codes, codes.flip(0)])  # duplicates in the same tile and in others
    assert int(nearest_codes(torch.randn(3000, 16), codebook).max()) < 300
    assert torch.equal(
        nearest_codes(torch.randn(5, 4), torch.ones(1000, 4)), torch.zeros(5, dtype=torch.int64)
    )


@pytest.mark.parametrize("num_codes", [5, 17, 31, 33, 255, 257, 513, 1025])
@pytest.mark.parametrize("dim", [3, 8, 64])
def test_equal_codes_at_the_edge_of_a_tile_go_to_the_lowest_index_too(
    num_codes: int, dim: int
) -> None:
    # Edge kernels of a matrix product round in another way, so without padding the higher of two
    # equal codes wins now and then.
    torch.manual_seed(num_codes)
    codebook = torch.randn(num_codes, dim)
    codebook[num_codes - 1] = codebook[num_codes // 2] = codebook[0]
    for num_queries in (1, 3, 777):
        indices = nearest_codes(codebook[0] + 0.01 * torch.randn(num_queries, dim), codebook)
        assert not bool(torch.isin(indices, torch.tensor([num_codes // 2, num_codes - 1])).any())
        assert bool((indices == 0).any())


def test_settings_come_back_after_searches_in_many_threads() -> None:
    from concurrent.futures import ThreadPoolExecutor

    before = torch.get_float32_matmul_precision()
    queries, codebook = torch.randn(3000, 8), torch.randn(300, 8)
    try:
        torch.set_float32_matmul_precision("high")
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(lambda _: nearest_codes(queries, codebook), range(40)))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_wide_codebook_stays_in_memory_bounds() -> None:
    assert (
        tiled._Codes(torch.zeros(70, 2**16), cosine=False).per_tile * 2**16 <= tiled.BUFFER_FLOATS
    )
    queries, codebook = torch.randn(3, 2**16), torch.randn(70, 2**16)
    assert torch.equal(
        nearest_codes(queries, codebook), brute_force_distances(queries, codebook).argmin(1)
    )


def test_rows_that_are_not_finite_get_index_0_and_leave_the_others_alone() -> None:
    queries, codebook = torch.randn(50, 4), torch.randn(600, 4)
    expected = nearest_codes(queries, codebook)
    queries[3, 1], queries[7, 0], queries[11, 2] = math.nan, math.inf, -math.inf
    expected[[3, 7, 11]] = 0
    assert torch.equal(nearest_codes(queries, codebook), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_searched_in_float32(dtype: torch.dtype) -> None:
    queries, codebook = torch.randn(300, 8).to(dtype), torch.randn(64, 8).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        indices = nearest_codes(queries, codebook)
    assert torch.equal(indices, nearest_codes(queries.float(), codebook.float()))


def test_reduced_float32_products_are_off_inside_and_back_on_after() -> None:
    queries, codebook = torch.randn(2000, 64), torch.randn(512, 64)
    expected = nearest_codes(queries, codebook)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(nearest_codes(queries, codebook), expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.skipif(
    not hasattr(torch.backends.mkldnn, "matmul"), reason="torch without switches per backend"
)
def test_the_switches_per_backend_are_off_inside_and_back_on_after() -> None:
    queries, codebook = torch.randn(2000, 64), torch.randn(512, 64)
    expected = nearest_codes(queries, codebook)
    switches = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul
    before = [switch.fp32_precision for switch in switches]
    try:
        switches[0].fp32_precision, switches[1].fp32_precision = "bf16", "tf32"
        assert torch.equal(nearest_codes(queries, codebook), expected)
        with pytest.raises(InputError):
            nearest_codes(queries, codebook[:0])
        assert [switch.fp32_precision for switch in switches] == ["bf16", "tf32"]
    finally:
        for switch, setting in zip(switches, before, strict=True):
            switch.fp32_precision = setting


def test_no_n_by_k_matrix_is_ever_made() -> None:
    queries, codebook = torch.randn(20_000, 4), torch.randn(2_000, 4)
    with LargestTensor() as monitor:
        tiled.search(
            queries, codebook, cosine=False
        )  # the body itself: a custom op hides its inner operations
    assert 0 < monitor.elements <= tiled.BUFFER_FLOATS < queries.shape[0] * codebook.shape[0]


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize(("num_queries", "num_codes"), [(60_000, 2), (2, 60_000)])
def test_few_codes_or_few_queries_make_no_large_copies(
    num_queries: int, num_codes: int, cosine: bool
) -> None:
    queries, codebook = torch.randn(num_queries, 100), torch.randn(num_codes, 100)
    with LargestTensor() as monitor:
        tiled.search(queries, codebook, cosine)
    assert 0 < monitor.elements <= tiled.BUFFER_FLOATS < 6_000_000


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize(
    "shape", [(65536, 65536, 8), (4096, 262144, 15), (2048, 131072, 64), (16384, 16384, 255)]
)
def test_extra_memory_stays_under_64_mib(shape: tuple[int, int, int]) -> None:
    script = f"""
import torch
from smalto.search import nearest_codes
def peak():  # of this process: getrusage would begin with the parent's
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
torch.set_num_threads(1)
queries, codebook = torch.randn{shape[0], shape[2]}, torch.randn{shape[1], shape[2]}
nearest_codes(queries[:1024], codebook[:1024])
before = peak()
nearest_codes(queries, codebook)
print((peak() - before) / 1024)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert 1 < float(done.stdout) < 64


def test_exact_settles_what_float32_leaves_open() -> None:
    torch.manual_seed(0)
    # Pairs of codes that differ by less than float32 can see beside their length; float64 sees
    # which is nearer.
    codebook = torch.randn(300, 8, dtype=torch.float64) + 30
    codebook = torch.cat([codebook, codebook + 1e-9 * torch.randn(300, 8, dtype=torch.float64)])
    queries = codebook[torch.randint(600, (2000,))] + 0.05 * torch.randn(
        2000, 8, dtype=torch.float64
    )
    expected = brute_force_distances(queries, codebook).argmin(1)
    assert torch.equal(nearest_codes(queries, codebook, exact=True), expected)
    assert not torch.equal(nearest_codes(queries, codebook), expected)


@settings(max_examples=30, deadline=None)
@given(
    num_queries=st.integers(0, 70),
    num_codes=st.sampled_from([1, 7, 256, 257, 600]),
    dim=st.integers(1, 20),
    offset=st.sampled_from([0.0, 100.0]),
    seed=st.integers(0, 2**20),
)
def test_exact_is_brute_force(
    num_queries: int, num_codes: int, dim: int, offset: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(num_queries, dim, generator=generator) + offset
    codebook = torch.randn(num_codes, dim, generator=generator) + offset
    distances = brute_force_distances(queries, codebook)
    indices = nearest_codes(queries, codebook, exact=True)
    if num_queries:
        best = distances.min(1).values
        assert bool(
            (
                distances.gather(1, indices[:, None])[:, 0] - best
                <= 1e-12 * (best + offset**2 * dim)
            ).all()
        )
    cosines = torch.nn.functional.normalize(codebook.double(), dim=1) @ queries.double().T
    indices = nearest_codes(queries, codebook, "cosine", exact=True)
    assert bool(
        (
            cosines.amax(0) - cosines.T.gather(1, indices[:, None])[:, 0]
            <= 1e-12 * (1 + offset) * dim
        ).all()
    )


def test_exact_keeps_to_the_lowest_of_equal_codes_and_to_zero_for_nan() -> None:
    codes = torch.randn(300, 16)
    queries = torch.randn(1000, 16)
    queries[5, 3] = math.nan
    indices = nearest_codes(queries, torch.cat([codes, codes]), exact=True)
    assert int(indices.max()) < 300
    assert int(indices[5]) == 0


def test_no_gradient_flows() -> None:
    queries = torch.randn(5, 3, requires_grad=True)
    assert not nearest_codes(queries, torch.randn(4, 3, requires_grad=True)).requires_grad


def test_the_operator_is_registered_as_torch_wants_it() -> None:
    torch.library.opcheck(nearest_op, (torch.randn(9, 3), torch.randn(5, 3), False, "", False))
    torch.library.opcheck(code_sums_op, (torch.randn(9, 3), torch.randint(5, (9,)), 5))


def test_searching_does_not_import_torchs_compiler() -> None:
    """It takes seconds and 100 MB, which programs that only encode can do without."""
    code = (
        "import sys, torch; from smalto.search import nearest_codes; "
        "nearest_codes(torch.ones(4, 2), torch.ones(3, 2))"
    )
    subprocess.run(
        [sys.executable, "-c", f"{code}; assert 'torch._dynamo' not in sys.modules"], check=True
    )


@pytest.mark.parametrize(
    ("queries", "codebook", "metric", "says"),
    [
        (torch.zeros(3), torch.zeros(2, 3), "l2", r"queries \[N, D\]"),
        (torch.zeros(3, 2), torch.zeros(2, 3), "l2", "same D"),
        (torch.zeros(3, 0), torch.zeros(2, 0), "l2", "at least 1"),
        (torch.zeros(3, 2), torch.zeros(0, 2), "l2", "empty"),
        (torch.zeros(3, 2, dtype=torch.int64), torch.zeros(2, 2), "l2", "floating point"),
        (torch.zeros(3, 2), torch.zeros(2, 2), "dot", "metric"),
        (None, torch.zeros(2, 2), "l2", "must be tensors"),
    ],
)
def test_wrong_arguments_say_what_is_expected(
    queries: Tensor, codebook: Tensor, metric: str, says: str
) -> None:
    with pytest.raises(InputError, match=says):
        nearest_codes(queries, codebook, metric)  # type: ignore[arg-type]


def test_code_sums_count_and_add() -> None:
    vectors, indices = torch.randn(500, 3, dtype=torch.float64), torch.randint(7, (500,))
    counts, sums = code_sums(vectors, indices, 9)
    one_hot = torch.nn.functional.one_hot(indices, 9).double()
    assert torch.equal(counts, one_hot.sum(0))
    torch.testing.assert_close(sums, one_hot.T @ vectors)


def test_code_sums_are_the_same_every_time_and_in_both_ways() -> None:
    vectors, indices = torch.randn(20_000, 5), torch.randint(50, (20_000,))
    counts, sums = code_sums(vectors, indices, 60)
    assert torch.equal(sums, code_sums(vectors, indices, 60)[1])
    by_segment = add_by_segment(vectors, indices, counts.long())
    torch.testing.assert_close(by_segment, sums, rtol=1e-4, atol=1e-3)
    assert torch.equal(by_segment, add_by_segment(vectors, indices, counts.long()))
    assert torch.equal(by_segment[50:], torch.zeros(10, 5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_code_sums_are_wide(dtype: torch.dtype) -> None:
    vectors = torch.ones(5000, 2, dtype=dtype)  # in float16 a sum of ones ends at 2048
    counts, sums = code_sums(vectors, torch.zeros(5000, dtype=torch.int64), 3)
    assert counts.tolist() == [5000, 0, 0]
    assert sums[0].tolist() == [5000, 5000]
    empty = code_sums(vectors[:0], torch.zeros(0, dtype=torch.int64), 3)
    assert all(float(part.abs().sum()) == 0 for part in empty)
