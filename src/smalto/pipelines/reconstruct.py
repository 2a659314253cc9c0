"""One picture to tokens and back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from smalto.core.device import Precision
from smalto.core.errors import DataError, RunError
from smalto.core.files import check_writable
from smalto.core.progress import Progress
from smalto.images.finding import find_pictures
from smalto.images.image_reader import PictureReader
from smalto.images.reading import LONGER_SIDE
from smalto.images.tensors import to_unit_range
from smalto.inference.runner import Runner
from smalto.metrics import psnr
from smalto.pipelines.decode import write_png
from smalto.tokenizer import ImageTokenizer


@dataclass(frozen=True)
class Reconstructed:
    """What came back of one picture."""

    path: Path
    psnr: float
    num_tokens: int
    bytes: int


def reconstruct(
    photo: str | Path,
    tokenizer: ImageTokenizer | str | Path,
    out: str | Path | None = None,
    *,
    overwrite: bool = False,
    longer_side: int | None = LONGER_SIDE,
    device: str = "auto",
    precision: Precision = "float32",
    progress: Progress | None = None,
) -> Reconstructed:
    """Encode one picture, decode it again and write what came back to ``out`` (default: ``NAME-reconstruction.png`` in this folder).

    Raises:
        DataError: the picture cannot be read.
        RunError: ``out`` exists and ``overwrite`` is off.
    """
    path = Path(out) if out else Path(f"{Path(photo).stem}-reconstruction.png")
    if path.exists() and not overwrite:
        raise RunError(f"{path} exists already. Replace it with --overwrite, or name another --out.")
    check_writable(path)
    files, _ = find_pictures(photo)
    if Path(photo).is_dir():
        raise DataError(f"{photo} is a folder; name one picture, or use `smalto tokenize` and `smalto decode`.")
    progress = progress or Progress()
    runner = Runner.of(tokenizer, device, precision, 1, progress)
    reader = PictureReader(files, runner.tokenizer.stride, progress, longer_side=longer_side, workers=0)
    progress.begin("reconstructing", 1, "pictures")
    pictures = list(reader)
    progress.end()
    if not pictures:
        raise DataError(f"{photo} cannot be read: {reader.skipped[0].reason}.")
    images = to_unit_range(pictures[0][1])[None]
    tokens = runner.encode(images)
    image = runner.decode(tokens, runner.tokenizer.layout(*images.shape[2:]))
    write_png(path, image[0])
    bits = (runner.tokenizer.quantize.codebook_size - 1).bit_length()
    return Reconstructed(path, float(psnr(image, images)), tokens.numel(), -(-tokens.numel() * bits // 8))
