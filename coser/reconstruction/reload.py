"""What a written file must hold when it is read back: comparisons that say in words what is wrong."""

from __future__ import annotations

import numpy as np
import trimesh

from coser.reconstruction.mesh import Mesh

EXACT = 1e-5  # of the mesh's longest side: what float32 and decimal digits may lose


def expect_equal(what: str, found: object, wanted: object) -> None:
    """Raises ValueError unless a figure read back from a file is the one that was to be written."""
    if found != wanted:
        raise ValueError(f"the written file must hold {what} {wanted}, got {found}")


def expect_close(what: str, found: np.ndarray, wanted: np.ndarray, tolerance: float) -> None:
    """Raises ValueError unless two arrays have one shape and differ by `tolerance` at most."""
    found, wanted = np.asarray(found), np.asarray(wanted)
    expect_equal(f"{what} of shape", list(found.shape), list(wanted.shape))
    off = float(np.abs(found.astype(np.float64) - wanted).max(initial=0.0))
    if not off <= tolerance:  # also when it is not a number
        raise ValueError(f"the written file must hold {what} to within {tolerance:g}, got some that are {off:g} off")


def expect_mesh(back: trimesh.Trimesh, mesh: Mesh, vertices: np.ndarray) -> None:
    """Raises ValueError unless `back`, read without merging anything, has the mesh's triangles, in its order, at
    `vertices` [V,3] (the mesh's, in the file's units and axes), and with that its bounds and windings."""
    expect_equal("this many triangles:", len(back.faces), len(mesh.faces))
    side = float(np.ptp(vertices, 0).max(initial=0.0))
    expect_close("corners", back.vertices[back.faces], vertices[mesh.faces], EXACT * side)


def expect_texture(back: trimesh.Trimesh, picture, mesh: Mesh) -> None:
    """Raises ValueError unless `back` has the mesh's texture places and `picture`, its image, is the texture."""
    if picture is None or getattr(back.visual, "uv", None) is None:
        raise ValueError("the written file must hold a texture and its places, got none")
    expect_close("a texture", np.asarray(picture.convert("RGB")), mesh.texture, 0)
    uv = np.asarray(back.visual.uv)[back.faces] * (1, -1) + (0, 1)  # trimesh counts v from below
    expect_close("texture places", uv, mesh.uvs, EXACT)
