"""kill -9 at any moment loses nothing that was saved."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import smalto
from smalto.training.run_folder import RunFolder, read_jsonl
from tests.conftest import ENVIRONMENT, smalto_command, tiny_sets, write_images

STEPS = 400
# Everything that has a state: discriminator, averages, random generators, parts of a batch. Half of
# the time goes into saving.
EVERYTHING = [
    *(
        "--set",
        "losses.adversarial.weight=0.2",
        "--set",
        "losses.adversarial.start=100",
        "--set",
        "losses.adversarial.lead=50",
    ),
    *(
        "--set",
        "losses.adversarial.layers=2",
        "--set",
        "losses.adversarial.width=4",
        "--set",
        "optimizer.ema_decay=0.9",
    ),
    *("--set", "optimizer.accumulate=2", "--set", "data.color=0.5", "--set", "checkpoint.every=3"),
]
DROPOUT = [
    *(
        "--set",
        "tokenizer.autoencoder.kind=cnn",
        "--set",
        "tokenizer.autoencoder.ch=32",
        "--set",
        "tokenizer.autoencoder.ch_mult=[1, 1]",
    ),
    *(
        "--set",
        "tokenizer.autoencoder.num_res_blocks=1",
        "--set",
        "tokenizer.autoencoder.dropout=0.2",
    ),
    *("--set", "tokenizer.autoencoder.latent_dim=8"),
]


def killed_run(folder: Path, seconds: float, arguments: list[str]) -> bool:
    """Run a command and kill it with all its workers after some time; whether it had to be
    killed.
    """
    command = [sys.executable, "-m", "smalto", *arguments]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(
        command, cwd=folder, env=ENVIRONMENT, start_new_session=True, **silent
    )  # type: ignore[call-overload]
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True
    return False


def kill_until_finished(folder: Path, kills: int, seed: int, recipe: list[str]) -> int:
    """Start a run and kill it again and again at random moments, then let it end; how often it was
    killed.
    """
    write_images(folder / "photos", 6)
    chance, killed = random.Random(seed), 0
    for _ in range(kills):
        begun = (folder / "run").exists()
        arguments = (
            ["train", "--resume", "run"]
            if begun
            else ["train", "photos", "--out", "run", *recipe, "--steps", str(STEPS)]
        )
        killed += killed_run(
            folder, chance.uniform(1.5, 5.0), [*arguments, "--workers", "0", "--device", "cpu"]
        )
        if (folder / "run").exists():
            assert RunFolder(folder / "run").steps()
            smalto.load(folder / "run")
    if (folder / "run").exists():
        smalto_command("train", "--resume", "run", "--workers", 0, cwd=folder)
    else:
        smalto_command(
            "train", "photos", "--out", "run", *recipe, "--steps", STEPS, "--workers", 0, cwd=folder
        )
    return killed


def check_equal_to_an_undisturbed_run(folder: Path, recipe: list[str]) -> None:
    smalto_command(
        "train", "photos", "--out", "whole", *recipe, "--steps", STEPS, "--workers", 0, cwd=folder
    )
    for name in ("model.safetensors", "log.jsonl"):
        assert (folder / "run" / name).read_bytes() == (folder / "whole" / name).read_bytes()
    assert [row["step"] for row in read_jsonl(folder / "run" / "log.jsonl")] == list(
        range(1, STEPS + 1)
    )
    assert not [
        p for p in (folder / "run").rglob(".*") if p.is_dir()
    ]  # nothing half-written is left lying about


def test_a_run_that_is_killed_three_times_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    recipe = [*tiny_sets(), *EVERYTHING]
    assert kill_until_finished(tmp_path, 3, seed=0, recipe=recipe) >= 1
    check_equal_to_an_undisturbed_run(tmp_path, recipe)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_that_is_killed_twenty_times_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    sets = tiny_sets()
    simple = [
        part
        for key, value in zip(sets[::2], sets[1::2], strict=True)
        if "autoencoder" not in value
        for part in (key, value)
    ]
    recipe = [*simple, *DROPOUT, *EVERYTHING]
    assert kill_until_finished(tmp_path, 20, seed=1, recipe=recipe) >= 15
    check_equal_to_an_undisturbed_run(tmp_path, recipe)


def test_a_run_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    write_images(tmp_path / "photos", 6)
    arguments = [
        "train",
        "photos",
        "--out",
        "run",
        *tiny_sets(),
        "--steps",
        "100000",
        "--workers",
        "0",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "smalto", *arguments], cwd=tmp_path, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "run").exists() and time.monotonic() < deadline:
        time.sleep(0.0005)
    process.kill()
    process.wait()
    assert process.returncode == -signal.SIGKILL
    run = RunFolder(tmp_path / "run")
    assert run.read(run.steps()[0]).step == run.steps()[0]  # its first checkpoint is not damaged
    smalto.load(run.path)
    smalto_command("train", "--resume", "run", "--steps", 12, cwd=tmp_path)
