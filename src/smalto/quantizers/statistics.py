"""What a step saw of one codebook: counts, sums, and a few vectors that could become codes. Fixed size, whatever the batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from smalto.search import code_sums


class Statistics:
    """Sums over all calls since ``clear``, and a sample of the vectors seen.

    Every vector draws a key from its own numbers and ``salt``; the largest keys stay (Efraimidis and Spirakis 2006). So the
    sample is the same however the vectors are split into calls or over processes, and in any order. ``clear(by_error=True)`` weighs
    by squared error, for revival: that is where another code helps most, and a vector that already is a code needs none.

    Attributes:
        counts: [K + 1] vectors per code; the last are those that were not usable.
        sums: [K, D].
        num_calls: [1].
        salt: [1], a tensor, so that a compiled graph does not change with it; ``seed`` is the same as a number.
        keys: [R], falling; -inf where the sample is shorter.
        sample: [R, D], no two alike.
    """

    def __init__(self, codebook_size: int, code_dim: int, like: Tensor) -> None:
        self.counts = like.new_zeros(codebook_size + 1)
        self.sums = like.new_zeros(codebook_size, code_dim)
        self.num_calls = like.new_zeros(1)
        self.keys = like.new_zeros(0)
        self.sample = like.new_zeros(0, code_dim)
        self.salt = torch.zeros(1, dtype=torch.int64, device=like.device)
        self.clear(0, 0, by_error=False)

    def clear(self, sample_size: int, salt: int, by_error: bool) -> None:
        """Begin anew, with room for a sample of ``sample_size``."""
        for tensor in (self.counts, self.sums, self.num_calls):
            tensor.zero_()
        if len(self.keys) != sample_size:
            self.keys, self.sample = (
                self.keys.new_empty(sample_size),
                self.sample.new_empty(sample_size, self.sample.shape[1]),
            )
        self.keys.fill_(-torch.inf)
        self.sample.zero_()
        self.salt.fill_(salt)
        self.seed, self.by_error = salt, by_error

    def anew(self, like: Tensor) -> Statistics:
        """Empty ones with the same settings, of the dtype and on the device of ``like``."""
        statistics = Statistics(self.sums.shape[0], self.sums.shape[1], like)
        statistics.clear(len(self.keys), self.seed, self.by_error)
        return statistics

    def add(self, vectors: Tensor, codes: Tensor, indices: Tensor, valid: Tensor) -> None:
        """Take in one call: vectors [N, D], codes [K, D], indices [N], valid [N]."""
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
        """Everything in one flat tensor, of one size in all processes, to be summed over them: every rank fills its own place.

        Where the places would have more than ``most`` numbers in all, every rank gives an even share of the sample only.
        """
        size, width = len(self.keys), 1 + self.sample.shape[1]
        size = min(size, max(-(-size // world_size), most // (world_size * width)))
        own = torch.cat([self.keys[:size].unsqueeze(1), self.sample[:size]], dim=1)
        own[:, 0] = torch.where(
            own[:, 0] > -torch.inf, own[:, 0], _NO_KEY
        )  # in a sum of zeros and infinities nothing would be left
        places = own.new_zeros(world_size, *own.shape)
        places[rank] = own
        return torch.cat([self.counts, self.num_calls, self.sums.flatten(), places.flatten()])

    def unpack(self, packed: Tensor) -> None:
        """Take over the sum of what all processes packed."""
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
        """The sample without empty rows, [n, D]."""
        return self.sample[self.keys > -torch.inf]


_NO_KEY = -1e30


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
    """One operator, so that a compiled forward has it as one node."""
    if (
        torch._C._current_graph_task_id() != -1
    ):  # a compiled forward that activation checkpointing runs again
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
    """It only changes its arguments."""


def _keep_largest(new_keys: Tensor, new_vectors: Tensor, keys: Tensor, sample: Tensor) -> None:
    """Merge candidates into ``keys`` [R] and ``sample`` [R, D], in place; of vectors that are alike one stays."""
    all_keys, vectors = torch.cat([keys, new_keys]), torch.cat([sample, new_vectors])
    order = all_keys.argsort(descending=True, stable=True)
    all_keys = all_keys[order]
    # Vectors that are alike have one key and stand together. Where rounding gives two vectors one key, one is lost: no harm.
    first = torch.ones_like(all_keys, dtype=torch.bool)
    first[1:] = all_keys[1:] != all_keys[:-1]
    chosen = (first & (all_keys > -torch.inf)).nonzero().squeeze(1)[: len(keys)]
    keys[: len(chosen)], sample[: len(chosen)] = all_keys[chosen], vectors[order[chosen]]


def _draw(vectors: Tensor, salt: Tensor) -> Tensor:
    """A negative random number for every row of [N, D], the logarithm of a uniform one, that depends on row and ``salt`` [1] alone."""
    # As float32, because the last bits of float64 depend on the order of earlier sums. Plus 0 because 0 and -0 are one number.
    bits = (vectors.float() + 0.0).view(torch.int32).long()
    columns = _mix(torch.arange(1, vectors.shape[1] + 1, device=vectors.device)) | 1
    mixed = _mix(_mix((bits * columns).sum(dim=1)) + salt)
    # 1 - u in place of u: near 0 float32 tells far more numbers apart than near 1, and the largest keys come from there.
    return torch.log1p(-((mixed >> 11) & (2**53 - 1)).to(vectors.dtype) / 2**53)


def _mix(numbers: Tensor) -> Tensor:
    """Spread every bit of int64 numbers over all others (the finalizer of SplitMix64: Steele et al. 2014)."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        numbers = (numbers ^ ((numbers >> shift) & (2 ** (64 - shift) - 1))) * factor
    return numbers ^ ((numbers >> 31) & (2**33 - 1))
