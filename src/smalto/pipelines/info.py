"""What a file or folder of smalto is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from smalto.data.token_file import TokenFile
from smalto.errors import RunError
from smalto.layout import TokenLayout
from smalto.quantizers import MultiScaleVQ
from smalto.tokenizer import ImageTokenizer, load
from smalto.training.checkpoint import RunFolder


def info(path: str | Path) -> dict[str, Any]:
    """Describe a run, a tokenizer or a token file.

    Returns:
        Names to plain values; ``"kind"`` is "run", "tokenizer" or "token file".

    Raises:
        RunError: none of these.
    """
    path = Path(path)
    if path.is_file():
        tokens = TokenFile.load(path)
        return {
            "kind": "token file",
            "images": len(tokens.names),
            "tokens": sum(layout.num_tokens for layout in tokens.layouts),
            "codebook size": tokens.codebook_size,
            "tokenizer": tokens.tokenizer,
            "fingerprint": tokens.fingerprint,
            "transform": tokens.transform,
            "precision": tokens.precision,
        }
    if not (path / "config.json").is_file():
        raise RunError(f"{path} is no run, tokenizer or token file of smalto.")
    tokenizer = load(path)
    facts: dict[str, Any] = {
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
        facts |= {
            "kind": "run",
            "trained on": recipe.data.source,
            "steps": f"{max(run.steps(), default=0)} of {recipe.steps}",
            "seed": recipe.seed,
        }
        if (path / "metrics.json").is_file():
            try:
                metrics = json.loads((path / "metrics.json").read_text(encoding="utf-8"))
                facts["PSNR"] = f"{metrics['psnr']:.2f} dB on {metrics['num_images']} {metrics['measured_on']}"
            except (ValueError, KeyError, TypeError):
                facts["PSNR"] = "metrics.json is damaged; smalto train --resume writes it again"
            facts["report"] = str(path / "report.html")
    return facts


def _grids(tokenizer: ImageTokenizer) -> dict[str, Any]:
    if isinstance(tokenizer.quantize, MultiScaleVQ):
        layout = TokenLayout(tokenizer.quantize.scales)
        side = " x ".join(str(n * tokenizer.stride) for n in layout.grids[-1])
        return {"scales": f"{layout}: {layout.num_tokens:,} tokens for {side} pixels"}
    return {"tokens per position": len(tokenizer.quantize.layout(1, 1).grids)}
