"""The run folder: what is in it, how it appears, how checkpoints are kept and found."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import filelock

from smalto.core.errors import RunError
from smalto.core.files import (
    atomic_path,
    check_regular,
    check_replaceable,
    check_writable,
    exclusive,
    foreign_names,
    parse_json,
    read_json,
    remove_leftovers,
    sync_tree,
    write_atomic,
)
from smalto.metrics.record import TrainingTimes
from smalto.training.checkpoint import Checkpoint, is_checkpoint, read_checkpoint, write_checkpoint
from smalto.training.earlier_formats import upgrade_split

RECIPE_FILE = "recipe.toml"
SPLIT_FILE = "split.json"
METRICS_FILE = "metrics.json"
REPORT_FILE = "report.html"
LOCK_FILE = ".lock"
START_FOLDER = "start"  # the model that fine-tuning started from
BASELINES_FILE = "baselines.json"  # of a generator
_CHECKPOINT = re.compile(r"step-([0-9]{8,})")
_OWN_CHECKPOINT = re.compile(r"(damaged-)?step-[0-9]{8,}")  # other names in the folder are not ours
_LARGEST = 2**1000  # an integer that is still a float
LOGS = ("log.jsonl", "times.jsonl", "events.jsonl")
OWN_NAMES = frozenset(
    {RECIPE_FILE, SPLIT_FILE, METRICS_FILE, LOCK_FILE, *LOGS}
    | {START_FOLDER, BASELINES_FILE, "tokenizer"}
    | {"config.json", "model.safetensors", "checkpoints", REPORT_FILE, "tensorboard"}
)


@dataclass(frozen=True)
class Split:
    """``split.json``: what a run was trained on, and what it never sees.

    Attributes:
        source: where the data was.
        num_images: how many images there were, held-out ones included.
        digest: of names and sizes, so that the data is recognized after a move; empty: unknown.
        held_out: names of the held-out images.
    """

    source: str
    num_images: int
    digest: str
    held_out: list[str]


class RunFolder:
    """A run on disk. It is a model folder too: ``smalto.load(run.path)`` returns the latest model.

    It holds ``recipe.toml``, ``split.json``, the latest model, ``checkpoints/step-00000120/``,
    ``log.jsonl`` (one line of numbers per step), ``times.jsonl``, ``events.jsonl``, and at the end
    ``metrics.json`` and ``report.html``.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.is_run(self.path):
            raise RunError(
                f"{self.path} is not a run: it lacks {RECIPE_FILE}, {SPLIT_FILE} or checkpoints. "
                "Runs are made by `smalto train FOLDER --out RUN`."
            )

    @staticmethod
    def is_run(path: Path) -> bool:
        """Return whether a folder looks like a run."""
        files = (path / RECIPE_FILE).is_file() and (path / SPLIT_FILE).is_file()
        return files and (path / "checkpoints").is_dir()

    @classmethod
    def create(
        cls,
        path: str | Path,
        recipe: str,
        split: Split,
        save_model: Callable[[Path], None],
        state: dict[str, Any],
        overwrite: bool = False,
        save_once: Callable[[Path], None] | None = None,
    ) -> RunFolder:
        """Create a run with its recipe and its checkpoint of step 0; it appears by one rename.

        Args:
            path: the folder.
            recipe: the text of ``recipe.toml``.
            split: what it is trained on.
            save_model: writes the model into a folder.
            state: of the trainer.
            overwrite: replace a run that exists.
            save_once: writes what training does not change, such as the model that fine-tuning
                starts from.

        Raises:
            RunError: ``path`` exists and ``overwrite`` is off, or it is not a run.
        """
        path = Path(path)
        cls.check_free(path, overwrite)
        remove_leftovers(path.parent, path.name)
        with atomic_path(path) as new:
            new.mkdir()
            write_atomic(new / RECIPE_FILE, recipe)
            write_atomic(new / SPLIT_FILE, json.dumps(asdict(split)) + "\n")
            for name in LOGS:
                (new / name).touch()
            (new / "checkpoints").mkdir()
            cls(new).save(0, save_model, state)
            if save_once is not None:
                save_once(new)
            sync_tree(new)
            if path.is_dir():
                os.replace(path, new.parent / "old")  # removed with the temporary folder
        return cls(path)

    @staticmethod
    def check_free(path: Path, overwrite: bool) -> None:
        """Raise RunError unless a run may be created at ``path``.

        Only a run with nothing else in its folder may be replaced, and only if it is not training.
        """
        if path.exists() and not path.is_dir():
            raise RunError(f"{path} is a file. Name a folder for --out.")
        is_empty = not path.is_dir() or not any(path.iterdir())
        if not is_empty and not overwrite:
            raise RunError(
                f"{path} exists already. Resume it with --resume {path}, name another --out, or "
                "replace it with --overwrite."
            )
        if not is_empty and not RunFolder.is_run(path):
            raise RunError(
                f"{path} is not a run of smalto, so --overwrite does not replace it. "
                "Name another --out."
            )
        if not is_empty:
            with RunFolder(path).locked():  # a run in training has temporary files beside its own
                remove_leftovers(path)
                check_replaceable(path, RunFolder(path).other_files(), "run")
        if Path.cwd().is_relative_to(path.resolve()):
            raise RunError(f"{path} is the current folder or a parent of it. Name another --out.")
        check_writable(path)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run's training lock for the duration of the block.

        The operating system releases it when the process ends, however it ends.

        Raises:
            RunError: another process holds it.
        """
        message = (
            f"{self.path} is being trained by another process. Wait for it, stop it, or name "
            "another --out."
        )
        with exclusive(filelock.FileLock(self.path / LOCK_FILE), message):
            yield

    def split(self) -> Split:
        """Read ``split.json``. Raises RunError if it is damaged."""
        return read_split(self.path / SPLIT_FILE)

    def save(
        self,
        step: int,
        save_model: Callable[[Path], None],
        state: dict[str, Any],
        keep: int = 2,
    ) -> None:
        """Write checkpoint ``step``, make its model the latest, remove all but the newest
        ``keep``.
        """
        target = self.checkpoint(step)
        if not target.parent.is_dir():
            raise RunError(f"{self.path} was removed during the run. Start the run again.")
        if not target.exists():  # saved already by a run that was stopped right here
            write_checkpoint(target, step, save_model, state)
        save_model(self.path)
        for old in self.steps()[:-keep]:
            shutil.rmtree(self.checkpoint(old))

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, ascending."""
        folders = (self.path / "checkpoints").glob("step-*")
        found = [_CHECKPOINT.fullmatch(folder.name) for folder in folders if is_checkpoint(folder)]
        return sorted(int(match[1]) for match in found if match)

    def other_files(self) -> list[str]:
        """Return the names in the run's folders that are not of the run; they are left alone."""
        checkpoints = self.path / "checkpoints"
        own = {
            path.name
            for path in checkpoints.glob("*")
            if _OWN_CHECKPOINT.fullmatch(path.name) and is_checkpoint(path)
        }
        return [*foreign_names(self.path, OWN_NAMES), *foreign_names(checkpoints, own)]

    def restore(self, check_model: Callable[[Path], object]) -> Checkpoint:
        """Read the newest checkpoint that is not damaged.

        Damaged ones are renamed and recorded as events.

        Args:
            check_model: reads the model in a folder; raises RunError if it cannot.

        Raises:
            RunError: none can be read.
        """
        reasons = []
        for step in reversed(self.steps()):
            try:
                checkpoint = self.read(step)
                check_model(checkpoint.folder)
                return checkpoint
            except RunError as error:
                reasons.append(str(error))
                folder = self.checkpoint(step)
                self.event("damaged checkpoint", step=step, text=str(error))
                damaged = folder.with_name(f"damaged-{folder.name}")
                shutil.rmtree(damaged, ignore_errors=True)
                os.replace(folder, damaged)  # a good checkpoint may take its name
        raise RunError(f"{self.path} has no checkpoint that can be read. {' '.join(reasons)}")

    def read(self, step: int) -> Checkpoint:
        """Read the checkpoint of ``step``. Raises RunError if it is damaged."""
        return read_checkpoint(self.checkpoint(step), step)

    def continue_from(self, checkpoint: Checkpoint, recipe: str, split: Split, steps: int) -> None:
        """Record that the run resumes from a checkpoint, and remove everything of a later step.

        Args:
            checkpoint: where it resumes.
            recipe: the text of ``recipe.toml`` from here on.
            split: from here on.
            steps: the step at which the run ends.
        """
        for log in LOGS:
            if (self.path / log).exists():
                check_regular(self.path / log)
        for folder in (self.path, self.path / "checkpoints"):
            remove_leftovers(folder)
        write_atomic(self.path / RECIPE_FILE, recipe)
        write_atomic(self.path / SPLIT_FILE, json.dumps(asdict(split)) + "\n")
        self.forget_after(checkpoint.step)
        for name in checkpoint.model_files():  # a kill may have left the model of another step
            write_atomic(self.path / name, (checkpoint.folder / name).read_bytes())
        if checkpoint.step < steps:
            (self.path / METRICS_FILE).unlink(missing_ok=True)
        self.event("resumed", step=checkpoint.step)

    def forget_after(self, step: int) -> None:
        """Remove checkpoints and log lines past ``step``, and a line that was cut short."""
        for later in reversed(self.steps()):
            if later > step:
                shutil.rmtree(self.checkpoint(later))
        for name in ("log.jsonl", "times.jsonl"):
            lines = _lines(self.path / name)
            kept = [line for line in lines if not _is_later(line, step)]
            write_atomic(self.path / name, "".join(kept))

    def times(self) -> TrainingTimes:
        """Return the time of training, from ``times.jsonl``."""
        rows = read_log(self.path / "times.jsonl")
        seconds = sum(row.get("seconds", 0) for row in rows)
        waiting = sum(row.get("waiting", 0) for row in rows)
        images = sum(row.get("images", 0) for row in rows)
        return TrainingTimes(
            round(seconds, 1),
            round(waiting / seconds, 4) if seconds else None,
            round(images / seconds, 1) if seconds else None,
            max((row.get("memory_mb", 0) for row in rows), default=0),
        )

    def event(self, event: str, **metadata: Any) -> None:
        """Append a line to ``events.jsonl``."""
        with open(self.path / "events.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, **metadata}) + "\n")

    def checkpoint(self, step: int) -> Path:
        """Return the folder of the checkpoint of ``step``."""
        return self.path / "checkpoints" / f"step-{step:08d}"


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the objects in a file of JSON lines; empty without a file.

    Lines that are cut short or damaged are left out.
    """
    rows = (_row(line) for line in _lines(path))
    return [row for row in rows if row is not None]


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the rows of ``log.jsonl`` or ``times.jsonl``: numbers of a step each."""
    return [row for row in read_jsonl(path) if _is_of_a_step(row)]


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        return []
    return path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = parse_json(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _is_of_a_step(row: dict[str, Any]) -> bool:
    numbers = all(
        isinstance(value, float) or (isinstance(value, int) and abs(value) < _LARGEST)
        for value in row.values()
    )
    return numbers and isinstance(row.get("step"), int)


def _is_later(line: str, step: int) -> bool:
    """Return whether a line of a log was written after a step, or is cut short."""
    row = _row(line)
    if row is None or not _is_of_a_step(row):
        return not line.endswith("\n")  # another line is not ours: it stays
    return bool(row["step"] > step)


def read_split(path: Path) -> Split:
    """Read a ``split.json``.

    Raises:
        RunError: it is damaged.
    """
    try:
        data = upgrade_split(read_json(path))
        split = Split(data["source"], data["num_images"], data.get("digest", ""), data["held_out"])
        types = (str, int, str, list)
        values = (split.source, split.num_images, split.digest, split.held_out)
        is_text = all(isinstance(name, str) for name in split.held_out)
        if not all(map(isinstance, values, types)) or not is_text:
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise RunError(
            f"{path} is damaged: expected source, num_images and held_out. Without it the held-out "
            "images are not known. Restore the file from a copy."
        ) from None
    return split
