"""ONNX: a tokenizer as two graphs of standard operators, for onnxruntime and browsers.

``encoder.onnx`` maps ``images`` [B, 3, H, W] in [-1, 1] to token maps, ``decoder.onnx`` maps them
back to ``images``. A token map is int64 [B, h, w]; there is one for each grid of the layout, called
``tokens`` if there is one, else ``tokens_1``, ``tokens_2`` and so on. Batch, height and width are
dynamic. The search is one product of all latent vectors and codes: 4 bytes x tokens x codes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smalto.core.errors import ConfigError, MissingExtra
from smalto.core.files import write_atomic
from smalto.core.layout import TokenLayout
from smalto.tokenizer import ImageTokenizer

ENCODER, DECODER, SETTINGS = "encoder.onnx", "decoder.onnx", "config.json"
OPSET = 20


class Encoding(nn.Module):
    """Images [B, C, H, W] -> token maps int64 [B, h, w], one per grid."""

    def __init__(self, tokenizer: ImageTokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        stride = self.tokenizer.stride
        layout = self.tokenizer.quantize.layout(
            images.shape[2] // stride, images.shape[3] // stride
        )
        tokens = self.tokenizer.encode(images).split(layout.lengths, dim=1)
        return tuple(
            block.view(images.shape[0], *grid)
            for block, grid in zip(tokens, layout.grids, strict=True)
        )


class Decoding(nn.Module):
    """Token maps int64 [B, h, w], one per grid -> images [B, C, H, W], clamped to [-1, 1]."""

    def __init__(self, tokenizer: ImageTokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, *maps: Tensor) -> Tensor:
        layout = TokenLayout(tuple((tokens.shape[1], tokens.shape[2]) for tokens in maps))
        tokens = torch.cat([tokens.flatten(1) for tokens in maps], dim=1)
        return self.tokenizer.decode(tokens, layout)


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
    if not tokenizer.has_decoder:
        raise ConfigError("this tokenizer has no decoder; only whole tokenizers become ONNX files.")
    if any(p.dtype != torch.float32 for p in tokenizer.parameters()):
        raise ConfigError(
            "got weights that are not float32; ONNX files hold float32. Convert with .float()."
        )
    tokenizer = tokenizer.folded().cpu().eval().requires_grad_(False)
    grids = tokenizer.quantize.layout(8, 8).grids
    names = ["tokens"] if len(grids) == 1 else [f"tokens_{n}" for n in range(1, len(grids) + 1)]
    configured = tokenizer.quantize.configured_layout
    rows, columns = configured.grids[-1] if configured else (8, 8)
    side = tokenizer.stride
    # No size of the examples is 1 or equal to another by chance: torch.export would fix it.
    images = torch.zeros(2, tokenizer.in_channels, 2 * rows * side, 3 * columns * side)
    batch, height, width = _size("batch"), _size("rows"), _size("columns")
    _export(
        Encoding(tokenizer),
        (images,),
        {"images": {0: batch, 2: side * height, 3: side * width}},
        ["images"],
        names,
        folder / ENCODER,
    )
    if len(set(grids)) == 1:  # of stages or heads
        maps = [torch.zeros(2, 3, 5, dtype=torch.int64) for _ in grids]
        sizes = [{0: batch, 1: height, 2: width} for _ in grids]
    else:
        maps = [torch.zeros(2, 3 + k, 5 + 2 * k, dtype=torch.int64) for k in range(len(grids))]
        sizes = [
            {0: batch, 1: _size(f"rows_{k}"), 2: _size(f"columns_{k}")} for k in range(len(grids))
        ]
    _export(
        Decoding(tokenizer),
        tuple(maps),
        {"maps": tuple(sizes)},
        names,
        ["images"],
        folder / DECODER,
    )
    settings = {
        "format": "smalto tokenizer in ONNX",
        "opset": OPSET,
        "fingerprint": tokenizer.fingerprint(),
        "codebook_size": tokenizer.quantize.codebook_size,
        "stride": side,
        "in_channels": tokenizer.in_channels,
        "tokens": names,
        "grids": None if configured is None else [list(grid) for grid in configured.grids],
        "search_bytes_per_token": 4 * tokenizer.quantize.codebook_size,
    }
    write_atomic(folder / SETTINGS, json.dumps(settings, indent=2) + "\n")


def _size(name: str) -> Any:
    return torch.export.Dim(name, max=2**15)


def _export(
    module: nn.Module,
    example: tuple[Tensor, ...],
    shapes: dict[str, Any],
    inputs: list[str],
    outputs: list[str],
    path: Path,
) -> None:
    program = torch.export.export(module, example, dynamic_shapes=shapes)
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


def _translations() -> dict[Any, Any]:
    """Return the operators of torch that the exporter does not know, in those of ONNX."""
    from onnxscript import opset20 as op

    def number(value: float) -> Any:
        return op.Constant(value_float=value)

    def integers(*values: int) -> Any:
        return op.Constant(value_ints=list(values))

    def integer(value: Any) -> Any:
        """Return a scalar: of a Python integer, or of a size that is computed in the graph."""
        return op.Constant(value_int=value) if isinstance(value, int) else op.Squeeze(value)

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

    def means(length: Any, parts: Any) -> Any:
        """Return the matrix [parts, length] whose product is the mean over each part."""
        one = integer(1)
        numbers = op.Range(integer(0), parts, one)
        starts = op.Div(op.Mul(numbers, length), parts)
        after = op.Mul(op.Add(numbers, one), length)
        ends = op.Div(op.Sub(op.Add(after, parts), one), parts)
        positions = op.Range(integer(0), length, one)
        starts, ends = op.Unsqueeze(starts, integers(1)), op.Unsqueeze(ends, integers(1))
        inside = op.And(op.GreaterOrEqual(positions, starts), op.Less(positions, ends))
        return op.Div(op.Cast(inside, to=1), op.Cast(op.Sub(ends, starts), to=1))

    def adaptive_mean(maps: Any, output_size: Any) -> Any:
        lengths = op.Shape(maps)
        rows, columns = (integer(size) for size in output_size)
        height, width = (op.Gather(lengths, integer(axis)) for axis in (2, 3))
        across = op.Transpose(means(width, columns), perm=[1, 0])
        return op.MatMul(op.MatMul(means(height, rows), maps), across)

    return {
        torch.ops.smalto.nearest_codes.default: nearest_codes,
        torch.ops.aten._adaptive_avg_pool2d.default: adaptive_mean,
    }
