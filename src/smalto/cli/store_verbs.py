"""Commands for token stores: smalto store info, verify, compact, export, import."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer

from smalto.cli.shared import Device, console_progress, fail, print_rows, say

app = typer.Typer(
    help="Describe, verify, compact, export and import token stores.",
    epilog="Example: smalto store info tokens.lance",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Store = Annotated[Path, typer.Argument(help="A token store.")]


@app.command(epilog="Example: smalto store info tokens.lance")
def info(
    path: Store,
    errors: Annotated[bool, typer.Option("--errors", help="List every bad image too.")] = False,
) -> None:
    """Describe a token store."""
    from smalto.pipelines.info import store_metadata
    from smalto.store.token_store import TokenStore

    store = TokenStore.open(path)
    print_rows([(name, str(value)) for name, value in store_metadata(store).items()])
    for name, (reason, _, _) in sorted(store.errors().items()) if errors else ():
        say(f"{name}: {reason}")


@app.command(epilog="Example: smalto store verify tokens.lance --sample 64")
def verify(
    path: Store,
    sample: Annotated[
        int, typer.Option(min=0, help="Number of rows to encode again; 0: none.")
    ] = 16,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="Folder or name of the tokenizer. Default: the one recorded in the store."
        ),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(help="Where the images are now. Default: where they were when tokenized."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed of the sample.")] = 0,
    device: Device = "auto",
) -> None:
    """Check every row for damage, and encode the images of a sample again.

    Exits with status 1 if any check fails.
    """
    from smalto.pipelines.verify import verify as run

    with console_progress() as progress:
        found = run(
            path,
            sample,
            tokenizer=tokenizer,
            source=source,
            seed=seed,
            device=device,
            progress=progress,
        )
    rows, sampled = found.rows, found.sample
    for problem in rows.problems:
        say(problem)
    if rows.num_problems > len(rows.problems):
        say(f"... and {rows.num_problems - len(rows.problems):,} more")
    for row in sampled.damaged:
        say(
            f"row {row.id!r}: {row.num_tokens:,} tokens differ when the image is encoded again, "
            f"the first at {row.first}"
        )
    say(f"{rows.num_checked:,} of {rows.num_rows:,} rows checked, {rows.num_problems:,} problems")
    if sampled.unreadable:
        say(
            f"{len(sampled.unreadable):,} images could not be read now, such as "
            f"{sampled.unreadable[0]}: check their drive or network, and verify again"
        )
    if sampled.num_rows or sampled.not_found or sampled.changed:
        say(
            f"{sampled.num_rows:,} rows ({sampled.num_tokens:,} tokens) encoded again: "
            f"{len(sampled.damaged):,} differ, {len(sampled.ties):,} differ at ties only; "
            f"{len(sampled.not_found):,} images no longer exist, "
            f"{len(sampled.changed):,} have changed since they were tokenized"
        )
    if not found.ok:
        fail(f"{path} is damaged", 1)
    if sampled.not_found and not (sampled.num_rows or sampled.changed):
        fail(
            "no image of the sample was found: name their folder with --source, or check only the "
            "rows with --sample 0",
            1,
        )


@app.command(epilog="Example: smalto store compact tokens.lance")
def compact(
    path: Store,
    keep_hours: Annotated[
        float,
        typer.Option(
            min=0,
            max=24 * 36_500,
            help="Keep replaced files this long for processes that read the store.",
        ),
    ] = 1.0,
) -> None:
    """Merge small files, index the names, and remove data that is no longer needed.

    With --keep-hours 0 a process that is reading the store must open it again afterwards.
    """
    from smalto.pipelines.info import store_metadata
    from smalto.store.token_store import TokenStore

    store = TokenStore.open(path)
    before = store_metadata(store)
    with console_progress():
        store.compact(timedelta(hours=keep_hours))
    after = store_metadata(store)
    print_rows(
        [
            (name, f"{before[name]} -> {after[name]}")
            for name in ("small files", "bytes on disk", "version", "other files")
            if name in before
        ]
    )


@app.command(epilog="Example: smalto store export tokens.lance --format numpy --out tokens-numpy")
def export(
    path: Store,
    out: Annotated[Path, typer.Option(help="Folder to create.")],
    format: Annotated[
        str,
        typer.Option(
            help="numpy (arrays for numpy.load), var (safetensors shards, one tensor per scale), "
            "parquet, or webdataset (tar shards)."
        ),
    ] = "numpy",
    rows_per_shard: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Rows per shard, for var, parquet and webdataset. Default: at most 10,000 "
            "(parquet: 100,000), and at least 8 shards for 64 rows or more.",
        ),
    ] = None,
) -> None:
    """Write a token store in another format."""
    from smalto.store.exports import export_store
    from smalto.store.token_store import TokenStore

    with console_progress() as progress:
        export_store(
            TokenStore.open(path), format, out, rows_per_shard=rows_per_shard, progress=progress
        )
    say(str(out))


@app.command("import", epilog="Example: smalto store import tokens-numpy --out tokens.lance")
def import_(
    path: Annotated[Path, typer.Argument(help="A folder that `smalto store export` wrote.")],
    out: Annotated[Path, typer.Option(help="Token store to create.")],
) -> None:
    """Create a token store from an export."""
    from smalto.store.exports import import_store

    with console_progress() as progress:
        store = import_store(path, out, progress=progress)
    say(f"{len(store):,} rows -> {out}")
