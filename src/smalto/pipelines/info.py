"""What a file or folder of smalto is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smalto.core.errors import RunError
from smalto.core.layout import TokenLayout
from smalto.quantizers import MultiScaleVQ
from smalto.tokenizer import ImageTokenizer, load
from smalto.training.run_folder import RunFolder

if TYPE_CHECKING:
    from smalto.store.token_store import TokenStore


def info(path: str | Path) -> dict[str, Any]:
    """Describe a run, a tokenizer or a token store.

    Returns:
        Names to plain values; ``"kind"`` is "run", "tokenizer" or "token store".

    Raises:
        RunError: none of these.
    """
    path = Path(path)
    if (path / "head.json").is_file():
        from smalto.store.token_store import TokenStore

        return {"kind": "token store", **store_metadata(TokenStore.open(path))}
    if not (path / "config.json").is_file():
        raise RunError(f"{path} is no run, tokenizer or token store of smalto.")
    tokenizer = load(path)
    metadata: dict[str, Any] = {
        "kind": "tokenizer",
        "codebook size": tokenizer.quantize.codebook_size,
        **_grids(tokenizer),
        "stride": tokenizer.stride,
        "parameters": sum(p.numel() for p in tokenizer.parameters()),
        "fingerprint": tokenizer.fingerprint(),
        "config": json.dumps(tokenizer.config.model_dump(mode="json")),
    }
    if (path / "recipe.toml").is_file():
        run = RunFolder(path)
        recipe = run.recipe()
        metadata |= {
            "kind": "run",
            "trained on": recipe.data.source,
            "steps": f"{max(run.steps(), default=0)} of {recipe.steps}",
            "seed": recipe.seed,
        }
        if (path / "metrics.json").is_file():
            try:
                metrics = json.loads((path / "metrics.json").read_text(encoding="utf-8"))
                metadata["PSNR"] = (
                    f"{metrics['psnr']:.2f} dB on {metrics['num_images']} {metrics['measured_on']}"
                )
            except (ValueError, KeyError, TypeError):
                metadata["PSNR"] = "metrics.json is damaged; smalto train --resume writes it again"
            metadata["report"] = str(path / "report.html")
    return metadata


def store_metadata(store: TokenStore) -> dict[str, Any]:
    """What a token store says of itself."""
    header, size = (
        store.header,
        sum(file.stat().st_size for file in store.path.rglob("*") if file.is_file()),
    )
    layout = header.layout
    return {
        "rows": len(store),
        "layout": f"{layout}: {layout.num_tokens:,} tokens a row"
        if layout is not None
        else "varies: images keep their shape",
        "codebook size": header.codebook_size,
        "quantizer": header.kind,
        "transform": str(header.transform) or "not said",
        "precision": header.precision,
        "tokenizer": header.tokenizer or "not said",
        "fingerprint": header.fingerprint,
        "source": header.source or "not said",
        "bad images": len(store.errors()),
        "labels": len(store.classes()),
        "bytes on disk": f"{size:,}",
        "version": store.version,
        "small files": store.num_small_files,
    }


def _grids(tokenizer: ImageTokenizer) -> dict[str, Any]:
    if isinstance(tokenizer.quantize, MultiScaleVQ):
        layout = TokenLayout(tokenizer.quantize.scales)
        side = " x ".join(str(n * tokenizer.stride) for n in layout.grids[-1])
        return {"scales": f"{layout}: {layout.num_tokens:,} tokens for {side} pixels"}
    return {"tokens per position": len(tokenizer.quantize.layout(1, 1).grids)}
