"""Projected codebooks become plain ones, for files and for programs that know no other."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

from smalto.quantizers.codebook import ProjectedCodebook
from smalto.quantizers.vector import VectorQuantizer

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def fold(module: ModuleT) -> ModuleT:
    """A copy in which every projected codebook (SimVQ) is the plain ``Codebook`` of the same codes: same input, same indices."""
    folded = copy.deepcopy(module)
    for quantizer in folded.modules():
        if isinstance(quantizer, VectorQuantizer) and isinstance(
            quantizer.embedding, ProjectedCodebook
        ):
            quantizer.embedding = quantizer.embedding.fold()
    return folded
