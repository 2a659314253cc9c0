"""Tokenizers on the Hugging Face Hub: download, upload and the model card."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smalto.core.errors import ConfigError, DataError, MissingExtra, RunError
from smalto.core.files import parse_json, read_regular, write_atomic
from smalto.core.model_files import CONFIG_FILE, WEIGHTS_FILE

CARD_FILE = "README.md"
METRICS_FILE = "metrics.json"
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_MEASURED = (
    ("PSNR", "psnr", "{:.2f} dB"),
    ("SSIM", "ssim", "{:.4f}"),
    ("MS-SSIM", "ms_ssim", "{:.4f}"),
    ("lite0 distance", "lite0_distance", "{:.4f}"),
    ("LPIPS (VGG)", "lpips", "{:.4f}"),
    ("lite0-FID", "lite0_fid", "{:.2f}"),
    ("rFID", "rfid", "{:.2f}"),
    ("codes used", "used", "{:.1%}"),
    ("perplexity", "perplexity", "{:.1f}"),
    ("bits per pixel", "bits_per_pixel", "{:.4f}"),
)


def local_folder(folder_or_repo: str | Path, revision: str | None, token: str | None) -> Path | str:
    """Return a folder unchanged, or the folder that a repository of the hub was downloaded to.

    A path that exists is a folder; ``OWNER/NAME`` that does not is a repository. Nothing is
    imported for a folder.

    Raises:
        MissingExtra: huggingface_hub is not installed.
        RunError: the repository cannot be downloaded.
    """
    is_repo = isinstance(folder_or_repo, str) and _REPO.fullmatch(folder_or_repo)
    if not is_repo or Path(folder_or_repo).exists():
        return folder_or_repo
    hub = _huggingface_hub()
    try:
        return Path(
            hub.snapshot_download(
                folder_or_repo,
                revision=revision,
                token=token,
                allow_patterns=[CONFIG_FILE, WEIGHTS_FILE],
            )
        )
    except Exception as error:  # of the hub, of httpx, of the file system
        raise RunError(
            f"{folder_or_repo} cannot be downloaded: {_line(error)}. Check the name and the "
            "revision; for a private repository set HF_TOKEN or pass token."
        ) from None


def check_repository(repo: str) -> None:
    """Raise ConfigError unless ``repo`` is ``OWNER/NAME``."""
    if not isinstance(repo, str) or not _REPO.fullmatch(repo):
        raise ConfigError(f"got {repo!r}; expected a repository OWNER/NAME, such as me/tokenizer.")


def upload(folder: Path, repo: str, *, private: bool, message: str, token: str | None) -> str:
    """Create a repository if needed, upload a folder, and return the URL of the commit.

    Raises:
        MissingExtra: huggingface_hub is not installed.
        RunError: the upload fails.
    """
    hub = _huggingface_hub()
    try:
        api = hub.HfApi(token=token)
        api.create_repo(repo, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message))
    except Exception as error:
        raise RunError(
            f"{repo} was not uploaded: {_line(error)}. Set HF_TOKEN to a token with write access, "
            "or run `hf auth login`."
        ) from None


def write_card(
    folder: Path,
    facts: Mapping[str, str],
    *,
    run: str | Path | None = None,
    license: str = "unknown",
) -> None:
    """Write the model card, ``README.md``.

    Args:
        folder: of the tokenizer.
        facts: (name, value) pairs of the tokenizer.
        run: folder whose ``metrics.json`` the card shows.
        license: identifier of the hub, such as ``"apache-2.0"``.

    Raises:
        DataError: ``run`` holds no metrics.
    """
    metrics = None if run is None else read_metrics(Path(run))
    tags = ["smalto", "image-tokenizer", "vq-vae"]
    lines = [
        "---",
        "library_name: smalto",
        f"license: {json.dumps(license)}",
        "tags:",
        *(f"- {tag}" for tag in tags),
        "---",
        "",
        f"# {folder.resolve().name}",
        "",
        "An image tokenizer: images become discrete tokens, and tokens images.",
        "",
        "```python",
        "import smalto",
        "",
        'tokenizer = smalto.ImageTokenizer.from_pretrained("OWNER/NAME")  # or a folder',
        "tokens = tokenizer.encode(images)  # float [B, 3, H, W] in [-1, 1] -> int64 [B, L]",
        "```",
        "",
        *_table(("", "tokenizer"), facts.items()),
    ]
    if metrics is not None:
        measured = [
            (label, form.format(metrics[name]))
            for label, name, form in _MEASURED
            if isinstance(metrics.get(name), (int, float))
        ]
        number, images = metrics.get("num_images", 0), metrics.get("measured_on", "images")
        lines += ["", *_table(("metric", f"{images}, N = {number:,}"), measured)]
    write_atomic(folder / CARD_FILE, "\n".join(lines) + "\n")


def read_metrics(run: Path) -> dict[str, Any]:
    """Return the ``metrics.json`` of a run.

    Raises:
        DataError: it is not there or cannot be read.
    """
    try:
        metrics: Any = parse_json(read_regular(run / METRICS_FILE).decode())
    except (OSError, ValueError) as error:
        raise DataError(
            f"{run / METRICS_FILE} cannot be read ({error}); expected the metrics of a finished "
            "run. Resume the run to its end, or leave run out."
        ) from None
    if not isinstance(metrics, dict):
        raise DataError(f"{run / METRICS_FILE}: got {type(metrics).__name__}; expected a table.")
    return metrics


def _table(heading: tuple[str, str], rows: Any) -> list[str]:
    return [f"| {heading[0]} | {heading[1]} |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)]


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _huggingface_hub() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise MissingExtra(
            "huggingface_hub", "hub", "repositories of the Hugging Face Hub"
        ) from None
    return huggingface_hub
