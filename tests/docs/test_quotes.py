"""Every figure in the READMEs is the stored result's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from smalto.pipelines.finish import figure_rows

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "README.zh.md"]


def result(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_demo_ends_as_shown(page: Path) -> None:
    demo, text = result("demo"), page.read_text(encoding="utf-8")
    for name, value in figure_rows(demo["metrics"]):
        assert any(line.startswith(name) and line.endswith(value) for line in text.splitlines()), (name, value)
    assert demo["machine"]["processor"] in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_quality_is_quoted(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name, row in result("quality")["summary"].items():
        shown = [f"{row['psnr']:.2f}", f"{row['codes_used']:.1%}", f"{row['perplexity']:.0f}"]
        shown += [f"{row['training_codes_used']:.1%}", f"{row['parameters']:,.0f}"]
        assert f"| {' | '.join([name, *shown])} |" in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_search_is_quoted(page: Path) -> None:
    search, text = result("search"), page.read_text(encoding="utf-8")
    for row in search["rows"]:
        assert f"| {row['shape']} | {row['smalto_ms']:.1f} ms | {row['cdist_ms']:.1f} ms | {row['ratio']:.1f} |" in text
    assert f"{search['geometric_mean_ratio']:.1f}" in text
