"""Statistics of one codebook: counts, sums, and a sample of vectors that could become codes.

Their size is fixed, whatever the batch size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from smalto.search import code_sums

_NO_KEY = -1e30  # keys up to this count as empty; a finite stand-in for -inf in ``pack``


class Statistics:
    """Sums over all calls since ``clear``, and a random sample of the vectors of these calls.

    The key of a vector is a random number computed from its values and ``salt``; the sample holds
    the vectors with the largest keys (Efraimidis and Spirakis 2006). So the sample does not depend
    on the order of the vectors, nor on how they are split into calls or over processes.
    ``clear(by_error=True)`` weights by squared error, for revival: another code helps most at a
    large error, and a vector that equals a code has weight 0.

    Attributes:
        counts: [K + 1] vectors per code; the last is the number of vectors that were not valid.
        sums: [K, D] sum of the vectors of each code.
        num_calls: [1] calls of ``add``.
        salt: int64 [1], a tensor so that a compiled graph does not depend on its value.
        seed: the value of ``salt`` as a Python integer.
        by_error: whether the sample is weighted by squared error.
        keys: [R], descending; -inf for empty rows of the sample.
        sample: [R, D], all rows distinct.
    """

    def __init__(self, codebook_size: int, code_dim: int, like: Tensor) -> None:
        self.counts = like.new_zeros(codebook_size + 1)
        self.sums = like.new_zeros(codebook_size, code_dim)
        self.num_calls = like.new_zeros(1)
        self.keys = like.new_zeros(0)
        self.sample = like.new_zeros(0, code_dim)
        self.salt = torch.zeros(1, dtype=torch.int64, device=like.device)
        self.seed = 0
        self.by_error = False
        self.clear(0, 0, by_error=False)

    def clear(self, sample_size: int, salt: int, by_error: bool) -> None:
        """Reset all statistics, with room for a sample of ``sample_size`` vectors."""
        for tensor in (self.counts, self.sums, self.num_calls):
            tensor.zero_()
        if len(self.keys) != sample_size:
            self.keys = self.keys.new_empty(sample_size)
            self.sample = self.sample.new_empty(sample_size, self.sample.shape[1])
        self.keys.fill_(-torch.inf)
        self.sample.zero_()
        self.salt.fill_(salt)
        self.seed = salt
        self.by_error = by_error

    def empty_like(self, like: Tensor) -> Statistics:
        """Return empty statistics with the same settings, dtype and device of ``like``."""
        statistics = Statistics(self.sums.shape[0], self.sums.shape[1], like)
        statistics.clear(len(self.keys), self.seed, self.by_error)
        return statistics

    def add(self, vectors: Tensor, codes: Tensor, indices: Tensor, valid: Tensor) -> None:
        """Add the vectors of one call.

        Args:
            vectors: [N, D].
            codes: [K, D].
            indices: the code of each vector, int64 [N].
            valid: bool [N]; the other vectors are only counted.
        """
        add_op(
            vectors,
            codes,
            indices,
            valid,
            self.salt,
            self.by_error,
            self.counts,
            self.sums,
            self.num_calls,
            self.keys,
            self.sample,
        )

    def pack(self, rank: int, world_size: int, most: int) -> Tensor:
        """Return everything as one flat tensor to sum over all processes.

        Its size is the same in all of them: every rank fills its own slot for the sample. If the
        slots had more than ``most`` numbers in total, every rank sends only an even share of its
        sample.
        """
        size = len(self.keys)
        width = 1 + self.sample.shape[1]
        size = min(size, max(-(-size // world_size), most // (world_size * width)))
        own = torch.cat([self.keys[:size].unsqueeze(1), self.sample[:size]], dim=1)
        # A finite stand-in for -inf, so that the all-reduce sums only finite numbers.
        own[:, 0] = torch.where(own[:, 0] > -torch.inf, own[:, 0], _NO_KEY)
        places = own.new_zeros(world_size, *own.shape)
        places[rank] = own
        return torch.cat([self.counts, self.num_calls, self.sums.flatten(), places.flatten()])

    def unpack(self, packed: Tensor) -> None:
        """Replace the statistics by the sum of all processes' ``pack``."""
        sizes = [self.counts.numel(), self.num_calls.numel(), self.sums.numel()]
        counts, num_calls, sums, places = packed.split([*sizes, packed.numel() - sum(sizes)])
        self.counts.copy_(counts)
        self.num_calls.copy_(num_calls)
        self.sums.copy_(sums.view_as(self.sums))
        places = places.view(-1, 1 + self.sample.shape[1])
        keys = torch.where(places[:, 0] > _NO_KEY, places[:, 0], -torch.inf)
        self.keys.fill_(-torch.inf)
        _keep_largest(keys, places[:, 1:], self.keys, self.sample)

    def candidates(self) -> Tensor:
        """Return the sample without empty rows, [n, D]."""
        return self.sample[self.keys > -torch.inf]


