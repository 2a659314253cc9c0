"""What share does `smalto tokenize` reach of what the parts allow (asked: 0.9): the model alone,
and the cores of the machine divided by what decoding and the model take of them for one image?
And how much more memory do 30,000 images take than 3,000 (asked: 5 %)?

    python benchmarks/tokenization.py [FOLDER]

(It is not called tokenize.py because Python has a module of that name, which all scripts of this
folder would find here.)

Images are made of the bundled photographs: JPEG files of 256 x 256 and of 500 x 375 (the usual size
in ImageNet), no two alike. Every job is a process of its own; what it writes is checked by its
number of rows.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy
import torch
from machine import RESULTS, store
from PIL import Image
from training import group_norm_recipe

import smalto
from smalto.core.allocator import retain_freed_memory
from smalto.core.progress import Progress
from smalto.images.bundled import bundled_photographs
from smalto.images.finding import find_images
from smalto.images.image_file import ImageFile
from smalto.images.reading import read_image
from smalto.images.transforms import Prepared, Transform
from smalto.inference.inference_tokenizer import InferenceTokenizer
from smalto.tokenizing.encode_shard import encode_shard
from smalto.tokenizing.local import FILES_PER_SHARD

SIDE, BATCH, ROUNDS, SECONDS = 256, 32, 3, 10
SHAPES = {"256 x 256": (256, 256), "500 x 375": (500, 375)}
IMAGES = {  # per job, so that each takes more than a minute: starting takes two seconds
    ("SimpleVQVAE", "float32"): 6000,
    ("SimpleVQVAE", "bf16"): 9000,
    ("small CNN", "bf16"): 1500,
}
MEMORY = (3000, 30_000)


def write_images(folder: Path, number: int, width: int, height: int) -> None:
    """Crops of photographs with a camera's noise, as JPEG files of quality 90, 1,000 in a
    folder.
    """
    sources = [Image.fromarray(read_image(file, None)) for file in bundled_photographs()]
    for i in range(number):
        random, source = numpy.random.default_rng(i), sources[i % len(sources)]
        scale = max(width / source.width, height / source.height) * random.uniform(1, 1.5)
        large = source.resize(
            (round(source.width * scale) + 1, round(source.height * scale) + 1),
            Image.Resampling.BICUBIC,
        )
        left, top = (
            int(random.integers(0, large.width - width + 1)),
            int(random.integers(0, large.height - height + 1)),
        )
        pixels = numpy.asarray(large.crop((left, top, left + width, top + height)), numpy.int16)
        noisy = numpy.clip(
            pixels + random.integers(-4, 5, pixels.shape, dtype=numpy.int16), 0, 255
        ).astype(numpy.uint8)
        path = folder / f"{i // 1000:03d}" / f"{i:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy).save(path, quality=90)


def tokenizers(folder: Path) -> dict[str, Path]:
    torch.manual_seed(0)
    made = {
        "SimpleVQVAE": smalto.SimpleVQVAE(512),
        "small CNN": group_norm_recipe().tokenizer.build(),
    }
    for name, model in made.items():
        model.save(folder / name)
    return {name: folder / name for name in made}


@retain_freed_memory()
def model_alone(tokenizer: str, precision: Any) -> dict[str, float]:
    """Images a second of the encoder on all cores, run as the job runs it, and the seconds of a
    core that one image takes.
    """
    inference = InferenceTokenizer.of(tokenizer, "cpu", precision, BATCH, Progress())
    image = numpy.random.default_rng(0).integers(0, 256, (1, SIDE, SIDE, 3), dtype=numpy.uint8)
    prepared = Prepared(image, SIDE, SIDE, [(0, 0, SIDE, SIDE)], b"")
    files = [ImageFile(str(number), "") for number in range(FILES_PER_SHARD)]
    transform = Transform(stride=4, size=SIDE)
    cores = torch.get_num_threads()

    def encode(_: int) -> None:
        encode_shard(files, transform, inference, [prepared] * len(files))

    with ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as threads:
        list(threads.map(encode, range(2 * cores)))
        begun, used = time.perf_counter(), time.process_time()
        done = 0
        while time.perf_counter() - begun < SECONDS:
            list(threads.map(encode, range(4 * cores)))
            done += 4 * cores * len(files)
    torch.set_num_threads(cores)
    return {
        "images_per_second": done / (time.perf_counter() - begun),
        "core_seconds": (time.process_time() - used) / done,
    }


def decoding_alone(images: str) -> float:
    """Seconds of a core that a worker of the job takes to read, decode and cut one image."""
    files, _ = find_images(images)
    transform = Transform(stride=4, size=SIDE)
    for file in files[:20]:
        transform.prepare(file)
    used = time.process_time()
    for file in files[:500]:
        transform.prepare(file)
    return (time.process_time() - used) / min(500, len(files))


JOB = f"""
import json, sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
import smalto
from machine import peak_mib
images, tokenizer, out, precision, batch = sys.argv[1:]
begun = time.perf_counter()
options = dict(size={SIDE}, batch=int(batch), precision=precision, device="cpu")
done = smalto.tokenize(images, tokenizer, out, **options)
seconds = time.perf_counter() - begun
print(json.dumps(dict(rows=done.num_rows, seconds=seconds, peak_mib=peak_mib())))
"""


def in_a_process(*arguments: object) -> Any:
    """What a Python process prints last; its threads wait as those of the command line do."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(
        command,
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"},
    )
    return json.loads(done.stdout.splitlines()[-1])


