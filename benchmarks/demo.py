"""Claim: the demo ends within five minutes on two cores. Runs it in a fresh folder, stores its
metrics and its wall time.

``python benchmarks/demo.py FOLDER`` leaves the run in FOLDER/demo, from which docs/make_image.py
makes the README's image.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from machine import store


def main(folder: Path) -> None:
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-m", "smalto", "demo", "--out", str(folder)], check=True)
    seconds = time.perf_counter() - begun
    metrics = json.loads((folder / "demo" / "metrics.json").read_text())
    print(
        f"{seconds:.0f} s; stored in",
        store("demo", {"wall_seconds": round(seconds, 1), "metrics": metrics}),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
