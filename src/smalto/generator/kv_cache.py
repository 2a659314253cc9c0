"""Keys and values of the steps that a generator has made, in memory that the caller owns."""

from __future__ import annotations

import torch
from torch import Tensor

from smalto.core.errors import InputError
from smalto.generator.config import GeneratorConfig


class KVCache:
    """Keys and values of all blocks, allocated once: [depth, 2, rows, heads, L, width / heads].

    Args:
        config: of the generator.
        rows: of a batch; guidance needs two per image.
        dtype, device: of keys and values.

    Attributes:
        length: positions that are filled.
        rows: as given.
    """

    def __init__(
        self,
        config: GeneratorConfig,
        rows: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        head_dim = config.width // config.num_heads
        size = config.depth, 2, rows, config.num_heads, sum(config.steps), head_dim
        self._config = config
        self._memory = torch.empty(size, dtype=dtype, device=device)
        self.rows = rows
        self.length = 0

    @staticmethod
    def bytes_per_row(config: GeneratorConfig, dtype: torch.dtype) -> int:
        """Return the bytes of one row: 2 · depth · L · width values."""
        return 2 * config.depth * sum(config.steps) * config.width * dtype.itemsize

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole cache: ``rows · bytes_per_row``."""
        return self._memory.nbytes

    def reset(self) -> None:
        """Forget all keys and values; the memory stays allocated."""
        self.length = 0

    def check(
        self, config: GeneratorConfig, rows: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Raise InputError unless the cache has ``rows`` rows for a generator."""
        own = self._memory
        fits = self._config == config and own.dtype == dtype and own.device == device
        if not fits or self.rows < rows:
            raise InputError(
                f"got a cache of {self.rows} rows in {own.dtype} on {own.device}"
                f"{'' if self._config == config else ' for another generator'}; expected "
                f"{rows} rows in {dtype} on {device}. "
                f"Use generator.new_cache({-(-rows // 2)})."
            )

    def append(self, block: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values of new positions, [B, heads, n, d], behind those of a block.

        Returns:
            All keys and values of the block, [B, heads, length + n, d]. ``length`` is the caller's
            to increase, after all blocks.
        """
        end = self.length + keys.shape[2]
        own = self._memory[block, :, : len(keys)]
        own[0, :, :, self.length : end] = keys
        own[1, :, :, self.length : end] = values
        return own[0, :, :, :end], own[1, :, :, :end]
