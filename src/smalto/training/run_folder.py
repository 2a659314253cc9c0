"""The run folder: what is in it, how it appears, and how checkpoints are written and found."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
import safetensors
import safetensors.torch
from torch import Tensor

from smalto.core.errors import RunError
from smalto.core.files import (
    atomic_path,
    check_writable,
    file_sha256,
    remove_leftovers,
    sync_tree,
    write_atomic,
)
from smalto.tokenizer import ImageTokenizer, load
from smalto.training.checkpoint import (
    STATE_FILE,
    SUMS_FILE,
    Checkpoint,
    _check_sums,
    _put_tensors,
    _take_tensors,
)
from smalto.training.earlier_formats import upgrade_split, upgrade_state
from smalto.training.recipe import Recipe, load_recipe, recipe_toml

LOCK_FILE = ".lock"
START_FOLDER = "start"  # the tokenizer that a fine-tuning began with
LOGS = ("log.jsonl", "times.jsonl", "events.jsonl")
SPLIT_FILE = "split.json"  # where the images came from and the names of those held out
OWN_NAMES = frozenset(
    {
        "recipe.toml",
        SPLIT_FILE,
        "config.json",
        "model.safetensors",
        "checkpoints",
        "metrics.json",
        "report.html",
    }
    | {"tokens.lance", "decoded"}  # of a demo
    | {LOCK_FILE, START_FOLDER, "tensorboard"}
    | set(LOGS)
)


class RunFolder:
    """A run on disk. It is a tokenizer too: ``smalto.load(run.path)`` gives the latest model.

    ``recipe.toml``, ``config.json`` and ``model.safetensors`` (latest), ``checkpoints/step-00000120/``, ``log.jsonl`` (a line of numbers
    per step), ``times.jsonl``, ``events.jsonl``, and at the end ``metrics.json`` and ``report.html``.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.is_run(self.path):
            raise RunError(
                f"{self.path} is not a run: it has no recipe.toml, {SPLIT_FILE} and checkpoints. "
                "Runs are made by `smalto train FOLDER --out RUN`."
            )

    @staticmethod
    def is_run(path: Path) -> bool:
        """Whether a folder looks like a run."""
        return (
            (path / "recipe.toml").is_file()
            and (path / SPLIT_FILE).is_file()
            and (path / "checkpoints").is_dir()
        )

    @classmethod
    def create(
        cls,
        path: str | Path,
        recipe: Recipe,
        split: dict[str, Any],
        tokenizer: ImageTokenizer,
        state: dict[str, Any],
        overwrite: bool = False,
        start: ImageTokenizer | None = None,
    ) -> RunFolder:
        """Make a run with its recipe and its checkpoint of step 0; it appears whole, by one rename.

        ``start``: the tokenizer that a fine-tuning begins with, kept to be compared with.

        Raises:
            RunError: something is there already and ``overwrite`` is off, or it is no run.
        """
        path = Path(path)
        cls.check_free(path, overwrite)
        with atomic_path(path) as new:
            new.mkdir()
            write_atomic(new / "recipe.toml", recipe_toml(recipe))
            write_atomic(new / SPLIT_FILE, json.dumps(split) + "\n")
            for name in LOGS:
                (new / name).touch()
            (new / "checkpoints").mkdir()
            cls(new).save(0, tokenizer, state)
            if start is not None:
                (new / START_FOLDER).mkdir()
                start.save(new / START_FOLDER)
            sync_tree(new)
            if path.is_dir():
                os.replace(
                    path, new.parent / "old"
                )  # goes with the temporary folder, once the new run is in its place
        return cls(path)

    @staticmethod
    def check_free(path: Path, overwrite: bool) -> None:
        """Raise RunError unless a run may be made at ``path``. Only a run, with nothing else in its folder, may be replaced."""
        if path.exists() and not path.is_dir():
            raise RunError(f"{path} is a file. Name a folder for --out.")
        entries = {p.name for p in path.iterdir()} if path.is_dir() else set()
        if entries and not overwrite:
            raise RunError(
                f"{path} exists already. Go on with --resume {path}, replace it with --overwrite, or name another --out."
            )
        foreign = sorted(entries - OWN_NAMES)
        if entries and (not RunFolder.is_run(path) or foreign):
            what = (
                f"holds other things too ({', '.join(foreign[:3])})"
                if RunFolder.is_run(path)
                else "is not a run of smalto"
            )
            raise RunError(f"{path} {what}, so --overwrite leaves it alone. Name another --out.")
        if entries:
            with RunFolder(path).locked():  # nobody may be training it
                pass
        if Path.cwd().is_relative_to(path.resolve()):
            raise RunError(f"{path} is the folder you are in, or one above it. Name another --out.")
        check_writable(path)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Inside, this process alone may train the run. The lock goes when the process does, however it ends.

        Raises:
            RunError: another process is training it.
        """
        lock = filelock.FileLock(self.path / LOCK_FILE, timeout=0)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise RunError(
                f"{self.path} is being trained by another process. Wait for it, stop it, or name another --out."
            ) from None
        try:
            yield
        finally:
            lock.release()

    def split(self) -> dict[str, Any]:
        """``source``, ``num_images`` and the names ``held_out``."""
        return read_split(self.path / SPLIT_FILE)

    def recipe(self) -> Recipe:
        return load_recipe(self.path / "recipe.toml")

    def save(
        self, step: int, tokenizer: ImageTokenizer, state: dict[str, Any], keep: int = 2
    ) -> None:
        """Write checkpoint ``step``, make it the run's latest model, and remove all but the newest ``keep``."""
        target = self.checkpoint(step)
        if not target.exists():  # saved already by a run that was stopped right here
            with atomic_path(target) as new:
                tokenizer.save(new)
                tensors: dict[str, Tensor] = {}
                plain = _take_tensors(state, "", tensors)
                metadata = {"smalto": json.dumps({"step": step, "state": plain}, sort_keys=True)}
                write_atomic(new / STATE_FILE, safetensors.torch.save(tensors, metadata))
                names = sorted(path.name for path in new.iterdir())
                write_atomic(
                    new / SUMS_FILE,
                    "".join(f"{file_sha256(new / name)}  {name}\n" for name in names),
                )
        tokenizer.save(self.path)
        for old in self.steps()[:-keep]:
            shutil.rmtree(self.checkpoint(old))

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending."""
        found = [p.name.removeprefix("step-") for p in (self.path / "checkpoints").glob("step-*")]
        return sorted(int(name) for name in found if name.isdigit())

    def restore(self) -> Checkpoint:
        """The newest checkpoint that is whole. Damaged ones are renamed and recorded as events.

        Raises:
            RunError: none can be read.
        """
        reasons = []
        for step in reversed(self.steps()):
            try:
                return self.read(step)
            except RunError as error:
                reasons.append(str(error))
                folder = self.checkpoint(step)
                self.event("damaged checkpoint", step=step, text=str(error))
                shutil.rmtree(folder.with_name(f"damaged-{folder.name}"), ignore_errors=True)
                os.replace(
                    folder, folder.with_name(f"damaged-{folder.name}")
                )  # its name is free for a good one
        raise RunError(f"{self.path} has no checkpoint that can be read. {' '.join(reasons)}")

    def read(self, step: int) -> Checkpoint:
        """The checkpoint of ``step``.

        Raises:
            RunError: it is damaged: a file is missing, is not what was written, or cannot be understood.
        """
        folder = self.checkpoint(step)
        _check_sums(folder)
        try:
            tokenizer = load(folder)
            with safetensors.safe_open(folder / STATE_FILE, "pt") as file:
                header = json.loads(file.metadata()["smalto"])
                state = _put_tensors(
                    header["state"], {name: file.get_tensor(name) for name in file.keys()}
                )
            return Checkpoint(step, tokenizer, upgrade_state(state))
        except (
            RunError,
            safetensors.SafetensorError,
            OSError,
            ValueError,
            KeyError,
            TypeError,
        ) as error:
            raise RunError(f"{folder.name}: {error}") from None

    def continue_from(self, checkpoint: Checkpoint, recipe: Recipe, split: dict[str, Any]) -> None:
        """Record that the run goes on from a checkpoint: from here on nothing in it is of a later step, or of an earlier end."""
        step = checkpoint.step
        for folder in (self.path, self.path / "checkpoints"):
            remove_leftovers(folder)
        write_atomic(self.path / "recipe.toml", recipe_toml(recipe))
        write_atomic(self.path / SPLIT_FILE, json.dumps(split) + "\n")
        self.forget_after(step)
        checkpoint.tokenizer.save(
            self.path
        )  # a kill between a checkpoint and this has left the one before
        if step < recipe.steps:
            (self.path / "metrics.json").unlink(missing_ok=True)
        self.event("resumed", step=step)

    def forget_after(self, step: int) -> None:
        """Drop what was written past ``step``: checkpoints, log lines, one that was cut short."""
        for later in reversed(self.steps()):
            if later > step:
                shutil.rmtree(self.checkpoint(later))
        for name in ("log.jsonl", "times.jsonl"):
            rows = [
                row for row in read_jsonl(self.path / name) if row.get("step", step + 1) <= step
            ]
            write_atomic(self.path / name, "".join(json.dumps(row) + "\n" for row in rows))

    def event(self, event: str, **metadata: Any) -> None:
        """Add a line to events.jsonl."""
        with open(self.path / "events.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, **metadata}) + "\n")

    def checkpoint(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step-{step:08d}"


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The lines of a log, up to one that was cut short or damaged; none where the log is gone."""
    rows: list[dict[str, Any]] = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                break
            if not isinstance(row, dict):
                break
            rows.append(row)
    return rows


def read_split(path: Path) -> dict[str, Any]:
    """What split.json says. Raises RunError where it is damaged."""
    try:
        metadata = upgrade_split(json.loads(path.read_text(encoding="utf-8")))
        if (
            not isinstance(metadata["source"], str)
            or not isinstance(metadata["num_images"], int)
            or not isinstance(metadata["held_out"], list)
        ):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError):
        raise RunError(
            f"{path} is damaged: it should say source, num_images and held_out. Without it nobody knows what was held out."
        ) from None
    return dict(metadata)
