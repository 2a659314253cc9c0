"""Conversion of projected codebooks to plain ones, for files and for other programs."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

from smalto.quantizers.code_space import ExplicitCodes
from smalto.quantizers.codebook import ProjectedCodebook

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def fold(module: ModuleT) -> ModuleT:
    """Return a copy with every projected codebook (SimVQ) replaced by a plain ``Codebook``.

    The codes are the same, so the same input gives the same indices.
    """
    folded = copy.deepcopy(module)
    for space in folded.modules():
        if isinstance(space, ExplicitCodes) and isinstance(space.embedding, ProjectedCodebook):
            space.embedding = space.embedding.fold()
    return folded
