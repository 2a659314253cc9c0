"""The table below the token store against a dict: whatever is done in whatever order, every row is
there once, and found by its id.
"""

from __future__ import annotations

import random
from datetime import timedelta
from pathlib import Path

import pytest

from smalto.store import lance_table
from smalto.store.lance_table import LanceTable, pyarrow

SCHEMA = pyarrow.schema(
    [pyarrow.field("id", pyarrow.string(), nullable=False), pyarrow.field("value", pyarrow.int64())]
)


def rows(contents: dict[str, int]) -> pyarrow.Table:
    return pyarrow.table([list(contents), list(contents.values())], schema=SCHEMA)


def contents(table: LanceTable) -> list[tuple[str, int]]:
    return sorted((row["id"], row["value"]) for row in table.read(0, len(table)).to_pylist())


@pytest.mark.parametrize("seed", range(6))
def test_rows_are_as_in_a_dict(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an index that is missing or old, and files that were joined, replaced and cleaned
    away.
    """
    monkeypatch.setattr(lance_table, "FEW_ROWS", 8)
    chance, expected, next_id = random.Random(seed), dict[str, int](), 0
    table = LanceTable.create(tmp_path / "t", SCHEMA)
    for step in range(60):
        match chance.choice(
            [
                "append",
                "append",
                "append",
                "replace",
                "replace",
                "delete",
                "compact",
                "compact lazily",
                "open",
            ]
        ):
            case "append":
                new = {f"row'{i}": step for i in range(next_id, next_id + chance.randrange(1, 12))}
                next_id += len(new)
                table.append(rows(new))
                expected |= new
            case "replace":
                known = chance.sample(sorted(expected), min(len(expected), 5))
                new = dict.fromkeys([*known, f"row'{next_id}"], step)
                next_id += 1
                table.upsert(rows(new))
                expected |= new
            case "delete" if expected:
                gone = chance.sample(sorted(expected), min(len(expected), 3))
                table.delete([*gone, "nobody"])
                expected = {id: value for id, value in expected.items() if id not in gone}
            case "compact":
                table.compact(timedelta(0))
            case "compact lazily":
                table.compact(timedelta(hours=1), lazily=True)
            case "open":
                table = LanceTable.open(tmp_path / "t")
        assert contents(table) == sorted(expected.items())
        asked = [
            *chance.sample(sorted(expected), min(len(expected), 20)),
            "nobody",
            f"row'{next_id}",
        ]
        found = table.find(asked, ["id", "value"]).to_pylist()
        assert sorted((row["id"], row["value"]) for row in found) == sorted(
            (id, expected[id]) for id in asked if id in expected
        )
        if expected:
            places = sorted(chance.sample(range(len(expected)), min(len(expected), 7)))
            assert table.take(places).to_pylist() == [
                table.read(place, place + 1).to_pylist()[0] for place in places
            ]
