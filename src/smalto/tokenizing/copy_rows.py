"""Copying the rows of one store into another of the same tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, field

from smalto.core.progress import Progress
from smalto.store.schema import TokenRow
from smalto.store.token_store import TokenStore
from smalto.store.writer import MANY_SMALL_FILES, ROWS_PER_COMMIT, SOME_SMALL_FILES


@dataclass
class Copied:
    """What ``copy_rows`` did.

    Attributes:
        num_rows: copied now; ``num_tokens``: theirs; ``num_known``: rows that were there.
        changed: ids of rows that exist and are of another image.
    """

    num_rows: int = 0
    num_tokens: int = 0
    num_known: int = 0
    changed: list[str] = field(default_factory=list)


def copy_rows(source: TokenStore, store: TokenStore, update: bool, progress: Progress) -> Copied:
    """Copy the rows that ``store`` lacks; ``update`` replaces those of another image."""
    copied = Copied()
    progress.start("copying", len(source), "rows")
    with store.writing():
        for start in range(0, len(source), ROWS_PER_COMMIT):
            rows = source.token_rows(start, start + ROWS_PER_COMMIT)
            known = store.known([row.id for row in rows])
            changed = {row.id for row in rows if row.id in known and _differs(row, *known[row.id])}
            new = [row for row in rows if row.id not in known or (update and row.id in changed)]
            if new:
                store.append(new, replace=update)
            copied.changed += sorted(changed)
            copied.num_known += len(rows) - len(new) - (0 if update else len(changed))
            copied.num_rows += len(new)
            copied.num_tokens += sum(len(row.tokens) for row in new)
            progress.advance(len(rows))
            store.merge_small_files(MANY_SMALL_FILES)
        store.merge_small_files(SOME_SMALL_FILES)
    progress.finish()
    return copied


def _differs(row: TokenRow, size: int, modified: int, digest: bytes) -> bool:
    """Whether a row is of another image than the stored one, if both know their files."""
    if not (row.size or row.digest) or not (size or digest):
        return False
    return row.size != size or row.digest != digest
