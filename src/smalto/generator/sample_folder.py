"""Folder of generated images: PNG files, a contact sheet, a manifest, a store of the tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from smalto.core.errors import RunError
from smalto.core.files import check_writable, read_json, remove_leftovers, write_atomic
from smalto.generator.generator import Generator, Samples
from smalto.images.contact_sheet import write_contact_sheet
from smalto.images.single_image import write_png

if TYPE_CHECKING:  # it needs Lance
    from smalto.store.token_store import TokenStore

MANIFEST_FILE = "manifest.json"
CONTACT_SHEET_FILE = "contact-sheet.png"
STORE_FOLDER = "tokens.lance"
ON_CONTACT_SHEET = 64  # images
SMALL_FILES = 64  # of the store, before they are joined
_OWN_IMAGE = re.compile(r"\d{6,}(-.*)?\.png")
_OF_EVERY_MANIFEST = {"generator", "seeds", "guidance"}


class SampleFolder:
    """Images of one generator and one choice of settings; it can be continued.

    Use ``prepare`` instead of the constructor.
    """

    def __init__(
        self, path: Path, generator: Generator, manifest: dict[str, Any], store: TokenStore | None
    ) -> None:
        self.path = path
        self._generator = generator
        self._manifest = manifest
        self._store = store

    @classmethod
    def prepare(
        cls, path: Path, generator: Generator, manifest: dict[str, Any], overwrite: bool
    ) -> SampleFolder:
        """Create the folder with its manifest, or continue one of the same settings.

        Args:
            path: the folder.
            generator: that makes the images.
            manifest: what decides the images.
            overwrite: remove the images of an earlier call.

        Raises:
            RunError: it holds images of other settings, and ``overwrite`` is off; or files under
                our names that are not ours.
        """
        record = path / MANIFEST_FILE
        check_writable(record)
        names = (MANIFEST_FILE, CONTACT_SHEET_FILE, STORE_FOLDER)
        there = [path / name for name in names if (path / name).exists()]
        there += [file for file in path.glob("*.png") if _OWN_IMAGE.fullmatch(file.name)]
        before = read_manifest(record)
        if there and not before:
            raise RunError(
                f"{path} holds {there[0].name}, which `smalto generate` did not write. Name "
                "another --out."
            )
        if there and not _is_same(before, manifest) and not overwrite:
            raise RunError(
                f"{path} holds images that were made with other settings. Name another --out, or "
                "replace them with --overwrite."
            )
        if overwrite:
            _remove(there)
        path.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        write_manifest(record, manifest)
        return cls(path, generator, manifest, _open_store(path / STORE_FOLDER, generator))

    def has(self, name: str) -> bool:
        """Return whether an image is there, and whole: a loss of power may have cut it short."""
        try:
            with Image.open(self.path / name) as image:
                image.verify()
        except (OSError, SyntaxError):
            return False
        return True

    def add(self, images: Sequence[tuple[str, int | None]], samples: Samples) -> None:
        """Write images: their tokens first, so that an image that is there has tokens.

        Args:
            images: (file name, number of the class or None) of each.
            samples: of the same images.
        """
        if self._store is not None:
            self._add_tokens(self._store, images, samples)
        for (name, _), pixels in zip(images, samples.images, strict=True):
            write_png(self.path / name, pixels.float().cpu())

    def finish(self, names: Sequence[str]) -> list[Path]:
        """Write the contact sheet and the final manifest; return the paths of the images."""
        paths = [self.path / name for name in names]
        write_contact_sheet(self.path / CONTACT_SHEET_FILE, paths[:ON_CONTACT_SHEET])
        write_manifest(self.path / MANIFEST_FILE, self._manifest | {"count": len(paths)})
        return paths

    def _add_tokens(
        self, store: TokenStore, images: Sequence[tuple[str, int | None]], samples: Samples
    ) -> None:
        from smalto.store.schema import TokenRow

        config = self._generator.config
        height, width = self._generator.image_size
        rows = [
            TokenRow(
                name,
                tokens.cpu(),
                label="" if label is None else config.class_name(label),
                height=height,
                width=width,
                crop=(0, 0, height, width),
            )
            for (name, label), tokens in zip(images, torch.cat(samples.idx_Bl, dim=1), strict=True)
        ]
        store.append(rows, replace=True)
        store.merge_small_files(SMALL_FILES)


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of an earlier call; empty if there is none, or another file."""
    try:
        manifest = read_json(path)
    except (OSError, ValueError):
        return {}
    is_own = isinstance(manifest, dict) and manifest.keys() >= _OF_EVERY_MANIFEST
    return manifest if is_own else {}


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest as JSON."""
    write_atomic(path, json.dumps(manifest, indent=2) + "\n")


def manifest_of_npz(path: Path) -> Path:
    """Return the path of the manifest of an .npz file."""
    return path.with_name(f"{path.name}.json")


def check_npz(path: Path, manifest: dict[str, Any], overwrite: bool) -> None:
    """Raise RunError unless an .npz file may be written: it is new, or of the same settings."""
    if path.suffix != ".npz" or path.is_dir():
        raise RunError(f"{path}: got no file name that ends with .npz. Name one with --npz.")
    is_other = path.exists() and not _is_same(read_manifest(manifest_of_npz(path)), manifest)
    if is_other and not overwrite:
        raise RunError(
            f"{path} exists already, and holds other images. Name another --npz, or replace it "
            "with --overwrite."
        )
    check_writable(path)


def _is_same(before: dict[str, Any], manifest: dict[str, Any]) -> bool:
    return all(before.get(key) == value for key, value in manifest.items())


def _remove(files: Sequence[Path]) -> None:
    """Remove files of an earlier call, and their store."""
    for path in files:
        if path.name == STORE_FOLDER:
            from smalto.store.token_store import TokenStore

            TokenStore.remove(path)
        else:
            path.unlink()


def _open_store(path: Path, generator: Generator) -> TokenStore | None:
    """Return the store of the tokens, which may be new; None if Lance is not installed."""
    if find_spec("lance") is None or find_spec("pyarrow") is None:
        return None
    from smalto.store.token_store import TokenStore

    if path.exists():
        return TokenStore.open(path)
    layout = generator.config.layout
    return TokenStore.create(path, generator.tokenizer, layout=layout, transform="generated")
