"""Watching a run for what goes wrong silently."""

from __future__ import annotations

import math
from typing import Any

from smalto.training.recipe import MonitorConfig

WINDOW = 50  # steps that the moving averages look back
SETTLED = 200  # steps before falls count: a codebook that has just been started is first used less
SATURATED = 0.05  # of the discriminator's hinge loss, which is 2 when it knows nothing
MAX_SKIPPED = 20  # steps in a row without a finite gradient


class TrainingMonitor:
    """Looks at every step's metrics and says what is wrong, once for each fault until it is over.

    It knows: steps without a finite gradient, a fall of PSNR or of the codes in use below the best so far, and a discriminator that tells
    all reconstructions apart, from which nothing can be learned. All of it in moving averages over about 50 steps.
    """

    def __init__(self, config: MonitorConfig) -> None:
        self._config = config
        self._averages: dict[str, float] = {}
        self._best: dict[str, float] = {}
        self._skipped = 0
        self._reported: list[str] = []

    def check(self, step: int, metrics: dict[str, float]) -> list[str]:
        """What is wrong since this step, in sentences."""
        self._skipped = self._skipped + 1 if metrics.get("skipped") else 0
        faults = {}
        if self.has_diverged:
            faults["skipped"] = (
                f"training has diverged, the last {self._skipped} steps had no finite gradient and were skipped: "
                "set a smaller optimizer.lr, or look for broken values in the data"
            )
        if not self._skipped:
            for key in ("psnr", "usage", "discriminator_loss"):
                if key in metrics and math.isfinite(metrics[key]):
                    self._average(key, metrics[key], step)
            faults |= self._drops()
        new = [text for fault, text in faults.items() if fault not in self._reported]
        self._reported = list(faults)
        return new

    @property
    def has_diverged(self) -> bool:
        """Whether no step has had a finite gradient for a while."""
        return self._skipped >= MAX_SKIPPED

    def _average(self, key: str, value: float, step: int) -> None:
        before = self._averages.get(key, value)
        self._averages[key] = before + (value - before) / WINDOW
        if step > SETTLED:
            self._best[key] = max(self._best.get(key, -math.inf), self._averages[key])

    def _drops(self) -> dict[str, str]:
        faults = {}
        psnr, best = self._averages.get("psnr", 0.0), self._best.get("psnr", -math.inf)
        if psnr < best - self._config.psnr_drop:
            faults["psnr"] = (
                f"PSNR of the training crops has fallen from {best:.2f} to {psnr:.2f} dB"
            )
        used, most = self._averages.get("usage", 1.0), self._best.get("usage", 0.0)
        if used < most * (1 - self._config.usage_drop):
            faults["usage"] = f"codes in use have fallen from {most:.1%} to {used:.1%}"
        if self._averages.get("discriminator_loss", 2.0) < SATURATED:
            faults["saturated"] = (
                "the discriminator tells all reconstructions from images: its gradient says little. "
                "Lower losses.adversarial.lr or raise losses.perceptual.weight"
            )
        return faults

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: plain numbers and texts."""
        return {
            "averages": dict(self._averages),
            "best": dict(self._best),
            "skipped": self._skipped,
            "reported": list(self._reported),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._averages, self._best = dict(state["averages"]), dict(state["best"])
        self._skipped, self._reported = int(state["skipped"]), list(state["reported"])
