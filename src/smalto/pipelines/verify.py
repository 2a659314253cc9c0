"""Checking a token store with the tokenizer that wrote it."""

from __future__ import annotations

from pathlib import Path

from smalto.data.token_store import TokenStore
from smalto.data.verify import Verification
from smalto.device import resolve_device
from smalto.memory import reused_memory
from smalto.pipelines.decode import check_tokenizer, recorded_tokenizer
from smalto.progress import Progress
from smalto.tokenizer import load


@reused_memory()
def verify(
    path: str | Path,
    sample: int = 0,
    *,
    tokenizer: str | Path | None = None,
    source: str | Path | None = None,
    seed: int = 0,
    device: str = "auto",
    progress: Progress | None = None,
) -> Verification:
    """Check a store; ``sample`` rows are encoded again.

    Args:
        tokenizer: the folder of the tokenizer; None: the recorded one.
        source: where the pictures are now; None: where they were.

    Raises:
        RunError: the tokenizer is not there, or it is not the one that wrote the store.
    """
    store, model = TokenStore.open(path), None
    if sample:
        model = load(recorded_tokenizer(store, tokenizer)).to(resolve_device(device))
        check_tokenizer(store, model.fingerprint(), tokenizer)
    return store.verify(sample, tokenizer=model, source=source, seed=seed, progress=progress)
