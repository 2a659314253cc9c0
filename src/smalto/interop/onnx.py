"""ONNX: a tokenizer as two graphs of standard operators, for onnxruntime and browsers.

``encoder.onnx`` maps ``images`` [B, 3, H, W] in [-1, 1] to token maps, ``decoder.onnx`` maps them
back to ``images``. A token map is int64 [B, h, w]; there is one for each grid of the layout, called
``tokens`` if there is one, else ``tokens_1``, ``tokens_2`` and so on. Batch, height and width are
dynamic. The search is one product of all latent vectors and codes: 4 bytes x tokens x codes.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from smalto.core.errors import ConfigError, MissingExtra
from smalto.core.files import write_atomic
from smalto.tokenizer import ImageTokenizer
from smalto.tokenizer.exporting import export_tokenizer

ENCODER, DECODER, SETTINGS = "encoder.onnx", "decoder.onnx", "config.json"
OPSET = 20


@torch.no_grad()
def write_onnx(tokenizer: ImageTokenizer, folder: Path) -> None:
    """Write ``encoder.onnx``, ``decoder.onnx`` and ``config.json`` into a folder.

    Raises:
        MissingExtra: onnx or onnxscript is not installed.
        ConfigError: the tokenizer has no decoder, or its weights are not float32.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError:
        raise MissingExtra("onnxscript", "export", "ONNX files") from None
    if any(parameter.dtype != torch.float32 for parameter in tokenizer.parameters()):
        raise ConfigError(
            "got weights that are not float32; ONNX files hold float32. Convert with .float()."
        )
    with _without_notes_of_the_exporter():
        encoder, decoder, num_maps = export_tokenizer(tokenizer)
        numbers = range(1, num_maps + 1)
        names = ["tokens"] if num_maps == 1 else [f"tokens_{number}" for number in numbers]
        folder.mkdir(parents=True, exist_ok=True)
        _write(encoder, ["images"], names, folder / ENCODER)
        _write(decoder, names, ["images"], folder / DECODER)
    configured = tokenizer.quantize.configured_layout
    settings = {
        "format": "smalto tokenizer in ONNX",
        "opset": OPSET,
        "fingerprint": tokenizer.fingerprint(),
        "codebook_size": tokenizer.quantize.codebook_size,
        "stride": tokenizer.stride,
        "in_channels": tokenizer.in_channels,
        "tokens": names,
        "grids": None if configured is None else [list(grid) for grid in configured.grids],
        "search_bytes_per_token": 4 * tokenizer.quantize.codebook_size,
    }
    write_atomic(folder / SETTINGS, json.dumps(settings, indent=2) + "\n")


def _write(program: ExportedProgram, inputs: list[str], outputs: list[str], path: Path) -> None:
    exported = torch.onnx.export(
        program,
        input_names=inputs,
        output_names=outputs,
        opset_version=OPSET,
        dynamo=True,
        external_data=False,
        verbose=False,
        custom_translation_table=_translations(),
    )
    assert exported is not None
    exported.save(str(path), external_data=False)


@contextmanager
def _without_notes_of_the_exporter() -> Iterator[None]:
    """Silence what the exporter tells its developers: torchvision is missing, and so on."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _translations() -> dict[Any, Any]:
    """Return the operators of torch that the exporter does not know, in those of ONNX."""
    from onnxscript import opset20

    op: Any = opset20  # its types do not know values that are computed in the graph

    def number(value: float) -> Any:
        return op.Constant(value_float=value)

    def integers(*values: int) -> Any:
        return op.Constant(value_ints=list(values))

    def nearest_codes(queries: Any, codebook: Any, cosine: bool, backend: str, exact: bool) -> Any:
        if cosine:
            squares = op.ReduceSum(op.Mul(codebook, codebook), integers(1), keepdims=1)
            codes = op.Div(codebook, op.Max(op.Sqrt(squares), number(1e-30)))
            scores = op.MatMul(queries, op.Transpose(codes, perm=[1, 0]))
        else:
            mean = op.ReduceMean(codebook, integers(0), keepdims=1)
            codes = op.Sub(codebook, mean)
            halves = op.Mul(
                op.ReduceSum(op.Mul(codes, codes), integers(1), keepdims=0), number(0.5)
            )
            product = op.MatMul(op.Sub(queries, mean), op.Transpose(codes, perm=[1, 0]))
            scores = op.Sub(product, halves)
        return op.ArgMax(scores, axis=1, keepdims=0)

    return {
        torch.ops.smalto.nearest_codes.default: nearest_codes,
    }
