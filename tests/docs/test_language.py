"""The language of code and documentation: phrases that a reader would stumble over do not
return.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs" / "en").glob("*.md")),
]
MODULES = sorted((ROOT / "src").rglob("*.py"))
SOURCES = [
    *MODULES,
    *(ROOT / "src/smalto/report").glob("*.html"),
    *sorted((ROOT / "benchmarks").glob("*.py")),
    *sorted((ROOT / "recipes").glob("*.toml")),
    ROOT / "pyproject.toml",
    ROOT / "Makefile",
]
EARLIER = ROOT / "src/smalto/training/earlier_formats.py"  # spells the names of that time
BANNED = {
    "image, not picture": r"(?<!\")\bpictures?\b(?!\")",  # in quotes: a name of users' data
    "again, or new": r"\banew\b",
    "name who does it": r"\b(whoever|nobody)\b",
    "without end": r"\bfor ever\b",
    "while": r"\bmeanwhile\b",
    "unused, or unusable": r"\bof no use\b",
    "unchanged": r"\bas (it is|they are)\b(?! (called|named|used|read|written|stored|published))",
    "automatically, or alone": r"\bby (itself|themselves)\b",
    "integers": r"\bwhole numbers?\b",
    "is not a": r"\bis no\b(?! longer)",
    "name the subject first": r"(?:^|[.!?] |\"\"\")Of [a-z]",
    "resume, or continue": r"\b(go|goes|going|went) on\b",
    "US spelling": r"\b(colour\w*|centre\w*|grey\w*|licence|behaviour\w*)",
    "US spelling, -ize": r"\b(normal|initial|maxim|minim|token|optim)is(e|es|ed|ing|ation)\b",
}
CHINESE = [ROOT / "README.zh.md", *sorted((ROOT / "docs" / "zh").glob("*.md"))]


def findings(path: Path, banned: dict[str, str]) -> list[str]:
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        for advice, pattern in banned.items():
            if match := re.search(pattern, line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {match[0]!r} ({advice})")
    return found


@pytest.mark.parametrize("paths", [SOURCES, PAGES], ids=["sources", "pages"])
def test_banned_phrases_do_not_return(paths: list[Path]) -> None:
    found = [line for path in paths if path != EARLIER for line in findings(path, BANNED)]
    assert not found, "\n".join(found)


def test_the_chinese_pages_use_one_word_per_idea() -> None:
    found = [line for path in CHINESE for line in findings(path, {"图像": "图片", "监控": "守卫"})]
    assert not found, "\n".join(found)


def test_the_banned_patterns_can_match() -> None:
    sentences = {
        "image, not picture": "a picture of",
        "is not a": "this is no run",
        "name the subject first": "Done. Of several processes the first speaks.",
        "US spelling": "the colour of",
        "US spelling, -ize": "normalised latents",
    }
    for advice, sentence in sentences.items():
        assert re.search(BANNED[advice], sentence), advice
    for good in ("the color of colors", "it is no longer there", "is not a run"):
        assert not any(re.search(pattern, good) for pattern in BANNED.values()), good


def test_lines_have_at_most_100_columns() -> None:
    long = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in [*MODULES, *sorted((ROOT / "tests").rglob("*.py"))]
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if len(re.sub(r"  # (type: ignore|noqa).*", "", line)) > 100
    ]
    assert not long, "\n".join(long)


def test_a_file_name_occurs_once() -> None:
    names = [path.name for path in MODULES if path.name not in ("__init__.py", "config.py")]
    assert len(names) == len(set(names)), sorted({n for n in names if names.count(n) > 1})
