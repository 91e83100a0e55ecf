"""Solids that pass for assets of known kinds: what scenes are composed of."""

import json

import numpy as np
from solids import cube, sphere, table

PAINTS = {"red": (1.0, 0.0, 0.0), "green": (0.0, 1.0, 0.0), "blue": (0.0, 0.0, 1.0), "white": (1.0, 1.0, 1.0)}
NAMES = {"wooden table": (table, "red"), "small crate": (cube, "green"), "pumpkin": (sphere, "blue"),
         "cooking pot": (sphere, "red"), "barrel": (cube, "blue"), "woman": (cube, "white"), "apple": (sphere, "green"),
         "treasure chest": (cube, "red"), "spaceship": (cube, "red"), "broken stool": (cube, "red")}


def write_assets(folder, repeats=2):
    """Solids that pass for assets, each in one colour; of each name the last is held out."""
    folder.mkdir()
    rows, arrays = [], {}
    for name, (solid, color) in NAMES.items():
        for i in range(repeats + 1):
            vertices, faces, _ = solid(0.6) if solid is not table else solid()
            asset_id = f"{name.replace(' ', '-')}-{i}"
            paint = np.array(PAINTS[color]) * 255
            arrays |= {f"{asset_id}_v": vertices.numpy().astype(np.float16),
                       f"{asset_id}_f": faces.numpy().astype(np.uint16),
                       f"{asset_id}_c": np.broadcast_to(paint, (len(faces), 3, 3)).astype(np.uint8)}
            rows.append({"id": asset_id, "shard": "meshes.npz", "split": "val" if i == repeats else "train",
                         "object": name, "captions": [f"a {color} {name}", f"a {name}"], "colors": [color],
                         "quality": 2, "front_known": name != "pumpkin"})
    np.savez(folder / "meshes.npz", **arrays)
    (folder / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
