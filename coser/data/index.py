"""The index.jsonl of a folder of rings or packed assets: what is known of each asset, a JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from coser.whole_files import whole_file

INDEX = "index.jsonl"
REPAINTED = "~"  # stands between an asset's id and the colour, in the id of a copy that coser.data.recolor made


def original_id(asset_id: str) -> str:
    """The asset whose shape an asset has: itself, or the original of a repainted copy."""
    return asset_id.split(REPAINTED)[0]


def repainted_id(asset_id: str, color: str) -> str:
    """The id of a copy of an asset in another colour."""
    return f"{asset_id}{REPAINTED}{color}"


def read_index(folder: Path) -> dict[str, dict]:
    """The row of each asset, by id; empty where there is no index."""
    index = folder / INDEX
    return {row["id"]: row for row in map(json.loads, index.read_text("utf-8").splitlines())} if index.is_file() else {}


def write_index(folder: Path, rows: Iterable[dict]) -> None:
    """Writes the rows in the place of what was there; a reader never sees half of them."""
    with whole_file(folder / INDEX) as writing:
        writing.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
