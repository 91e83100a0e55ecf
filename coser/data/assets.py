"""Assets: captioned meshes read from a folder, either packed (index.jsonl + npz shards) or loose GLB/glTF/OBJ files.

Packed form: `index.jsonl`, a JSON object a line with at least `id` and `shard`, and optionally `split`, `object`,
`captions`, `colors`, `quality`, `front_known`, `kinds`; each shard is a numpy archive with `<id>_v` [V,3], `<id>_f`
[F,3] and `<id>_c` uint8 [F,3,3] (RGB of each face's corners).
Loose form: any GLB, glTF or OBJ below the folder; its captions are the lines of a text file of the same name beside it
(`barrel.glb`, `barrel.txt`), or else its file name; of an object that lies there in several formats, the first of the
three is read. Loose meshes are centred and scaled into the unit sphere. Colours are sRGB as pictures are; glTF's vertex
and material colours are linear and become so here.
"""

from __future__ import annotations

import json
import re
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

LOOSE_SUFFIXES = (".glb", ".gltf", ".obj")
HELD_OUT_SHARE = 0.05  # of assets that come without a split
DETAILS = re.compile(r"(?<!-)\b(?:with|of|in|that|which|made|for|holding|wearing|carrying)\b|[,.;:]")
PLACES = re.compile(r"(?<!-)\b(?:and|on|at|under|over|beside|behind|from|like|against|around|near|between)\b")
AMOUNTS = {"cluster", "full", "group", "loaf", "pair", "piece", "pile", "row", "set", "slice", "stack", "stacks"}
SIDES = {"left": "right", "right": "left", "clockwise": "counterclockwise", "counterclockwise": "clockwise"}
SIDE = re.compile(r"\b(left|right|clockwise|counterclockwise)\b(?![- ]?(?:angle|over))", re.IGNORECASE)


@dataclass(frozen=True)
class Asset:
    """One captioned mesh; geometry is read when asked for (`load_mesh`).

    kinds: of a scene of several assets (`coser.data.compose`), the kinds it shows; empty for a single object.
    """

    id: str
    path: Path
    split: str = "train"
    object: str = ""
    captions: tuple[str, ...] = ()
    colors: tuple[str, ...] = ()
    quality: int = 2
    front_known: bool = True
    kinds: tuple[str, ...] = ()
    packed: bool = field(default=True, repr=False)


def list_assets(folder: str | Path, split: str | None = None, min_quality: int = 0, min_object_count: int = 1,
                words: list[str] | None = None, limit: int | None = None) -> list[Asset]:
    """The assets below `folder`, in a fixed order.

    split: keep this split only. min_quality: leave out assets judged below it. min_object_count: keep only assets whose
    object's last word ("oak tree" -> "tree"), or the last before a preposition, is shared by at least this many of the
    rest. words: keep only assets whose object's last word is one of these. limit: the first so many of a fixed shuffle,
    so that a smaller subset is part of every larger one. Raises ValueError when nothing is left.
    """
    folder = Path(folder)
    index = folder / "index.jsonl"
    if index.is_file():
        assets = [_packed_asset(folder, json.loads(line)) for line in index.read_text().splitlines() if line.strip()]
    else:
        found: dict[str, Asset] = {}
        for suffix in LOOSE_SUFFIXES:  # the same object in several formats counts once
            for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() == suffix):
                asset = _loose_asset(folder, path)
                found.setdefault(asset.id, asset)
        assets = [found[key] for key in sorted(found)]
    assets = [a for a in assets if (split is None or a.split == split) and a.quality >= min_quality]
    of_kind, about = Counter(map(last_word, assets)), Counter(map(subject_of, assets))
    assets = [a for a in assets if max(of_kind[last_word(a)], about[subject_of(a)]) >= min_object_count
              and (words is None or last_word(a) in words)]
    if limit is not None:
        order = np.random.default_rng(0).permutation(len(assets))
        assets = [assets[i] for i in sorted(order[:limit])]
    if not assets:
        raise ValueError(f"no assets found in {folder} (split={split!r}, min_quality={min_quality}, "
                         f"min_object_count={min_object_count}); expected index.jsonl or {', '.join(LOOSE_SUFFIXES)} "
                         "files")
    return assets


