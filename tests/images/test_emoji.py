"""Twemoji as a source: groups are folders, skin tones stay together."""

from __future__ import annotations

from collections import Counter

from smalto.images.emoji import base_emoji, emoji
from smalto.images.reading import read_image
from smalto.images.sources import credits_of, open_source


def test_all_emoji_lie_in_groups() -> None:
    files, held_out = emoji()
    assert len(files) == 4009
    groups = Counter(file.name.split("/")[0] for file in files)
    assert len(groups) == 11  # the tenth of them, and what belongs to none
    assert groups["other"] < 100
    assert groups["people-body"] > 2000
    assert 0.05 < len(held_out) / len(files) < 0.15
    assert read_image(files[0]).shape == (72, 72, 3)


def test_an_emoji_and_its_skin_tones_are_on_one_side() -> None:
    source = open_source("emoji")
    assert source.name == "emoji"
    assert source.held_out is not None
    names = {file.name for file in source.files}
    out = {base_emoji(name.split("/")[1].removesuffix(".png")) for name in source.held_out}
    training = {
        base_emoji(name.split("/")[1].removesuffix(".png")) for name in names - set(source.held_out)
    }
    assert not out & training
    assert base_emoji("1f44d-1f3fe") == base_emoji("1f44d") == "1f44d"
    assert base_emoji("0023-fe0f-20e3") == "23-20e3"


def test_the_authors_of_images_out_of_packages_are_named() -> None:
    assert "CC BY 4.0" in credits_of("emoji")
    assert "chelsea.png: Chelsea the cat" in credits_of("bundled")
    assert credits_of("photos") == ""
