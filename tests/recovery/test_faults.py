"""Full disks, folders that cannot be written, two runs at once, checkpoints cut short: a message
each, and nothing lost.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import distributed

import smalto
from smalto.core.errors import RunError
from smalto.training.checkpoint import SUMS_FILE
from smalto.training.run_folder import RunFolder, read_jsonl
from smalto.training.tokenizer_recipe import TokenizerRecipe
from tests.conftest import ENVIRONMENT, smalto_command, tiny_sets, write_images

ENDLESS = ["--steps", "100000", "--workers", "0", "--device", "cpu"]


def mounted(folder: Path, options: str) -> bool:
    folder.mkdir(exist_ok=True)
    tool = shutil.which("mount")
    return (
        tool is not None
        and subprocess.run(
            [tool, "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True
        ).returncode
        == 0
    )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte."""
    if not mounted(tmp_path / "disk", "size=1m"):
        pytest.skip("needs leave to mount a tmpfs")
    yield tmp_path / "disk"
    subprocess.run(["umount", "-l", tmp_path / "disk"], check=True)


def started(arguments: list[str], cwd: Path, steps: int = 4) -> subprocess.Popen[bytes]:
    """Begin a command that trains into ``run``, and wait until it has made some steps."""
    process = subprocess.Popen(
        [sys.executable, "-m", "smalto", *arguments],
        cwd=cwd,
        env=ENVIRONMENT,
        stderr=subprocess.DEVNULL,
    )
    end = time.monotonic() + 60
    while (
        len(read_jsonl(cwd / "run" / "log.jsonl")) < steps
        and time.monotonic() < end
        and process.poll() is None
    ):
        time.sleep(0.05)
    return process


