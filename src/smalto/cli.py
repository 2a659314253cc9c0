"""The command line. Each verb checks nothing itself: it calls one function of the library and prints what that returns."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from smalto.errors import SmaltoError

if TYPE_CHECKING:
    from smalto.console import ConsoleProgress

app = typer.Typer(
    name="smalto",
    help="Turn images into discrete tokens and back: train an image tokenizer (VQ-VAE) on your own pictures.",
    epilog="Begin with: smalto demo. Then: smalto train FOLDER --out runs/mine",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps; auto says what it took.")]
Precision = Annotated[str, typer.Option(help="float32 or bf16 for encoder and decoder; the search for codes is always float32.")]
Workers = Annotated[int | None, typer.Option(help="Decoding processes; 0 decodes in this one. Default: all cores but one.")]
Batch = Annotated[int, typer.Option(help="Pictures at a time.")]
LongerSide = Annotated[
    int, typer.Option(min=0, help="Reduce larger pictures to this many pixels on their longer side; 0 keeps their size.")
]
Size = Annotated[int | None, typer.Option(help="Cut a square of this side from the middle; default: keep the shape.")]
Tokenizer = Annotated[Path, typer.Option(help="Folder of a tokenizer or run.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]


@app.command(epilog="Example: smalto demo")
def demo(
    out: Annotated[Path, typer.Option(help="Where runs lie; the demo is made in OUT/demo, OUT/demo-2, ...")] = Path("runs"),
    steps: Annotated[int | None, typer.Option(help="Training steps.")] = None,
    batch: Annotated[int | None, typer.Option(help="Crops per step.")] = None,
    device: Device = "auto",
    precision: Annotated[str | None, typer.Option(help="float32 or bf16.")] = None,
    workers: Workers = None,
) -> None:
    """Train on bundled photographs, write held-out ones as tokens, read them back, and make a report."""
    from smalto.pipelines.demo import demo as run_demo

    settings = _given({"steps": steps, "data.batch": batch, "precision": precision})
    with _progress() as progress:
        _print_trained(run_demo(out, settings=settings, device=device, workers=workers, progress=progress))


@app.command(epilog="Examples: smalto train photos/ --out runs/mine --steps 4000;  smalto train --resume runs/mine")
def train(
    folder: Annotated[
        str | None,
        typer.Argument(help="Folder (or zip, tar) of pictures, with its subfolders. With --resume: where they are now, if they moved."),
    ] = None,
    out: Annotated[Path, typer.Option(help="The run folder to make.")] = Path("runs/mine"),
    resume: Annotated[Path | None, typer.Option(help="Go on with this run instead.")] = None,
    overwrite: Overwrite = False,
    start: Annotated[Path | None, typer.Option("--from", help="Fine-tune this tokenizer: a folder, or a weight file of VAR.")] = None,
    learn: Annotated[
        str | None, typer.Option(help="With --from: everything, decoder (tokens stay as they are) or all-but-codebook.")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="A recipe (TOML); see recipes/.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Change one setting, such as --set optimizer.lr=0.0005; may be repeated.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps.")] = None,
    size: Annotated[int | None, typer.Option(help="Side of the training crops in pixels.")] = None,
    codebook_size: Annotated[int | None, typer.Option(help="Number of codes.")] = None,
    seed: Annotated[int | None, typer.Option(help="Decides weights, crops and all other chances.")] = None,
    batch: Annotated[int | None, typer.Option(help="Crops per step.")] = None,
    device: Device = "auto",
    precision: Annotated[str | None, typer.Option(help="float32 or bf16 for encoder and decoder.")] = None,
    workers: Workers = None,
) -> None:
    """Train a tokenizer on your pictures. Ctrl-C stops it after saving; --resume goes on."""
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
    settings = dict(parse_setting(text) for text in set_ or []) | _given(short)
    if folder is None and resume is None:
        raise SmaltoError("name a FOLDER of pictures to train on, or a run to go on with: --resume RUN.")
    if "data.source" in settings:
        raise SmaltoError("the pictures are named by FOLDER, not by --set data.source. With --resume, FOLDER says where they are now.")
    if resume is not None and (recipe is not None or overwrite or start is not None or learn is not None):
        raise SmaltoError("--resume goes on with a run as it is: leave out --recipe, --overwrite, --from and --learn.")
    if resume is not None and codebook_size is not None:
        raise SmaltoError("--resume goes on with the tokenizer as it is: leave out --codebook-size.")
    with _progress(resume or out) as progress:
        if resume is not None:
            _print_trained(jobs.resume(resume, folder, settings=settings, device=device, workers=workers, progress=progress))
        else:
            assert folder is not None
            chosen = load_recipe(recipe, settings)
            if codebook_size is not None:
                chosen = change_recipe(chosen, {codebook_size_key(chosen): codebook_size})
            _print_trained(
                jobs.train(folder, chosen, out=out, overwrite=overwrite, start=start, device=device, workers=workers, progress=progress)
            )


@app.command(epilog="Example: smalto evaluate photos/ --tokenizer runs/mine")
def evaluate(
    folder: Annotated[str, typer.Argument(help="Folder (or zip, tar) of pictures. Of the training folder held-out pictures only.")],
    tokenizer: Tokenizer,
    everything: Annotated[bool, typer.Option("--all", help="Measure training pictures too.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    longer_side: LongerSide = 768,
    size: Size = None,
    batch: Batch = 8,
    device: Device = "auto",
    precision: Precision = "float32",
    workers: Workers = None,
    reference_stats: Annotated[
        Path | None, typer.Option(help="An .npz file of mu and sigma to measure Fréchet distances from; default: the pictures themselves.")
    ] = None,
    inception_weights: Annotated[Path | None, typer.Option(help="pt_inception-2015-12-05-6726825d.pth, for rFID.")] = None,
    lpips_vgg: Annotated[Path | None, typer.Option(help="The state of lpips.LPIPS(net='vgg') as a file, for LPIPS.")] = None,
) -> None:
    """Measure a tokenizer: PSNR, SSIM, perceptual and Fréchet distances, codebook use, bits per pixel, speed, beside JPEG and WebP."""
    import json

    from smalto.data.images import summary
    from smalto.pipelines import evaluate as jobs

    with _progress() as progress:
        result = jobs.evaluate(
            folder,
            tokenizer,
            everything=everything,
            longer_side=longer_side,
            size=size,
            batch=batch,
            device=device,
            precision=_precision(precision),
            workers=workers,
            reference_stats=reference_stats,
            inception_weights=inception_weights,
            lpips_vgg=lpips_vgg,
            progress=progress,
        )
        if result.skipped:
            progress.say(summary(result.skipped))
    if json_:
        print(json.dumps(result.figures, indent=2))
    else:
        _print_figures(result.figures)


@app.command(epilog="Example: smalto tokenize photos/ --tokenizer runs/mine --out tokens.safetensors")
def tokenize(
    folder: Annotated[str, typer.Argument(help="Folder (or zip, tar) of pictures, or one picture.")],
    tokenizer: Tokenizer,
    out: Annotated[Path, typer.Option(help="The token file to write.")] = Path("tokens.safetensors"),
    overwrite: Overwrite = False,
    longer_side: LongerSide = 768,
    size: Size = None,
    batch: Batch = 8,
    device: Device = "auto",
    precision: Precision = "float32",
    workers: Workers = None,
) -> None:
    """Write pictures as tokens to one file."""
    from smalto.data.images import summary
    from smalto.pipelines import tokenize as jobs

    with _progress() as progress:
        result = jobs.tokenize(
            folder,
            tokenizer,
            out,
            longer_side=longer_side,
            size=size,
            overwrite=overwrite,
            batch=batch,
            device=device,
            precision=_precision(precision),
            workers=workers,
            progress=progress,
        )
        if result.skipped:
            progress.say(summary(result.skipped))
    print(f"{result.num_images:,} pictures, {result.num_tokens:,} tokens -> {result.path}")


@app.command(epilog="Example: smalto decode tokens.safetensors --out pictures/")
def decode(
    tokens: Annotated[Path, typer.Argument(help="A token file.")],
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("decoded"),
    tokenizer: Annotated[Path | None, typer.Option(help="Folder of the tokenizer; default: the one that the token file names.")] = None,
    overwrite: Overwrite = False,
    batch: Batch = 8,
    device: Device = "auto",
    precision: Precision = "float32",
    workers: Annotated[int | None, typer.Option(help="Threads that write PNG files; 0: none. Default: all cores but one.")] = None,
) -> None:
    """Turn tokens back into PNG pictures."""
    from smalto.pipelines import tokenize as jobs

    with _progress() as progress:
        paths = jobs.decode(
            tokens,
            out,
            tokenizer,
            overwrite=overwrite,
            batch=batch,
            device=device,
            precision=_precision(precision),
            workers=workers,
            progress=progress,
        )
    print(f"{len(paths):,} pictures -> {out}")


@app.command(epilog="Example: smalto reconstruct cat.jpg --tokenizer runs/mine")
def reconstruct(
    photo: Annotated[Path, typer.Argument(help="One picture.")],
    tokenizer: Tokenizer,
    out: Annotated[Path | None, typer.Option(help="The PNG to write; default: NAME-reconstruction.png here.")] = None,
    overwrite: Overwrite = False,
    longer_side: LongerSide = 768,
    batch: Annotated[int, typer.Option(help="Makes no difference to one picture.")] = 1,
    device: Device = "auto",
    precision: Precision = "float32",
    workers: Annotated[int, typer.Option(help="Makes no difference to one picture.")] = 0,
) -> None:
    """Encode one picture, decode it again, and say how near it came."""
    from smalto.pipelines import tokenize as jobs

    with _progress() as progress:
        if batch != 1 or workers:
            progress.say("one picture is decoded and encoded at once: --batch and --workers make no difference")
        result = jobs.reconstruct(
            photo,
            tokenizer,
            out,
            overwrite=overwrite,
            longer_side=longer_side,
            device=device,
            precision=_precision(precision),
            progress=progress,
        )
    print(f"{result.num_tokens:,} tokens ({result.bytes:,} bytes), PSNR {result.psnr:.2f} dB -> {result.path}")


@app.command(epilog="Example: smalto convert runs/var --to var --out vae.pth (a run of recipes/var-small.toml or like it)")
def convert(
    source: Annotated[Path, typer.Argument(help="Folder of a tokenizer or run; with --to smalto: a .pth or .safetensors file of VAR.")],
    out: Annotated[Path, typer.Option(help="The .pth file to write; with --to smalto: the folder.")],
    to: Annotated[str, typer.Option(help="var: a file for FoundationVision/VAR. smalto: a tokenizer from such a file.")] = "var",
    patch_nums: Annotated[str, typer.Option(help="With --to smalto: the scales of the file's tokenizer.")] = "1,2,3,4,5,6,8,10,13,16",
    using_znorm: Annotated[bool, typer.Option("--using-znorm", help="With --to smalto: it searches by angle.")] = False,
    quant_resi: Annotated[float, typer.Option(help="With --to smalto: its quant_resi.")] = 0.5,
    overwrite: Overwrite = False,
) -> None:
    """Write a tokenizer as a file that VAR loads, or read such a file."""
    from smalto.pipelines.convert import convert as run

    try:
        scales = [int(number) for number in patch_nums.split(",")]
    except ValueError:
        raise SmaltoError(f"--patch-nums takes whole numbers with commas between, such as 1,2,3,4; got {patch_nums!r}.") from None
    settings: dict[str, Any] = {"patch_nums": scales, "using_znorm": using_znorm, "quant_resi": quant_resi}
    result = run(source, out, to, overwrite=overwrite, **settings)  # type: ignore[arg-type]
    print(f"{result.path}\n" + "\n".join(result.notes))


@app.command(epilog="Example: smalto info runs/mine")
def info(path: Annotated[Path, typer.Argument(help="A run, a tokenizer or a token file.")]) -> None:
    """Say what a file or folder of smalto is."""
    from smalto.pipelines.info import info as describe

    _print_rows([(name, str(value)) for name, value in describe(path).items()])


def main() -> None:
    """Entry point: a user's mistake ends in one line and exit code 1, Ctrl-C in 130."""
    # Torch's threads wait by spinning; where another process of this kind wants the cores, a step can then take several times
    # as long. It must be said before torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # While torch is being imported Python may swallow a KeyboardInterrupt, and nothing is lost yet: leave at once.
    signal.signal(signal.SIGINT, _leave_at_once)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names may be no text
    try:
        app()
    except SmaltoError as error:
        _fail(str(error), 1)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except OSError as error:
        advice = ". What was saved is whole: free some space and resume." if error.errno == errno.ENOSPC else "."
        _fail(f"{f'{error.filename}: ' if error.filename else ''}{error.strerror or error}{advice}", 1)
    except (MemoryError, RuntimeError) as error:
        from smalto.device import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        _fail("out of memory. Try a smaller --batch, --size or --codebook-size.", 1)