@torch.library.custom_op(
    "smalto::add_statistics", mutates_args={"counts", "sums", "num_calls", "keys", "sample"}
)
def add_op(
    vectors: Tensor,
    codes: Tensor,
    indices: Tensor,
    valid: Tensor,
    salt: Tensor,
    by_error: bool,
    counts: Tensor,
    sums: Tensor,
    num_calls: Tensor,
    keys: Tensor,
    sample: Tensor,
) -> None:
    """Add one call to the statistics, in place.

    One operator, so that a compiled forward has it as one node.
    """
    # Inside a backward pass: activation checkpointing recomputes a compiled forward.
    if torch._C._current_graph_task_id() != -1:
        return
    size = len(sums)
    new_counts, new_sums = code_sums(vectors, torch.where(valid, indices, size), size + 1)
    counts += new_counts
    sums += new_sums[:size]
    num_calls += 1
    new_keys = _draw(vectors, salt)
    if by_error:
        new_keys = new_keys / (vectors - codes[indices]).square().sum(dim=1)
    new_keys = new_keys.masked_fill(~valid, -torch.inf)
    _keep_largest(torch.where(new_keys > _NO_KEY, new_keys, -torch.inf), vectors, keys, sample)


@add_op.register_fake
def _(*arguments: Any) -> None:
    """Return nothing: the operator only mutates its arguments."""


def _keep_largest(new_keys: Tensor, new_vectors: Tensor, keys: Tensor, sample: Tensor) -> None:
    """Merge candidates into ``keys`` [R] and ``sample`` [R, D], in place.

    One copy of equal vectors is kept.
    """
    all_keys = torch.cat([keys, new_keys])
    vectors = torch.cat([sample, new_vectors])
    order = all_keys.argsort(descending=True, stable=True)
    all_keys = all_keys[order]
    # Equal vectors have equal keys, so sorting puts them next to each other. If rounding gives two
    # different vectors the same key, one is dropped, which does no harm.
    first = torch.ones_like(all_keys, dtype=torch.bool)
    first[1:] = all_keys[1:] != all_keys[:-1]
    chosen = (first & (all_keys > -torch.inf)).nonzero().squeeze(1)[: len(keys)]
    keys[: len(chosen)] = all_keys[chosen]
    sample[: len(chosen)] = vectors[order[chosen]]


def _draw(vectors: Tensor, salt: Tensor) -> Tensor:
    """Return a random number for every row of [N, D], the logarithm of a uniform one: [N].

    It is negative and depends on the row's values and ``salt`` [1] alone.
    """
    # As float32, because the last bits of float64 depend on the order of earlier sums. Plus 0.0,
    # because 0.0 and -0.0 are equal but differ in their bits.
    bits = (vectors.float() + 0.0).view(torch.int32).long()
    columns = _mix(torch.arange(1, vectors.shape[1] + 1, device=vectors.device)) | 1
    mixed = _mix(_mix((bits * columns).sum(dim=1)) + salt)
    # log(1 - u) instead of log(u), whose largest values come from u near 1: float32 resolves far
    # more values near 0 than near 1.
    return torch.log1p(-((mixed >> 11) & (2**53 - 1)).to(vectors.dtype) / 2**53)


def _mix(numbers: Tensor) -> Tensor:
    """Mix every bit of int64 numbers into all others.

    This is the finalizer of SplitMix64 (Steele et al. 2014).
    """
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        numbers = (numbers ^ ((numbers >> shift) & (2 ** (64 - shift) - 1))) * factor
    return numbers ^ ((numbers >> 31) & (2**33 - 1))
