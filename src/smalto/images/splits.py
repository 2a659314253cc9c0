"""Which images training never sees. No torch here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from smalto.core.errors import DataError
from smalto.core.files import name_hash
from smalto.images.image_file import printable

if TYPE_CHECKING:
    from torch import Tensor

    from smalto.images.image_set import ImageSet

HELD_OUT_SHARE = 0.1
MIN_IMAGES_TO_HOLD_OUT = 4


def is_held_out(name: str) -> bool:
    """Whether an image belongs to the 10 % that training never sees. It depends on the name alone."""
    return name_hash(name, "held out") < HELD_OUT_SHARE * 2**64


def held_out_order(names: list[str]) -> list[int]:
    """Positions of ``names`` in the order in which they are held out: the first are, and the next where none of them is readable."""
    return sorted(range(len(names)), key=lambda i: (name_hash(names[i], "held out"), names[i]))


def split(images: ImageSet) -> tuple[list[int], list[int]]:
    """Numbers of the images to train on and of those held out: 10 % by hash of name, at least one readable one.

    Fewer than 4 images hold nothing out.

    Raises:
        DataError: no image can be read.
    """
    names = images.names
    held_out: list[int] = []
    if len(names) >= MIN_IMAGES_TO_HOLD_OUT:
        held_out = [i for i, name in enumerate(names) if is_held_out(name)]
        if not any(True for _ in _readable(images, held_out)):
            for i in held_out_order(names):
                if i not in held_out:
                    held_out.append(i)
                    if images.get(i) is not None:
                        break
    out = set(held_out)
    train = [i for i in range(len(names)) if i not in out]
    if not any(True for _ in _readable(images, train)):
        if not any(True for _ in _readable(images, held_out)):
            reasons = "; ".join(
                f"{printable(name)} ({reason})" for name, reason in images.skipped[:8]
            )
            raise DataError(f"none of the {len(names)} images can be read: {reasons}.")
        return list(
            range(len(names))
        ), []  # the only readable ones are held out: better to train on them than not at all
    return train, sorted(held_out)


def split_by_name(images: ImageSet, held_out: Sequence[str]) -> tuple[list[int], list[int]]:
    """Like ``split``, with the names to hold out given."""
    names = set(held_out)
    return [i for i, n in enumerate(images.names) if n not in names], [
        i for i, n in enumerate(images.names) if n in names
    ]


def _readable(images: ImageSet, indices: Sequence[int]) -> Iterator[Tensor]:
    for start in range(0, len(indices), 16):
        images.prefetch(indices[start : start + 16])
        for i in indices[start : start + 16]:
            image = images.get(i)
            if image is not None:
                yield image
