"""Names that settings and checkpoints had in earlier versions, so that old recipes and runs can still be read."""

from __future__ import annotations

import warnings
from typing import Any

from smalto.core.errors import RenamedSettingWarning

_SETTINGS = {
    "codebook.memory": "codebook.decay_tokens",
    "data.colour": "data.color",
    "data.crops_per_picture": "data.crops_per_image",
    "evaluate.pictures": "evaluate.images",
    "guard.action": "monitor.action",
    "guard.psnr_fall": "monitor.psnr_drop",
    "guard.usage_fall": "monitor.usage_drop",
    "optimizer.average": "optimizer.ema_decay",
}


def rename_settings(settings: dict[str, Any], source: str) -> dict[str, Any]:
    """Return dotted settings under today's names; one RenamedSettingWarning lists those that had an earlier name."""
    renamed = [f"{key} is now {_SETTINGS[key]}" for key in settings if key in _SETTINGS]
    if renamed:
        warnings.warn(f"{source}: {', '.join(renamed)}.", RenamedSettingWarning, stacklevel=2)
    return {_SETTINGS.get(key, key): value for key, value in settings.items()}


def rename_tables(data: dict[str, Any], source: str) -> dict[str, Any]:
    """Return the tables of a recipe file with today's names; warns as ``rename_settings`` does."""
    earlier = {key: value for key, value in _flat(data).items() if key in _SETTINGS}
    if not earlier:
        return data
    for key in earlier:
        table, _, name = key.partition(".")
        del data[table][name]
        if not data[table]:
            del data[table]
    for key, value in rename_settings(earlier, source).items():
        table, _, name = key.partition(".")
        data.setdefault(table, {})[name] = value
    return data


def upgrade_state(state: dict[str, Any]) -> dict[str, Any]:
    """Return the training state of a checkpoint with today's names."""
    state = {
        {"guard": "monitor", "stream": "batches"}.get(key, key): value
        for key, value in state.items()
    }
    task = dict(state["task"])
    if "caution" in task:
        task["lr_scale"] = task.pop("caution")
    if "books" in task.get("updater", {}):
        task["updater"] = {
            ("trackers" if key == "books" else key): value for key, value in task["updater"].items()
        }
    if "told" in state["monitor"]:
        state["monitor"] = {
            ("reported" if key == "told" else key): value for key, value in state["monitor"].items()
        }
    return {**state, "task": task}


def upgrade_split(split: dict[str, Any]) -> dict[str, Any]:
    """Return the contents of a split.json with today's names."""
    return {("num_images" if key == "num_pictures" else key): value for key, value in split.items()}


def _flat(data: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{table}.{key}": value
        for table, values in data.items()
        if isinstance(values, dict)
        for key, value in values.items()
    }