def last_word(asset: Any) -> str:
    """The noun that names the kind of whatever has an `object` (an asset, a ring): "oak tree" -> "tree"."""
    return (asset.object.split() or [""])[-1].lower()


def head_word(asset: Any) -> str:
    """The noun that an `object` is about, before any preposition: "table with two plates" -> "table", of which
    `last_word` makes plates. "" where nothing stands before it or but an amount ("pile of coins")."""
    head = (PLACES.split(before_details(asset.object.lower()), 1)[0].split() or [""])[-1]
    return "" if head in AMOUNTS and head != last_word(asset) else head


def subject_of(asset: Any) -> str:
    """What an `object` is about: its last word, but of a "table with two plates" the table."""
    return head_word(asset) or last_word(asset)


def other_sides(words: str) -> str:
    """What is said of an object => of its mirror image: "his left arm" => "his right arm"."""
    return SIDE.sub(_other_side, words)


def _other_side(found: re.Match) -> str:
    word = SIDES[found[0].lower()]
    return word.capitalize() if found[0][0].isupper() else word


def with_article(words: str) -> str:
    """"oak tree" => "an oak tree"."""
    return f"{'an' if words[0].lower() in 'aeiou' else 'a'} {words}"


def in_color(color: str, words: str) -> str:
    """"red" and "barrel" => "a red barrel"; words that name the colour themselves say it once."""
    return with_article(words if color in words.split() else f"{color} {words}")


def before_details(words: str) -> str:
    """What is named, before a preposition or a comma says more about it: "a red cat with a hat" => "a red cat"."""
    return DETAILS.split(words, 1)[0].strip()


def in_unit_sphere(vertices: np.ndarray) -> np.ndarray:
    """Vertices [V,3] moved so that their box is centred, and scaled so that the farthest lies on the unit sphere."""
    vertices = vertices - (vertices.min(0) + vertices.max(0)) / 2
    return vertices / max(np.linalg.norm(vertices, axis=1).max(), 1e-9)


def _packed_asset(folder: Path, row: dict) -> Asset:
    return Asset(id=row["id"], path=folder / row["shard"], split=row.get("split", "train"),
                 object=row.get("object", ""),
                 captions=tuple(row.get("captions", ())) or (row.get("object", row["id"]),),
                 colors=tuple(row.get("colors", ())), quality=row.get("quality", 2),
                 front_known=row.get("front_known", True), kinds=tuple(row.get("kinds", ())))


def _loose_asset(folder: Path, path: Path) -> Asset:
    name = path.stem.replace("_", " ").replace("-", " ").strip()
    text = path.with_suffix(".txt")
    captions = [line.strip() for line in text.read_text().splitlines() if line.strip()] if text.is_file() else []
    asset_id = str(path.relative_to(folder).with_suffix("")).replace("/", "__").replace("\\", "__")
    return Asset(id=asset_id, path=path, object=name, captions=tuple(captions) or (name,), packed=False)


_open_shards: dict[Path, np.lib.npyio.NpzFile] = {}  # numpy reads members lazily: one open archive a process and shard


def load_mesh(asset: Asset) -> tuple[Tensor, Tensor, Tensor]:
    """Asset => vertices [V,3] float32 in the unit sphere, faces [F,3] int64, corner_colors [F,3,3] in [0,1]."""
    if asset.packed:
        if asset.path not in _open_shards:
            _open_shards[asset.path] = np.load(asset.path, allow_pickle=False)
        shard = _open_shards[asset.path]
        vertices, faces, colors = (shard[f"{asset.id}_{part}"] for part in "vfc")
        return (torch.from_numpy(vertices.astype(np.float32)), torch.from_numpy(faces.astype(np.int64)),
                torch.from_numpy(colors.astype(np.float32) / 255))
    return _load_loose(asset.path)


