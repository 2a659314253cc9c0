"""Reference numbers of other projects' public code, with weights that follow from a seed
(tests/golden/README.md).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import safetensors
import torch

GOLDEN = Path(__file__).parent.parent / "golden"
DERIVED = {"lvl_1L", "attn_bias_for_masking"}  # buffers that follow from the scales


def read(name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(config, tensors) of one file."""
    with safetensors.safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        return json.loads(file.metadata()["config"]), {
            key: file.get_tensor(key)
            for key in file.keys()  # noqa: SIM118
        }


def weights(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The reference's state_dict, rebuilt from the seed."""
    shapes = config["shapes"]
    counts = {"quantize.ema_vocab_hit_SV", "quantize.codebook_used"}
    state = {name: torch.zeros(shapes[name]) for name in sorted(counts & set(shapes))}
    derived = {name for name in shapes if name in DERIVED or name.endswith(".zero_k_bias")}
    for number, name in enumerate(sorted(set(shapes) - counts - derived)):
        shape = shapes[name]
        x = (
            numpy.random.RandomState(config["seed"] * 100003 + number)
            .standard_normal(shape)
            .astype("float32")
        )
        if name == "quantize.embedding.weight":
            x = 0.7 * x
        elif (
            len(shape) > 1
            and name.endswith("weight")
            and not name.startswith(("class_emb", "lvl_embed"))
        ):
            x = x * (1 / numpy.prod(shape[1:])) ** 0.5
        elif name.endswith("weight") and len(shape) == 1:
            x = 1 + 0.2 * x
        else:
            x = 0.1 * x
        state[name] = torch.from_numpy(x.astype("float32"))
    return state


def near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5)
