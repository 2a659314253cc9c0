"""Page that compares tokenizers on the same images: one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from smalto.core.files import write_atomic
from smalto.metrics.formatting import metric_rows
from smalto.metrics.record import Metrics
from smalto.report.drawing import data_uri
from smalto.report.page import Example, template


@dataclass(frozen=True)
class ComparisonReport:
    """Contents of the page.

    Attributes:
        names: of the tokenizers.
        table: a row per metric and a column per tokenizer, below a heading.
        metrics: of each tokenizer.
        examples: the example images of each tokenizer, the same images in the same order.
    """

    names: Sequence[str]
    table: Sequence[Sequence[str]]
    metrics: Sequence[Metrics]
    examples: Sequence[Sequence[Example]]


def write_comparison_report(path: Path, report: ComparisonReport) -> None:
    """Write the comparison as one HTML file."""
    first = report.metrics[0]
    page = template("comparison.html").render(
        title="smalto: tokenizers compared",
        subtitle=f"On {first.measured_on} (N = {first.num_images:,}), {first.transform}.",
        headline=[],
        notes=[],
        comparison=report.table,
        examples=[_card(report, number) for number in range(len(report.examples[0]))],
        charts=[],
        table=[
            (f"{name}: {label}", value)
            for name, metrics in zip(report.names, report.metrics, strict=True)
            for label, value in metric_rows(metrics)
        ],
    )
    write_atomic(path, page)


def _card(report: ComparisonReport, number: int) -> dict[str, object]:
    """Return one image, and beside it its reconstruction by each tokenizer."""
    own = [examples[number] for examples in report.examples]
    height, width = own[0].image.shape[1:]
    captions = [
        f"{name}: {example.psnr:.2f} dB, {example.num_tokens:,} tokens"
        for name, example in zip(report.names, own, strict=True)
    ]
    return {
        "name": own[0].name,
        "size": f"{width} x {height} pixels",
        "credit": own[0].credit,
        "images": [
            ("image", data_uri(own[0].image)),
            *(
                (caption, data_uri(example.reconstruction))
                for caption, example in zip(captions, own, strict=True)
            ),
        ],
    }
