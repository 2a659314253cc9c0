"""Making new images with a generator: PNG files, a contact sheet, and their tokens."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from smalto.core.allocator import retain_freed_memory
from smalto.core.device import Precision, fastest_precision, memory_errors, resolve_device
from smalto.core.errors import InputError, RunError
from smalto.core.files import check_writable, named_path, read_json, remove_leftovers, write_atomic
from smalto.core.progress import Progress
from smalto.generator import Fixed, Generator, GeneratorConfig, Samples, load_generator
from smalto.generator.inpainting import box_mask, kept_tokens
from smalto.generator.sampling import SamplingSettings
from smalto.images.contact_sheet import write_contact_sheet
from smalto.images.npz import write_npz
from smalto.images.single_image import fitted, fitted_mask, read_mask, read_whole, write_png
from smalto.images.tensors import to_unit_range

if TYPE_CHECKING:  # it needs Lance
    from smalto.store.token_store import TokenStore

MANIFEST_FILE = "manifest.json"
CONTACT_SHEET_FILE = "contact-sheet.png"
STORE_FOLDER = "tokens.lance"
ON_CONTACT_SHEET = 64  # images
SMALL_FILES = 64  # of the store, before they are joined
_OWN_IMAGE = re.compile(r"\d{6,}(-.*)?\.png")
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
    chosen = _class_number(model, label)
    place = resolve_device(device)
    precision = precision or fastest_precision(place)
    fixed = _fixed_tokens(model, edit, box, mask)
    manifest = _manifest(model, chosen, seed, settings, precision, fixed)
    wanted = _requests(model, chosen, count, seed, takes_turns=edit is None)
    paths = [folder / image.name for image in wanted]
    if target is not None:
        _check_npz(target, manifest, overwrite)
    _prepare_folder(folder, manifest, overwrite)
    progress.message(f"device {place}, {precision}")
    missing = [image for image in wanted if not _is_made(folder / image.name)]
    fast = model.for_inference(precision).to(place)
    store = _open_store(folder, model)
    progress.start("generating", count, "images", done=count - len(missing))
    for images, made in _made(fast, missing, settings, fixed, batch, progress):
        if store is not None:
            _append_tokens(store, model, images, made.idx_Bl)
        for image, pixels in zip(images, made.images, strict=True):
            write_png(folder / image.name, pixels.float().cpu())
    progress.finish()
    write_atomic(folder / MANIFEST_FILE, json.dumps(manifest | {"count": count}, indent=2) + "\n")
    write_contact_sheet(folder / CONTACT_SHEET_FILE, paths[:ON_CONTACT_SHEET])
    if target is not None:
        write_npz(target, paths, progress)
        write_atomic(_beside(target), json.dumps(manifest | {"count": count}, indent=2) + "\n")
    return Generated(folder, paths, len(missing), target)


def _check_npz(path: Path, manifest: dict[str, Any], overwrite: bool) -> None:
    """Raise RunError unless the file may be written: it is new, or of the same settings."""
    if path.suffix != ".npz" or path.is_dir():
        raise RunError(f"{path}: got no file name that ends with .npz. Name one with --npz.")
    before = _read_manifest(_beside(path))
    is_same = all(before.get(key) == value for key, value in manifest.items())
    if path.exists() and not is_same and not overwrite:
        raise RunError(
            f"{path} exists already, and holds other images. Name another --npz, or replace it "
            "with --overwrite."
        )
    check_writable(path)


def _beside(npz: Path) -> Path:
    """Return the path of the manifest of an .npz file."""
    return npz.with_name(f"{npz.name}.json")


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
            name = f"{number:06d}-{_file_name(_class_name(config, own))}.png"
        wanted.append(_Wanted(number, own, seed * SEEDS_PER_RUN + number, name))
    return wanted


def _class_number(generator: Generator, label: str | int | None) -> int | None:
    """Return the number of a class by its number, its name, or a part of its name.

    Raises:
        InputError: no class has this name, or several have.
    """
    config = generator.config
    if label is None:
        return None
    if not config.num_classes:
        raise InputError(
            f"got the label {label!r}; this generator was trained without labels. Leave it out."
        )
    names = config.class_names
    known = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    expected = f"one of {known}" if names else f"0 to {config.num_classes - 1}"
    if str(label) in names:
        return names.index(str(label))
    if str(label).isdecimal():
        if int(label) < config.num_classes:
            return int(label)
        raise InputError(f"got the label {label}; expected {expected}.")
    found = [number for number, name in enumerate(names) if str(label).lower() in name.lower()]
    if len(found) != 1:
        several = f", which is in {', '.join(names[n] for n in found[:5])}" if found else ""
        raise InputError(f"got the label {label!r}{several}; expected {expected}.")
    return found[0]


def _class_name(config: GeneratorConfig, number: int) -> str:
    return config.class_names[number] if config.class_names else str(number)


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
    layout = generator.config.layout
    stride = generator.tokenizer.stride
    height, width = layout.grids[-1][0] * stride, layout.grids[-1][1] * stride
    pixels = to_unit_range(fitted(image, height, width))
    device = next(generator.tokenizer.parameters()).device
    tokens = generator.tokenizer.encode(pixels[None].to(device)).cpu()
    return Fixed(tokens, kept_tokens(fitted_mask(repaint, height, width), layout))


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
        "label": labels if label is None else _class_name(config, label),
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


def _prepare_folder(folder: Path, manifest: dict[str, Any], overwrite: bool) -> None:
    """Create the folder with its manifest; keep the images of an earlier call of the same settings.

    Raises:
        RunError: it holds other images, and ``overwrite`` is off, or it is not a folder of ours.
    """
    record = folder / MANIFEST_FILE
    check_writable(record)
    names = (MANIFEST_FILE, CONTACT_SHEET_FILE, STORE_FOLDER)
    there = [folder / name for name in names if (folder / name).exists()]
    there += [path for path in folder.glob("*.png") if _OWN_IMAGE.fullmatch(path.name)]
    before = _read_manifest(record)
    is_same = all(before.get(key) == value for key, value in manifest.items())
    if there and not before:
        raise RunError(
            f"{folder} holds {there[0].name}, which `smalto generate` did not write. Name another "
            "--out."
        )
    if there and not is_same and not overwrite:
        raise RunError(
            f"{folder} holds images that were made with other settings. Name another --out, or "
            "replace them with --overwrite."
        )
    if overwrite:
        for path in there:
            if path.name == STORE_FOLDER:
                from smalto.store.token_store import TokenStore

                TokenStore.remove(path)
            else:
                path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    write_atomic(record, json.dumps(manifest, indent=2) + "\n")


def _read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of an earlier call; empty if there is none, or another file."""
    try:
        manifest = read_json(path)
    except (OSError, ValueError):
        return {}
    is_own = isinstance(manifest, dict) and {"generator", "seeds", "guidance"} <= manifest.keys()
    return manifest if is_own else {}


