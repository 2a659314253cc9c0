"""What every resumed run does: find its checkpoint, and compute with as many threads as before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from smalto.core import distributed
from smalto.core.errors import ConfigError
from smalto.core.progress import Progress
from smalto.training.checkpoint import Checkpoint
from smalto.training.run_folder import RunFolder


def checkpoint_to_resume(
    run: RunFolder, steps: int, check_model: Callable[[Path], object], device: torch.device
) -> Checkpoint:
    """Return the newest checkpoint that is not damaged, the same on all ranks.

    Args:
        run: to resume.
        steps: the step at which it will end.
        check_model: reads the model in a folder; raises RunError if it cannot.
        device: on which processes exchange tensors.

    Raises:
        RunError: no checkpoint can be read.
        ConfigError: the run is past ``steps``.
    """
    step = -1
    if distributed.rank() == 0:
        with run.locked():
            step = run.restore(check_model).step
    step = distributed.broadcast_object(step, device)
    if steps < step:
        raise ConfigError(
            f"got --steps {steps}; {run.path} is at step {step} already. "
            f"Resume with at least that many."
        )
    return run.read(step)


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
