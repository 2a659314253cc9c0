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


class _Header(Config):
    """What the file says beside its tensors."""

    format_version: Literal[1] = 1
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
        grids: (rows, columns) per picture.
        codebook_size: tokens are in [0, codebook_size).
        tokenizer: where the tokenizer was.
        fingerprint: which tokenizer it was.
        transform: what was done to the pictures first.
        precision: what the encoder computed in.
    """

    names: list[str]
    tokens: list[Tensor]
    grids: list[tuple[int, int]]
    codebook_size: int
    tokenizer: str
    fingerprint: str
    transform: str
    precision: str

    def save(self, path: str | Path) -> None:
        """Write the file in one step."""
        dtype = numpy.uint16 if self.codebook_size <= 2**16 else numpy.uint32
        flat = numpy.concatenate([t.numpy().astype(dtype) for t in self.tokens]) if self.tokens else numpy.zeros(0, dtype)
        grids = numpy.array(self.grids, dtype=numpy.int32).reshape(-1, 2)
        header = {key: value for key, value in vars(self).items() if key not in ("tokens", "grids")}
        metadata = {"smalto": json.dumps({"format_version": 1, **header}, sort_keys=True)}
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
        whole = flat.ndim == 1 and flat.dtype.kind == "u" and grids.ndim == 2 and grids.shape[1:] == (2,) and grids.dtype.kind == "i"
        lengths = grids.astype(numpy.int64).prod(axis=1) if whole else numpy.zeros(0, numpy.int64)
        top = int(flat.max(initial=0)) if whole else -1
        if not whole or int(lengths.sum()) != len(flat) or len(grids) != len(header.names) or top >= header.codebook_size:
            raise DataError(
                f"{path} contradicts itself: {len(header.names)} names, grids {list(grids.shape)} of {int(lengths.sum())} tokens together, "
                f"tokens {list(flat.shape)} up to {top}, {header.codebook_size} codes. Write it again."
            )
        tokens = list(torch.from_numpy(flat.astype(numpy.int64)).split(lengths.tolist()))
        facts = header.model_dump(exclude={"format_version"})
        return cls(tokens=tokens, grids=[(int(h), int(w)) for h, w in grids], **facts)
