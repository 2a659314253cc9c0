"""Export as safetensors shards for next-scale models (VAR, Tian et al. 2024, arXiv 2404.02905).

Each ``shard-00000.safetensors`` of n rows holds:

- ``idx_0``, ``idx_1``, ...: the tokens of one scale each, int64 [n, L_k];
- ``label_B``: class numbers, int64 [n], -1 for a row without a label;
- ``height``, ``width``: of the original image in pixels, int64 [n];
- ``crop``: (top, left, height, width) of the part that was tokenized in pixels, int64 [n, 4];
- a metadata entry ``smalto``: the export header as JSON.

``shard-00000.ids.txt`` holds the ids of the rows, one per line.

Tokens are int64 because ``torch.nn.functional.cross_entropy`` requires int64 targets, and
``torch.nn.Embedding``, ``max`` and ``unique`` do not accept uint16. A token therefore takes 8
bytes; in the token store it takes 2, or 4 above 65,536 codes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy
import safetensors.numpy

from smalto.store.exports.export_header import METADATA_KEY, ExportHeader, split_into_shards
from smalto.store.schema import TokenRow


def write_var(rows: Iterator[TokenRow], header: ExportHeader, folder: Path) -> None:
    """Write rows as safetensors shards with one tensor per scale."""
    metadata = {METADATA_KEY: header.to_json()}
    for number, group in split_into_shards(rows, header):
        # not save_file: it creates the file with mode 0600 instead of the umask's
        data = safetensors.numpy.save(_to_tensors(group, header), metadata)
        (folder / f"shard-{number}.safetensors").write_bytes(data)
        (folder / f"shard-{number}.ids.txt").write_text(
            "".join(f"{row.id}\n" for row in group), encoding="utf-8", newline="\n"
        )


def read_var(header: ExportHeader, folder: Path) -> Iterator[TokenRow]:
    """Yield the rows of a var export."""
    layout = header.store.layout
    assert layout is not None
    for path in sorted(folder.glob("shard-*.safetensors")):
        tensors = safetensors.numpy.load_file(path)
        tokens = numpy.concatenate([tensors[f"idx_{k}"] for k in range(len(layout.grids))], axis=1)
        ids = path.with_name(f"{path.stem}.ids.txt").read_text(encoding="utf-8").split("\n")[:-1]
        columns = (tensors[name].tolist() for name in ("label_B", "height", "width", "crop"))
        for id, row, label, height, width, crop in zip(ids, tokens, *columns, strict=True):
            yield TokenRow(id, row, layout, header.label(label), height, width, tuple(crop))


def _to_tensors(group: list[TokenRow], header: ExportHeader) -> dict[str, numpy.ndarray]:
    assert header.store.layout is not None
    tokens = numpy.stack([numpy.asarray(row.tokens, numpy.int64) for row in group])
    boundaries = numpy.cumsum(header.store.layout.lengths)[:-1]
    scales = numpy.split(tokens, boundaries, axis=1)
    tensors = {f"idx_{k}": numpy.ascontiguousarray(scale) for k, scale in enumerate(scales)}
    tensors["label_B"] = numpy.array(header.class_numbers(group), numpy.int64)
    tensors["height"] = numpy.array([row.height for row in group], numpy.int64)
    tensors["width"] = numpy.array([row.width for row in group], numpy.int64)
    tensors["crop"] = numpy.array([row.crop for row in group], numpy.int64)
    return tensors
