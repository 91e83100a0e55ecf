"""Imports files into Blender and prints, as a JSON line a file, what it holds and where which colour lies on its surface.

Run by a Python that has bpy: `python blender_points.py FILE...`
"""

import json
import sys
from pathlib import Path

import bpy
import numpy as np

READERS = {".glb": lambda p: bpy.ops.import_scene.gltf(filepath=p), ".obj": lambda p: bpy.ops.wm.obj_import(filepath=p),
           ".ply": lambda p: bpy.ops.wm.ply_import(filepath=p), ".stl": lambda p: bpy.ops.wm.stl_import(filepath=p)}
MOST_POINTS = 4000


def report(path: str) -> dict:
    """Points are the middles of faces in Blender's world (z up), colours sRGB in [0,1]."""
    bpy.ops.wm.read_factory_settings(use_empty=True)
    READERS[Path(path).suffix](path)
    points, colors, triangles = [], [], 0
    for thing in (o for o in bpy.context.scene.objects if o.type == "MESH"):
        mesh = thing.data
        mesh.calc_loop_triangles()
        corners = np.array([t.loops for t in mesh.loop_triangles])
        vertex = np.array([loop.vertex_index for loop in mesh.loops])
        world = np.array([thing.matrix_world @ v.co for v in mesh.vertices])
        triangles += len(corners)
        points.append(world[vertex[corners]].mean(1))
        colors.append(face_colors(mesh, corners, vertex))
    points = np.concatenate(points)
    chosen = np.random.default_rng(0).permutation(len(points))[:MOST_POINTS]
    return {"path": path, "triangles": triangles, "low": world.min(0).tolist(), "high": world.max(0).tolist(),
            "images": [[i.name, *i.size] for i in bpy.data.images if i.size[0] > 0],
            "points": points[chosen].round(5).tolist(),
            "colors": None if colors[0] is None else np.concatenate(colors)[chosen].round(4).tolist()}


def face_colors(mesh, corners: np.ndarray, vertex: np.ndarray) -> np.ndarray | None:
    pictures = [i for i in bpy.data.images if i.size[0] > 0]
    if mesh.uv_layers and pictures:
        width, height = pictures[0].size
        pixels = np.array(pictures[0].pixels[:]).reshape(height, width, -1)  # the bottom row first, as uvs count
        uv = np.array([u.vector for u in mesh.uv_layers.active.uv])[corners].mean(1)
        column, row = (uv * (width, height)).astype(int).clip(0, (width - 1, height - 1)).T
        return pixels[row, column, :3]
    if mesh.color_attributes:
        attribute = mesh.color_attributes[0]
        values = np.array([c.color_srgb[:3] for c in attribute.data])
        return values[corners if attribute.domain == "CORNER" else vertex[corners]].mean(1)
    return None


if __name__ == "__main__":
    for file in sys.argv[1:]:
        print("REPORT " + json.dumps(report(file)))
