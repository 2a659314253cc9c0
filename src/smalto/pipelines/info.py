"""Descriptions of runs, tokenizers, generators and token stores."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smalto.core.errors import RunError
from smalto.core.files import read_json
from smalto.generator import load_generator
from smalto.generator.generator_folder import holds_generator
from smalto.interop.open_tokenizer import load
from smalto.pretrained import is_pretrained, model_folder, pretrained_names, read_card
from smalto.tokenizer import ImageTokenizer
from smalto.training.recipe_file import load_recipe
from smalto.training.run_folder import METRICS_FILE, RECIPE_FILE, REPORT_FILE, RunFolder

if TYPE_CHECKING:
    from smalto.store.token_store import TokenStore


def info(path: str | Path) -> dict[str, Any]:
    """Describe a run, a tokenizer, a generator or a token store.

    Args:
        path: its folder, the name of a model in this package, or a weight file that
            ``smalto.load`` reads.

    Returns:
        Plain values by name; ``"kind"`` is "run", "tokenizer", "generator" or "token store". The
        model card of a model in this package is ``"card"``.

    Raises:
        RunError: ``path`` is none of these.
    """
    card = read_card(str(path)) if is_pretrained(path) else None
    path = model_folder(path)
    if (path / "head.json").is_file():
        from smalto.store.token_store import TokenStore

        return {"kind": "token store", **store_metadata(TokenStore.open(path))}
    if path.is_file():
        return _tokenizer_metadata(path)
    if not (path / "config.json").is_file():
        raise RunError(
            f"{path} is not a run, tokenizer, generator or token store of smalto. Name a folder "
            "that smalto wrote, such as runs/mine or tokens.lance, or one of "
            f"{', '.join(pretrained_names())}."
        )
    metadata = _generator_metadata(path) if holds_generator(path) else _tokenizer_metadata(path)
    if card is not None:
        metadata["card"] = card
    if (path / RECIPE_FILE).is_file():
        metadata |= _run_metadata(path)
    return metadata


def _tokenizer_metadata(path: Path) -> dict[str, Any]:
    tokenizer = load(path)
    return {
        "kind": "tokenizer",
        "codebook size": tokenizer.quantize.codebook_size,
        **_grids(tokenizer),
        "stride": tokenizer.stride,
        "receptive field": _receptive_field(tokenizer),
        "parameters": sum(p.numel() for p in tokenizer.parameters()),
        "fingerprint": tokenizer.fingerprint(),
        "config": json.dumps(tokenizer.config.model_dump(mode="json")),
    }


def _generator_metadata(path: Path) -> dict[str, Any]:
    generator = load_generator(path)
    config = generator.config
    names = ", ".join(config.class_names[:20])
    return {
        "kind": "generator",
        "order": config.order,
        "tokens per image": f"{config.layout.num_tokens:,} in {len(config.grids)} grids",
        "codebook size": config.codebook_size,
        "classes": f"{config.num_classes:,}{': ' if names else ''}{names}",
        "parameters": sum(p.numel() for p in generator.transformer.parameters()),
        "fingerprint": generator.fingerprint(),
        "tokenizer": generator.tokenizer.fingerprint(),
        "config": json.dumps(config.model_dump(mode="json")),
    }


def _run_metadata(path: Path) -> dict[str, Any]:
    run = RunFolder(path)
    recipe = load_recipe(path / RECIPE_FILE)
    metadata: dict[str, Any] = {
        "kind": "run",
        "trained on": recipe.data.source,
        "steps": f"{max(run.steps(), default=0)} of {recipe.steps}",
        "seed": recipe.seed,
    }
    if (path / METRICS_FILE).is_file():
        name, text = _SUMMARIES[recipe.trains]
        try:
            metadata[name] = text(read_json(path / METRICS_FILE))
        except (ValueError, KeyError, TypeError):
            metadata[name] = (
                f"metrics.json is damaged; rewrite it with: smalto train --resume {path}"
            )
        metadata["report"] = str(path / REPORT_FILE)
    return metadata


def _psnr(metrics: dict[str, Any]) -> str:
    return f"{metrics['psnr']:.2f} dB on {metrics['num_images']} {metrics['measured_on']}"


def _cross_entropy(metrics: dict[str, Any]) -> str:
    held_out, below = metrics["held_out"], metrics["below_histogram"]
    return (
        f"{held_out['loss']:.4f} nats per token on {held_out['num_rows']} "
        f"{metrics['measured_on']}, {below:.1%} below the histogram by position"
    )


_SUMMARIES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "tokenizer": ("PSNR", _psnr),
    "generator": ("cross-entropy", _cross_entropy),
}


def store_metadata(store: TokenStore) -> dict[str, Any]:
    """Return the metadata of a token store, by name."""
    header = store.header
    size = sum(file.stat().st_size for file in store.path.rglob("*") if file.is_file())
    layout = header.layout
    shape = "varies: images keep their aspect ratio"
    if layout is not None:
        shape = f"{layout}: {layout.num_tokens:,} tokens per row"
    other_files = store.other_files()
    return {
        "rows": len(store),
        "layout": shape,
        "codebook size": header.codebook_size,
        "quantizer": header.kind,
        "transform": str(header.transform) or "not recorded",
        "precision": header.precision,
        "tokenizer": header.tokenizer or "not recorded",
        "fingerprint": header.fingerprint,
        "source": header.source or "not recorded",
        "bad images": len(store.errors()),
        "labels": len(store.classes()),
        "bytes on disk": f"{size:,}",
        "version": store.version,
        "small files": store.num_small_files,
        **({"other files": ", ".join(other_files)} if other_files else {}),
    }


def _grids(tokenizer: ImageTokenizer) -> dict[str, Any]:
    layout = tokenizer.quantize.configured_layout
    if layout is None:
        return {"tokens per position": len(tokenizer.quantize.layout(1, 1).grids)}
    side = " x ".join(str(n * tokenizer.stride) for n in layout.grids[-1])
    return {"scales": f"{layout}: {layout.num_tokens:,} tokens for {side} pixels"}


def _receptive_field(tokenizer: ImageTokenizer) -> str:
    side = tokenizer.receptive_field
    if side is None:
        return "the whole image: tokens of tiles differ, and memory grows with the image"
    return f"{side} x {side} pixels: large images are encoded in tiles, with the same tokens"
