"""The verbs of token stores: smalto store info, verify, compact, export, import."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from smalto.cli.shared import Device, console_progress, fail, print_rows

app = typer.Typer(
    help="Look at a token store, check it, tidy it up, export it.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Store = Annotated[Path, typer.Argument(help="A token store.")]


@app.command(epilog="Example: smalto store info tokens.lance")
def info(
    path: Store,
    errors: Annotated[bool, typer.Option("--errors", help="Name every bad image too.")] = False,
) -> None:
    """Say what a store holds."""
    from smalto.images.image_file import printable
    from smalto.pipelines.info import store_metadata
    from smalto.store.token_store import TokenStore

    store = TokenStore.open(path)
    print_rows([(name, str(value)) for name, value in store_metadata(store).items()])
    for name, (reason, _, _) in sorted(store.errors().items()) if errors else ():
        print(f"{printable(name)}: {reason}")


@app.command(epilog="Example: smalto store verify tokens.lance --sample 64")
def verify(
    path: Store,
    sample: Annotated[
        int, typer.Option(min=0, help="So many images are encoded again; 0: none.")
    ] = 16,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Folder of the tokenizer; default: the one that the store names."),
    ] = None,
    source: Annotated[
        str | None, typer.Option(help="Where the images are now; default: where they were.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Decides the sample.")] = 0,
    device: Device = "auto",
) -> None:
    """Check every row for damage, and encode a sample of images again. Ends with 1 where something is wrong."""
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
    for problem in found.problems:
        print(problem)
    if found.num_problems > len(found.problems):
        print(f"... and {found.num_problems - len(found.problems):,} more")
    for id, number, first in found.differing:
        print(
            f"row {id!r}: {number:,} tokens differ when the image is encoded again, the first at {first}"
        )
    print(
        f"{found.num_checked:,} of {found.num_rows:,} rows checked, {found.num_problems:,} problems"
    )
    if found.num_sampled or found.not_found or found.changed:
        gone = (
            f"; {len(found.not_found):,} images are not in the source any more"
            if found.not_found
            else ""
        )
        gone += (
            f"; {len(found.changed):,} have changed since they were tokenized"
            if found.changed
            else ""
        )
        print(
            f"{found.num_sampled:,} rows ({found.num_tokens_sampled:,} tokens) encoded again, {len(found.differing):,} differ{gone}"
        )
    if not found.ok:
        fail(f"{path} is not as it was written", 1)
    if found.not_found and not (found.num_sampled or found.changed):
        fail(
            "not one image of the sample is where it was: name their folder with --source, or check rows alone with --sample 0",
            1,
        )


@app.command(epilog="Example: smalto store compact tokens.lance")
def compact(path: Store) -> None:
    """Join small files, index the names, and remove what is not needed. Whoever reads the store meanwhile has to open it again."""
    from smalto.pipelines.info import store_metadata
    from smalto.store.token_store import TokenStore

    store = TokenStore.open(path)
    before = store_metadata(store)
    store.compact()
    after = store_metadata(store)
    print_rows(
        [
            (name, f"{before[name]} -> {after[name]}")
            for name in ("small files", "bytes on disk", "version")
        ]
    )


@app.command(epilog="Example: smalto store export tokens.lance --format numpy --out tokens-numpy")
def export(
    path: Store,
    out: Annotated[Path, typer.Option(help="The folder to make.")],
    format: Annotated[
        str,
        typer.Option(
            help="numpy (memory map), var (tensors per scale and classes), parquet, or webdataset (tar shards)."
        ),
    ] = "numpy",
) -> None:
    """Write a store in another format."""
    from smalto.store.exports import export_store
    from smalto.store.token_store import TokenStore

    with console_progress() as progress:
        export_store(TokenStore.open(path), format, out, progress=progress)
    print(out)


@app.command("import", epilog="Example: smalto store import tokens-numpy --out tokens.lance")
def import_(
    path: Annotated[Path, typer.Argument(help="A folder that `smalto store export` made.")],
    out: Annotated[Path, typer.Option(help="The token store to make.")],
) -> None:
    """Make a store of an export."""
    from smalto.store.exports import import_store

    with console_progress() as progress:
        store = import_store(path, out, progress=progress)
    print(f"{len(store):,} rows -> {out}")
