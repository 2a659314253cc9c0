"""The last step of a generator's run: its metrics, metrics.json and report.html."""

from __future__ import annotations

import json

import torch
from torch import Tensor

from smalto.core.files import write_atomic
from smalto.core.progress import Progress
from smalto.core.text import printable
from smalto.evaluation.run_summary import versions
from smalto.generator import Generator, Samples
from smalto.images.contact_sheet import contact_sheet
from smalto.images.tensors import to_uint8
from smalto.metrics.generator_metrics import GeneratorMetrics
from smalto.report.generator_page import GeneratorReport, write_generator_report
from smalto.training.generator_run import TrainedGeneratorRun
from smalto.training.run_folder import METRICS_FILE, REPORT_FILE, read_log

MAX_CLASSES = 10  # in the report
GUIDANCE = 3.0  # of the samples
SETTINGS = [(t, g) for t in (0.7, 1.0) for g in (0.0, 1.5, 3.0, 6.0)]  # temperature, guidance


def measure_run(trained: TrainedGeneratorRun) -> GeneratorMetrics:
    """Measure a trained generator on held-out and on training rows. Every rank calls it."""
    return GeneratorMetrics(
        held_out=trained.task.measure(trained.rows.held_out),
        training=trained.task.measure(trained.rows.training),
        measured_on=trained.measured_on,
        uniform=trained.baselines.uniform,
        histogram=trained.baselines.histogram,
    )


def write_generator_results(
    trained: TrainedGeneratorRun,
    generator: Generator,
    metrics: GeneratorMetrics,
    progress: Progress,
) -> None:
    """Write metrics.json and report.html of a trained run."""
    run, recipe = trained.folder, trained.recipe
    run.event("finished", step=recipe.steps)
    record = {
        **metrics.as_json(),
        "steps": recipe.steps,
        "batch": recipe.data.batch,
        "seed": recipe.seed,
        "source": recipe.data.source,
        "fingerprint": generator.fingerprint(),
        **run.times().as_json(),
        "versions": versions(),
    }
    fast = generator.for_inference(recipe.precision)
    write_generator_report(
        run.path / REPORT_FILE, _report(trained, fast, metrics, record["fingerprint"], progress)
    )
    text = json.dumps(record, indent=2, allow_nan=False) + "\n"
    write_atomic(run.path / METRICS_FILE, text)  # last: it says that the run is complete


def _report(
    trained: TrainedGeneratorRun,
    generator: Generator,
    metrics: GeneratorMetrics,
    fingerprint: str,
    progress: Progress,
) -> GeneratorReport:
    run, recipe, config = trained.folder, trained.recipe, generator.config
    times = run.times()
    each = recipe.evaluate.samples
    classes = _chosen_classes(config.num_classes) if each else []
    progress.start("making samples", len(classes) + len(SETTINGS) * bool(each), "sheets")
    samples: list[tuple[str, Tensor]] = []
    firsts = []
    for number in classes:
        made = _samples(generator, [number] * each, GUIDANCE, 1.0)
        name = "without labels"
        if number is not None:
            name = config.class_names[number] if config.class_names else f"class {number}"
        samples.append((printable(name), _sheet(made.images, columns=each)))
        firsts.append([block[:1] for block in made.idx_Bl])
        progress.advance()
    sheet = []
    for temperature, guidance in SETTINGS if each else []:
        labels = [classes[i % len(classes)] for i in range(max(8, len(classes)))]
        made = _samples(generator, labels, guidance, temperature)
        caption = f"guidance {guidance:g}, temperature {temperature:g}"
        sheet.append((caption, _sheet(made.images, columns=5)))
        progress.advance()
    progress.finish()
    settings = [
        ("trained on", str(recipe.data.source)),
        ("steps, batch", f"{recipe.steps:,} steps of {recipe.data.batch} rows"),
        ("training time", f"{times.seconds:.0f} s, at most {times.peak_memory_mb:,} MiB of memory"),
        ("order", config.order),
        ("parameters", f"{sum(p.numel() for p in generator.transformer.parameters()):,}"),
        ("classes", f"{config.num_classes:,}"),
        ("seed", str(recipe.seed)),
        ("versions", ", ".join(f"{name} {number}" for name, number in versions().items())),
        ("fingerprint", fingerprint),
    ]
    if trained.credits:
        settings.append(("images by", trained.credits))
    return GeneratorReport(
        name=printable(run.path.resolve().name),
        metrics=metrics,
        times=times,
        settings=settings,
        grids=[f"{rows}x{columns}" for rows, columns in config.grids],
        guidance=GUIDANCE,
        samples=samples,
        stages=_stages(generator, firsts),
        sheet=sheet,
        log=read_log(run.path / "log.jsonl"),
    )


def _chosen_classes(num_classes: int) -> list[int | None]:
    """Return at most 10 classes, evenly spaced; [None] without classes."""
    number = min(num_classes, MAX_CLASSES)
    return [i * num_classes // number for i in range(number)] if number else [None]


def _samples(
    generator: Generator, labels: list[int | None], guidance: float, temperature: float
) -> Samples:
    known = [label for label in labels if label is not None]
    return generator.generate(
        known or None,
        seeds=range(len(labels)),
        guidance=guidance,
        temperature=temperature,
    )


def _sheet(images: Tensor, columns: int) -> Tensor:
    return contact_sheet(list(to_uint8(images.cpu())), columns)


def _stages(generator: Generator, firsts: list[list[Tensor]]) -> Tensor | None:
    """Return a sheet with a row per image: after each grid. None if they are not progressive."""
    layout = generator.config.layout
    if len(layout.grids) == 1 or not firsts or not generator.tokenizer.is_progressive:
        return None
    rows = []
    for blocks in firsts:
        stages = generator.tokenizer.decode_each(torch.cat(blocks, dim=1), layout)
        rows += [to_uint8(image[0].float().cpu()) for image in stages]
    return contact_sheet(rows, columns=len(layout.grids))
