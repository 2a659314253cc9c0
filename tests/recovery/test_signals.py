"""Signals end a job within seconds, in one line, and leave no process and no shared memory."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

import smalto
from smalto.store.token_store import TokenStore
from smalto.training.run_folder import read_jsonl
from tests.conftest import ENVIRONMENT, smalto_command, tiny_sets, write_images

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="needs /proc")
OTHERS = [pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGINT, signal.SIGHUP)]


def session(leader: int) -> list[int]:
    """The living processes of a session."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[3]) == leader and fields[0] not in "ZX":
            found.append(int(folder.name))
    return found


def shared_memory(processes: list[int]) -> set[Path]:
    """The files in shared memory that processes have mapped."""
    found = set()
    for process in processes:
        with suppress(OSError):
            maps = Path(f"/proc/{process}/maps").read_text()
            found |= {Path(path) for path in re.findall(r"(/dev/shm/\S+)$", maps, re.MULTILINE)}
    return found


def run_and_stop(
    arguments: list[str], cwd: Path, is_under_way: Callable[[], bool], number: int, times: int = 1
) -> tuple[int, str]:
    """Start a job with worker processes, send it a signal; return its exit status and messages."""
    process = subprocess.Popen(
        [sys.executable, "-m", "smalto", *arguments, "--workers", "2"],
        cwd=cwd,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=ENVIRONMENT,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not is_under_way() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    processes = session(process.pid)
    assert len(processes) >= 3  # itself and its workers
    shared = shared_memory(processes)
    for _ in range(times):
        process.send_signal(number)
        time.sleep(0.1)
    deadline = time.monotonic() + 5
    while session(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert session(process.pid) == []
    assert not any(path.exists() for path in shared)
    return process.wait(), process.communicate()[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, *OTHERS])
def test_tokenize_commits_what_is_done(number: int, tmp_path: Path) -> None:
    write_images(tmp_path / "photos", 600)
    smalto.SimpleVQVAE(16, 32, 32).save(tmp_path / "tokenizer")
    begun: list[float] = []

    def is_under_way() -> bool:
        if not begun and (tmp_path / "t" / ".lock").exists():
            begun.append(time.monotonic())
        return bool(begun) and time.monotonic() > begun[0] + 1.5

    arguments = ["tokenize", "photos", "--tokenizer", "tokenizer", "--out", "t", "--size", "256"]
    status, messages = run_and_stop(arguments, tmp_path, is_under_way, number)
    if number == signal.SIGKILL:
        assert status == -signal.SIGKILL
    else:
        assert status == 128 + number, messages
        word = {signal.SIGTERM: "terminated", signal.SIGINT: "interrupted"}.get(number, "hung up")
        assert f"smalto: {word}; what was written is kept" in messages
        assert "Traceback" not in messages
        assert "leaked" not in messages
        assert 0 < len(TokenStore.open(tmp_path / "t")) < 600


@pytest.mark.parametrize("number", [signal.SIGHUP, *OTHERS[:1], signal.SIGTERM])
def test_training_saves_the_step(number: int, tmp_path: Path) -> None:
    write_images(tmp_path / "photos", 6)
    arguments = ["train", "photos", "--out", "run", *tiny_sets(), "--steps", "100000"]
    log = tmp_path / "run" / "log.jsonl"
    status, messages = run_and_stop(arguments, tmp_path, lambda: len(read_jsonl(log)) > 3, number)
    assert status == 128 + number, messages
    assert "everything is saved. Resume with: smalto train --resume run" in messages
    assert "Traceback" not in messages
    step = int(smalto.info(tmp_path / "run")["steps"].split()[0])
    assert len(read_jsonl(log)) == step


@pytest.mark.slow
def test_two_interrupts_end_it_too(tmp_path: Path) -> None:
    write_images(tmp_path / "photos", 6)
    arguments = ["train", "photos", "--out", "run", *tiny_sets(), "--steps", "100000"]
    log = tmp_path / "run" / "log.jsonl"
    status, messages = run_and_stop(
        arguments, tmp_path, lambda: len(read_jsonl(log)) > 3, signal.SIGINT, times=2
    )
    assert status == 130, messages
    assert "Traceback" not in messages
    assert "smalto: " in messages


@pytest.mark.slow
def test_a_hangup_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    write_images(tmp_path / "photos", 6)
    smalto.SimpleVQVAE(16, 8, 8).save(tmp_path / "tokenizer")
    command = [sys.executable, "-m", "smalto", "tokenize", "photos", "--tokenizer", "tokenizer"]
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does; a child inherits it
    try:
        process = subprocess.Popen(
            [*command, "--out", "t", "--workers", "1"], cwd=tmp_path, env=ENVIRONMENT
        )
    finally:
        signal.signal(signal.SIGHUP, before)
    for _ in range(20):
        process.send_signal(signal.SIGHUP)
        time.sleep(0.1)
    assert process.wait(timeout=60) == 0
    assert smalto_command("store", "verify", tmp_path / "t", "--sample", "0")
