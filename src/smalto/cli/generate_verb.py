"""The command that makes new images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from smalto.cli.shared import Device, Overwrite, checked_choice, console_progress, say
from smalto.core.errors import SmaltoError


def generate(
    generator: Annotated[
        str,
        typer.Argument(
            help="Run or folder of a generator, or a name that `smalto info` lists, such as emoji."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the images.")] = Path("samples"),
    label: Annotated[
        str | None,
        typer.Option(
            help="Class to make, by its name, a part of it, or its number. Default: all in turn; "
            "for --edit, none."
        ),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Images in all.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Other images for another number.")] = 0,
    guidance: Annotated[
        float,
        typer.Option(help="Classifier-free guidance: more is more typical, less varied. 0: none."),
    ] = 1.5,
    top_k: Annotated[
        int, typer.Option(help="Draw from this many of the likeliest codes; 0: from all.")
    ] = 0,
    top_p: Annotated[
        float,
        typer.Option(help="Draw from the likeliest codes of this total probability; 0: from all."),
    ] = 0.0,
    temperature: Annotated[
        float, typer.Option(help="Below 1 more typical, above 1 more varied; 0: the likeliest.")
    ] = 1.0,
    smooth: Annotated[
        bool, typer.Option("--smooth", help="Mix codes with Gumbel noise (VAR's more_smooth).")
    ] = False,
    edit: Annotated[
        Path | None, typer.Option(help="Paint a part of this image again: with --box or --mask.")
    ] = None,
    box: Annotated[
        str | None,
        typer.Option(help="Part of --edit to paint: x,y,width,height in pixels of that image."),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(help="Part of --edit to paint: an image of its size, white where to paint."),
    ] = None,
    npz: Annotated[
        Path | None,
        typer.Option(
            help="Also write all images to this file, as uint8 [N, H, W, 3] in arr_0: what "
            "evaluators of FID read."
        ),
    ] = None,
    overwrite: Overwrite = False,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Images at a time. Default: a cache of 1 GiB.")
    ] = None,
    device: Device = "auto",
    precision: Annotated[
        str | None,
        typer.Option(help="float32 or bf16. Default: bf16 if the device is fast at it."),
    ] = None,
) -> None:
    """Make new images with a generator: PNG files, a contact sheet and their tokens.

    Run the same command again to continue; a larger --count adds images.
    """
    from smalto.pipelines.generate import generate as run

    if precision is not None:
        precision = checked_choice("--precision", precision, ("float32", "bf16"))
    with console_progress(resumes=not overwrite) as progress:
        made = run(
            generator,
            out,
            label=label,
            count=count,
            seed=seed,
            guidance=guidance,
            top_k=top_k,
            top_p=top_p,
            temperature=temperature,
            smooth=smooth,
            edit=edit,
            box=_parse_box(box),
            mask=mask,
            npz=npz,
            overwrite=overwrite,
            batch=batch,
            device=device,
            precision=precision,  # type: ignore[arg-type]
            progress=progress,
        )
    say(f"{made.num_new:,} new images, {len(made.paths):,} in all -> {made.folder}")
    if made.npz is not None:
        say(f"all images as one array -> {made.npz}")


def _parse_box(text: str | None) -> tuple[int, int, int, int] | None:
    """Return the four integers of --box."""
    if text is None:
        return None
    try:
        x, y, width, height = (int(number) for number in text.split(","))
    except ValueError:
        raise SmaltoError(
            f"--box must be x,y,width,height in pixels, such as 10,20,64,64; got {text!r}."
        ) from None
    return x, y, width, height
