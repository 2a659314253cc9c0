"""Watching a run for faults that raise no error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from smalto.training.task import MonitoredMetric

WINDOW = 50  # steps that the moving averages look back
SETTLED_AFTER = 200  # steps before the best counts: a codebook that has just started is used less
MAX_SKIPPED = 20  # steps in a row without a finite gradient


class TrainingMonitor:
    """Checks the metrics of every step and reports each fault once, until it is over.

    Faults are steps without a finite gradient, and those that the task names for its metrics.
    """

    def __init__(self, monitored: Sequence[MonitoredMetric]) -> None:
        self._monitored = monitored
        self._averages: dict[str, float] = {}
        self._best: dict[str, float] = {}
        self._skipped = 0
        self._reported: list[str] = []

    def check(self, step: int, metrics: dict[str, float]) -> list[str]:
        """Return the faults that are new since the last step, one sentence each."""
        self._skipped = self._skipped + 1 if metrics.get("skipped") else 0
        faults = {}
        if self.has_diverged:
            faults["skipped"] = (
                f"training has diverged: the last {self._skipped} steps had no finite gradient and "
                "were skipped. Set a smaller optimizer.lr, or look for broken values in the data"
            )
        if not self._skipped:
            for metric in self._monitored:
                value = metrics.get(metric.name, math.nan)
                if math.isfinite(value):
                    self._update(metric, value, step)
                if text := self._fault(metric):
                    faults[metric.name] = text
        new = [text for fault, text in faults.items() if fault not in self._reported]
        self._reported = list(faults)
        return new

    @property
    def has_diverged(self) -> bool:
        """Whether the last 20 steps had no finite gradient."""
        return self._skipped >= MAX_SKIPPED

    def _update(self, metric: MonitoredMetric, value: float, step: int) -> None:
        before = self._averages.get(metric.name, value)
        average = before + (value - before) / WINDOW
        self._averages[metric.name] = average
        if step > SETTLED_AFTER:
            better = max if metric.higher_is_better else min
            self._best[metric.name] = better(self._best.get(metric.name, average), average)

    def _fault(self, metric: MonitoredMetric) -> str | None:
        if metric.name not in self._averages:
            return None
        worst = -math.inf if metric.higher_is_better else math.inf
        return metric.fault(self._averages[metric.name], self._best.get(metric.name, worst))

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: numbers and text."""
        return {
            "averages": dict(self._averages),
            "best": dict(self._best),
            "skipped": self._skipped,
            "reported": list(self._reported),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self._averages = dict(state["averages"])
        self._best = dict(state["best"])
        self._skipped = int(state["skipped"])
        self._reported = list(state["reported"])
