"""Page of the report of a generator's run: one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from smalto.core.files import write_atomic
from smalto.metrics.formatting import generator_rows, prediction_rows
from smalto.metrics.generator_metrics import GeneratorMetrics
from smalto.metrics.record import TrainingTimes
from smalto.report.charts import Curves, curves
from smalto.report.drawing import data_uri
from smalto.report.page import template

_LABELS = (
    ("training", "loss"),
    ("held out", "held_out_loss"),
    ("histogram", "histogram_loss"),
    ("uniform", "uniform_loss"),
)


@dataclass(frozen=True)
class GeneratorReport:
    """Contents of the report of a generator's run.

    Attributes:
        name: of the run.
        metrics: measured after training.
        times: of training.
        settings: (name, value) pairs of the run.
        grids: the size of each grid, such as ``"4x4"``.
        guidance: of the samples.
        samples: (name of the class, sheet of images uint8 [3, H, W]).
        stages: sheet of images after each grid; None for a single grid.
        sheet: (caption, sheet of images) for several settings.
        log: rows of the run's log.jsonl.
    """

    name: str
    metrics: GeneratorMetrics
    times: TrainingTimes
    settings: list[tuple[str, str]]
    grids: Sequence[str]
    guidance: float
    samples: list[tuple[str, Tensor]]
    stages: Tensor | None
    sheet: list[tuple[str, Tensor]]
    log: list[dict[str, Any]]


def write_generator_report(path: Path, report: GeneratorReport) -> None:
    """Write the report as one HTML file."""
    metrics = report.metrics
    page = template("generator.html").render(
        title=f"smalto: {report.name}",
        subtitle=f"A generator; measured on {metrics.held_out.num_rows:,} {metrics.measured_on}.",
        headline=_headline(report),
        notes=[],
        guidance=report.guidance,
        samples=[(name, data_uri(image)) for name, image in report.samples],
        stages=data_uri(report.stages) if report.stages is not None else "",
        sheet=[(caption, data_uri(image)) for caption, image in report.sheet],
        grids=prediction_rows(metrics, report.grids),
        charts=_charts(report),
        table=[*generator_rows(metrics), *report.settings],
    )
    write_atomic(path, page)


def _headline(report: GeneratorReport) -> list[tuple[str, str]]:
    metrics = report.metrics
    return [
        (f"{metrics.held_out.loss:.3f}", f"nats per token on {metrics.measured_on}"),
        (f"{metrics.below_histogram:.1%}", "below the histogram by position"),
        (f"{metrics.held_out.accuracy:.1%}", f"accuracy on {metrics.measured_on}"),
        (f"{metrics.training.loss:.3f}", "nats per token on training rows"),
        (f"{report.times.seconds / 60:.1f} min", "training time"),
    ]


def _charts(report: GeneratorReport) -> list[tuple[str, str]]:
    """Return the curves of loss and accuracy, in all and per grid, with their baselines."""
    metrics = report.metrics
    baselines = {"histogram_loss": metrics.histogram.loss, "uniform_loss": metrics.uniform}
    for number, loss in enumerate(metrics.histogram.loss_by_grid, start=1):
        baselines[f"histogram_loss_grid_{number}"] = loss
    ends = [report.log[0], report.log[-1]] if report.log else []  # a level is a line of two points
    log = [*report.log, *({"step": row["step"], **baselines} for row in ends)]
    chosen: list[Any] = [
        ("Cross-entropy", "nats per token", False, _LABELS),
        (
            "Accuracy",
            "share",
            False,
            (("training", "accuracy"), ("held out", "held_out_accuracy")),
        ),
    ]
    if len(report.grids) > 1:
        for number, grid in enumerate(report.grids, start=1):
            keys = [(label, f"{key}_grid_{number}") for label, key in _LABELS[:3]]
            chosen.append(
                (f"Cross-entropy of grid {number}: {grid}", "nats per token", False, keys)
            )
    found: Curves = chosen
    return curves(found, log)
