"""Earlier names of settings and checkpoint entries, so that old recipes and runs can be read."""

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


_FAULTS = {"saturated": "discriminator_loss"}  # that a monitor has reported


def rename_settings(settings: dict[str, Any], source: str) -> dict[str, Any]:
    """Return dotted settings under their present names.

    Warns once with a RenamedSettingWarning that lists the settings with an earlier name.
    """
    renamed = [f"{key} is now {_SETTINGS[key]}" for key in settings if key in _SETTINGS]
    if renamed:
        warnings.warn(f"{source}: {', '.join(renamed)}.", RenamedSettingWarning, stacklevel=2)
    return {_SETTINGS.get(key, key): value for key, value in settings.items()}


def rename_tables(data: dict[str, Any], source: str) -> dict[str, Any]:
    """Return the tables of a recipe file with present names; warn like ``rename_settings``."""
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
        if isinstance(data.setdefault(table, {}), dict):  # otherwise the recipe refuses it
            data[table][name] = value
    return data


def upgrade_state(state: dict[str, Any]) -> dict[str, Any]:
    """Return the training state of a checkpoint with present names."""
    upgraded = {("monitor" if key == "guard" else key): value for key, value in state.items()}
    if "stream" in upgraded:  # one flat list of positions, of all ranks
        upgraded["batches"] = [upgraded.pop("stream")]
    monitor = upgraded["monitor"]
    if "told" in monitor:
        upgraded["monitor"] = _renamed(monitor, "told", "reported") | {
            "reported": [_FAULTS.get(fault, fault) for fault in monitor["told"]]
        }
    task = _renamed(state["task"], "caution", "lr_scale")
    if "books" in task.get("updater", {}):
        task["updater"] = _renamed(task["updater"], "books", "trackers")
    upgraded["task"] = task
    return upgraded


def upgrade_split(split: dict[str, Any]) -> dict[str, Any]:
    """Return the contents of a split.json with present names."""
    return {("num_images" if key == "num_pictures" else key): value for key, value in split.items()}


def _flat(data: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{table}.{key}": value
        for table, values in data.items()
        if isinstance(values, dict)
        for key, value in values.items()
    }


def _renamed(data: dict[str, Any], earlier: str, today: str) -> dict[str, Any]:
    return {(today if key == earlier else key): value for key, value in data.items()}