def _load_loose(path: Path) -> tuple[Tensor, Tensor, Tensor]:
    import trimesh  # only people with loose files pay for it

    scene = trimesh.load(path, force="scene", process=False)  # else corners of several colours become one
    vertices, faces, colors, offset = [], [], [], 0
    for node in scene.graph.nodes_geometry:  # not scene.dump(): its copies lose vertex colours that multiply a material
        pose, name = scene.graph[node]
        mesh = scene.geometry[name]
        if not isinstance(mesh, trimesh.Trimesh) or not len(mesh.faces):
            continue
        vertices.append(trimesh.transform_points(mesh.vertices, pose))
        faces.append(mesh.faces + offset)
        colors.append(_corner_colors(mesh, linear=path.suffix.lower() != ".obj"))
        offset += len(mesh.vertices)
    if not vertices:
        raise ValueError(f"{path} holds no triangles")
    vertices = in_unit_sphere(np.concatenate(vertices))
    return (torch.from_numpy(vertices.astype(np.float32)), torch.from_numpy(np.concatenate(faces).astype(np.int64)),
            torch.from_numpy(np.concatenate(colors).astype(np.float32)))


def _corner_colors(mesh, linear: bool) -> np.ndarray:
    """sRGB of each face corner, [F,3,3] in [0,1]: texture, material, vertex or face colours, whichever the mesh has.

    linear: whether the file's vertex and material colours are linear light, as in glTF; textures never are.
    """
    visual = mesh.visual
    if visual.kind == "face":
        return np.repeat(visual.face_colors[:, None, :3], 3, axis=1) / 255
    if visual.kind != "texture":
        colors = visual.vertex_colors[mesh.faces][..., :3] / 255
        return linear_to_srgb(colors) if linear else colors
    material = visual.material
    textured = getattr(material, "baseColorTexture", None) is not None or getattr(material, "image", None) is not None
    if textured and visual.uv is not None:
        return visual.to_color().vertex_colors[mesh.faces][..., :3] / 255
    colors = np.broadcast_to(material.main_color[:3] / 255, (len(mesh.faces), 3, 3))
    painted = visual.vertex_attributes.get("color")
    if painted is not None:  # glTF's vertex colours multiply the material's
        scale = np.iinfo(painted.dtype).max if np.issubdtype(painted.dtype, np.integer) else 1
        colors = colors * (painted[mesh.faces][..., :3] / scale)
    return linear_to_srgb(colors) if linear else colors


def linear_to_srgb(colors: np.ndarray) -> np.ndarray:
    """Linear light in [0,1] => sRGB in [0,1] (IEC 61966-2-1)."""
    return np.where(colors <= 0.0031308, 12.92 * colors, 1.055 * np.maximum(colors, 0.0031308) ** (1 / 2.4) - 0.055)


def split_assets(folder: Path, min_quality: int = 0) -> tuple[list[Asset], list[Asset]]:
    """Assets to train on, and held out.

    A packed folder's own splits `train` and `val`; where it has none, those whose id's crc32 says so are held out, at
    least one. Raises ValueError for fewer than two assets.
    """
    assets = list_assets(folder, min_quality=min_quality)
    train = [a for a in assets if a.split == "train"]
    if any(a.split == "val" for a in assets):
        held_out = [a for a in assets if a.split == "val"]
    else:
        ranked = sorted(train, key=lambda a: zlib.crc32(a.id.encode()))
        below = HELD_OUT_SHARE * 2**32
        held_out = [a for a in ranked if zlib.crc32(a.id.encode()) < below] or ranked[:1]
        chosen = {a.id for a in held_out}
        train = [a for a in train if a.id not in chosen]
    if not train or not held_out:
        raise ValueError("assets must be at least two, one to train on and one held out, got "
                         f"{len(assets)} in {folder}")
    return train, held_out
