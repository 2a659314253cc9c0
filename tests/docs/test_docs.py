"""The documentation is true: its code runs, and both languages show the same code under the same
headings.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from smalto.autoencoders import CNNAutoencoderConfig
from smalto.interop import llamagen
from smalto.quantizers import VectorQuantizerConfig
from smalto.tokenizer import TokenizerConfig
from tests.conftest import WARM, write_images, write_small_photographs

ROOT = Path(__file__).parents[2]
ENGLISH = [ROOT / "README.md", *sorted((ROOT / "docs" / "en").glob("*.md"))]
CHINESE = [ROOT / "README.zh.md", *sorted((ROOT / "docs" / "zh").glob("*.md"))]
# The commands run as they are shown, on fewer steps and less data: at full size they take an hour.
LESS_DATA = """
from pathlib import Path
from smalto.images import bundled, emoji
bundled.package_folder = lambda package, *rest: Path({folder!r}, package)
whole = emoji.emoji
def few():
    files, held_out = whole()
    kept = files[::10]
    return kept, tuple(name for name in held_out if name in {{file.name for file in kept}})
emoji.emoji = few
"""
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, *languages: str) -> list[tuple[str, str]]:
    found = [(match[1], match[2]) for match in BLOCK.finditer(page.read_text(encoding="utf-8"))]
    return [block for block in found if not languages or block[0] in languages]


def heading_levels(page: Path) -> list[int]:
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    return [len(match[1]) for match in re.finditer(r"^(#+) ", text, re.MULTILINE)]


def test_every_page_is_there_in_both_languages() -> None:
    assert [p.name.replace(".zh", "") for p in CHINESE] == [p.name for p in ENGLISH]
    assert len(ENGLISH) >= 3


@pytest.mark.parametrize(
    ("english", "chinese"), list(zip(ENGLISH, CHINESE, strict=True)), ids=lambda page: page.name
)
def test_both_languages_show_the_same(english: Path, chinese: Path) -> None:
    assert blocks(english, "python", "bash", "toml") == blocks(chinese, "python", "bash", "toml")
    assert heading_levels(english) == heading_levels(chinese)


@pytest.mark.parametrize("page", ENGLISH, ids=lambda page: page.name)
def test_its_code_runs(page: Path, tmp_path: Path, prelude: str) -> None:
    write_images(tmp_path / "photos", 6, 80, 96)
    (tmp_path / "photos" / "photo00.png").rename(tmp_path / "photos" / "cat.png")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "my.toml").write_text("\n".join(code for _, code in blocks(page, "toml")))
    torch.save({"model": weights_of_llamagen()}, tmp_path / "vq_ds16_c2i.pt")
    found = blocks(page, "python", "bash")
    if page.name == "concepts.md":
        found = [("python", "\n".join(code for _, code in found))]  # one program
    for language, code in found:
        (run_python if language == "python" else run_commands)(code, tmp_path, prelude)


def weights_of_llamagen() -> dict[str, torch.Tensor]:
    """Return the weights of a small tokenizer in LlamaGen's layout."""
    tokenizer = TokenizerConfig(
        autoencoder=CNNAutoencoderConfig(
            latent_dim=32, ch=32, ch_mult=(1, 1, 1, 1, 1), num_res_blocks=1, quant_conv_kernel=0
        ),
        quantizer=VectorQuantizerConfig(
            codebook_size=64, latent_dim=32, code_dim=8, metric="cosine", unit_codes=True
        ),
    ).build()
    return llamagen.tokenizer_state_dict(tokenizer)


def shorter(arguments: list[str]) -> list[str]:
    """Return options that shorten a training; of two equal ones the last one counts."""
    if arguments[0] not in ("train", "demo"):
        return []
    options = ["--steps", "4", "--batch", "4"]
    if "recipes/emoji-generator.toml" in arguments:
        return [*options, "--set", "evaluate.samples=1"]
    if arguments[0] == "train" and "--resume" not in arguments:
        options += ["--set", "evaluate.crops=4"]
        options += [] if "--from" in arguments else ["--codebook-size", "64"]
    return options


@pytest.fixture(scope="module")
def prelude(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Code that reduces the bundled photographs and the emoji in number or size."""
    folder = write_small_photographs(tmp_path_factory.mktemp("bundled"), 192)
    return LESS_DATA.format(folder=str(folder))


def run_python(code: str, folder: Path, prelude: str) -> None:
    done = WARM.run(["-c", code], folder, timeout=240, prelude=prelude)
    assert done.returncode == 0, code + done.stderr


def run_commands(code: str, folder: Path, prelude: str) -> None:
    for line in code.strip().splitlines():
        program, *arguments = shlex.split(line, comments=True)
        if program == "smalto":
            command = ["-m", "smalto", *arguments, *shorter(arguments)]
            done = WARM.run(command, folder, timeout=240, prelude=prelude)
            assert done.returncode == 0, line + done.stderr
        else:
            assert program in (".", "make", "pip", "git"), (
                line
            )  # what these do is tried in a fresh clone, not here


@pytest.mark.parametrize(
    "page",
    [*ENGLISH, *CHINESE, ROOT / "CONTRIBUTING.md"],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_its_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target
