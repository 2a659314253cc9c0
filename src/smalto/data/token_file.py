"""Tokens of a few pictures in one safetensors file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy
import safetensors
import safetensors.numpy
import torch
from pydantic import Field
from torch import Tensor

from smalto.config import Config, parse_config
from smalto.errors import DataError
from smalto.files import write_atomic
from smalto.layout import TokenLayout


class _Header(Config):
    """What the file says beside its tensors."""

    format_version: Literal[2] = 2
    names: list[str]
    codebook_size: int = Field(ge=1)
    tokenizer: str
    fingerprint: str
    transform: str
    precision: Literal["float32", "bf16"]


@dataclass(frozen=True)
class TokenFile:
    """Tokens and what is needed to decode them.

    Attributes:
        names: of the pictures, relative, with ``/``.
        tokens: one int64 [L_i] per picture.
        layouts: the layout of every picture's tokens.
        codebook_size: tokens are in [0, codebook_size).
        tokenizer: where the tokenizer was.
        fingerprint: which tokenizer it was.
        transform: what was done to the pictures first.
        precision: what the encoder computed in.
    """

    names: list[str]
    tokens: list[Tensor]
    layouts: list[TokenLayout]
    codebook_size: int
    tokenizer: str
    fingerprint: str
    transform: str
    precision: str

    def save(self, path: str | Path) -> None:
        """Write the file in one step."""
        dtype = numpy.uint16 if self.codebook_size <= 2**16 else numpy.uint32
        flat = numpy.concatenate([t.numpy().astype(dtype) for t in self.tokens]) if self.tokens else numpy.zeros(0, dtype)
        num_grids = len(self.layouts[0].grids) if self.layouts else 1
        grids = numpy.array([layout.grids for layout in self.layouts], dtype=numpy.int32).reshape(-1, num_grids, 2)
        header = {key: value for key, value in vars(self).items() if key not in ("tokens", "layouts")}
        metadata = {"smalto": json.dumps({"format_version": 2, **header}, sort_keys=True)}
        write_atomic(path, safetensors.numpy.save({"tokens": flat, "grids": grids}, metadata))

    @classmethod
    def load(cls, path: str | Path) -> TokenFile:
        """Read and check a file.

        Raises:
            DataError: not there, not a token file, damaged, of another format, or its parts do not fit.
        """
        path = Path(path)
        if not path.is_file():
            raise DataError(f"{path} does not exist: token files are made by `smalto tokenize`.")
        try:
            with safetensors.safe_open(path, "numpy") as file:
                header = parse_config(_Header, json.loads((file.metadata() or {})["smalto"]), str(path))
                flat, grids = file.get_tensor("tokens"), file.get_tensor("grids")
        except (safetensors.SafetensorError, OSError, KeyError, ValueError) as error:
            raise DataError(f"{path} is not a token file of smalto, or it is damaged ({error}).") from None
        whole = flat.ndim == 1 and flat.dtype.kind == "u" and grids.ndim == 3 and grids.shape[2] == 2 and grids.dtype.kind == "i"
        whole = whole and grids.shape[1] > 0 and bool((grids > 0).all())
        lengths = grids.astype(numpy.int64).prod(axis=2).sum(axis=1) if whole else numpy.zeros(0, numpy.int64)
        top = int(flat.max(initial=0)) if whole else -1
        if not whole or int(lengths.sum()) != len(flat) or len(grids) != len(header.names) or top >= header.codebook_size:
            raise DataError(
                f"{path} contradicts itself: {len(header.names)} names, grids {list(grids.shape)} of {int(lengths.sum())} tokens together, "
                f"tokens {list(flat.shape)} up to {top}, {header.codebook_size} codes. Write it again."
            )
        tokens = list(torch.from_numpy(flat.astype(numpy.int64)).split(lengths.tolist()))
        facts = header.model_dump(exclude={"format_version"})
        return cls(tokens=tokens, layouts=[TokenLayout(tuple(map(tuple, rows))) for rows in grids.tolist()], **facts)
