"""Tokenizers as repositories, against a stand-in of the hub's HTTP interface on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import smalto
from smalto.core.errors import ConfigError, DataError, RunError
from smalto.tokenizer.hub import read_metrics
from tests.conftest import WARM
from tests.parity.test_vqgan import small

pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
COMMIT = "0" * 39 + "1"


def digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


class StandIn(BaseHTTPRequestHandler):
    """The part of the hub's interface that creates, commits, lists and downloads."""

    files: dict[str, bytes]
    token = "Bearer hf_secret"

    @property
    def address(self) -> str:
        return f"http://{self.headers['host']}"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"content-length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, value: Any) -> None:
        self.answer(200, json.dumps(value).encode(), content_type="application/json")

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("content-length", 0)))

    def do_POST(self) -> None:
        body = self.body()
        if self.headers.get("authorization") != self.token and "validate" not in self.path:
            self.answer(401)
        elif self.path == "/api/repos/create":
            self.answer_json({"url": f"{self.address}/me/tokenizer", "name": "me/tokenizer"})
        elif self.path == "/api/validate-yaml":
            self.answer_json({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [
                {"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names
            ]
            self.answer_json({"files": modes})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    self.files[entry["value"]["path"]] = content
            self.answer_json(
                {
                    "commitUrl": f"{self.address}/me/tokenizer/commit/{COMMIT}",
                    "commitOid": COMMIT,
                    "success": True,
                }
            )
        else:
            self.answer(404)

    def do_GET(self) -> None:
        name = re.fullmatch(r"/me/tokenizer/resolve/\w+/(.+)", self.path)
        if re.match(r"/api/models/me/tokenizer(/revision/(main|v1|0+1))?(\?.*)?$", self.path):
            siblings = [{"rfilename": name} for name in self.files]
            self.answer_json({"id": "me/tokenizer", "sha": COMMIT, "siblings": siblings})
        elif self.path.startswith("/api/models/me/tokenizer/tree/"):
            self.answer_json(
                [
                    {"type": "file", "path": name, "size": len(content), "oid": digest(content)}
                    for name, content in self.files.items()
                ]
            )
        elif name and name[1] in self.files:
            content = self.files[name[1]]
            self.answer(200, content, etag=f'"{digest(content)}"', x_repo_commit=COMMIT)
        else:
            self.answer(404, x_error_code="RepoNotFound")

    do_HEAD = do_GET  # noqa: N815


@pytest.fixture
def hub() -> Iterator[tuple[str, dict[str, bytes]]]:
    files: dict[str, bytes] = {}
    handler = type("Handler", (StandIn,), {"files": files})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", files
    server.shutdown()
    server.server_close()
    thread.join()


def run(code: str, folder: Path, endpoint: str) -> str:
    """Run code with this hub: huggingface_hub reads its address when it is imported."""
    settings = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(folder / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    prelude = f"import os\nos.environ.update({settings!r})"
    done = WARM.run(["-c", code], folder, timeout=120, prelude=prelude)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_there_and_back(hub: tuple[str, dict[str, bytes]], tmp_path: Path) -> None:
    endpoint, files = hub
    tokenizer = small()
    tokenizer.save(tmp_path / "own")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.json").write_text(
        '{"psnr": 27.123, "used": 0.5, "num_images": 3, "measured_on": "held-out images"}'
    )
    pushed = run(
        "import smalto\nprint(smalto.load('own').push_to_hub('me/tokenizer', run='run', "
        "license='apache-2.0', token='hf_secret'))",
        tmp_path,
        endpoint,
    )
    assert COMMIT in pushed
    assert sorted(files) == ["README.md", "config.json", "model.safetensors"]
    card = files["README.md"].decode()
    assert card.startswith('---\nlibrary_name: smalto\nlicense: "apache-2.0"\ntags:\n- smalto\n')
    assert "| PSNR | 27.12 dB |" in card
    assert "| metric | held-out images, N = 3 |" in card
    assert tokenizer.fingerprint() in card
    for revision in ("None", "'v1'"):
        code = (
            "import smalto\nfrom smalto import ImageTokenizer\n"
            f"t = ImageTokenizer.from_pretrained('me/tokenizer', revision={revision})\n"
            "print(t.fingerprint())"
        )
        assert run(code, tmp_path, endpoint) == tokenizer.fingerprint()


def test_errors_say_what_to_do(hub: tuple[str, dict[str, bytes]], tmp_path: Path) -> None:
    endpoint, _ = hub
    small().save(tmp_path / "own")
    code = """
import smalto
from smalto.core.errors import RunError
for call in (lambda: smalto.ImageTokenizer.from_pretrained("nobody/nothing"),
             lambda: smalto.load("own").push_to_hub("me/tokenizer", token="hf_wrong")):
    try:
        call()
    except RunError as error:
        print(error)
"""
    first, second = run(code, tmp_path, endpoint).splitlines()
    assert first.startswith("nobody/nothing cannot be downloaded")
    assert "HF_TOKEN" in first
    assert second.startswith("me/tokenizer was not uploaded")


@pytest.mark.parametrize("repo", ["tokenizer", "me/..", "../me", "me/a/b", ""])
def test_names_of_repositories_are_checked(repo: str) -> None:
    with pytest.raises(ConfigError, match="expected a repository OWNER/NAME"):
        small().push_to_hub(repo)


def test_a_folder_needs_neither_network_nor_package(tmp_path: Path) -> None:
    tokenizer = small()
    tokenizer.save_pretrained(tmp_path / "own")
    assert 'license: "unknown"' in (tmp_path / "own" / "README.md").read_text()
    code = (
        "import sys\nsys.modules['huggingface_hub'] = None\nimport smalto\n"
        "print(smalto.ImageTokenizer.from_pretrained('own').fingerprint())\n"
        "try: smalto.ImageTokenizer.from_pretrained('me/none')\n"
        "except ImportError as error: print(error)"
    )
    done = WARM.run(["-c", code], tmp_path, timeout=120)
    fingerprint, missing = done.stdout.strip().splitlines()
    assert fingerprint == tokenizer.fingerprint()
    assert 'pip install "smalto[hub]"' in missing
    with pytest.raises(RunError, match="does not exist"):
        smalto.ImageTokenizer.from_pretrained(tmp_path / "nothing")
    for text in ("[", "[]"):
        (tmp_path / "metrics.json").write_text(text)
        with pytest.raises(DataError):
            read_metrics(tmp_path)
