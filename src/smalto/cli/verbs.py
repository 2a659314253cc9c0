"""All commands but `generate` and those for token stores."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from smalto.cli.generate_verb import generate
from smalto.cli.shared import (
    Batch,
    Device,
    LongerSide,
    Overwrite,
    Precision,
    Size,
    Tokenizer,
    Workers,
    checked_choice,
    console_progress,
    given,
    print_rows,
    print_tables,
    print_trained,
    quoted,
    say,
)
from smalto.cli.store_verbs import app as store
from smalto.core.errors import SmaltoError

app = typer.Typer(
    name="smalto",
    help="Turn images into discrete tokens and back: train an image tokenizer (VQ-VAE) on your own "
    "images.",
    epilog="Start with: smalto demo. Then: smalto train FOLDER --out runs/mine",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(store, name="store")
app.command(epilog="Example: smalto generate emoji --label animals --count 16")(generate)


@app.command(epilog="Example: smalto demo")
def demo(
    out: Annotated[
        Path,
        typer.Option(help="Folder for runs; the demo is written to OUT/demo, OUT/demo-2, ..."),
    ] = Path("runs"),
    steps: Annotated[int | None, typer.Option(help="Training steps.")] = None,
    batch: Annotated[int | None, typer.Option(help="Crops per step.")] = None,
    device: Device = "auto",
    precision: Annotated[str | None, typer.Option(help="float32 or bf16.")] = None,
    workers: Workers = None,
) -> None:
    """Fine-tune photos-f4 on bundled photographs, tokenize and decode held-out ones, and report."""
    from smalto.pipelines.demo import demo as run_demo

    settings = given({"steps": steps, "data.batch": batch, "precision": precision})
    with console_progress() as progress:
        print_trained(
            run_demo(out, settings=settings, device=device, workers=workers, progress=progress)
        )


@app.command(
    epilog="Examples: smalto train photos/ --out runs/mine --steps 4000;  "
    "smalto train --resume runs/mine"
)
def train(
    folder: Annotated[
        str | None,
        typer.Argument(
            help="Folder (or zip, tar, parquet) of images, with its subfolders; or bundled, emoji. "
            "For the recipe of a generator: a token store, or a folder of stores. "
            "With --resume: where the images or tokens are now, if they moved."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Run folder to create.")] = Path("runs/mine"),
    resume: Annotated[
        Path | None, typer.Option(help="Resume this run instead of starting one.")
    ] = None,
    overwrite: Overwrite = False,
    start: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="Fine-tune this tokenizer: a folder, a name that `smalto info` lists, or weights "
            "of another project, as for --tokenizer.",
        ),
    ] = None,
    learn: Annotated[
        str | None,
        typer.Option(
            help="What --from trains: everything, decoder (the tokens of an image stay the same) "
            "or all-but-codebook."
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="Recipe file (TOML); see recipes/. Default: the smallest network; after --from "
            "NAME, the recipe that comes with that tokenizer."
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Change one setting, such as --set optimizer.lr=0.0005. May be repeated."
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps.")] = None,
    size: Annotated[int | None, typer.Option(help="Side of the training crops in pixels.")] = None,
    codebook_size: Annotated[int | None, typer.Option(help="Number of codes.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Random seed for initialization, crops and augmentation.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="Crops per step; for a generator, rows per step.")
    ] = None,
    device: Device = "auto",
    precision: Annotated[
        str | None,
        typer.Option(help="float32 or bf16 for encoder and decoder, or for the transformer."),
    ] = None,
    workers: Workers = None,
) -> None:
    """Train a tokenizer on your images, or a generator on their tokens.

    Ctrl-C saves and stops; --resume continues the run.
    """
    from smalto.pipelines import train as jobs
    from smalto.pretrained import finetuning_recipe
    from smalto.training.recipe import change_recipe, parse_setting
    from smalto.training.recipe_file import load_recipe

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
            "got neither images nor a run. Name a FOLDER of images to train on, or resume a run "
            "with --resume RUN."
        )
    if "data.source" in settings:
        raise SmaltoError(
            "got --set data.source; the images are named by FOLDER. With --resume, FOLDER is where "
            "they are now."
        )
    if resume is not None and (
        recipe is not None or overwrite or start is not None or learn is not None
    ):
        raise SmaltoError(
            "--resume keeps the recipe and weights of the run: leave out --recipe, --overwrite, "
            "--from and --learn."
        )
    if resume is not None and codebook_size is not None:
        raise SmaltoError("--resume keeps the tokenizer of the run: leave out --codebook-size.")
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
            chosen = load_recipe(recipe or finetuning_recipe(start), settings)
            if codebook_size is not None and not chosen.codebook_size_key:
                raise SmaltoError("--codebook-size is for recipes of tokenizers: leave it out.")
            if codebook_size is not None:
                chosen = change_recipe(chosen, {chosen.codebook_size_key: codebook_size})
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
            help="Folder (or zip, tar, parquet) of images; or bundled, emoji. If it is the "
            "training folder, only its held-out images are evaluated."
        ),
    ],
    tokenizer: Annotated[
        list[str],
        typer.Option(
            help="Folder of a tokenizer, run or generator, a name that `smalto info` lists, or "
            "weights of another project; several of them are compared in one table."
        ),
    ],
    report: Annotated[
        Path | None,
        typer.Option(help="HTML file to write, with the reconstructions side by side."),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Evaluate training images too.")
    ] = False,
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
            help="An .npz file with mu and sigma as the reference of Fréchet distances. "
            "Default: the original images."
        ),
    ] = None,
    inception_weights: Annotated[
        Path | None,
        typer.Option(help="Path of pt_inception-2015-12-05-6726825d.pth, for rFID."),
    ] = None,
    lpips_vgg: Annotated[
        Path | None,
        typer.Option(help="File with the state_dict of lpips.LPIPS(net='vgg'), for LPIPS."),
    ] = None,
) -> None:
    """Evaluate a tokenizer on whole images, or compare several.

    Reports PSNR, SSIM, perceptual and Fréchet distances, codebook usage, bits per pixel and speed,
    and compares with JPEG and WebP at the same file size.
    """
    import json

    from smalto.images.image_file import summary
    from smalto.metrics.formatting import metric_tables
    from smalto.pipelines import evaluate as jobs

    settings: dict[str, Any] = {
        "everything": everything,
        "longer_side": longer_side,
        "size": size,
        "batch": batch,
        "device": device,
        "precision": checked_choice("--precision", precision, ("float32", "bf16")),
        "workers": workers,
        "reference_stats": reference_stats,
        "inception_weights": inception_weights,
        "lpips_vgg": lpips_vgg,
    }
    with console_progress() as progress:
        if len(tokenizer) > 1 or report is not None:
            compared = jobs.compare(folder, tokenizer, report, progress=progress, **settings)
            skipped = compared.contenders[0].evaluation.skipped
            measured: Any = compared.as_json()
            tables = [[], compared.table()]
        else:
            result = jobs.evaluate(folder, tokenizer[0], progress=progress, **settings)
            skipped = result.skipped
            measured = result.metrics.as_json()
            tables = metric_tables(result.metrics)
        if skipped:
            progress.message(summary(skipped))
    if json_:
        say(json.dumps(measured, indent=2))
        return
    print_tables(tables)
    if report is not None:
        say(f"\nreport: {report}")


@app.command(
    epilog="Example: smalto tokenize photos/ --tokenizer runs/mine --out tokens.lance --size 256"
)
def tokenize(
    source: Annotated[
        str,
        typer.Argument(
            help="Folder (or zip, tar, parquet) of images, one image, emoji, bundled, or another "
            "token store, whose rows are copied."
        ),
    ],
    tokenizer: Tokenizer,
    out: Annotated[Path, typer.Option(help="Token store to create or resume.")] = Path(
        "tokens.lance"
    ),
    size: Annotated[
        int | None,
        typer.Option(help="Resize the shorter side to this and crop a square from the center."),
    ] = None,
    resize: Annotated[
        int | None,
        typer.Option(
            help="Resize the shorter side to this before the crop of --size; VAR uses 1.125 times "
            "the size."
        ),
    ] = None,
    keep_shape: Annotated[
        bool,
        typer.Option("--keep-shape", help="Keep the aspect ratio: the default without --size."),
    ] = False,
    longer_side: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Without --size: reduce larger images to this many pixels on their longer side; "
            "0 keeps their size. Default: 768.",
        ),
    ] = None,
    crops: Annotated[
        int,
        typer.Option(
            help="With --size: 1 for the center crop, 5 to add the corner crops, each as a row."
        ),
    ] = 1,
    flip: Annotated[
        bool, typer.Option("--flip", help="Add a mirrored view of each crop as a row.")
    ] = False,
    deep_gray: Annotated[
        str,
        typer.Option(
            help="How 16-bit and float gray becomes 8-bit gray: full maps the whole range of the "
            "type to black and white, range the minimum and maximum of the image."
        ),
    ] = "full",
    shuffle: Annotated[
        bool,
        typer.Option(
            "--shuffle", help="Tokenize in random order, always the same. Reads all names first."
        ),
    ] = False,
    update: Annotated[
        bool, typer.Option("--update", help="Tokenize images again whose files have changed.")
    ] = False,
    max_errors: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Stop after more bad images than this. Default: 100, or 1 % of the images if that "
            "is more.",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the store.")] = False,
    batch: Annotated[int, typer.Option(help="Images per batch.")] = 32,
    device: Device = "auto",
    precision: Precision = "float32",
    workers: Workers = None,
) -> None:
    """Write the tokens of images to a token store.

    Run the same command again to resume: images that are in the store are skipped.
    """
    from smalto.images.image_file import summary
    from smalto.images.reading import LONGER_SIDE
    from smalto.pipelines import tokenize as jobs

    if size is not None and (keep_shape or longer_side is not None):
        raise SmaltoError(
            "--size crops squares: leave out --keep-shape and --longer-side, or --size."
        )
    with console_progress(resumes=True) as progress:
        done = jobs.tokenize(
            source,
            tokenizer,
            out,
            size=size,
            resize=resize,
            longer_side=LONGER_SIDE if longer_side is None else longer_side,
            crops=crops,
            flip=flip,
            deep_gray=checked_choice("--deep-gray", deep_gray, ("full", "range")),
            shuffle=shuffle,
            update=update,
            max_errors=max_errors,
            overwrite=overwrite,
            batch=batch,
            device=device,
            precision=checked_choice("--precision", precision, ("float32", "bf16")),
            workers=workers,
            progress=progress,
        )
        if done.skipped:
            progress.message(
                f"{summary(done.skipped)} List them with: smalto store info {quoted(out)} --errors"
            )
        if done.unreadable:
            progress.message(
                f"{summary(done.unreadable)} Run the same command again to try these again."
            )
        if done.num_ignored:
            progress.message(f"{done.num_ignored:,} other files are not images")
        if done.changed:
            action = (
                "they were tokenized again"
                if update
                else "their tokens were kept; --update tokenizes them again"
            )
            progress.message(
                f"{_images_have(len(done.changed))} changed since they were tokenized, such as "
                f"{done.changed[0]!r}: {action}"
            )
        if done.notes:
            name, note = done.notes[0]
            progress.message(f"{_images_have(len(done.notes))} a note, such as {name}: {note}")
    say(
        f"{done.num_images:,} images, {done.num_tokens:,} tokens written; {done.num_known:,} were "
        f"in the store -> {done.path}: {done.num_rows:,} rows"
    )


def _images_have(number: int) -> str:
    return "1 image has" if number == 1 else f"{number:,} images have"


@app.command(epilog="Example: smalto decode tokens.lance --out images/")
def decode(
    tokens: Annotated[Path, typer.Argument(help="A token store.")],
    out: Annotated[Path, typer.Option(help="Folder for the images.")] = Path("decoded"),
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="Folder or name of the tokenizer. Default: the one recorded in the store."
        ),
    ] = None,
    overwrite: Overwrite = False,
    batch: Batch = 8,
    device: Device = "auto",
    precision: Precision = "float32",
    workers: Annotated[
        int | None,
        typer.Option(
            help="Threads that write PNG files; 0: the main thread waits for each batch. "
            "Default: all cores but one, at most 8."
        ),
    ] = None,
) -> None:
    """Decode a token store to PNG images."""
    from smalto.pipelines import decode as jobs

    with console_progress() as progress:
        paths = jobs.decode(
            tokens,
            out,
            tokenizer,
            overwrite=overwrite,
            batch=batch,
            device=device,
            precision=checked_choice("--precision", precision, ("float32", "bf16")),
            workers=workers,
            progress=progress,
        )
    say(f"{len(paths):,} images -> {out}")


@app.command(epilog="Example: smalto reconstruct cat.jpg --tokenizer runs/mine")
def reconstruct(
    photo: Annotated[Path, typer.Argument(help="One image.")],
    tokenizer: Tokenizer,
    out: Annotated[
        Path | None,
        typer.Option(
            help="PNG file to write. Default: NAME-reconstruction.png in the current folder."
        ),
    ] = None,
    overwrite: Overwrite = False,
    longer_side: LongerSide = 768,
    device: Device = "auto",
    precision: Precision = "float32",
) -> None:
    """Encode one image, decode its tokens, and report the PSNR."""
    from smalto.pipelines import reconstruct as jobs

    with console_progress() as progress:
        result = jobs.reconstruct(
            photo,
            tokenizer,
            out,
            overwrite=overwrite,
            longer_side=longer_side,
            device=device,
            precision=checked_choice("--precision", precision, ("float32", "bf16")),
            progress=progress,
        )
    say(
        f"{result.num_tokens:,} tokens ({result.bytes:,} bytes), PSNR {result.psnr:.2f} dB -> "
        f"{result.path}"
    )


@app.command(
    epilog="Example: smalto convert runs/var --to var --out vae.pth  "
    "(a run of recipes/var-small.toml or a similar recipe)"
)
def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="Folder of a tokenizer or generator, or name of a tokenizer. With --to smalto: a "
            "weight file or folder of VAR, LlamaGen, taming-transformers, diffusers, transformers "
            "or MaskGIT."
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(help=".pth file to write. With --to smalto or onnx: the folder to create."),
    ],
    to: Annotated[
        str,
        typer.Option(
            help="var, llamagen, taming, diffusers or maskgit: write a file that this project's "
            "code loads. onnx: write a folder with an encoder and a decoder for onnxruntime. "
            "smalto: read weights of another project."
        ),
    ] = "var",
    patch_nums: Annotated[
        str, typer.Option(help="With --to smalto: the scales of VAR's tokenizer.")
    ] = "1,2,3,4,5,6,8,10,13,16",
    using_znorm: Annotated[
        bool,
        typer.Option(
            "--using-znorm", help="With --to smalto: VAR's tokenizer uses cosine similarity."
        ),
    ] = False,
    quant_resi: Annotated[
        float, typer.Option(help="With --to smalto: quant_resi of VAR's tokenizer.")
    ] = 0.5,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="With --to smalto: SOURCE is a transformer of VAR, and this is the folder of its "
            "tokenizer, converted before."
        ),
    ] = None,
    num_heads: Annotated[
        int | None,
        typer.Option(help="Attention heads of that transformer, if its weights do not show them."),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            help="Project of SOURCE (var, llamagen, taming, diffusers, transformers, maskgit). "
            "Default: recognized from its keys."
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Convert a tokenizer or generator to a weight file of another project, or such a file back."""
    from smalto.pipelines.convert import convert as run

    try:
        scales = [int(number) for number in patch_nums.split(",")]
    except ValueError:
        raise SmaltoError(
            f"--patch-nums must be integers separated by commas, such as 1,2,3,4; got "
            f"{patch_nums!r}."
        ) from None
    settings: dict[str, Any] = {
        "patch_nums": scales,
        "using_znorm": using_znorm,
        "quant_resi": quant_resi,
        "tokenizer": tokenizer,
        "num_heads": num_heads,
        "format": format,
    }
    with console_progress():
        result = run(source, out, to, overwrite=overwrite, **settings)  # type: ignore[arg-type]
    say(f"{result.path}\n" + "\n".join(result.notes))


@app.command(epilog="Example: smalto info runs/mine")
def info(
    path: Annotated[
        str | None,
        typer.Argument(
            help="Run, tokenizer or generator (its folder or name), or token store. Default: list "
            "the models of this package."
        ),
    ] = None,
) -> None:
    """Describe a run, a model or a token store, or list the models of this package."""
    from smalto.pretrained import pretrained_names, summary_of

    if path is None:
        print_rows([(name, summary_of(name)) for name in pretrained_names()])
        return
    from smalto.pipelines.info import info as describe

    metadata = describe(path)
    card = metadata.pop("card", None)
    print_rows([(name, str(value)) for name, value in metadata.items()])
    if card is not None:
        say("\n" + card)
