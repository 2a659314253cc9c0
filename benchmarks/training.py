"""What several benchmarks train: a run that resumes after an interruption, and VQGAN's network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import smalto
from smalto.core.progress import Progress
from smalto.tokenizer import ImageTokenizer
from smalto.training.recipe_file import load_recipe
from smalto.training.tokenizer_recipe import TokenizerRecipe

VQGAN_RECIPE = Path(__file__).parent.parent / "recipes" / "photos-vqgan-small.toml"
GROUP_NORM = {  # VQGAN's network, which the recipe trained before local ones
    "tokenizer.autoencoder.norm": "group",
    "tokenizer.autoencoder.shortcuts": False,
    "tokenizer.autoencoder.patch": 1,
    "tokenizer.autoencoder.ch_mult": [1, 1, 2, 2],
    "channels_last": False,
}


def group_norm_recipe(settings: dict[str, Any] | None = None) -> TokenizerRecipe:
    """Return ``recipes/photos-vqgan-small.toml`` with VQGAN's network, which is not local."""
    return load_recipe(VQGAN_RECIPE, GROUP_NORM | (settings or {}))


def trained(
    recipe: TokenizerRecipe, run: Path, source: str = "bundled", start: str | None = None
) -> ImageTokenizer:
    """Return the tokenizer of ``run``; train or resume it first if it is not finished."""
    if not (run / "metrics.json").is_file():
        if run.is_dir():
            smalto.resume(run, progress=Lines())
        else:
            smalto.train(source, recipe, out=run, start=start, progress=Lines())
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
