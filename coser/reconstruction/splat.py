"""Gaussian splats seeded from the surface: flat discs in the layout of 3D Gaussian Splatting (Kerbl et al. 2023).

A binary .ply of x y z nx ny nz f_dc_0..2 opacity scale_0..2 rot_0..3, float32: log standard deviations, the logit of
the opacity, (colour - 0.5) / SH_C0, quaternions w x y z. Viewers take such files to be in the axes of the cameras that
they were trained from (COLMAP's: x right, y DOWN, z away from the viewer), so the mesh, y up with its front along +z,
is turned by 180 degrees about x: (x, y, z) => (x, -y, -z). Nothing is mirrored; units are metres.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from coser.reconstruction.mesh import Mesh
from coser.reconstruction.reload import expect_close, expect_equal
from coser.reconstruction.sampling import colors_at, face_areas, spread_points

SUFFIX = "-splat.ply"
COUNT = 90_000
SH_C0 = 0.28209479177387814
SPREAD = 0.75  # standard deviation of a disc, in sides of the square that is its share: hides what is behind
FLATNESS = 0.1  # across the surface, of that
OPACITY = 0.99
REACH = 0.05  # of the longest side: how far the outermost disc may lie inside the mesh's box
FIELDS = ("x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2", "opacity", "scale_0", "scale_1", "scale_2",
          "rot_0", "rot_1", "rot_2", "rot_3")
TURN = np.array([1.0, -1.0, -1.0])


def save_splat(mesh: Mesh, path: str | Path, count: int = COUNT) -> Path:
    """Writes about `count` discs that cover the mesh's surface in its colours; returns the path."""
    faces, weights = spread_points(mesh, count)
    corners = mesh.vertices[mesh.faces[faces]].astype(np.float64)
    crossed = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normals = crossed / np.maximum(np.linalg.norm(crossed, axis=1, keepdims=True), 1e-30) * TURN
    share = np.sqrt(face_areas(mesh).sum() / len(faces))
    rows = np.empty((len(faces), len(FIELDS)), "<f4")
    rows[:, 0:3] = np.einsum("pk,pkc->pc", weights, corners) * TURN
    rows[:, 3:6] = normals
    rows[:, 6:9] = (colors_at(mesh, faces, weights) - 0.5) / SH_C0
    rows[:, 9] = np.log(OPACITY / (1 - OPACITY))
    rows[:, 10:13] = np.log(SPREAD * share * np.array([1, 1, FLATNESS]))
    rows[:, 13:17] = _turns_to(normals)
    Path(path).write_bytes(_header(len(rows)) + rows.tobytes())
    return Path(path)


def read_splat(path: str | Path) -> np.ndarray:
    """A file as `save_splat` writes it => its rows [P,17] float32, in the order of FIELDS; ValueError for others."""
    content = Path(path).read_bytes()
    head, _, body = content.partition(b"end_header\n")
    found = [line.split()[-1] for line in head.decode("ascii", "replace").splitlines() if line.startswith("element")]
    count = int(found[0]) if found and found[0].isdigit() else 0
    expect_equal("the header", head + b"end_header\n", _header(count))
    expect_equal("this many bytes of discs:", len(body), count * len(FIELDS) * 4)
    return np.frombuffer(body, "<f4").reshape(count, len(FIELDS))


def check_splat(mesh: Mesh, path: str | Path) -> None:
    """Reads the file back; raises ValueError where its discs are broken or do not reach all over the mesh."""
    rows = read_splat(path)
    expect_equal("finite numbers only:", bool(np.isfinite(rows).all()), True)
    expect_equal("discs:", len(rows) > 0, True)
    expect_close("turns of length one", np.linalg.norm(rows[:, 13:17], axis=1), np.ones(len(rows)), 1e-4)
    expect_close("colours", rows[:, 6:9] * SH_C0, np.zeros((len(rows), 3)), 0.5 + 1e-4)
    places = rows[:, :3] * TURN
    used = mesh.vertices[mesh.faces.ravel()]
    side = float(np.ptp(used, 0).max())
    expect_close("bounds", [places.min(0), places.max(0)], [used.min(0), used.max(0)], REACH * side)


def _header(count: int) -> bytes:
    lines = ["ply", "format binary_little_endian 1.0", f"element vertex {count}",
             *(f"property float {name}" for name in FIELDS), "end_header"]
    return "\n".join(lines).encode("ascii") + b"\n"


def _turns_to(normals: np.ndarray) -> np.ndarray:
    """Unit quaternions w x y z [P,4] that turn the z axis to the normals [P,3] on the shortest way."""
    x, y, z = normals.T
    turns = np.stack([1 + z, -y, x, np.zeros_like(z)], -1)
    turns[z < -1 + 1e-9] = 0, 1, 0, 0  # straight down: any half turn does
    return turns / np.linalg.norm(turns, axis=1, keepdims=True)