def _is_made(path: Path) -> bool:
    """Return whether an image is there, and whole: a loss of power may have cut it short."""
    try:
        with Image.open(path) as image:
            image.verify()
    except (OSError, SyntaxError):
        return False
    return True


def _open_store(folder: Path, generator: Generator) -> TokenStore | None:
    """Return the store of the tokens, which may be new; None if Lance is not installed."""
    if find_spec("lance") is None or find_spec("pyarrow") is None:
        return None
    from smalto.store.token_store import TokenStore

    path = folder / STORE_FOLDER
    if path.exists():
        return TokenStore.open(path)
    layout = generator.config.layout
    return TokenStore.create(path, generator.tokenizer, layout=layout, transform="generated")


def _append_tokens(
    store: TokenStore, generator: Generator, images: list[_Wanted], blocks: list[Tensor]
) -> None:
    """Add the tokens of images to the store beside them."""
    from smalto.store.schema import TokenRow

    config = generator.config
    rows, columns = config.layout.grids[-1]
    height, width = rows * generator.tokenizer.stride, columns * generator.tokenizer.stride
    new = [
        TokenRow(
            image.name,
            tokens.cpu(),
            label="" if image.label is None else _class_name(config, image.label),
            height=height,
            width=width,
            crop=(0, 0, height, width),
        )
        for image, tokens in zip(images, torch.cat(blocks, dim=1), strict=True)
    ]
    store.append(new, replace=True)
    store.merge_small_files(SMALL_FILES)
