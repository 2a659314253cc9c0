"""Making new images with a generator: PNG files, a contact sheet, and their tokens."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from smalto.core.allocator import retain_freed_memory
from smalto.core.device import Precision, fastest_precision, memory_errors, resolve_device
from smalto.core.errors import InputError
from smalto.core.files import named_path
from smalto.core.progress import Progress
from smalto.generator import Fixed, Generator, Samples, load_generator
from smalto.generator.inpainting import box_mask, kept_tokens
from smalto.generator.sample_folder import (
    SampleFolder,
    check_npz,
    manifest_of_npz,
    write_manifest,
)
from smalto.generator.sampling import SamplingSettings
from smalto.images.npz import write_npz
from smalto.images.single_image import fitted, fitted_mask, read_mask, read_whole
from smalto.images.tensors import to_unit_range

SEEDS_PER_RUN = 2**32  # image i of seed s has the seed s * 2^32 + i


@dataclass(frozen=True)
class Generated:
    """What was made.

    Attributes:
        folder: of the images.
        paths: of the PNG files, in order.
        num_new: images made now; the others were there already.
        npz: the file for evaluators, if it was asked for.
    """

    folder: Path
    paths: list[Path]
    num_new: int
    npz: Path | None


@dataclass(frozen=True)
class _Wanted:
    """One image to make."""

    number: int
    label: int | None
    seed: int
    name: str


@retain_freed_memory()
def generate(
    generator: Generator | str | Path,
    out: str | Path = "samples",
    *,
    label: str | int | None = None,
    count: int = 16,
    seed: int = 0,
    guidance: float = 1.5,
    top_k: int = 0,
    top_p: float = 0.0,
    temperature: float = 1.0,
    smooth: bool = False,
    edit: str | Path | None = None,
    box: tuple[int, int, int, int] | None = None,
    mask: str | Path | None = None,
    npz: str | Path | None = None,
    overwrite: bool = False,
    batch: int | None = None,
    device: str = "auto",
    precision: Precision | None = None,
    progress: Progress | None = None,
) -> Generated:
    """Make new images and write them as PNG files, with a contact sheet, a manifest and, if Lance
    is installed, a store of their tokens.

    The same call again continues after an interruption; with a larger ``count`` it adds images.

    Args:
        generator: a Generator, its folder or run, or the name of one in this package.
        out: folder for the images.
        label: name of a class, a part of a name that no other class has, or its number; None: all
            classes in turn, so that each has as many images as the others, give or take one; for
            an edit, no label.
        count: images in all.
        seed: an image depends on (seed, its number, its label) and the settings alone.
        guidance, top_k, top_p, temperature, smooth: see ``Generator.generate``.
        edit: an image of which a part is painted again; it is cropped and resized to the
            generator's size.
        box: (x, y, width, height) of that part in pixels of ``edit``.
        mask: instead of ``box``: an image of the size of ``edit``, white where to paint.
        npz: also write all images to this file as uint8 [N, H, W, 3] in ``arr_0``, which the usual
            evaluators of FID read.
        overwrite: replace the images in ``out``.
        batch: images at a time; None: as many as a cache of 1 GiB holds.
        device: of the model.
        precision: "float32" or "bf16"; None: bf16 if the device is fast at it.
        progress: receives images and messages.

    Raises:
        InputError: a label, box or setting is out of range.
        DataError: ``edit`` or ``mask`` cannot be read.
        RunError: the generator does not exist, or ``out`` holds other images.
    """
    progress = progress or Progress()
    folder = named_path(out, "the images")
    target = npz if npz is None else named_path(npz, "the .npz file")
    model = generator if isinstance(generator, Generator) else load_generator(generator)
    settings = SamplingSettings(guidance, top_k, top_p, temperature, smooth)
    settings.check()
    if count < 1 or (batch is not None and batch < 1):
        raise InputError(f"got count {count} and batch {batch}; expected at least 1.")
    if not 0 <= seed < SEEDS_PER_RUN // 2:
        raise InputError(f"got seed {seed}; expected 0 to {SEEDS_PER_RUN // 2 - 1}.")
    chosen = None if label is None else model.config.class_number(label)
    place = resolve_device(device)
    precision = precision or fastest_precision(place)
    fixed = _fixed_tokens(model, edit, box, mask)
    manifest = _manifest(model, chosen, seed, settings, precision, fixed)
    wanted = _requests(model, chosen, count, seed, takes_turns=edit is None)
    if target is not None:
        check_npz(target, manifest, overwrite)
    samples = SampleFolder.prepare(folder, model, manifest, overwrite)
    progress.message(f"device {place}, {precision}")
    missing = [image for image in wanted if not samples.has(image.name)]
    fast = model.for_inference(precision).to(place)
    progress.start("generating", count, "images", done=count - len(missing))
    for images, made in _made(fast, missing, settings, fixed, batch, progress):
        samples.add([(image.name, image.label) for image in images], made)
    progress.finish()
    paths = samples.finish([image.name for image in wanted])
    if target is not None:
        write_npz(target, paths, progress)
        write_manifest(manifest_of_npz(target), manifest | {"count": count})
    return Generated(folder, paths, len(missing), target)


def _made(
    generator: Generator,
    wanted: list[_Wanted],
    settings: SamplingSettings,
    fixed: Fixed | None,
    batch: int | None,
    progress: Progress,
) -> Iterator[tuple[list[_Wanted], Samples]]:
    """Make images, as many at a time as the cache holds."""
    if not wanted:
        return
    at_a_time = min(batch or generator.images_at_a_time(), len(wanted))
    device = generator.transformer.head.weight.device
    cache = generator.new_cache(at_a_time)
    for start in range(0, len(wanted), at_a_time):
        images = wanted[start : start + at_a_time]
        labels = [image.label for image in images if image.label is not None]
        with memory_errors(device, len(images)):
            samples = generator.generate(
                labels or None,
                seeds=[image.seed for image in images],
                fixed=fixed,
                cache=cache,
                **asdict(settings),
            )
        yield images, samples
        progress.advance(len(images))


def _requests(
    generator: Generator, label: int | None, count: int, seed: int, takes_turns: bool
) -> list[_Wanted]:
    """Return the images to make; without a label of all classes in turn, or of none."""
    config = generator.config
    wanted = []
    for number in range(count):
        own = label
        if own is None and config.num_classes and takes_turns:
            own = number % config.num_classes
        name = f"{number:06d}.png"
        if own is not None:
            name = f"{number:06d}-{_file_name(config.class_name(own))}.png"
        wanted.append(_Wanted(number, own, seed * SEEDS_PER_RUN + number, name))
    return wanted


def _file_name(label: str) -> str:
    """Return a label as a part of a file name."""
    return re.sub(r"[^\w.-]+", "-", label)[:80]


def _fixed_tokens(
    generator: Generator,
    edit: str | Path | None,
    box: tuple[int, int, int, int] | None,
    mask: str | Path | None,
) -> Fixed | None:
    """Return the tokens of an image that an edit keeps; None without an edit."""
    if edit is None:
        if box is not None or mask is not None:
            raise InputError("got a box or a mask without an image; name the image to edit.")
        return None
    if (box is None) == (mask is None):
        raise InputError("got an image to edit; expected either a box or a mask with it.")
    image = read_whole(edit)
    size = image.shape[0], image.shape[1]
    repaint = box_mask(size, box) if box is not None else read_mask(mask or "", size)
    pixels = to_unit_range(fitted(image, *generator.image_size))
    device = next(generator.tokenizer.parameters()).device
    tokens = generator.tokenizer.encode(pixels[None].to(device)).cpu()
    mask_of_image = fitted_mask(repaint, *generator.image_size)
    return Fixed(tokens, kept_tokens(mask_of_image, generator.config.layout))


def _manifest(
    generator: Generator,
    label: int | None,
    seed: int,
    settings: SamplingSettings,
    precision: Precision,
    fixed: Fixed | None,
) -> dict[str, Any]:
    """Return what decides the images, as JSON."""
    config = generator.config
    labels = "all in turn" if config.num_classes and fixed is None else "none"
    return {
        "generator": generator.fingerprint(),
        "label": labels if label is None else config.class_name(label),
        "seed": seed,
        "seeds": f"image i has the seed {seed} * 2^32 + i",
        **asdict(settings),
        "precision": precision,
        "edit": "" if fixed is None else _digest(fixed),
    }


def _digest(fixed: Fixed) -> str:
    """Return a hash of the tokens that an edit keeps."""
    kept = fixed.tokens.masked_fill(~fixed.mask, -1)
    return hashlib.sha256(kept.cpu().numpy().tobytes()).hexdigest()
