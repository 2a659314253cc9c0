"""Split into training images and held-out images. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy

from smalto.core.errors import DataError
from smalto.core.files import name_hash
from smalto.core.text import printable

if TYPE_CHECKING:
    from torch import Tensor

    from smalto.images.image_set import ImageSet

HELD_OUT_SHARE = 0.1
MIN_IMAGES_TO_HOLD_OUT = 4


def is_held_out(name: str) -> bool:
    """Return whether an image belongs to the held-out 10 %; this depends on its name alone."""
    return name_hash(name, "held out") < HELD_OUT_SHARE * 2**64


def held_out_order(names: list[str]) -> list[int]:
    """Return the positions of ``names`` in the order in which they are held out.

    The first ones are held out; the next follow if none of them can be read.
    """
    return sorted(range(len(names)), key=lambda i: (name_hash(names[i], "held out"), names[i]))


def split(images: ImageSet) -> tuple[list[int], list[int]]:
    """Return the indices of the training images and of the held-out images.

    10 % are held out by the hash of their names, and at least one that can be read. With fewer
    than 4 images, none is held out.

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
            failed = [*images.skipped, *images.unreadable.items()][:8]
            reasons = "; ".join(f"{printable(name)} ({reason})" for name, reason in failed)
            raise DataError(
                f"none of the {len(names)} images can be read: {reasons}. Name another folder."
            )
        # Only held-out images can be read. Training on them is better than not training at all.
        return list(range(len(names))), []
    return train, sorted(held_out)


def split_by_name(images: ImageSet, held_out: Sequence[str]) -> tuple[list[int], list[int]]:
    """Return the indices of the training images and of the images named in ``held_out``."""
    names = set(held_out)
    train = [i for i, name in enumerate(images.names) if name not in names]
    out = [i for i, name in enumerate(images.names) if name in names]
    return train, out


def split_names(names: Iterable[str], rule: Callable[[str], bool] = is_held_out) -> numpy.ndarray:
    """Return for each name whether it is held out, bool [n]; equal names are on one side.

    Like ``split``, without reading images and without a list of all names: with fewer than 4
    images none is held out, and otherwise at least one.

    Args:
        names: of images; a name may occur several times.
        rule: whether a name is held out.
    """
    mask = bytearray()
    distinct: set[str] = set()  # of the first names, to count the images
    first: list[str] = []  # all names until one is held out
    for name in names:
        mask.append(rule(name))
        if len(distinct) < MIN_IMAGES_TO_HOLD_OUT:
            distinct.add(name)
        if not mask[-1] and len(first) == len(mask) - 1:
            first.append(name)
    result = numpy.frombuffer(bytes(mask), dtype=bool).copy()
    if len(distinct) < MIN_IMAGES_TO_HOLD_OUT:
        result[:] = False
    elif len(first) == len(result):  # none was held out
        least = first[held_out_order(first)[0]]
        result[:] = [name == least for name in first]
    return result


def _readable(images: ImageSet, indices: Sequence[int]) -> Iterator[Tensor]:
    for start in range(0, len(indices), 16):
        images.prefetch(indices[start : start + 16])
        for i in indices[start : start + 16]:
            image = images.get(i)
            if image is not None:
                yield image
