"""What needs no model: the cross-entropies that a generator has to beat."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
import torch

from smalto.core import distributed
from smalto.core.errors import RunError
from smalto.core.files import read_json, write_atomic
from smalto.core.progress import Progress
from smalto.metrics.generator_metrics import TokenLoss, TokenPrediction
from smalto.training.run_folder import BASELINES_FILE
from smalto.training.training_tokens import TokenBatch, TrainingTokens

SMOOTHING = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003)  # counts added to every code, per position


@dataclass(frozen=True)
class Baselines:
    """Cross-entropies in nats per token of predictions that do not look at the other tokens.

    Attributes:
        uniform: the logarithm of the codebook size.
        histogram: of the held-out rows under the histogram of the training rows at each position.
        smoothing: the count added to every code, of those tried the best for the held-out rows.
    """

    uniform: float
    histogram: TokenPrediction
    smoothing: float


def measure_baselines(
    tokens: TrainingTokens, held_out: TokenBatch, device: torch.device, progress: Progress
) -> Baselines:
    """Compute the baselines from the stores: one pass over all training rows, shared by the ranks.

    Args:
        tokens: of the run.
        held_out: the rows that the generator is evaluated on.
        device: on which processes exchange tensors.
        progress: receives rows.
    """
    layout, codebook_size = tokens.layout, tokens.stores.header.codebook_size
    counts = numpy.zeros((layout.num_tokens, codebook_size), numpy.int32)
    progress.start("counting tokens", len(distributed.rank_range(len(tokens.training))), "rows")
    for rows in tokens.some_training_tokens(distributed.rank_range):
        for position in range(layout.num_tokens):
            counts[position] += numpy.bincount(rows[:, position], minlength=codebook_size)
        progress.advance(len(rows))
    progress.finish()
    counts = distributed.all_reduce(torch.from_numpy(counts).to(device)).cpu().numpy()
    targets = held_out.tokens.numpy()
    found = numpy.take_along_axis(counts.T, targets, axis=0)
    hits = torch.from_numpy(targets == counts.argmax(axis=1))
    best = None
    for smoothing in SMOOTHING:
        total = len(tokens.training) + smoothing * codebook_size
        losses = torch.from_numpy(math.log(total) - numpy.log(found + smoothing))
        sums = TokenLoss(layout, torch.device("cpu"))
        sums.add(losses, hits)
        baselines = Baselines(math.log(codebook_size), sums.means(), smoothing)
        if best is None or baselines.histogram.loss < best.histogram.loss:
            best = baselines
    assert best is not None
    return best


def write_baselines(folder: Path, baselines: Baselines) -> None:
    """Write ``baselines.json``."""
    write_atomic(folder / BASELINES_FILE, json.dumps(asdict(baselines)) + "\n")


def read_baselines(folder: Path) -> Baselines:
    """Read ``baselines.json``.

    Raises:
        RunError: it is missing or damaged.
    """
    try:
        data = read_json(folder / BASELINES_FILE)
        histogram: dict[str, Any] = data["histogram"]
        lists = {key: tuple(value) for key, value in histogram.items() if isinstance(value, list)}
        return Baselines(data["uniform"], TokenPrediction(**histogram | lists), data["smoothing"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise RunError(
            f"{folder / BASELINES_FILE} is missing or damaged; it holds the cross-entropies that a "
            "generator has to beat. They are computed again when the run is resumed."
        ) from None
