"""The command line as a user types it."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy
import pytest
from PIL import Image

import smalto
import smalto.cli
from smalto.core.errors import RenamedSettingWarning
from tests.conftest import make_image, smalto_command, tiny_sets, write_images
from tests.odd_images import GOOD, write_odd_folder

VERBS = [
    "demo",
    "train",
    "evaluate",
    "tokenize",
    "decode",
    "reconstruct",
    "convert",
    "info",
    "store",
    "store info",
    "store verify",
    "store compact",
    "store export",
    "store import",
]
WITH_DEVICE = [*VERBS[:6], "store verify"]


@pytest.mark.parametrize("verb", VERBS)
def test_help_explains_with_an_example(verb: str) -> None:
    text = smalto_command(*verb.split(), "--help").stdout
    assert "Example" in text
    assert f"smalto {verb}" in text.partition("Example")[2]
    assert ("--device" in text) == (verb in WITH_DEVICE)


def test_help_lists_every_verb() -> None:
    for group, verbs in itertools.groupby(VERBS, lambda verb: verb.rpartition(" ")[0]):
        text = smalto_command(*group.split(), "--help").stdout
        for verb in verbs:
            assert re.search(rf"^  {verb.split()[-1]}  ", text, re.MULTILINE)


def test_the_command_line_does_not_import_torch() -> None:
    script = (
        "import sys, smalto.cli; heavy = {'torch', 'numpy', 'pydantic'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_odd_and_broken_files_through_train_and_tokenize(tmp_path: Path) -> None:
    bad = write_odd_folder(tmp_path / "odd")
    run = tmp_path / "run"
    done = smalto_command(
        "train",
        tmp_path / "odd",
        "--out",
        run,
        *tiny_sets(),
        "--steps",
        100,
        "--workers",
        1,
        "--device",
        "cpu",
    )
    metrics = json.loads((run / "metrics.json").read_text())
    named = {row["name"] for row in metrics["skipped"]}
    assert named == set(bad)
    assert "enlarged" in done.stderr  # tiny.png and thin.png
    done = smalto_command(
        "tokenize", tmp_path / "odd", "--tokenizer", run, "--out", tmp_path / "t", "--workers", 1
    )
    assert f"{len(GOOD) + 1} images" in done.stdout
    # Without notes.txt and other files that are obviously not images.
    assert f"Skipped {len(bad) - 4} files" in done.stderr
    assert "4 other files are not images" in done.stderr
    assert (
        "textbomb.png: damaged"
        in smalto_command("store", "info", tmp_path / "t", "--errors").stdout
    )
    done = smalto_command("decode", tmp_path / "t", "--out", tmp_path / "decoded")
    assert len(list((tmp_path / "decoded").rglob("*.png"))) == len(GOOD) + 1


def test_the_whole_way(tmp_path: Path) -> None:
    write_images(tmp_path / "photos", 6)
    run = tmp_path / "run"
    done = smalto_command(
        "train",
        "photos",
        "--out",
        "run",
        *tiny_sets(),
        "--size",
        16,
        "--codebook-size",
        32,
        "--seed",
        3,
        cwd=tmp_path,
    )
    assert "5 images to train on, 1 held out; device cpu" in done.stderr
    assert "training 6/6 steps" in done.stderr
    assert f"report: {Path('run') / 'report.html'}" in done.stdout
    assert smalto.load(run).quantize.codebook_size == 32
    smalto_command(
        "tokenize", "photos", "--tokenizer", "run", "--out", "t.safetensors", cwd=tmp_path
    )
    smalto_command("decode", "t.safetensors", "--out", "back", cwd=tmp_path)
    assert len(list((tmp_path / "back").iterdir())) == 6
    assert (
        "PSNR"
        in smalto_command(
            "reconstruct", "photos/photo00.png", "--tokenizer", "run", cwd=tmp_path
        ).stdout
    )
    assert (tmp_path / "photo00-reconstruction.png").exists()
    assert (
        "held-out images"
        in smalto_command("evaluate", "photos", "--tokenizer", "run", cwd=tmp_path).stdout
    )
    metrics = json.loads(
        smalto_command(
            "evaluate", "photos", "--tokenizer", "run", "--all", "--json", cwd=tmp_path
        ).stdout
    )
    assert metrics["num_images"] == 6
    assert "6 of 6" in smalto_command("info", "run", cwd=tmp_path).stdout
    again = smalto_command("train", "--resume", "run", "--steps", 8, cwd=tmp_path)
    assert "resuming after step 6 of 8" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train"], "Name a FOLDER"),
        (["train", ".", "--set", "data.source=x"], "named by FOLDER"),
        (["train", ".", "--seed", "99999999999999999999"], "seed: "),
        (["train", ".", "--out", "/proc/run"], "cannot be written"),
        (["train", ".", "--out", "r" * 300], "File name too long"),
        (["train", "--resume", "y", "--overwrite"], "leave out --recipe, --overwrite"),
        (["train", "nowhere"], "nowhere does not exist"),
        (["train", "--resume", "nowhere"], "is not a run"),
        (["train", ".", "--set", "optimizer.lrr=1"], "did you mean 'optimizer.lr'"),
        (["train", ".", "--recipe", "none.toml"], "cannot be read"),
        (["tokenize", ".", "--tokenizer", "nowhere"], "does not exist; expected a folder"),
        (["evaluate", ".", "--tokenizer", "nowhere", "--precision", "int8"], "--precision must be"),
        (
            ["tokenize", ".", "--tokenizer", "nowhere", "--deep-gray", "none"],
            "--deep-gray must be full or range; got 'none'",
        ),
        (["decode", "nowhere"], "does not exist; expected a token store"),
        (["info", "."], "not a run, tokenizer, generator or token store"),
    ],
)
def test_mistakes_end_in_one_line(tmp_path: Path, arguments: list[str], says: str) -> None:
    done = smalto_command(*arguments, check=False, cwd=tmp_path)
    assert done.returncode == 1
    assert says in done.stderr
    assert done.stderr.startswith("smalto: ")
    assert "Traceback" not in done.stderr


def test_unknown_options_are_usage_errors() -> None:
    done = smalto_command("train", "--stepz", "4", check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_named(tmp_path: Path) -> None:
    write_images(tmp_path / "photos", 4)
    (tmp_path / "locked").mkdir(mode=0o500)
    done = smalto_command(
        "train", "photos", "--out", "locked/run", *tiny_sets(), check=False, cwd=tmp_path
    )
    assert "permission denied" in done.stderr


@pytest.mark.parametrize("seconds", [0.8, 1.6, 2.4])
def test_ctrl_c_while_it_starts_ends_it_in_one_line(tmp_path: Path, seconds: float) -> None:
    import signal

    write_images(tmp_path / "photos", 30, 200, 200)
    # Before the print Python itself is starting.
    start = "print('started', flush=True); from smalto.cli import main; main()"
    command = [
        sys.executable,
        "-c",
        start,
        "train",
        "photos",
        "--out",
        "run",
        *tiny_sets(),
        "--steps",
        "100000",
        "--workers",
        "2",
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(
        command, cwd=tmp_path, text=True, start_new_session=True, **pipes
    ) as process:  # type: ignore[call-overload]
        assert process.stdout.readline() == "started\n"
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "Traceback" not in error


def test_ctrl_c_saves_and_resume_continues(tmp_path: Path) -> None:
    import signal

    write_images(tmp_path / "photos", 6)
    command = [
        sys.executable,
        "-m",
        "smalto",
        "train",
        "photos",
        "--out",
        "run",
        *tiny_sets(),
        "--steps",
        "100000",
        "--workers",
        "1",
    ]
    with subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        log, deadline = tmp_path / "run" / "log.jsonl", time.monotonic() + 60
        while (
            not (tmp_path / "run" / "checkpoints" / "step-00000010").exists()
            and time.monotonic() < deadline
        ):
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "everything is saved. Resume with: smalto train --resume run" in error
    assert "Traceback" not in error
    step = smalto.info(tmp_path / "run")["steps"].split()[0]
    assert len(log.read_text().splitlines()) == int(step)
    done = smalto_command("train", "--resume", "run", "--steps", int(step) + 3, cwd=tmp_path)
    assert f"resuming after step {step}" in done.stderr


def test_the_number_of_codes_is_set_for_any_kind_of_quantizer(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", 6)
    (tmp_path / "r.toml").write_text('[tokenizer.quantizer]\nkind = "product"\n')
    small = ["--steps", 0, "--size", 16, "--batch", 2, "--device", "cpu", "--workers", 0]
    smalto_command(
        "train",
        images,
        "--out",
        tmp_path / "run",
        "--recipe",
        tmp_path / "r.toml",
        "--codebook-size",
        32,
        *small,
    )
    assert smalto.load(tmp_path / "run").quantize.codebook_size == 32
    done = smalto_command("train", "--resume", tmp_path / "run", "--codebook-size", 64, check=False)
    assert "leave out --codebook-size" in done.stderr


def test_resize_and_deep_gray_reach_the_store_and_notes_are_reported(tmp_path: Path) -> None:
    smalto.default_tokenizer(64).save(tmp_path / "tokenizer")
    (tmp_path / "images").mkdir()
    dark = make_image(0)[..., 0].astype(numpy.uint16)  # 8 of 16 bits
    Image.fromarray(dark).save(tmp_path / "images" / "dark.png")
    Image.fromarray(make_image(1)).save(tmp_path / "images" / "rgb.png")
    command = ["tokenize", "images", "--tokenizer", "tokenizer", "--size", 16, "--resize", 18]
    command += ["--workers", 0, "--device", "cpu"]
    done = smalto_command(*command, cwd=tmp_path)
    assert "1 image has a note, such as dark.png: 16-bit image uses values up to 255" in done.stderr
    transform = smalto.info(tmp_path / "tokens.lance")["transform"]
    assert transform == "shorter side to 18, center crop to 16 x 16"
    done = smalto_command(*command, "--deep-gray", "range", "--overwrite", cwd=tmp_path)
    assert "a note" not in done.stderr
    transform = smalto.info(tmp_path / "tokens.lance")["transform"]
    assert transform == "shorter side to 18, center crop to 16 x 16, deep gray scaled by range"


def test_a_renamed_setting_is_reported_in_one_line(tmp_path: Path) -> None:
    arguments = ["train", "nowhere", "--set", "guard.action=warn"]
    done = smalto_command(*arguments, check=False, cwd=tmp_path)
    assert done.returncode == 1
    first, second = done.stderr.splitlines()
    assert first == "smalto: settings: guard.action is now monitor.action."
    assert second.startswith("smalto: nowhere does not exist")


def test_other_warnings_are_shown_as_before(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = []
    monkeypatch.setattr(warnings, "showwarning", lambda *arguments: shown.append(arguments))
    smalto.cli.show_renamed_settings_in_one_line()
    warnings.showwarning(RenamedSettingWarning("old"), RenamedSettingWarning, "file.py", 1)
    other = FutureWarning("other")
    warnings.showwarning(other, FutureWarning, "file.py", 2)
    assert capsys.readouterr().err == "smalto: old\n"
    assert shown == [(other, FutureWarning, "file.py", 2)]


@pytest.mark.parametrize("own", [{}, {"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}])
def test_threads_spin_for_microseconds_unless_the_user_sets_it(
    own: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    for name in names:
        monkeypatch.setenv(name, "")  # so that both are put back after the test
        monkeypatch.delenv(name)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    smalto.cli.limit_thread_spinning()
    expected = own or {"GOMP_SPINCOUNT": "1000", "OMP_WAIT_POLICY": "PASSIVE"}
    assert {name: os.environ[name] for name in names if name in os.environ} == expected
