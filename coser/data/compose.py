"""Training scenes of two or three assets that stand in life's places: `python -m coser.data.compose ASSETS SCENES`.

SCENES becomes a packed folder as of `coser.data.assets`, to be rendered, encoded and trained on like any other. A row
of its index has, besides what every asset's has: `kinds`, the two kinds shown; `relation`, one of
`coser.data.scene_words.RELATIONS`; `pair`, [kind, relation, kind]; `parts`, the ids of the assets, three in groups.

Its `object` ends in the kind of what carries or accompanies ("lantern on barrel"), and so that one's is the scene's
`kind`: rings of rare carriers are drawn more often, those of common ones less. Scenes are weighed among themselves
(`coser.data.dataset.LatentRings`) and keep no kind in or out of a training. Nothing is taught that "lantern on barrel"
looks like a barrel: by `kinds`, scenes stay out of the judge's training and of the vocabulary. `colors` stays empty: no
one colour is a scene's, so none is asked of it, it is never repainted, and no caption is made of it.

Held-out pairs (list `compositions` of `questions.json`) are in no training scene: of an "on" pair that relation, of any
other pair all relations on the floor, in both orders, since a mirror image turns left into right. With `--split val`
they are composed, too, of held-out assets: for evaluation.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from coser.data.assets import Asset, in_unit_sphere, list_assets, load_mesh
from coser.data.index import INDEX, write_index
from coser.data.placing import beside, box_of, on_floor, resting_places
from coser.data.scene_words import (PORTABLE, SHRINKS, SIDES, SMALLEST, Part, part_of, scene_captions, scene_object,
                                    sizes_together)
from coser.questions import QUESTIONS, load_questions

SHARES = {"on": 0.42, "beside": 0.16, "left of": 0.1, "right of": 0.1, "in front of": 0.05, "behind": 0.05, "and": 0.12}
LEAST_RATIO = {"on": 0.055, "beside": 0.15, "and": 0.25}  # of sizes in life; an apple on a bed is not a scene
MOST_CARRIED = 0.85  # of the carrier's size in life
GAP = (0.02, 0.08)  # between neighbours, of the larger one's size
SHIFT = 0.1  # of the same: how far neighbours stand out of line, at most
HIDING = 0.8  # of the height of what stands behind: what stands in front of it must be lower
ATOP = 0.9  # of the carrier's height: what lies higher lies on top of it
SHARD = 400  # scenes
DRAWS, PER_RELATION = 3000, 100  # of one scene, before giving up; and before another relation is tried

Mesh = tuple[Tensor, Tensor, Tensor]  # vertices [V,3] float64, faces [F,3] int64, corner colours [F,3,3] in [0,1]


@dataclass(frozen=True)
class Scene:
    """Two kinds of assets and how they stand. mesh: centred in the unit sphere. atop: see `scene_captions`."""

    first: Part
    relation: str
    second: Part
    mesh: Mesh
    atop: bool = True

    def row(self, scene_id: str, shard: str, split: str) -> dict:
        """What the index says of it."""
        first, second = self.first, self.second
        parts = [p.asset.id for p in ([first, first, second] if self.relation == "and" else [first, second])]
        sided = self.relation in SIDES
        return {"id": scene_id, "split": split, "object": scene_object(first, self.relation, second),
                "captions": scene_captions(first, self.relation, second, self.atop), "colors": [],
                "quality": min(first.asset.quality, second.asset.quality), "kinds": [first.kind, second.kind],
                # seen from the side, left would be wrong, even of things that have no front
                "front_known": sided or first.asset.front_known or second.asset.front_known,
                "relation": self.relation, "pair": [first.kind, self.relation, second.kind], "parts": parts,
                "n_faces": len(self.mesh[1]), "shard": shard}


def pair_key(kind: str, relation: str, other: str) -> tuple[str, str, str]:
    """What is held out together: "on" by its order, the relations on the floor as one and in both orders."""
    return (kind, "on", other) if relation == "on" else (*sorted((kind, other)), "beside")


def held_out_compositions() -> set[tuple[str, str, str]]:
    """The `pair_key` of every composition that evaluation asks for and training must not show."""
    questions = load_questions(QUESTIONS, "compositions")
    return {pair_key(q.kinds[0], q.relation, q.kinds[1]) for q in questions}


def compose(assets: list[Asset], count: int, seed: int = 0,
            held_out: Collection[tuple[str, str, str]] = ()) -> Iterator[Scene]:
    """`count` different scenes of these assets; the first so many of a longer call with the same seed.

    Kinds are drawn by the square root of their number of assets. held_out: keys (`pair_key`) never to be composed.
    Raises ValueError where the assets allow no, or not enough, scenes.
    """
    parts = [p for p in map(part_of, assets) if p]
    kinds = {name: [p for p in parts if p.name == name] for name in sorted({p.name for p in parts})}
    carriers = {name: [p for p in group if p.carries] for name, group in kinds.items()}
    carried = {name: group for name, group in kinds.items() if name in PORTABLE}
    done: set[tuple[str, str, str]] = set()
    for i in range(count):
        draw = np.random.default_rng([seed, i])
        for attempt in range(DRAWS):
            if attempt % PER_RELATION == 0:
                relation = str(draw.choice(list(SHARES), p=list(SHARES.values())))
            first = _draw_part(carried if relation == "on" else kinds, draw)
            second = _draw_part(carriers if relation == "on" else kinds, draw)
            if first is None or second is None or not _is_sensible(first, relation, second):
                continue
            key = first.asset.id, relation, second.asset.id
            if key in done or pair_key(first.kind, relation, second.kind) in held_out:
                continue
            scene = place(first, relation, second, draw)
            if scene is not None:
                done.add(key)
                yield scene
                break
        else:
            raise ValueError(f"assets must allow {count} different scenes of kinds that coser.data.scene_words lists, "
                             f"got {len(assets)} assets, {len(parts)} of such kinds, and {i} scenes")


def _draw_part(groups: dict[str, list[Part]], draw: np.random.Generator) -> Part | None:
    names = [name for name, group in groups.items() if group]
    if not names:
        return None
    chance = np.array([len(groups[name]) ** 0.5 for name in names])
    group = groups[names[draw.choice(len(names), p=chance / chance.sum())]]
    return group[draw.integers(len(group))]


def _is_sensible(first: Part, relation: str, second: Part) -> bool:
    """Whether these two are seen so in life, as far as their sizes tell."""
    if first.kind == second.kind:
        return False
    if relation == "on":
        return LEAST_RATIO["on"] <= first.size / second.size <= MOST_CARRIED
    least = LEAST_RATIO["and" if relation == "and" else "beside"]
    if min(first.size, second.size) < least * max(first.size, second.size):
        return False
    if (first.indoor and second.outdoor) or (second.indoor and first.outdoor):
        return False
    if relation in SIDES:
        return second.asset.front_known
    return relation == "and" or first.size <= second.size


def place(first: Part, relation: str, second: Part, draw: np.random.Generator) -> Scene | None:
    """The scene that stands so; None where the first finds no place to lie on the second, or one would hide the other
    from the front."""
    sizes = sizes_together(first.size, second.size)
    meshes = [_standing(p.asset, size) for p, size in zip((first, second), sizes)]
    if relation == "on":
        return _laid(first, second, *meshes, draw)
    gap, shift = draw.uniform(*GAP), draw.uniform(-SHIFT, SHIFT)
    boxes = [box_of(mesh[0]) for mesh in meshes]
    side = SIDES.get(relation) or (0, int(draw.choice([-1, 1])))
    if side[0] == 2:
        heights = [float(box[1, 1]) for box in boxes]
        if min(heights) > HIDING * max(heights) or (heights[0] < heights[1]) != (relation == "in front of"):
            return None
    if side[0] == 0:  # something small stands by the front of something deep rather than by its middle, to be seen
        depths = [float(box[1, 2] - box[0, 2]) for box in boxes]
        shift += draw.uniform(0, 0.5) * (depths[1] - depths[0])
    if relation == "and":
        meshes = _grouped(*meshes, *boxes, gap, shift, draw)
    else:
        meshes = [_moved(meshes[0], beside(boxes[0], boxes[1], side, gap, shift)), meshes[1]]
    return Scene(first, relation, second, _joined(meshes))


def _standing(asset: Asset, size: float) -> Mesh:
    vertices, faces, colors = load_mesh(asset)
    return on_floor(vertices.double(), size), faces, colors


def _laid(first: Part, second: Part, upper: Mesh, lower: Mesh, draw: np.random.Generator) -> Scene | None:
    for shrink in SHRINKS:
        if shrink < 1 and float((upper[0].amax(0) - upper[0].amin(0)).max()) * shrink < SMALLEST * 0.9:
            return None
        smaller = (upper[0] * shrink, *upper[1:])
        for move in resting_places(lower[:2], smaller[:2], draw):
            atop = float(move[1]) >= ATOP * float(lower[0][:, 1].max())
            return Scene(first, "on", second, _joined([_moved(smaller, move), lower]), atop)
    return None


def _grouped(two: Mesh, one: Mesh, box: Tensor, other: Tensor, gap: float, shift: float,
             draw: np.random.Generator) -> list[Mesh]:
    """Two copies of a mesh and another: side by side behind it or, where it is higher, before it, in a row, or one on
    each side of it."""
    layout = draw.choice(["pair", "row", "flank"])
    right, left = ((0, 1), (0, -1)) if draw.integers(2) else ((0, -1), (0, 1))
    if layout == "flank":
        return [_moved(two, beside(box, other, left, gap, shift)), _moved(two, beside(box, other, right, gap)), one]
    copy = _moved(two, beside(box, box, right, gap))
    both = box_of(torch.cat([two[0], copy[0]]))
    if layout == "row":
        return [two, copy, _moved(one, beside(other, both, left, gap, -shift))]
    side = 2, -1 if float(other[1, 1]) > float(box[1, 1]) else 1
    return [two, copy, _moved(one, beside(other, both, side, gap, draw.uniform(-SHIFT, SHIFT)))]


def _moved(mesh: Mesh, move: Tensor) -> Mesh:
    return mesh[0] + move, mesh[1], mesh[2]


def _joined(meshes: list[Mesh]) -> Mesh:
    """Several meshes as one, centred in the unit sphere."""
    firsts = np.cumsum([0] + [len(vertices) for vertices, _, _ in meshes])
    vertices = torch.cat([vertices for vertices, _, _ in meshes])
    faces = torch.cat([faces + int(n) for (_, faces, _), n in zip(meshes, firsts)])
    return torch.from_numpy(in_unit_sphere(vertices.numpy())), faces, torch.cat([colors for _, _, colors in meshes])


def write_scenes(assets: list[Asset], folder: Path, count: int, seed: int = 0, split: str = "train",
                 held_out: Collection[tuple[str, str, str]] = ()) -> list[dict]:
    """Composes scenes into a new packed folder; returns the rows of its index. Raises ValueError where one lies."""
    if (folder / INDEX).exists():
        raise ValueError(f"{folder} must be new or empty, but holds an {INDEX}")
    folder.mkdir(parents=True, exist_ok=True)
    rows, arrays = [], {}
    for i, scene in enumerate(compose(assets, count, seed, held_out)):
        shard = f"meshes_{i // SHARD:02}.npz"
        rows.append(scene.row(f"scene-{split}-{seed}-{i:05}", shard, split))
        vertices, faces, colors = scene.mesh
        arrays |= {f"{rows[-1]['id']}_v": vertices.numpy().astype(np.float16),
                   f"{rows[-1]['id']}_f": faces.numpy().astype(np.uint16 if len(vertices) < 65536 else np.int32),
                   f"{rows[-1]['id']}_c": (colors * 255).round().to(torch.uint8).numpy()}
        if len(rows) % SHARD == 0 or len(rows) == count:
            np.savez_compressed(folder / shard, **arrays)
            arrays = {}
    write_index(folder, rows)
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m coser.data.compose", description=__doc__.split("\n")[0])
    parser.add_argument("assets", type=Path, help="a packed folder (index.jsonl) or a folder of GLB, glTF or OBJ files")
    parser.add_argument("scenes", type=Path, help="new folder")
    parser.add_argument("--count", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", default="train", help="of the assets; of any other than train, pairs that are held "
                        "out are composed, too")
    parser.add_argument("--min-quality", type=int, default=2)
    options = parser.parse_args(arguments)
    try:
        assets = list_assets(options.assets, options.split, options.min_quality)
        rows = write_scenes(assets, options.scenes, options.count, options.seed, options.split,
                            held_out_compositions() if options.split == "train" else ())
    except ValueError as error:
        parser.exit(1, f"coser: {error}\n")
    found = Counter(row["relation"] for row in rows)
    print(f"{len(rows)} scenes of {len({part for row in rows for part in row['parts']})} assets and "
          f"{len({tuple(row['kinds']) for row in rows})} pairs of kinds: "
          + ", ".join(f"{found[relation]} {relation!r}" for relation in SHARES))


if __name__ == "__main__":
    main()
