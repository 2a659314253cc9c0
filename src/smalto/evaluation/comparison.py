"""Several tokenizers measured on the same images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from smalto.core.text import printable
from smalto.evaluation.evaluator import Evaluation
from smalto.metrics.record import ImageMetrics, Mean, Metrics


@dataclass(frozen=True)
class Contender:
    """One tokenizer of a comparison.

    Attributes:
        name: the folder or name that it was loaded from.
        evaluation: what was measured.
    """

    name: str
    evaluation: Evaluation

    @property
    def memory_mb(self) -> int | None:
        """Largest memory of encoding and decoding one batch, weights included, in MiB."""
        memory = self.evaluation.memory
        return None if memory is None else memory // 2**20

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        metrics = self.evaluation.metrics.as_json()
        return {"tokenizer": printable(self.name), "memory_mb": self.memory_mb, **metrics}


@dataclass(frozen=True)
class Comparison:
    """Tokenizers in the order in which they were named, measured on the same images."""

    contenders: Sequence[Contender]

    def as_json(self) -> list[dict[str, Any]]:
        """Return plain values, one table per tokenizer."""
        return [contender.as_json() for contender in self.contenders]

    def table(self) -> list[tuple[str, ...]]:
        """Return a row per metric and a column per tokenizer, below a heading.

        Metrics that were not measured are left out.
        """
        rows = [("", *(printable(contender.name) for contender in self.contenders))]
        for label, cell in _METRICS:
            cells = [cell(contender.evaluation.metrics) for contender in self.contenders]
            if any(cells):
                rows.append((label, *(text or "-" for text in cells)))
        memories = [contender.memory_mb for contender in self.contenders]
        if any(memory is not None for memory in memories):
            rows.append(("memory", *("-" if m is None else f"{m:,} MiB" for m in memories)))
        return rows


def _codec(metrics: Metrics, codec: str) -> ImageMetrics:
    found = [other for other in metrics.codecs if other.codec == codec]
    return found[0] if found else ImageMetrics()


def _number(value: Mean | float | None, form: str) -> str:
    return "" if value is None else form.format(value)


_METRICS: tuple[tuple[str, Callable[[Metrics], str]], ...] = (
    ("codes", lambda m: f"{m.codebook_size:,}"),
    ("tokens per image", lambda m: f"{m.num_tokens / m.num_images:,.0f}"),
    ("bits per pixel", lambda m: f"{m.bits_per_pixel:.4f}"),
    ("PSNR", lambda m: _number(m.psnr, "{:.2f} dB")),
    ("SSIM", lambda m: _number(m.ssim, "{:.4f}")),
    ("MS-SSIM", lambda m: _number(m.ms_ssim, "{:.4f}")),
    ("lite0 distance", lambda m: _number(m.lite0_distance, "{:.4f}")),
    ("LPIPS (VGG)", lambda m: _number(m.lpips, "{:.4f}")),
    ("rFID", lambda m: _number(m.rfid, "{:.2f}")),
    ("codes used", lambda m: f"{m.used:.1%}"),
    ("JPEG, as many bytes", lambda m: _number(_codec(m, "JPEG").psnr, "{:.2f} dB")),
    ("WebP, as many bytes", lambda m: _number(_codec(m, "WEBP").psnr, "{:.2f} dB")),
    ("images/s", lambda m: _number(m.images_per_second, "{:.2f}")),
    ("parameters", lambda m: f"{m.parameters:,}"),
)
