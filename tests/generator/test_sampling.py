"""Sampling: filters against a plain implementation, draws against the softmax, noise by counter."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from smalto.generator.sampling import filtered, guided, mixture, sampled, uniform


def plainly_filtered(logits: list[float], top_k: int, top_p: float) -> list[float]:
    """One row, code by code."""
    kept = set(range(len(logits)))
    if top_k:
        least = sorted(logits, reverse=True)[: min(top_k, len(logits))][-1]
        kept = {i for i in kept if logits[i] >= least}
    if top_p:
        weights = {i: math.exp(logits[i]) for i in kept}
        whole, total, nucleus = sum(weights.values()), 0.0, set()
        for i in sorted(kept, key=lambda i: (-logits[i], i)):
            if total / whole < top_p:
                nucleus.add(i)
            total += weights[i]
        kept = nucleus
    return [value if i in kept else -math.inf for i, value in enumerate(logits)]


@pytest.mark.parametrize("top_k", [0, 1, 5, 17, 40])
@pytest.mark.parametrize("top_p", [0.0, 0.1, 0.5, 0.95, 1.0])
def test_filters(top_k: int, top_p: float) -> None:
    logits = torch.randn(3, 2, 17, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    logits[0, 0, :6] = 0.5  # ties
    before = logits.clone()
    found = filtered(logits, top_k, top_p)
    assert torch.equal(logits, before)
    for row, own in zip(before.view(-1, 17).tolist(), found.view(-1, 17).tolist(), strict=True):
        assert own == plainly_filtered(row, top_k, top_p if top_p < 1 else 0)


def test_guidance_is_the_formula() -> None:
    a, b = torch.randn(2, 4), torch.randn(2, 4)
    torch.testing.assert_close(guided(a, b, 1.5), 2.5 * a - 1.5 * b)
    assert torch.equal(guided(a, b, 0), a)


def test_draws_follow_the_softmax() -> None:
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, -torch.inf, 0.5])
    number = 60_000
    drawn = sampled(logits.expand(number, 1, -1), torch.arange(number), torch.tensor([3]))
    counts = drawn.flatten().bincount(minlength=6).double()
    expected = number * logits.double().softmax(0)
    assert counts[4] == 0
    some = expected > 0
    chi_square = ((counts - expected)[some] ** 2 / expected[some]).sum()
    assert chi_square < 18.5  # 4 degrees of freedom: exceeded once in a thousand times


def test_one_image_draws_other_numbers_at_other_positions() -> None:
    number = 60_000
    logits = torch.zeros(1, number, 4)
    drawn = sampled(logits, torch.tensor([7]), torch.arange(number))[0]
    counts = drawn.bincount(minlength=4).double()
    assert ((counts - number / 4) ** 2 / (number / 4)).sum() < 16.3  # 3 degrees of freedom
    pairs = (drawn[:-1] * 4 + drawn[1:]).bincount(minlength=16).double()
    mean = (number - 1) / 16
    assert ((pairs - mean) ** 2 / mean).sum() < 37.7  # 15 degrees of freedom


def reference_splitmix(seed: int, counter: int) -> float:
    """In Python's integers."""
    most, golden = 2**64 - 1, 0x9E3779B97F4A7C15

    def mix(x: int) -> int:
        x = (x + golden) & most
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & most
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & most
        return x ^ (x >> 31)

    first = mix((seed * golden) & most)
    return (mix((first + counter * golden) & most) >> 11) / 2**53


def test_noise_is_splitmix64() -> None:
    seeds = [0, 1, 2**62, -5]
    counters = [0, 1, 679]
    found = uniform(torch.tensor(seeds)[:, None], torch.tensor(counters))
    assert found.tolist() == [[reference_splitmix(s % 2**64, c) for c in counters] for s in seeds]


def test_certain_codes_are_always_drawn() -> None:
    for code in (0, 3, 9):
        logits = torch.full((5, 2, 10), -torch.inf)
        logits[..., code] = 0
        drawn = sampled(logits, torch.arange(5), torch.arange(2))
        assert (drawn == code).all()


def test_mixtures_are_codes_at_low_temperature_and_between_them_at_high() -> None:
    codes = torch.eye(4, dtype=torch.float64)
    logits = torch.zeros(50, 1, 4, dtype=torch.float64)
    seeds, positions = torch.arange(50), torch.tensor([2])
    cold: Tensor = mixture(logits, codes, 1e-8, seeds, positions)
    torch.testing.assert_close(cold.amax(-1), torch.ones(50, 1, dtype=torch.float64))
    assert set(cold.argmax(-1).flatten().tolist()) == {0, 1, 2, 3}
    warm = mixture(logits, codes, 100.0, seeds, positions)
    torch.testing.assert_close(warm, torch.full_like(warm, 0.25), atol=0.05, rtol=0)