def run_job(
    images: Path, tokenizer: Path, out: Path, precision: str, batch: int = BATCH
) -> dict[str, float]:
    shutil.rmtree(out, ignore_errors=True)
    return in_a_process("-c", JOB, images, tokenizer, out, precision, batch)


def end_to_end(
    folder: Path, images: dict[str, Path], models: dict[str, Path]
) -> list[dict[str, Any]]:
    found = []
    for (name, precision), number in IMAGES.items():
        tokenizer = models[name]
        for shape, source in images.items():
            part = folder / "part" / shape
            shutil.rmtree(part, ignore_errors=True)
            for file in find_images(source)[0][:number]:
                (part / file.name).parent.mkdir(parents=True, exist_ok=True)
                os.link(file.path, part / file.name)
            rounds = []
            for _ in range(ROUNDS):  # bounds and job in turn: the machine's speed changes
                alone, decoding = (
                    in_a_process(__file__, "--model", tokenizer, precision),
                    in_a_process(__file__, "--decoding", part),
                )
                cores = (os.cpu_count() or 1) / (decoding + alone["core_seconds"])
                done = run_job(part, tokenizer, folder / "tokens.lance", precision)
                assert done["rows"] == number
                speed, bound = (
                    done["rows"] / done["seconds"],
                    min(alone["images_per_second"], cores),
                )
                rounds.append(
                    (
                        speed / bound,
                        speed,
                        alone["images_per_second"],
                        cores,
                        1000 * decoding,
                        done["peak_mib"],
                    )
                )
            keys = (
                "share_of_bound",
                "images_per_second",
                "model_alone",
                "cores_bound",
                "decoding_ms",
                "peak_mib",
            )
            middle = {
                key: statistics.median(values)
                for key, values in zip(keys, zip(*rounds, strict=True), strict=True)
            }
            found.append(
                {"model": name, "precision": precision, "jpeg": shape, "images": number, **middle}
            )
            print(found[-1], flush=True)
    return found


def batch_of_one(folder: Path, tokenizer: Path) -> dict[str, Any]:
    """The speed of jobs with ``batch=1``, whose tokens do not depend on the images beside them, as
    a share of the usual speed.
    """
    write_images(folder / "some", MEMORY[0], SIDE, SIDE)
    shares = {}
    for precision in ("float32", "bf16"):
        ratios = []
        for _ in range(ROUNDS):
            usual, alone = (
                run_job(folder / "some", tokenizer, folder / "tokens.lance", precision, batch)
                for batch in (BATCH, 1)
            )
            ratios.append(usual["seconds"] / alone["seconds"])
        shares[precision] = statistics.median(ratios)
    return {"speed_with_batch_1": shares}


def memory(folder: Path, tokenizer: Path) -> dict[str, Any]:
    """The peak of jobs of 3,000 and 30,000 images; the short job before and after the long one."""
    number, many = MEMORY
    write_images(folder / "many", many, SIDE, SIDE)
    (folder / "few").mkdir()
    for path in sorted((folder / "many").iterdir())[: number // 1000]:
        os.symlink(path.resolve(), folder / "few" / path.name)
    peaks = [
        run_job(folder / where, tokenizer, folder / "tokens.lance", "bf16")["peak_mib"]
        for where in ("few", "many", "few")
    ]
    few = statistics.mean(peaks[::2])
    return {"peak_mib": {number: few, many: peaks[1]}, "memory_ratio": peaks[1] / few}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder",
        nargs="?",
        type=Path,
        default=Path("runs/bench-tokenize"),
        help="for images and stores; 4 GB; removed",
    )
    parser.add_argument(
        "--only",
        choices=("memory", "batch"),
        help="this part alone again; the rest stays as stored",
    )
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir(parents=True)
    try:
        models = tokenizers(folder)
        if arguments.only:
            result = json.loads((RESULTS / "tokenization.json").read_text())
            result.pop("machine")
        else:
            images = {shape: folder / shape for shape in SHAPES}
            for shape, (width, height) in SHAPES.items():
                write_images(images[shape], max(IMAGES.values()), width, height)
            result = {
                "side": SIDE,
                "batch": BATCH,
                "rounds": ROUNDS,
                "rows": end_to_end(folder, images, models),
            }
        if arguments.only != "batch":
            result |= memory(folder, models["SimpleVQVAE"])
            print(result["peak_mib"], result["memory_ratio"])
        if arguments.only != "memory":
            result |= batch_of_one(folder, models["SimpleVQVAE"])
            print(result["speed_with_batch_1"])
    finally:
        shutil.rmtree(folder)
    print("stored in", store("tokenization", result))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--model"]:
        print(json.dumps(model_alone(*sys.argv[2:])))
    elif sys.argv[1:2] == ["--decoding"]:
        print(json.dumps(decoding_alone(*sys.argv[2:])))
    else:
        main()
