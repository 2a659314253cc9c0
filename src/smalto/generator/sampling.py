"""Choosing tokens from logits: guidance, filters, and noise that belongs to one image alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from smalto.core.errors import InputError

_GOLDEN = -7046029254386353131  # 2^64 / golden ratio as a signed integer: splitmix64's constants
_MIX_1 = -4658895280553007687
_MIX_2 = -7723592293110705685


@dataclass(frozen=True)
class SamplingSettings:
    """How tokens are drawn from logits; see ``Generator.generate``."""

    guidance: float
    top_k: int
    top_p: float
    temperature: float
    smooth: bool

    def check(self) -> None:
        """Raise InputError if a value is out of range."""
        if not isinstance(self.top_k, int):
            raise InputError(f"got top_k={self.top_k!r}; expected an integer.")
        for name, value, most in (
            ("guidance", self.guidance, math.inf),
            ("top_k", self.top_k, math.inf),
            ("top_p", self.top_p, 1),
            ("temperature", self.temperature, math.inf),
        ):
            is_number = isinstance(value, (int, float)) and math.isfinite(value)
            if not is_number or not 0 <= value <= most:
                limit = "" if most == math.inf else f" and at most {most}"
                raise InputError(f"got {name}={value!r}; expected a number of at least 0{limit}.")
        if self.smooth and self.temperature == 0:
            raise InputError(
                "got smooth=True and temperature=0; mixtures need noise. Use smooth=False."
            )

    def filtered(self, logits: Tensor) -> Tensor:
        """Return logits divided by the temperature, -inf for codes that must not be drawn."""
        if self.temperature == 0:
            return logits
        return filtered(logits / self.temperature, self.top_k, self.top_p)

    def draw(self, logits: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
        """Return tokens for filtered logits [B, n, V], int64 [B, n]."""
        return logits.argmax(dim=-1) if self.temperature == 0 else sampled(logits, seeds, positions)

    def mixtures(
        self, logits: Tensor, codes: Tensor, progress: float, seeds: Tensor, positions: Tensor
    ) -> Tensor:
        """Return mixtures of codes with the weights of VAR's ``more_smooth``, [B, n, D].

        ``progress`` goes from 0 in the first step to 1 in the last.
        """
        temperature = max(0.27 * (1 - 0.95 * progress), 0.005)
        return mixture(logits * (1 + progress), codes, temperature, seeds, positions)


def guided(conditional: Tensor, unconditional: Tensor, strength: float) -> Tensor:
    """Return ``(1 + t)·conditional - t·unconditional``: classifier-free guidance.

    Ho and Salimans 2022, arXiv 2207.12598.
    """
    return (1 + strength) * conditional - strength * unconditional


def filtered(logits: Tensor, top_k: int = 0, top_p: float = 0.0) -> Tensor:
    """Return a copy of logits [..., V] with -inf for all but the likeliest codes.

    Args:
        logits: finite.
        top_k: keep this many codes, and those equal to the last of them; 0: all.
        top_p: of these, keep the fewest of the likeliest codes whose probabilities sum to at least
            this (nucleus sampling, arXiv 1904.09751); 0: all.
    """
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if 0 < top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        dropped = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(dropped, -torch.inf)
    return logits


def sampled(logits: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """Draw one code per position from the softmax of logits.

    Args:
        logits: [B, n, V]; -inf for codes that must not be drawn.
        seeds: int64 [B], one per image.
        positions: int64 [n], of the tokens in an image.

    Returns:
        int64 [B, n]. A token depends on its logits, its seed and its position alone.
    """
    if logits.device.type == "mps":  # which has no float64
        return sampled(logits.cpu(), seeds.cpu(), positions.cpu()).to(logits.device)
    sums = logits.double().softmax(dim=-1).cumsum(dim=-1)
    total = sums[..., -1:]
    drawn = uniform(seeds[:, None], positions).unsqueeze(-1) * total
    drawn = torch.minimum(drawn, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(sums, drawn, right=True).squeeze(-1)


def mixture(
    logits: Tensor, codes: Tensor, temperature: float, seeds: Tensor, positions: Tensor
) -> Tensor:
    """Return mixtures of codes, weighted by a softmax with Gumbel noise (arXiv 1611.01144).

    Args:
        logits: [B, n, V]; -inf for codes that must not be mixed in.
        codes: [V, D].
        temperature: near 0, the weight of one code is 1.
        seeds, positions: as for ``sampled``.

    Returns:
        [B, n, D] in the dtype of the codes.
    """
    if logits.device.type == "mps":
        mixed = mixture(logits.cpu(), codes.cpu(), temperature, seeds.cpu(), positions.cpu())
        return mixed.to(logits.device)
    counters = positions[:, None] * logits.shape[-1] + torch.arange(
        logits.shape[-1], device=logits.device
    )
    noise = uniform(~seeds[:, None, None], counters)  # not the numbers that ``sampled`` uses
    gumbel = -torch.log(-torch.log(noise.clamp(2.0**-53)))
    weights = ((logits.double() + gumbel) / temperature).softmax(dim=-1)
    return weights.to(codes.dtype) @ codes


def uniform(seeds: Tensor, counters: Tensor) -> Tensor:
    """Return numbers in [0, 1), float64, each of which depends on (seed, counter) alone.

    Counter-based: splitmix64 (Steele, Lea and Flood 2014) of the seed, then of the counter.

    Args:
        seeds, counters: int64, broadcast against each other.
    """
    mixed = _mix(_mix(seeds * _GOLDEN) + counters * _GOLDEN)
    return _shifted(mixed, 11).double() * 2.0**-53


def _mix(x: Tensor) -> Tensor:
    x = x + _GOLDEN
    x = (x ^ _shifted(x, 30)) * _MIX_1
    x = (x ^ _shifted(x, 27)) * _MIX_2
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shift to the right, filling with zeros: torch's int64 fills with the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
