"""A training that resumes after an interruption, for the benchmarks that need one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import smalto
from smalto.core.progress import Progress
from smalto.tokenizer import ImageTokenizer
from smalto.training.tokenizer_recipe import TokenizerRecipe


def trained(recipe: TokenizerRecipe, run: Path, source: str = "bundled") -> ImageTokenizer:
    if not (run / "metrics.json").is_file():
        if run.is_dir():
            smalto.resume(run, progress=Lines())
        else:
            smalto.train(source, recipe, out=run, progress=Lines())
    return smalto.load(run)


class Lines(Progress):
    """A line every hundred steps."""

    def start(self, title: str, total: int | None, unit: str, done: int = 0) -> None:
        print(title, total, unit, flush=True)
        self.done = done

    def advance(self, number: int = 1, **metrics: Any) -> None:
        self.done += number
        if self.done % 100 == 0:
            print(
                self.done,
                {
                    name: value
                    for name, value in metrics.items()
                    if "psnr" in name or name == "usage"
                },
                flush=True,
            )

    def say(self, text: str) -> None:
        print(text, flush=True)
