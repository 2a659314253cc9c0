"""Tokenizers that are part of this package, and their names.

Each is a folder beside this file: a tokenizer's two files with weights in bfloat16, and its model
card. A name is used wherever a tokenizer's folder is: ``smalto.load("photos-f8")``.
"""

from __future__ import annotations

from pathlib import Path

CARD_FILE = "card.md"
_FOLDER = Path(__file__).parent


def pretrained_names() -> list[str]:
    """Return the names of the tokenizers in this package."""
    return sorted(path.parent.name for path in _FOLDER.glob(f"*/{CARD_FILE}"))


def is_pretrained(name: str | Path) -> bool:
    """Return whether a name is that of a tokenizer in this package.

    A file or folder of that name in the current folder comes first.
    """
    return str(name) in pretrained_names() and not Path(name).exists()


def tokenizer_folder(name: str | Path) -> Path:
    """Return the folder of a tokenizer: ``name`` itself, or that of a tokenizer in this package."""
    return _FOLDER / name if is_pretrained(name) else Path(name)


def recorded_name(name: str | Path) -> str:
    """Return what a run or a token store records: the name, or the absolute path of a folder."""
    return str(name) if is_pretrained(name) else str(Path(name).resolve())


def read_card(name: str) -> str:
    """Return the model card of a tokenizer in this package: Markdown."""
    return (_FOLDER / name / CARD_FILE).read_text(encoding="utf-8")


def summary_of(name: str) -> str:
    """Return the first paragraph of a model card after its title, in one line."""
    return " ".join(read_card(name).split("\n\n")[1].split())