def test_a_full_disk_ends_with_advice_and_the_run_goes_on_when_there_is_room(
    small_disk: Path, tmp_path: Path
) -> None:
    write_images(tmp_path / "images", 6)
    smalto_command(
        "train",
        tmp_path / "images",
        "--out",
        small_disk / "run",
        *tiny_sets(),
        "--steps",
        4,
        "--workers",
        0,
    )
    saved = RunFolder(small_disk / "run").restore(smalto.load)
    with open(small_disk / "filler", "wb") as filler:
        filler.write(bytes(shutil.disk_usage(small_disk).free - 20_000))
    done = smalto_command(
        "train", "--resume", small_disk / "run", "--steps", 200, "--workers", 0, check=False
    )
    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    assert "free some space and resume" in done.stderr
    assert "Traceback" not in done.stderr
    assert RunFolder(small_disk / "run").restore(smalto.load).step >= saved.step
    (small_disk / "filler").unlink()
    smalto_command("train", "--resume", small_disk / "run", "--steps", 8, "--workers", 0)
    smalto_command(
        "train",
        tmp_path / "images",
        "--out",
        tmp_path / "whole",
        *tiny_sets(),
        "--steps",
        4,
        "--workers",
        0,
    )
    smalto_command("train", "--resume", tmp_path / "whole", "--steps", 8, "--workers", 0)
    assert (small_disk / "run" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()


def test_a_disk_too_small_for_a_run_says_so_and_leaves_nothing(
    small_disk: Path, tmp_path: Path
) -> None:
    write_images(tmp_path / "images", 6)
    (small_disk / "filler").write_bytes(bytes(shutil.disk_usage(small_disk).free - 20_000))
    done = smalto_command(
        "train",
        tmp_path / "images",
        "--out",
        small_disk / "run",
        *tiny_sets(),
        "--workers",
        0,
        check=False,
    )
    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


def test_a_folder_that_cannot_be_written_is_named_before_any_work(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 6)
    if not mounted(tmp_path / "disk", "ro,size=1m"):
        pytest.skip("needs leave to mount a tmpfs")
    try:
        done = smalto_command(
            "train",
            tmp_path / "images",
            "--out",
            tmp_path / "disk" / "run",
            *tiny_sets(),
            check=False,
        )
    finally:
        subprocess.run(["umount", "-l", tmp_path / "disk"], check=True)
    assert done.returncode == 1
    assert "cannot be written: Read-only file system" in done.stderr


def test_two_processes_do_not_train_one_run(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 6)
    first = started(["train", "images", "--out", "run", *tiny_sets(), *ENDLESS], tmp_path)
    try:
        for arguments in (["--resume", "run"], ["images", "--out", "run", "--overwrite"]):
            done = smalto_command("train", *arguments, "--workers", 0, check=False, cwd=tmp_path)
            assert done.returncode == 1
            assert "run is being trained by another process" in done.stderr
        assert first.poll() is None
    finally:
        first.kill()
        first.wait()
    log = read_jsonl(tmp_path / "run" / "log.jsonl")
    assert [row["step"] for row in log] == list(range(1, len(log) + 1))  # only one has written
    step = RunFolder(tmp_path / "run").steps()[-1]
    smalto_command(
        "train", "--resume", "run", "--steps", step + 2, "--workers", 0, cwd=tmp_path
    )  # the lock went with the process


@pytest.mark.parametrize(
    "name", ["model.safetensors", "state.safetensors", "config.json", SUMS_FILE]
)
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_any_damage_to_a_checkpoint_is_seen_and_the_one_before_used(
    image_folder: Path, tiny_recipe: TokenizerRecipe, tmp_path: Path, name: str, damage: str
) -> None:
    smalto.train(image_folder, tiny_recipe, out=tmp_path / "run", device="cpu", workers=0)
    expected = (tmp_path / "run" / "model.safetensors").read_bytes()
    file = RunFolder(tmp_path / "run").checkpoint(6) / name
    data = bytearray(file.read_bytes())
    if damage == "gone":
        file.unlink()
    else:
        data[len(data) // 2] ^= 1
        file.write_bytes(data if damage == "flipped" else data[: len(data) // 2])
    with pytest.raises(RunError, match="step-00000006"):
        RunFolder(tmp_path / "run").read(6)
    assert smalto.resume(tmp_path / "run", device="cpu", workers=0).training.steps == 6
    (event,) = [
        row
        for row in read_jsonl(tmp_path / "run" / "events.jsonl")
        if row["event"] == "damaged checkpoint"
    ]
    assert "step-00000006" in event["text"]
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == expected


@pytest.mark.skipif(not distributed.is_gloo_available(), reason="torch without gloo")
def test_a_process_that_dies_ends_the_job_and_it_goes_on_with_another_number(
    tmp_path: Path,
) -> None:
    write_images(tmp_path / "images", 6)
    sets = [*tiny_sets(), "--set", "checkpoint.every=2"]
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--standalone",
        "-m",
        "smalto",
    ]
    environment = ENVIRONMENT | {"GLOO_SOCKET_IFNAME": "lo"}
    with open(tmp_path / "messages", "w") as messages:
        job = subprocess.Popen(
            [*torchrun, "train", "images", "--out", "run", *sets, *ENDLESS],
            cwd=tmp_path,
            env=environment,
            stdout=messages,
            stderr=messages,
        )
    end = time.monotonic() + 90
    while (
        len(read_jsonl(tmp_path / "run" / "log.jsonl")) < 6
        and time.monotonic() < end
        and job.poll() is None
    ):
        time.sleep(0.05)
    os.kill(_second_process(job.pid), signal.SIGKILL)
    assert job.wait(timeout=60) != 0
    text = (tmp_path / "messages").read_text()
    assert "lost the connection to another process of this run" in text
    steps = RunFolder(tmp_path / "run").steps()
    assert steps[-1] >= 2
    done = smalto_command(
        "train", "--resume", "run", "--steps", steps[-1] + 5, "--workers", 0, cwd=tmp_path
    )
    assert f"resuming after step {steps[-1]}" in done.stderr
    log = read_jsonl(tmp_path / "run" / "log.jsonl")
    assert [row["step"] for row in log] == list(range(1, steps[-1] + 6))


def _second_process(parent: int) -> int:
    """The process that torchrun gave rank 1."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
            status = (folder / "stat").read_text()
        except OSError:
            continue
        if b"RANK=1" in environment and int(status.rsplit(")", 1)[1].split()[1]) == parent:
            return int(folder.name)
    raise AssertionError("there is no second process")
