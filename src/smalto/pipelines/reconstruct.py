"""Reconstructing one image: encode, decode, compare."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from smalto.core.device import Precision
from smalto.core.errors import DataError, RunError
from smalto.core.files import check_writable
from smalto.core.progress import Progress
from smalto.images.finding import find_images
from smalto.images.image_reader import ImageReader
from smalto.images.reading import LONGER_SIDE
from smalto.images.tensors import to_unit_range
from smalto.inference.inference_tokenizer import InferenceTokenizer
from smalto.metrics import psnr
from smalto.pipelines.decode import write_png
from smalto.tokenizer import ImageTokenizer


@dataclass(frozen=True)
class Reconstructed:
    """Reconstruction of one image.

    Attributes:
        path: of the PNG file.
        psnr: in dB.
        num_tokens: of the image.
        bytes: size of the tokens, packed at the bits that one code needs.
    """

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
    """Encode one image, decode its tokens and write the reconstruction as PNG.

    Args:
        photo: an image file.
        tokenizer: a tokenizer, or the folder of one or of a run.
        out: the PNG file; None: ``NAME-reconstruction.png`` in the current folder.
        overwrite: replace ``out``.
        longer_side: a larger image is reduced to this; None or 0 keeps its size.
        device, precision: of the model.
        progress: receives messages.

    Raises:
        DataError: the image cannot be read.
        RunError: ``out`` exists and ``overwrite`` is off.
    """
    path = Path(out) if out else Path(f"{Path(photo).stem}-reconstruction.png")
    if path.exists() and not overwrite:
        raise RunError(
            f"{path} exists already. Name another --out, or replace it with --overwrite."
        )
    check_writable(path)
    files, _ = find_images(photo)
    if Path(photo).is_dir():
        raise DataError(
            f"got the folder {photo}; expected one image. Name an image, or use `smalto tokenize` "
            "and `smalto decode` for a folder."
        )
    progress = progress or Progress()
    inference = InferenceTokenizer.of(tokenizer, device, precision, 1, progress)
    reader = ImageReader(
        files, inference.tokenizer.stride, progress, longer_side=longer_side, workers=0
    )
    progress.start("reconstructing", 1, "images")
    found = list(reader)
    progress.finish()
    if not found:
        raise DataError(f"{photo} cannot be read: {reader.skipped[0].reason}.")
    images = to_unit_range(found[0][1])[None]
    tokens = inference.encode(images)
    image = inference.decode(tokens, inference.tokenizer.layout(*images.shape[2:]))
    write_png(path, image[0])
    bits = (inference.tokenizer.quantize.codebook_size - 1).bit_length()
    return Reconstructed(
        path, float(psnr(image, images)), tokens.numel(), -(-tokens.numel() * bits // 8)
    )
