"""The index.jsonl of a folder of rings or packed assets: what is known of each asset, a JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from coser.whole_files import whole_file

INDEX = "index.jsonl"
COPY = "~"  # stands between an asset's id and what a copy of it is: a colour (coser.data.recolor) or a stretched one
STRETCHED = "stretched"


def original_id(asset_id: str) -> str:
    """The asset that an asset was made of: itself, or the original of a repainted or stretched copy."""
    return asset_id.split(COPY)[0]


def repainted_id(asset_id: str, color: str) -> str:
    """The id of a copy of an asset, or of a stretched copy, in another colour."""
    return f"{asset_id}{COPY}{color}"


def is_repainted(asset_id: str) -> bool:
    """Whether it is of a copy that coser.data.recolor made, of an asset or of a stretched copy."""
    return not asset_id.split(COPY)[-1].startswith(STRETCHED) and COPY in asset_id


def is_stretched(asset_id: str) -> bool:
    """Whether it is of a copy that coser.data.stretch made, in its asset's colours or in others."""
    return any(part.startswith(STRETCHED) for part in asset_id.split(COPY)[1:])


def stretched_id(asset_id: str, copy: int) -> str:
    """The id of the copy of that number that coser.data.stretch made of an asset."""
    return f"{asset_id}{COPY}{STRETCHED}{copy}"


def read_index(folder: Path) -> dict[str, dict]:
    """The row of each asset, by id; empty where there is no index."""
    index = folder / INDEX
    return {row["id"]: row for row in map(json.loads, index.read_text("utf-8").splitlines())} if index.is_file() else {}


def write_index(folder: Path, rows: Iterable[dict]) -> None:
    """Writes the rows in the place of what was there; a reader never sees half of them."""
    with whole_file(folder / INDEX) as writing:
        writing.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
