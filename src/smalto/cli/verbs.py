"""The verbs, but those of token stores."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from smalto.cli.shared import (
    Batch,
    Device,
    LongerSide,
    Overwrite,
    Precision,
    Size,
    Tokenizer,
    Workers,
    checked_precision,
    console_progress,
    given,
    print_metrics,
    print_rows,
    print_trained,
)
from smalto.cli.store_verbs import app as store
from smalto.core.errors import SmaltoError

app = typer.Typer(
    name="smalto",
    help="Turn images into discrete tokens and back: train an image tokenizer (VQ-VAE) on your own images.",
    epilog="Begin with: smalto demo. Then: smalto train FOLDER --out runs/mine",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(store, name="store")


@app.command(epilog="Example: smalto demo")
def demo(
    out: Annotated[
        Path, typer.Option(help="Where runs lie; the demo is made in OUT/demo, OUT/demo-2, ...")
    ] = Path("runs"),
    steps: Annotated[int | None, typer.Option(help="Training steps.")] = None,
    batch: Annotated[int | None, typer.Option(help="Crops per step.")] = None,
    device: Device = "auto",
    precision: Annotated[str | None, typer.Option(help="float32 or bf16.")] = None,
    workers: Workers = None,
) -> None:
    """Train on bundled photographs, write held-out ones as tokens, read them back, and make a report."""
    from smalto.pipelines.demo import demo as run_demo

    settings = given({"steps": steps, "data.batch": batch, "precision": precision})
    with console_progress() as progress:
        print_trained(
            run_demo(out, settings=settings, device=device, workers=workers, progress=progress)
        )


@app.command(
    epilog="Examples: smalto train photos/ --out runs/mine --steps 4000;  smalto train --resume runs/mine"
)
def train(
    folder: Annotated[
        str | None,
        typer.Argument(
            help="Folder (or zip, tar) of images, with its subfolders. With --resume: where they are now, if they moved."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="The run folder to make.")] = Path("runs/mine"),
    resume: Annotated[Path | None, typer.Option(help="Go on with this run instead.")] = None,
    overwrite: Overwrite = False,
    start: Annotated[
        Path | None,
        typer.Option("--from", help="Fine-tune this tokenizer: a folder, or a weight file of VAR."),
    ] = None,
    learn: Annotated[
        str | None,
        typer.Option(
            help="With --from: everything, decoder (tokens stay as they are) or all-but-codebook."
        ),
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="A recipe (TOML); see recipes/.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Change one setting, such as --set optimizer.lr=0.0005; may be repeated."
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps.")] = None,
    size: Annotated[int | None, typer.Option(help="Side of the training crops in pixels.")] = None,
    codebook_size: Annotated[int | None, typer.Option(help="Number of codes.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Decides weights, crops and all other chances.")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Crops per step.")] = None,
    device: Device = "auto",
    precision: Annotated[
        str | None, typer.Option(help="float32 or bf16 for encoder and decoder.")
    ] = None,
    workers: Workers = None,
) -> None:
    """Train a tokenizer on your images. Ctrl-C stops it after saving; --resume goes on."""
    from smalto.pipelines import train as jobs
    from smalto.training.recipe import change_recipe, codebook_size_key, load_recipe, parse_setting

    short = {
        "steps": steps,
        "data.size": size,
        "seed": seed,
        "data.batch": batch,
        "precision": precision,
        "finetune.learn": learn,
    }
    settings = dict(parse_setting(text) for text in set_ or []) | given(short)
    if folder is None and resume is None:
        raise SmaltoError(
            "name a FOLDER of images to train on, or a run to go on with: --resume RUN."
        )
    if "data.source" in settings:
        raise SmaltoError(
            "the images are named by FOLDER, not by --set data.source. With --resume, FOLDER says where they are now."
        )
    if resume is not None and (
        recipe is not None or overwrite or start is not None or learn is not None
    ):
        raise SmaltoError(
            "--resume goes on with a run as it is: leave out --recipe, --overwrite, --from and --learn."
        )
    if resume is not None and codebook_size is not None:
        raise SmaltoError(
            "--resume goes on with the tokenizer as it is: leave out --codebook-size."
        )
    with console_progress(resume or out) as progress:
        if resume is not None:
            print_trained(
                jobs.resume(
                    resume,
                    folder,
                    settings=settings,
                    device=device,
                    workers=workers,
                    progress=progress,
                )
            )
        else:
            assert folder is not None
            chosen = load_recipe(recipe, settings)
            if codebook_size is not None:
                chosen = change_recipe(chosen, {codebook_size_key(chosen): codebook_size})
            print_trained(
                jobs.train(
                    folder,
                    chosen,
                    out=out,
                    overwrite=overwrite,
                    start=start,
                    device=device,
                    workers=workers,
                    progress=progress,
                )
            )


@app.command(epilog="Example: smalto evaluate photos/ --tokenizer runs/mine")
def evaluate(
    folder: Annotated[
        str,
        typer.Argument(
            help="Folder (or zip, tar) of images. Of the training folder held-out images only."
        ),
    ],
    tokenizer: Tokenizer,
    everything: Annotated[bool, typer.Option("--all", help="Measure training images too.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the metrics as JSON.")] = False,
    longer_side: LongerSide = 768,
    size: Size = None,
    batch: Batch = 8,
    device: Device = "auto",
    precision: Precision = "float32",
    workers: Workers = None,
    reference_stats: Annotated[
        Path | None,
        typer.Option(
            help="An .npz file of mu and sigma to measure Fréchet distances from; default: the images themselves."
        ),
    ] = None,
    inception_weights: Annotated[
        Path | None, typer.Option(help="pt_inception-2015-12-05-6726825d.pth, for rFID.")
    ] = None,
    lpips_vgg: Annotated[
        Path | None, typer.Option(help="The state of lpips.LPIPS(net='vgg') as a file, for LPIPS.")
    ] = None,
) -> None:
    """Measure a tokenizer: PSNR, SSIM, perceptual and Fréchet distances, codebook use, bits per pixel, speed, beside JPEG and WebP."""
    import json

    from smalto.images.image_file import summary
    from smalto.pipelines import evaluate as jobs

    with console_progress() as progress:
        result = jobs.evaluate(
            folder,
            tokenizer,
            everything=everything,
            longer_side=longer_side,
            size=size,
            batch=batch,
            device=device,
            precision=checked_precision(precision),
            workers=workers,
            reference_stats=reference_stats,
            inception_weights=inception_weights,
            lpips_vgg=lpips_vgg,
            progress=progress,
        )
        if result.skipped:
            progress.message(summary(result.skipped))
    if json_:
        print(json.dumps(result.metrics, indent=2))
    else:
        print_metrics(result.metrics)


@app.command(
    epilog="Example: smalto tokenize photos/ --tokenizer runs/mine --out tokens.lance --size 256"
)
def tokenize(
    source: Annotated[
        str,
        typer.Argument(
            help="Folder (or zip, tar, parquet) of images, one image, emoji, bundled, or another store."
        ),
    ],
    tokenizer: Tokenizer,
    out: Annotated[Path, typer.Option(help="The token store to make, or to go on with.")] = Path(
        "tokens.lance"
    ),
    size: Annotated[
        int | None,
        typer.Option(help="Bring the shorter side to this and cut a square from the middle."),
    ] = None,
    keep_shape: Annotated[
        bool,
        typer.Option("--keep-shape", help="Keep the shape of images: the default without --size."),
    ] = False,
    longer_side: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="With --keep-shape: reduce larger images to this; 0 keeps their size. Default: 768.",
        ),
    ] = None,
    crops: Annotated[
        int, typer.Option(help="With --size: 5 takes the corners too, each as a row of its own.")
    ] = 1,
    flip: Annotated[
        bool, typer.Option("--flip", help="Each image mirrored too, as a row of its own.")
    ] = False,
    shuffle: Annotated[
        bool,
        typer.Option("--shuffle", help="Take the images in random order. Reads all names first."),
    ] = False,
    update: Annotated[
        bool, typer.Option("--update", help="Do images again whose files have changed.")
    ] = False,
    max_errors: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Stop after more bad images than this. Default: 100, or 1 % if that is more.",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin the store anew.")] = False,
    batch: Annotated[int, typer.Option(help="Images at a time.")] = 32,
    device: Device = "auto",
    precision: Precision = "float32",
    workers: Workers = None,
) -> None:
    """Write a collection as tokens. Run it again to go on: images that are in the store are not done again."""
    from smalto.images.image_file import summary
    from smalto.images.reading import LONGER_SIDE
    from smalto.pipelines import tokenize as jobs

    if size is not None and (keep_shape or longer_side is not None):
        raise SmaltoError(
            "--size cuts squares: leave out --keep-shape and --longer-side, or --size."
        )
    with console_progress(resumes=True) as progress:
        done = jobs.tokenize(
            source,
            tokenizer,
            out,
            size=size,
            longer_side=LONGER_SIDE if longer_side is None else longer_side,
            crops=crops,
            flip=flip,
            shuffle=shuffle,
            update=update,
            max_errors=max_errors,
            overwrite=overwrite,
            batch=batch,
            device=device,
            precision=checked_precision(precision),
            workers=workers,
            progress=progress,
        )
        if done.skipped:
            progress.message(
                f"{summary(done.skipped)} They are noted in the store: smalto store info {out} --errors"
            )
        if done.num_ignored:
            progress.message(f"{done.num_ignored:,} other files are no images")
        if done.changed:
            what = (
                "were done again" if update else "are kept as they were; --update does them again"
            )
            progress.message(
                f"{len(done.changed):,} images have changed since they were tokenized, such as {done.changed[0]!r}: they {what}"
            )
    written = f"{done.num_images:,} images, {done.num_tokens:,} tokens written; {done.num_known:,} were there"
    print(f"{written} -> {done.path}: {done.num_rows:,} rows")


@app.command(epilog="Example: smalto decode tokens.lance --out images/")
def decode(
    tokens: Annotated[Path, typer.Argument(help="A token store.")],
    out: Annotated[Path, typer.Option(help="Folder for the images.")] = Path("decoded"),
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Folder of the tokenizer; default: the one that the store names."),
    ] = None,
    overwrite: Overwrite = False,
    batch: Batch = 8,
    device: Device = "auto",
    precision: Precision = "float32",
    workers: Annotated[
        int | None,
        typer.Option(help="Threads that write PNG files; 0: none. Default: all cores but one."),
    ] = None,
) -> None:
    """Turn tokens back into PNG images."""
    from smalto.pipelines import decode as jobs

    with console_progress() as progress:
        paths = jobs.decode(
            tokens,
            out,
            tokenizer,
            overwrite=overwrite,
            batch=batch,
            device=device,
            precision=checked_precision(precision),
            workers=workers,
            progress=progress,
        )
    print(f"{len(paths):,} images -> {out}")


@app.command(epilog="Example: smalto reconstruct cat.jpg --tokenizer runs/mine")
def reconstruct(
    photo: Annotated[Path, typer.Argument(help="One image.")],
    tokenizer: Tokenizer,
    out: Annotated[
        Path | None, typer.Option(help="The PNG to write; default: NAME-reconstruction.png here.")
    ] = None,
    overwrite: Overwrite = False,
    longer_side: LongerSide = 768,
    batch: Annotated[int, typer.Option(help="Makes no difference to one image.")] = 1,
    device: Device = "auto",
    precision: Precision = "float32",
    workers: Annotated[int, typer.Option(help="Makes no difference to one image.")] = 0,
) -> None:
    """Encode one image, decode it again, and say how near it came."""
    from smalto.pipelines import reconstruct as jobs

    with console_progress() as progress:
        if batch != 1 or workers:
            progress.message(
                "one image is decoded and encoded at once: --batch and --workers make no difference"
            )
        result = jobs.reconstruct(
            photo,
            tokenizer,
            out,
            overwrite=overwrite,
            longer_side=longer_side,
            device=device,
            precision=checked_precision(precision),
            progress=progress,
        )
    print(
        f"{result.num_tokens:,} tokens ({result.bytes:,} bytes), PSNR {result.psnr:.2f} dB -> {result.path}"
    )


@app.command(
    epilog="Example: smalto convert runs/var --to var --out vae.pth (a run of recipes/var-small.toml or like it)"
)
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            help="Folder of a tokenizer or run; with --to smalto: a .pth or .safetensors file of VAR."
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="The .pth file to write; with --to smalto: the folder.")
    ],
    to: Annotated[
        str,
        typer.Option(
            help="var: a file for FoundationVision/VAR. smalto: a tokenizer from such a file."
        ),
    ] = "var",
    patch_nums: Annotated[
        str, typer.Option(help="With --to smalto: the scales of the file's tokenizer.")
    ] = "1,2,3,4,5,6,8,10,13,16",
    using_znorm: Annotated[
        bool, typer.Option("--using-znorm", help="With --to smalto: it searches by angle.")
    ] = False,
    quant_resi: Annotated[float, typer.Option(help="With --to smalto: its quant_resi.")] = 0.5,
    overwrite: Overwrite = False,
) -> None:
    """Write a tokenizer as a file that VAR loads, or read such a file."""
    from smalto.pipelines.convert import convert as run

    try:
        scales = [int(number) for number in patch_nums.split(",")]
    except ValueError:
        raise SmaltoError(
            f"--patch-nums takes whole numbers with commas between, such as 1,2,3,4; got {patch_nums!r}."
        ) from None
    settings: dict[str, Any] = {
        "patch_nums": scales,
        "using_znorm": using_znorm,
        "quant_resi": quant_resi,
    }
    result = run(source, out, to, overwrite=overwrite, **settings)  # type: ignore[arg-type]
    print(f"{result.path}\n" + "\n".join(result.notes))


@app.command(epilog="Example: smalto info runs/mine")
def info(
    path: Annotated[Path, typer.Argument(help="A run, a tokenizer or a token store.")],
) -> None:
    """Say what a file or folder of smalto is."""
    from smalto.pipelines.info import info as describe

    print_rows([(name, str(value)) for name, value in describe(path).items()])
