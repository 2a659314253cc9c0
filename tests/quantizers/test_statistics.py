"""The sample that codes are revived from: fixed size, fair, and the same however the vectors
come.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from smalto.quantizers.statistics import Statistics, add_op

SIZE = 50


def statistics(
    by_error: bool = False,
    salt: int = 1,
    sample_size: int = SIZE,
    dtype: torch.dtype = torch.float32,
) -> Statistics:
    made = Statistics(4, 3, torch.zeros(0, dtype=dtype))
    made.clear(sample_size, salt, by_error)
    return made


def take(into: Statistics, vectors: Tensor, codes: Tensor | None = None) -> Statistics:
    codes = torch.zeros(4, 3, dtype=vectors.dtype) if codes is None else codes
    into.add(
        vectors, codes, torch.zeros(len(vectors), dtype=torch.int64), vectors.isfinite().all(dim=1)
    )
    return into


@pytest.mark.parametrize("by_error", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_sample_does_not_depend_on_split_or_order(by_error: bool, dtype: torch.dtype) -> None:
    vectors = torch.randn(3000, 3, dtype=dtype)
    whole = take(statistics(by_error, dtype=dtype), vectors)
    parts = statistics(by_error, dtype=dtype)
    for part in vectors[torch.randperm(3000)].split(170):
        take(parts, part)
    assert torch.equal(whole.keys, parts.keys)
    assert torch.equal(whole.sample, parts.sample)
    assert torch.equal(whole.counts, parts.counts)
    assert not torch.equal(
        take(statistics(by_error, salt=2, dtype=dtype), vectors).sample, whole.sample
    )


def test_packed_and_summed_is_what_one_would_have_seen() -> None:
    vectors = torch.randn(3000, 3, dtype=torch.float64)
    whole = take(statistics(True, dtype=torch.float64), vectors)
    shards = [vectors[:0], vectors[:2500], vectors[2500:]]
    ranks = [take(statistics(True, dtype=torch.float64), shard) for shard in shards]
    ranks[0].unpack(sum(own.pack(rank, 3, 10**9) for rank, own in enumerate(ranks)))  # type: ignore[arg-type]
    assert torch.equal(ranks[0].sample, whole.sample)
    torch.testing.assert_close(ranks[0].sums, whole.sums, rtol=1e-12, atol=1e-12)
    assert int(ranks[0].num_calls) == 3


def test_a_large_sample_is_shared_evenly() -> None:
    own = take(statistics(sample_size=1000), torch.randn(3000, 3))
    assert own.pack(0, 4, 10**9).numel() == 5 + 1 + 12 + 4 * 1000 * 4
    assert own.pack(0, 4, 100).numel() == 5 + 1 + 12 + 4 * 250 * 4


def test_vectors_that_are_alike_are_taken_once() -> None:
    vectors = torch.randn(7, 3)[torch.randint(7, (2000,))]
    made = take(take(statistics(), vectors), -0.0 * vectors[:1])
    candidates = made.candidates()
    assert len(candidates) == len(candidates.unique(dim=0)) == 8
    assert len(take(made, vectors * 0.0).candidates()) == 8  # 0 and -0


def test_what_is_badly_served_is_taken_more_often() -> None:
    near, far = torch.randn(5000, 3) * 0.1, torch.randn(5000, 3) * 0.1 + 10
    made = take(statistics(by_error=True), torch.cat([near, far]))
    assert float((made.candidates().norm(dim=1) > 5).float().mean()) > 0.95
    uniform = take(statistics(), torch.cat([near, far]))
    assert 0.2 < float((uniform.candidates().norm(dim=1) > 5).float().mean()) < 0.8


def test_a_vector_that_is_a_code_or_broken_is_no_candidate() -> None:
    vectors = torch.zeros(20, 3)
    vectors[3] = torch.nan
    vectors[4, 1] = torch.inf
    made = take(statistics(by_error=True), vectors)
    assert len(made.candidates()) == 0
    assert made.counts.tolist() == [18, 0, 0, 0, 2]
    assert float(made.sums.abs().sum()) == 0


def test_every_vector_has_the_same_chance() -> None:
    vectors = torch.linspace(-1, 1, 400)[:, None].expand(-1, 3).contiguous()
    hits = torch.zeros(400)
    for salt in range(300):
        hits += torch.isin(vectors[:, 0], take(statistics(salt=salt), vectors).candidates()[:, 0])
    # 300 draws of 50 from 400: a mean of 37.5, a standard deviation of 5.7.
    assert float((hits - 37.5).abs().max()) < 5 * 5.7
    assert float(hits.std()) == pytest.approx(5.7, rel=0.2)


def test_the_operator_is_registered_as_torch_wants_it() -> None:
    made = statistics()
    inputs = (
        torch.randn(9, 3),
        torch.randn(4, 3),
        torch.randint(4, (9,)),
        torch.ones(9, dtype=torch.bool),
    )
    torch.library.opcheck(
        add_op,
        (*inputs, made.salt, True, made.counts, made.sums, made.num_calls, made.keys, made.sample),
    )
