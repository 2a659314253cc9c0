"""Models that are part of this package, and their names.

Each is a folder beside this file: the two files of a tokenizer with weights in bfloat16, its model
card, the authors of the images that it was trained on, and a recipe for fine-tuning it. A generator
has its tokenizer in a folder inside. A name is used wherever a folder is:
``smalto.load("photos-f8")``; the name of a generator stands for its tokenizer there.
"""

from __future__ import annotations

from pathlib import Path

CARD_FILE = "card.md"
TOKENIZER_FOLDER = "tokenizer"  # in the folder of a generator
RECIPE_FILE = "finetune.toml"
PRETRAINED_FOLDER = Path(__file__).parent


def pretrained_names() -> list[str]:
    """Return the names of the models in this package."""
    return sorted(path.parent.name for path in PRETRAINED_FOLDER.glob(f"*/{CARD_FILE}"))


def pretrained_folder(name: str) -> Path:
    """Return the folder of a model in this package."""
    return PRETRAINED_FOLDER / name


def is_pretrained(name: object) -> bool:
    """Return whether ``name`` is that of a model in this package.

    It is a str without any part of a path: ``"./photos-f8"`` is a path. A model of that name in the
    current folder takes precedence.
    """
    is_name = isinstance(name, str) and name in pretrained_names()
    return is_name and not (Path(str(name)) / "config.json").is_file()


def is_in_package(folder: Path) -> bool:
    """Return whether a folder is in this package, where weights are in bfloat16."""
    return PRETRAINED_FOLDER in folder.parents


def model_folder(name: str | Path) -> Path:
    """Return the folder of a model: ``name`` itself, or that of a model in this package."""
    return pretrained_folder(str(name)) if is_pretrained(name) else Path(name)


def tokenizer_folder(name: str | Path) -> Path:
    """Return the folder of a tokenizer by its folder or name; for a generator, of its tokenizer."""
    folder = model_folder(name)
    own = folder / TOKENIZER_FOLDER
    return own if (own / "config.json").is_file() else folder


def recorded_name(name: str | Path) -> str:
    """Return what a run or a token store records: the name, or the absolute path of a folder."""
    return str(name) if is_pretrained(name) else str(Path(name).resolve())


def folder_of_recorded(recorded: str) -> Path:
    """Return the folder of a tokenizer from what ``recorded_name`` returned, in any folder."""
    return pretrained_folder(recorded) if recorded in pretrained_names() else Path(recorded)


def finetuning_recipe(name: object) -> Path | None:
    """Return the recipe for fine-tuning a tokenizer of this package; None if it has none."""
    recipe = pretrained_folder(str(name)) / RECIPE_FILE
    return recipe if is_pretrained(name) and recipe.is_file() else None


def read_card(name: str) -> str:
    """Return the model card of a model in this package: Markdown."""
    return (pretrained_folder(name) / CARD_FILE).read_text(encoding="utf-8")


def summary_of(name: str) -> str:
    """Return the first paragraph of a model card after its title, in one line."""
    return " ".join(read_card(name).split("\n\n")[1].split())
