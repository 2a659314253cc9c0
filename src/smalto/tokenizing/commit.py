"""Writing encoded shards to a store."""

from __future__ import annotations

from smalto.store.writer import StoreWriter
from smalto.tokenizing.encode_shard import Shard
from smalto.tokenizing.plan import Plan


def commit(writer: StoreWriter, shard: Shard, plan: Plan, *, replace: bool = False) -> None:
    """Pass a shard to the writer, which commits it together with others.

    Args:
        writer: of the store.
        shard: rows and errors.
        plan: knows which errors are recorded already.
        replace: rows with these ids may exist.
    """
    if shard.rows:
        writer.put(shard.rows, replace=replace)
    for error in shard.errors:
        if not plan.is_recorded(error):
            writer.put_error(*error)
    plan.recovered += [name for name in shard.names if plan.was_bad(name)]
