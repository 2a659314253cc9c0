"""Reconstructing one image: encode, decode, compare."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from smalto.core.device import Precision
from smalto.core.errors import RunError
from smalto.core.files import check_writable
from smalto.core.progress import Progress
from smalto.images.reading import LONGER_SIDE
from smalto.images.single_image import png_path, read_pixels, single_file, write_png
from smalto.images.tensors import to_unit_range
from smalto.inference.inference_tokenizer import InferenceTokenizer
from smalto.interop.open_tokenizer import open_tokenizer
from smalto.metrics import psnr
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
        tokenizer: a tokenizer, its name, or the folder of one or of a run.
        out: the PNG file; None: ``NAME-reconstruction.png`` in the current folder.
        overwrite: replace ``out``.
        longer_side: a larger image is reduced to this; None or 0 keeps its size.
        device, precision: of the model.
        progress: receives messages.

    Raises:
        DataError: the image cannot be read.
        RunError: ``out`` exists and ``overwrite`` is off.
    """
    path = png_path(out or f"{Path(photo).stem}-reconstruction.png")
    if path.exists() and not overwrite:
        raise RunError(
            f"{path} exists already. Name another --out, or replace it with --overwrite."
        )
    check_writable(path)
    file = single_file(photo)
    progress = progress or Progress()
    inference = InferenceTokenizer.of(
        open_tokenizer(tokenizer, progress), device, precision, 1, progress
    )
    progress.start("reconstructing", 1, "images")
    # uint8: in float32 only while it is needed
    original = read_pixels(file, inference.tokenizer.stride, longer_side, progress)
    progress.finish()
    tokens = inference.encode(to_unit_range(original))
    image = inference.decode(tokens, inference.tokenizer.layout(*original.shape[2:]))
    write_png(path, image[0])
    bits = (inference.tokenizer.quantize.codebook_size - 1).bit_length()
    similarity = float(psnr(image, to_unit_range(original)))
    return Reconstructed(path, similarity, tokens.numel(), -(-tokens.numel() * bits // 8))
