"""How well a generator predicts tokens: cross-entropy and accuracy, in all and per grid."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor

from smalto.core import distributed
from smalto.core.layout import TokenLayout


@dataclass(frozen=True)
class TokenPrediction:
    """Cross-entropy in nats per token, and accuracy, as means over tokens.

    Attributes:
        loss, accuracy: of all tokens.
        loss_by_grid, accuracy_by_grid: of the tokens of each grid.
        num_rows: images that they were measured on.
    """

    loss: float
    accuracy: float
    loss_by_grid: tuple[float, ...]
    accuracy_by_grid: tuple[float, ...]
    num_rows: int

    def as_log(self) -> dict[str, float]:
        """Return the numbers by name, those of grids only if there are several."""
        named = {"loss": self.loss, "accuracy": self.accuracy}
        if len(self.loss_by_grid) > 1:
            for number, loss in enumerate(self.loss_by_grid, start=1):
                named[f"loss_grid_{number}"] = loss
            for number, accuracy in enumerate(self.accuracy_by_grid, start=1):
                named[f"accuracy_grid_{number}"] = accuracy
        return {name: round(value, 6) for name, value in named.items()}


@dataclass(frozen=True)
class GeneratorMetrics:
    """Metrics of a generator, after training.

    Attributes:
        held_out, training: predictions of held-out rows and of training rows.
        measured_on: what ``held_out`` really is, in words.
        uniform: cross-entropy of a uniform guess, in nats: the logarithm of the codebook size.
        histogram: predictions of the same held-out rows from the histogram of the training rows at
            each position.
    """

    held_out: TokenPrediction
    training: TokenPrediction
    measured_on: str
    uniform: float
    histogram: TokenPrediction

    @property
    def below_histogram(self) -> float:
        """How far the held-out loss is below that of the histogram, as a share of the latter."""
        return 1 - self.held_out.loss / self.histogram.loss

    def as_json(self) -> dict[str, Any]:
        """Return the metrics as JSON values."""
        return {**asdict(self), "below_histogram": self.below_histogram}


class TokenLoss:
    """Sums of cross-entropies and hits over tokens.

    Args:
        layout: of the tokens of an image.
        device: of the sums.
    """

    def __init__(self, layout: TokenLayout, device: torch.device) -> None:
        self._lengths = layout.lengths
        self._losses = torch.zeros(len(layout.grids), device=device)
        self._hits = torch.zeros(len(layout.grids), device=device)
        self._rows = torch.zeros(1, device=device)

    def add(self, losses: Tensor, hits: Tensor) -> None:
        """Add images: cross-entropies [B, L], and whether the likeliest token is right [B, L]."""
        for grid, (loss, hit) in enumerate(
            zip(losses.split(self._lengths, 1), hits.split(self._lengths, 1), strict=True)
        ):
            self._losses[grid] += loss.sum()
            self._hits[grid] += hit.sum()
        self._rows += len(losses)

    def over_all_ranks(self) -> Self:
        """Add the sums of all processes, in place."""
        distributed.all_reduce(self._losses)
        distributed.all_reduce(self._hits)
        distributed.all_reduce(self._rows)
        return self

    def means(self) -> TokenPrediction:
        """Return the means over all that was added."""
        rows = max(1.0, float(self._rows))
        lengths = torch.tensor(self._lengths, device="cpu")
        losses = self._losses.cpu() / (lengths * rows)
        hits = self._hits.cpu() / (lengths * rows)
        shares = lengths / lengths.sum()
        return TokenPrediction(
            float((losses * shares).sum()),
            float((hits * shares).sum()),
            tuple(losses.tolist()),
            tuple(hits.tolist()),
            int(self._rows),
        )
