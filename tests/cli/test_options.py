"""Snapshot of the command line: every command with its arguments, options and defaults.

A change here is a change for users: name it in CHANGELOG.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typer.main import get_command

from smalto.cli.verbs import app

REQUIRED = "(required)"

COMMANDS: dict[str, dict[str, Any]] = {
    "demo": {
        "--out": "runs",
        "--steps": None,
        "--batch": None,
        "--device": "auto",
        "--precision": None,
        "--workers": None,
    },
    "train": {
        "FOLDER": None,
        "--out": "runs/mine",
        "--resume": None,
        "--overwrite": False,
        "--from": None,
        "--learn": None,
        "--recipe": None,
        "--set": None,
        "--steps": None,
        "--size": None,
        "--codebook-size": None,
        "--seed": None,
        "--batch": None,
        "--device": "auto",
        "--precision": None,
        "--workers": None,
    },
    "generate": {
        "GENERATOR": REQUIRED,
        "--out": "samples",
        "--label": None,
        "--count": 16,
        "--seed": 0,
        "--guidance": 1.5,
        "--top-k": 0,
        "--top-p": 0.0,
        "--temperature": 1.0,
        "--smooth": False,
        "--edit": None,
        "--box": None,
        "--mask": None,
        "--npz": None,
        "--overwrite": False,
        "--batch": None,
        "--device": "auto",
        "--precision": None,
    },
    "evaluate": {
        "FOLDER": REQUIRED,
        "--tokenizer": REQUIRED,
        "--report": None,
        "--all": False,
        "--json": False,
        "--longer-side": 768,
        "--size": None,
        "--batch": 8,
        "--device": "auto",
        "--precision": "float32",
        "--workers": None,
        "--reference-stats": None,
        "--inception-weights": None,
        "--lpips-vgg": None,
    },
    "tokenize": {
        "SOURCE": REQUIRED,
        "--tokenizer": REQUIRED,
        "--out": "tokens.lance",
        "--size": None,
        "--resize": None,
        "--keep-shape": False,
        "--longer-side": None,
        "--crops": 1,
        "--flip": False,
        "--deep-gray": "full",
        "--shuffle": False,
        "--update": False,
        "--max-errors": None,
        "--overwrite": False,
        "--batch": 32,
        "--device": "auto",
        "--precision": "float32",
        "--workers": None,
    },
    "decode": {
        "TOKENS": REQUIRED,
        "--out": "decoded",
        "--tokenizer": None,
        "--overwrite": False,
        "--batch": 8,
        "--device": "auto",
        "--precision": "float32",
        "--workers": None,
    },
    "reconstruct": {
        "PHOTO": REQUIRED,
        "--tokenizer": REQUIRED,
        "--out": None,
        "--overwrite": False,
        "--longer-side": 768,
        "--device": "auto",
        "--precision": "float32",
    },
    "convert": {
        "SOURCE": REQUIRED,
        "--out": REQUIRED,
        "--to": "var",
        "--patch-nums": "1,2,3,4,5,6,8,10,13,16",
        "--using-znorm": False,
        "--quant-resi": 0.5,
        "--tokenizer": None,
        "--num-heads": None,
        "--format": None,
        "--overwrite": False,
    },
    "info": {
        "PATH": None,
    },
    "store info": {
        "PATH": REQUIRED,
        "--errors": False,
    },
    "store verify": {
        "PATH": REQUIRED,
        "--sample": 16,
        "--tokenizer": None,
        "--source": None,
        "--seed": 0,
        "--device": "auto",
    },
    "store compact": {
        "PATH": REQUIRED,
        "--keep-hours": 1.0,
    },
    "store export": {
        "PATH": REQUIRED,
        "--out": REQUIRED,
        "--format": "numpy",
        "--rows-per-shard": None,
    },
    "store import": {
        "PATH": REQUIRED,
        "--out": REQUIRED,
    },
}


def test_commands_options_and_defaults_are_frozen() -> None:
    assert _commands(get_command(app)) == COMMANDS


def _commands(group: Any, prefix: str = "") -> dict[str, dict[str, Any]]:
    """Return the parameters of every command below a group, by the words that call it."""
    found: dict[str, dict[str, Any]] = {}
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            found |= _commands(command, f"{prefix}{name} ")
        else:
            found[prefix + name] = dict(map(_parameter, command.params))
    return found


def _parameter(parameter: Any) -> tuple[str, Any]:
    """Return the spelling of a parameter (an argument's in capitals), and its default."""
    is_argument = parameter.param_type_name == "argument"
    name = parameter.name.upper() if is_argument else "/".join(parameter.opts)
    if parameter.required:
        return name, REQUIRED
    default = parameter.default
    return name, str(default) if isinstance(default, Path) else default