def _leave_at_once(number: int, frame: Any) -> None:
    os.write(2, b"smalto: interrupted\n")
    os._exit(130)


@contextmanager
def _progress(run: Path | None = None) -> Iterator[ConsoleProgress]:
    from smalto.console import ConsoleProgress
    from smalto.training.trainer import Interrupted

    signal.signal(signal.SIGINT, signal.default_int_handler)
    progress = ConsoleProgress()
    try:
        yield progress
    except Interrupted as stopped:
        progress.close()
        _fail(f"{stopped}; everything is saved. Go on with: {_again(run)}", 130)
    except KeyboardInterrupt:
        progress.close()
        begun = run is not None and (run / "recipe.toml").is_file()
        _fail(f"interrupted. Go on with: {_again(run)}" if begun else "interrupted", 130)
    finally:
        progress.close()


def _again(run: Path | None) -> str:
    return f"smalto train --resume {run}" if run else "the same command again"


def _print_trained(trained: Any) -> None:
    if not trained.metrics:  # of several processes only the first has measured
        return
    _print_figures(trained.metrics)
    print(f"\nreport: {trained.run.path / 'report.html'}")


def _print_figures(figures: dict[str, Any]) -> None:
    from smalto.pipelines.finish import codec_rows, figure_rows, grid_rows

    _print_rows(figure_rows(figures))
    for lines in filter(None, (grid_rows(figures), codec_rows(figures))):
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        print()
        for line in lines:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _print_rows(rows: list[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


def _given(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if value is not None}


def _precision(name: str) -> Any:
    if name not in ("float32", "bf16"):
        raise SmaltoError(f"--precision must be float32 or bf16; got {name!r}.")
    return name


def _fail(message: str, code: int) -> None:
    print(f"smalto: {message}", file=sys.stderr)
    sys.exit(code)
