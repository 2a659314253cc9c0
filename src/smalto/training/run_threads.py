"""The number of threads of a resumed run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from smalto.core.progress import Progress


@contextmanager
def run_threads(number: int, device: torch.device, progress: Progress) -> Iterator[None]:
    """Compute with as many threads as the run started with: sums on a CPU depend on their
    number.
    """
    before = torch.get_num_threads()
    if device.type == "cpu" and number != before:
        progress.message(
            f"computing with {number} threads as when this run started, not {before}: another "
            "number would change the results"
        )
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
