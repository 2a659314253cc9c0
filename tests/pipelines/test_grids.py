"""What is counted and shown of a tokenizer of several grids."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import smalto
from smalto.core.errors import ConfigError
from smalto.core.layout import TokenLayout
from smalto.evaluation.evaluator import Evaluator
from smalto.metrics import perplexity, psnr
from smalto.metrics.formatting import grid_rows
from smalto.pipelines.evaluate import evaluate
from smalto.training.recipe_file import load_recipe
from tests.conftest import smalto_command, write_images

SIZE = 64  # codes


def measured(batch: int, seed: int = 0) -> dict[str, Any]:
    """Metrics of 20 images of 21 random tokens each, taken in ``batch`` at a time."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(SIZE, (20, 21), generator=generator)
    tokens[:, 0] %= 4
    images = torch.rand(20, 3, 16, 16, generator=generator) * 2 - 1
    stages = [(images * share).clone() for share in (0.2, 0.5, 0.9)]
    evaluator = Evaluator(smalto.default_tokenizer(SIZE))
    for start in range(0, 20, batch):
        part = slice(start, start + batch)
        layout = TokenLayout(((1, 1), (2, 2), (4, 4)))
        names = [f"{i}.png" for i in range(20)[part]]
        evaluator.add(
            names,
            images[part],
            stages[2][part],
            tokens[part],
            layout,
            1.0,
            [stage[part] for stage in stages],
        )
    metrics = evaluator.result("test", "none", "float32", []).metrics.as_json()
    for number, grid in enumerate(metrics["grids"]):
        block = tokens.split((1, 4, 16), dim=1)[number]
        assert grid["tokens"] == block.numel()
        assert grid["used"] == len(block.unique()) / SIZE
        assert grid["ceiling"] == min(1, block.numel() / SIZE)
        assert grid["perplexity"] == pytest.approx(
            perplexity(torch.bincount(block.flatten(), minlength=SIZE))
        )
        assert grid["psnr"] == pytest.approx(float(psnr(stages[number], images).mean()))
    assert metrics["used"] == len(tokens.unique()) / SIZE
    return metrics


def test_every_grid_is_counted_exactly_whatever_the_batch() -> None:
    reference = measured(20)
    assert [grid["grid"] for grid in reference["grids"]] == ["1x1", "2x2", "4x4"]
    assert reference["grids"][0]["used"] == 4 / SIZE
    assert reference["grids"][0]["ceiling"] == 20 / SIZE  # 20 images have 20 tokens there
    for batch in (1, 3, 7):
        metrics = measured(batch)
        assert metrics["used"] == reference["used"]
        for own, expected in zip(metrics["grids"], reference["grids"], strict=True):
            assert own == pytest.approx(expected)


def test_images_after_each_grid_are_made_of_the_first_ones_only(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smalto.evaluation.evaluator.MAX_CODEC_IMAGES", 2)
    measured = evaluate(run.parent / "images", run, everything=True, workers=0, batch=1).metrics
    metrics = measured.as_json()
    assert metrics["num_images"] == 6
    assert [grid["psnr_num_images"] for grid in metrics["grids"]] == [2, 2, 2]
    assert metrics["grids"][-1]["tokens"] == 6 * 120
    assert grid_rows(measured)[0][-1] == "PSNR up to it (2 images)"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("multiscale")
    settings = {
        "steps": 4, "data.size": 16, "data.batch": 4, "evaluate.every": 2, "evaluate.crops": 4,
        "precision": "float32",
        "tokenizer.autoencoder.ch": 32, "tokenizer.autoencoder.ch_mult": [1, 1, 1],
        "tokenizer.quantizer.scales": [1, 2, 4],
        "tokenizer.quantizer.scale.codebook_size": 24, "gradient_checkpointing": True,
    }  # fmt: skip
    recipe = load_recipe(Path(__file__).parents[2] / "recipes" / "var-small.toml", settings)
    return smalto.train(
        write_images(folder / "images", 6), recipe, out=folder / "run", workers=0
    ).run.path


def test_a_run_with_scales_from_recipe_to_report(run: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    assert [grid["grid"] for grid in metrics["grids"]] == [
        "3x3",
        "5x6",
        "10x12",
    ]  # of images of 40 x 48
    assert metrics["grids"][-1]["psnr"] == pytest.approx(metrics["psnr"], abs=1e-3)
    page = (run / "report.html").read_text()
    assert "Grid by grid" in page
    strips = re.findall(r'alt="[^"]* after grid (\d): ([\d.]+) dB"', page)
    assert [number for number, _ in strips][:3] == ["1", "2", "3"]
    assert "10x12" in smalto_command("evaluate", run.parent / "images", "--tokenizer", run).stdout
    assert "1x1 + 2x2 + 4x4: 21 tokens for 16 x 16 pixels" in smalto_command("info", run).stdout


def test_tokens_of_images_of_any_shape_go_to_disk_and_back(run: Path, tmp_path: Path) -> None:
    source = write_images(tmp_path / "images", 2, 32, 64)
    write_images(tmp_path / "images" / "more", 2, 24, 24)
    result = smalto.tokenize(source, run, tmp_path / "tokens.lance", workers=0)
    layouts = [smalto.load(run).layout(*size) for size in ((32, 64), (24, 24))]
    assert result.num_tokens == 2 * sum(layout.num_tokens for layout in layouts)
    paths = smalto.decode(tmp_path / "tokens.lance", tmp_path / "back", workers=0)
    assert len(paths) == 4


def test_scales_that_are_not_those_of_the_crops_are_an_error() -> None:
    path = Path(__file__).parents[2] / "recipes" / "var-small.toml"
    with pytest.raises(
        ConfigError,
        match=r"a crop is 32 x 32, .*scales end with 16 x 16\. Set data\.size to "
        r"64, or scales that end with 32",
    ):
        load_recipe(path, {"data.size": 128})
    with pytest.raises(ConfigError, match="scales end with 4 x 8"):
        load_recipe(path, {"tokenizer.quantizer.scales": [[1, 2], [4, 8]]})


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_the_metrics_of_both_precisions_are_near(run: Path, precision: Any) -> None:
    reference = json.loads((run / "metrics.json").read_text())
    metrics = evaluate(run.parent / "images", run, precision=precision, workers=0).metrics
    assert metrics.precision == precision
    assert metrics.psnr == pytest.approx(reference["psnr"], abs=0.5)


def test_a_run_with_scales_resumes(run: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(run, tmp_path / "run")
    resumed = smalto.resume(tmp_path / "run", settings={"steps": 6}, workers=0)
    assert resumed.training.steps == 6
    assert load_recipe(resumed.run.path / "recipe.toml").gradient_checkpointing
