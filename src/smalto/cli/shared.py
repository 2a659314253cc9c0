"""What the verbs share: options, the progress bar around a job, printing."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from smalto.core.errors import SmaltoError

if TYPE_CHECKING:
    from smalto.cli.progress_bar import ConsoleProgress

Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps; auto says what it took.")]
Precision = Annotated[
    str,
    typer.Option(
        help="float32 or bf16 for encoder and decoder; the search for codes is always float32."
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(help="Decoding processes; 0 decodes in this one. Default: all cores but one."),
]
Batch = Annotated[int, typer.Option(help="Images at a time.")]
LongerSide = Annotated[
    int,
    typer.Option(
        min=0,
        help="Reduce larger images to this many pixels on their longer side; 0 keeps their size.",
    ),
]
Size = Annotated[
    int | None,
    typer.Option(help="Cut a square of this side from the middle; default: keep the shape."),
]
Tokenizer = Annotated[Path, typer.Option(help="Folder of a tokenizer or run.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]


@contextmanager
def console_progress(run: Path | None = None, resumes: bool = False) -> Iterator[ConsoleProgress]:
    from smalto.cli.progress_bar import ConsoleProgress
    from smalto.training.trainer import Interrupted

    signal.signal(signal.SIGINT, signal.default_int_handler)
    progress = ConsoleProgress()
    try:
        yield progress
    except Interrupted as stopped:
        progress.close()
        fail(f"{stopped}; everything is saved. Go on with: {_again(run)}", 130)
    except KeyboardInterrupt:
        progress.close()
        begun = run is not None and (run / "recipe.toml").is_file()
        fail(
            f"interrupted. What was written is kept; go on with: {_again(run)}"
            if begun or resumes
            else "interrupted",
            130,
        )
    finally:
        progress.close()


def _again(run: Path | None) -> str:
    return f"smalto train --resume {run}" if run else "the same command again"


def print_trained(trained: Any) -> None:
    if not trained.metrics:  # of several processes only the first has measured
        return
    print_metrics(trained.metrics)
    print(f"\nreport: {trained.run.path / 'report.html'}")


def print_metrics(metrics: dict[str, Any]) -> None:
    from smalto.evaluation.formatting import codec_rows, grid_rows, metric_rows

    print_rows(metric_rows(metrics))
    for lines in filter(None, (grid_rows(metrics), codec_rows(metrics))):
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        print()
        for line in lines:
            print(
                "  ".join(
                    cell.ljust(width) for cell, width in zip(line, widths, strict=True)
                ).rstrip()
            )


def print_rows(rows: list[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


def given(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if value is not None}


def checked_precision(name: str) -> Any:
    if name not in ("float32", "bf16"):
        raise SmaltoError(f"--precision must be float32 or bf16; got {name!r}.")
    return name


def fail(message: str, code: int) -> None:
    print(f"smalto: {message}", file=sys.stderr)
    sys.exit(code)
