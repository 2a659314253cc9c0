"""The README's first block works as pasted into a new shell, and its tree is the tree."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ENVIRONMENT

ROOT = Path(__file__).parents[2]
READMES = [ROOT / "README.md", ROOT / "README.zh.md"]


def first_block(page: Path) -> str:
    match = re.search(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert match
    return match[1]


def test_the_first_block_works_in_a_shell_that_does_not_know_smalto(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "src", "README.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".venv").symlink_to(sys.prefix)  # what `make .venv` makes, as this test has it
    system = os.pathsep.join(
        folder
        for folder in os.environ["PATH"].split(os.pathsep)
        if not Path(folder).is_relative_to(sys.prefix)
    )
    assert shutil.which("smalto", path=system) is None
    environment = {key: ENVIRONMENT[key] for key in ENVIRONMENT if key != "VIRTUAL_ENV"}
    environment |= {"PATH": system, "MAKEFLAGS": "-o .venv/installed"}
    block = first_block(READMES[0]).replace(
        "smalto train bundled", "smalto train bundled --steps 4"
    )
    done = subprocess.run(
        ["bash", "-euc", block],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "PSNR" in done.stdout
    assert len(list((tmp_path / "decoded").rglob("*.png"))) >= 10


@pytest.mark.parametrize("page", READMES, ids=lambda page: page.name)
def test_the_tree_is_the_tree(page: Path) -> None:
    shown = re.findall(r"^  (\w+)/ ", page.read_text(encoding="utf-8"), re.MULTILINE)
    package = ROOT / "src" / "smalto"
    there = [folder.name for folder in package.iterdir() if (folder / "__init__.py").is_file()]
    assert sorted(shown) == sorted(there)
