"""Parts that commands share: options, the progress bar around a job, printing."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from smalto.core.errors import SmaltoError
from smalto.core.signals import exit_status, raise_stopped, stop_signals, stop_word
from smalto.core.text import printable, printable_lines

if TYPE_CHECKING:
    from smalto.cli.progress_bar import ConsoleProgress
    from smalto.pipelines.train import Trained, TrainedGenerator

Device = Annotated[
    str,
    typer.Option(help="auto, cpu, cuda or mps. auto picks a GPU if there is one, and names it."),
]
Precision = Annotated[
    str,
    typer.Option(
        help="float32 or bf16 for encoder and decoder; the codebook search always uses float32."
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        help="Processes that read images; 0 reads them in the main process. "
        "Default: all cores but one, at most 8."
    ),
]
Batch = Annotated[int, typer.Option(help="Images per batch.")]
LongerSide = Annotated[
    int,
    typer.Option(
        min=0,
        help="Reduce larger images to this many pixels on their longer side; 0 keeps their size.",
    ),
]
Size = Annotated[
    int | None,
    typer.Option(
        help="Resize the shorter side to this and crop a square from the center. "
        "Default: keep the aspect ratio."
    ),
]
Tokenizer = Annotated[
    str,
    typer.Option(
        help="Folder of a tokenizer, run or generator, a name that `smalto info` lists, or "
        "weights of another project (VAR, LlamaGen, taming-transformers, diffusers, transformers, "
        "MaskGIT)."
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing output.")]


@contextmanager
def console_progress(run: Path | None = None, resumes: bool = False) -> Iterator[ConsoleProgress]:
    """Yield a progress bar; turn a stop signal into its exit status (130 after Ctrl-C), with the
    command that resumes.

    Args:
        run: the run folder that the job writes.
        resumes: whether the same command resumes the job.
    """
    from smalto.cli.progress_bar import ConsoleProgress
    from smalto.training.trainer import Interrupted

    progress = ConsoleProgress()
    try:
        with stop_signals(raise_stopped):
            yield progress
    except Interrupted as stopped:
        progress.close()
        status = exit_status(stopped.number)
        fail(f"{stopped}; everything is saved. Resume with: {_again(run)}", status)
    except KeyboardInterrupt as interrupt:
        progress.close()
        number = getattr(interrupt, "number", signal.SIGINT)
        has_begun = run is not None and (run / "recipe.toml").is_file()
        message = stop_word(number)
        if has_begun or resumes:
            message += f"; what was written is kept. Resume with: {_again(run)}"
        fail(message, exit_status(number))
    finally:
        progress.close()


def _again(run: Path | None) -> str:
    return f"smalto train --resume {quoted(run)}" if run else "the same command"


def quoted(path: Path) -> str:
    """Return a path as it can be pasted into a shell."""
    return shlex.quote(str(path))


def print_trained(trained: Trained | TrainedGenerator) -> None:
    """Print the metrics of a training and the path of its report; only rank 0 has them."""
    if trained.metrics is not None:
        print_tables(trained.tables())
        say(f"\nreport: {trained.run.path / 'report.html'}")


def print_tables(tables: list[list[tuple[str, ...]]]) -> None:
    """Print (name, value) pairs, and below them tables with a heading."""
    from smalto.metrics.formatting import aligned

    pairs, *others = tables
    print_rows([(name, value) for name, value in pairs])
    for rows in filter(None, others):
        say(("\n" if pairs else "") + "\n".join(aligned(rows)))


def print_rows(rows: list[tuple[str, str]]) -> None:
    """Print (name, value) pairs in two aligned columns."""
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        say(f"{name:<{width}}  {printable(value)}")


def say(text: str) -> None:
    """Print a result on stdout; control characters in it are escaped."""
    print(printable_lines(text))


def given(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that are not None."""
    return {key: value for key, value in settings.items() if value is not None}


def checked_choice(option: str, value: str, choices: tuple[str, ...]) -> Any:
    """Return the value of an option that takes one of a few words.

    Raises:
        SmaltoError: it is none of them.
    """
    if value not in choices:
        raise SmaltoError(f"{option} must be {' or '.join(choices)}; got {value!r}.")
    return value


def fail(message: str, code: int) -> None:
    """Print a message on stderr and exit with a status."""
    print(f"smalto: {printable_lines(message)}", file=sys.stderr)
    sys.exit(code)
