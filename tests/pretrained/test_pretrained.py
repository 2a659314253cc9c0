"""Models of the package: every job takes their names, and a wheel holds all of their files."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import smalto
from smalto.core.errors import RunError
from smalto.metrics import psnr
from smalto.pretrained import (
    CARD_FILE,
    finetuning_recipe,
    pretrained_folder,
    pretrained_names,
    read_card,
    summary_of,
    tokenizer_folder,
)
from tests.conftest import ENVIRONMENT, smalto_command, write_images

ROOT = Path(__file__).parents[2]
PUBLISHED = {  # fingerprints: weights under a name never change, or token stores would not decode
    "photos-f4": "5dc8c29902d9b16c3cd2e92a0bf2992dc1910ccf9ec42f4aed2ac3a0ca49e06f",
    "photos-f8": "deb2a7414be0f313b5775744b02f8f10f330567e2108fd16c3da2885c1f7dbbd",
}
GENERATORS = {"emoji": "a7817fff3740524be667ce05efb17b08c6543d9a3519b474165d3cc3fb45311c"}
NAMES = sorted(PUBLISHED)
each = pytest.mark.parametrize("name", NAMES)


def test_they_are_there_and_fit_into_the_wheel() -> None:
    assert set(pretrained_names()) == {*PUBLISHED, *GENERATORS}
    for names, megabytes in ((PUBLISHED, 10), (GENERATORS, 12)):
        files = [file for name in names for file in pretrained_folder(name).rglob("*.*")]
        assert sum(file.stat().st_size for file in files) < megabytes * 1e6


def test_the_generator_makes_emoji_from_anywhere(tmp_path: Path) -> None:
    """Right after the installation, and without a network."""
    done = smalto_command(
        "generate", "emoji", "--label", "animals", "--count", 16, "--out", "s", cwd=tmp_path
    )
    assert "16 new images" in done.stdout
    assert len(list((tmp_path / "s").glob("*-animals-nature.png"))) == 16
    store = smalto.TokenStore.open(tmp_path / "s" / "tokens.lance")
    assert len(store) == 16
    assert store.header.fingerprint == smalto.load("emoji").fingerprint()


def test_the_generator_is_the_published_one(tmp_path: Path) -> None:
    generator = smalto.load_generator("emoji")
    assert generator.fingerprint() == GENERATORS["emoji"]
    assert all(weight.dtype == torch.float32 for weight in generator.parameters())
    saved = load_file(pretrained_folder("emoji") / "model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.bfloat16}
    assert len(generator.config.class_names) == generator.config.num_classes
    assert finetuning_recipe("emoji") is None
    described = smalto.info("emoji")
    assert (described["kind"], described["card"]) == ("generator", read_card("emoji"))


def test_the_card_of_the_generator_shows_what_was_measured() -> None:
    card = read_card("emoji")
    result = json.loads((ROOT / "benchmarks" / "results" / "emoji.json").read_text())
    run = result["run"]
    assert f"{run['held_out']['loss']:.3f} nats" in card
    assert f"{run['below_histogram']:.1%} below the histogram" in card
    for guidance, row in result["guidance"].items():
        assert f"| {guidance} | {row['accuracy']:.1%} | {row['fid']:.1f} |" in card
    assert "CC BY 4.0" in card


def test_what_was_claimed_of_the_generator_holds() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "emoji.json").read_text())
    assert result["run"]["below_histogram"] >= 0.1
    chance = 1 / result["groups"]
    assert max(row["accuracy"] for row in result["guidance"].values()) >= 2 * chance


@each
def test_it_is_loaded_from_anywhere_in_float32_and_works(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = smalto.load(name)
    assert tokenizer.fingerprint() == PUBLISHED[name]
    assert tokenizer.is_local
    assert tokenizer.stride == int(name.split("-f")[1])
    assert all(weight.dtype == torch.float32 for weight in tokenizer.parameters())
    saved = load_file(tokenizer_folder(name) / "model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.bfloat16}
    x = torch.linspace(-0.9, 0.9, 96)
    image = torch.stack([x.expand(96, 96), x[:, None].expand(96, 96), -x.expand(96, 96)])[None]
    back = tokenizer.decode(tokenizer.encode(image), tokenizer.layout(96, 96))
    assert psnr(back, image) > 25


@each
def test_jobs_take_and_record_the_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "photos", 5, 100, 120)
    Path(name).touch()  # not a tokenizer
    smalto.tokenize("photos", name, "tokens.lance", workers=0)
    assert smalto.TokenStore.open("tokens.lance").header.tokenizer == name
    assert len(smalto.decode("tokens.lance", "decoded")) == 5
    settings = {"steps": 2, "data.batch": 2, "evaluate.images": 1}
    recipe = smalto.load_recipe(finetuning_recipe(name), settings)
    smalto.train("photos", recipe, out="run", start=name, workers=0)
    assert smalto.load_recipe("run/recipe.toml").finetune.tokenizer == name
    described = smalto.info(name)
    assert described["card"] == read_card(name)
    assert described["fingerprint"] == smalto.load(name).fingerprint()


def test_only_a_tokenizer_of_that_name_takes_precedence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "photos-f8", 1, 64, 64)
    smalto.tokenize("photos-f8", "photos-f8", "tokens.lance", workers=0)
    published = smalto.load("photos-f8").fingerprint()
    smalto.SimpleVQVAE().save(tmp_path / "photos-f8")
    assert isinstance(smalto.load("photos-f8"), smalto.SimpleVQVAE)
    assert finetuning_recipe("photos-f8") is None
    assert smalto.load(pretrained_folder("photos-f8")).fingerprint() == published
    smalto.decode("tokens.lance", "decoded")  # a recorded name is that of the package


def test_a_path_is_not_a_name(tmp_path: Path) -> None:
    for path in ("./photos-f8", "photos-f8/", tmp_path / "photos-f8"):
        with pytest.raises(RunError, match="does not exist"):
            smalto.load(path)
    done = smalto_command("info", "./photos-f8", cwd=tmp_path, check=False)
    assert done.returncode == 1


def test_other_names_are_refused_with_those_that_exist() -> None:
    with pytest.raises(RunError, match=r"photos-f9 does not exist.*photos-f8"):
        smalto.load("photos-f9")


def test_the_command_line_lists_them_and_prints_their_cards(tmp_path: Path) -> None:
    listed = smalto_command("info", cwd=tmp_path).stdout
    for name in pretrained_names():
        assert re.search(rf"^{name} +{re.escape(summary_of(name))}$", listed, re.MULTILINE)
        assert read_card(name) in smalto_command("info", name, cwd=tmp_path).stdout
    write_images(tmp_path, 1, 64, 64)
    smalto_command("reconstruct", "photo00.png", "--tokenizer", "photos-f8", cwd=tmp_path)
    assert (tmp_path / "photo00-reconstruction.png").is_file()


@each
def test_the_card_shows_what_was_measured_and_names_every_author(name: str) -> None:
    card = read_card(name)
    result = json.loads((ROOT / "benchmarks" / "results" / f"pretrained-{name}.json").read_text())
    assert result["split"] == "test"
    for label, kind in (("tokens", "tokens"), ("JPEG", "JPEG"), ("WebP", "WEBP")):
        means = result[kind]
        cells = (
            f"{means['coded_bits_per_pixel']:.3f}",
            f"{means['psnr']:.2f} dB",
            f"{means['ssim']:.4f}",
            f"{means['ms_ssim']:.4f}",
            f"{means['lite0_distance']:.4f}",
        )
        assert f"| {label} | {' | '.join(cells)} |" in card
    head, *rows = (
        (tokenizer_folder(name) / "attribution.tsv").read_text(encoding="utf-8").splitlines()
    )
    assert head.split("\t") == ["file", "package", "path", "author", "license"]
    assert f"The {len(rows)} photographs of the training split" in card
    assert all(len(row.split("\t")) == 5 and all(row.split("\t")) for row in rows)


def test_a_wheel_holds_all_files_and_runs_without_the_repository(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    program = """
import pathlib, torch, smalto
assert pathlib.Path(smalto.__file__).is_relative_to(pathlib.Path.cwd()), smalto.__file__
tokenizer = smalto.load("photos-f8")
tokens = tokenizer.encode(torch.zeros(1, 3, 64, 64))
samples = smalto.load_generator("emoji").generate(0, seeds=[0])
print(len(tokens[0]), tokenizer.fingerprint(), *samples.images.shape)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=ENVIRONMENT | {"PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    own = smalto.load("photos-f8").fingerprint()
    assert done.stdout.split() == ["64", own, "1", "3", "72", "72"]
    installed = tmp_path / "installed" / "smalto" / "pretrained"
    for name in pretrained_names():
        own_files, files = (
            sorted(str(path.relative_to(folder / name)) for path in (folder / name).rglob("*.*"))
            for folder in (pretrained_folder(name).parent, installed)
        )
        assert files == own_files
        assert CARD_FILE in files
