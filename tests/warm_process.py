"""Commands in forks of one process that has imported torch and smalto already.

``python -m smalto`` imports for three seconds before it does anything. A fork of a process that has
done so starts at once, in its own folder, with its own standard streams. Threads do not survive a
fork, so nothing that starts some (Lance, faiss) is imported before.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import Any

PRELOADED = """
torch torch.utils.data torch.nn.attention numpy PIL.Image safetensors.torch pydantic typer jinja2
smalto.cli.verbs smalto.cli.store_verbs smalto.pipelines.train smalto.pipelines.evaluate
smalto.pipelines.decode smalto.pipelines.convert smalto.pipelines.info smalto.pipelines.generate
"""
ROOT = Path(__file__).parent.parent


class WarmProcess:
    """The process that is forked; started at the first command.

    Args:
        environment: of the process and its forks.
    """

    def __init__(self, environment: dict[str, str]) -> None:
        self._environment = environment
        self._server: subprocess.Popen[str] | None = None

    def run(
        self, arguments: list[str], cwd: Path | None, timeout: float, prelude: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Run ``python ARGUMENTS``, which begin with ``-m MODULE`` or ``-c CODE``.

        Args:
            arguments: as for python.
            cwd: folder to run in.
            timeout: in seconds, after which TimeoutExpired is raised.
            prelude: code to run first.
        """
        server = self._started()
        assert server.stdin is not None
        assert server.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            outputs = [Path(folder, name) for name in ("stdout", "stderr")]
            request = {
                "arguments": arguments,
                "cwd": str(cwd or Path.cwd()),
                "outputs": [str(path) for path in outputs],
                "prelude": prelude,
            }
            server.stdin.write(json.dumps(request) + "\n")
            server.stdin.flush()
            pid = int(server.stdout.readline())
            if not select.select([server.stdout], [], [], timeout)[0]:
                os.kill(pid, signal.SIGKILL)
                server.stdout.readline()
                raise subprocess.TimeoutExpired(arguments, timeout)
            status = int(server.stdout.readline())
            texts = [path.read_text(encoding="utf-8", errors="replace") for path in outputs]
        return subprocess.CompletedProcess(arguments, status, *texts)

    def _started(self) -> subprocess.Popen[str]:
        if self._server is None or self._server.poll() is not None:
            self._server = subprocess.Popen(
                [sys.executable, "-m", "tests.warm_process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                bufsize=1,
                cwd=ROOT,
                env=self._environment,
            )
        return self._server

    def close(self) -> None:
        """End the process."""
        if self._server is not None:
            self._server.kill()
            self._server.communicate()


def serve() -> None:
    """Import, then fork for each request on standard input."""
    for name in PRELOADED.split():
        __import__(name)
    assert threading.active_count() == 1
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    for line in requests:
        request = json.loads(line)
        pid = os.fork()
        if not pid:
            requests.close()
            answers.close()
            os._exit(_run(request))
        print(pid, file=answers, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


def _run(request: dict[str, Any]) -> int:
    """Run one request in a fork and return its exit status."""
    for number, path in enumerate(request["outputs"], start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), number)
    os.chdir(request["cwd"])
    flag, what, *rest = request["arguments"]
    sys.path[0] = ""
    status = 0
    try:
        exec(request["prelude"], {})
        sys.argv = [what if flag == "-m" else "-c", *rest]
        if flag == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            main = type(sys)("__main__")
            sys.modules["__main__"] = main
            exec(compile(what, "<string>", "exec"), main.__dict__)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return status


if __name__ == "__main__":
    serve()
