"""A mesh cut into charts that lie flat beside each other in a square: where each face corner finds its texel."""

from __future__ import annotations

import numpy as np
import xatlas

from coser.reconstruction.mesh import Mesh

PADDING = 5  # texels between charts, so that their smaller copies (mipmaps) do not bleed into each other


def unwrap(mesh: Mesh, texture_size: int) -> np.ndarray:
    """Mesh => uvs [F,3,2] float32 in [0,1], v down, of a texture of `texture_size` pixels a side.

    Charts do not overlap and lie at least about PADDING texels apart. The same mesh gives the same uvs.
    """
    atlas = xatlas.Atlas()
    atlas.add_mesh(mesh.vertices.astype(np.float32), mesh.faces.astype(np.uint32))
    options = xatlas.PackOptions()
    options.resolution, options.padding = texture_size, PADDING
    atlas.generate(xatlas.ChartOptions(), options)
    _, corners, uvs = atlas[0]
    # the atlas comes out a little larger than asked for, and not quite square; uvs are in shares of its sides
    uvs = uvs * (np.array([atlas.width, atlas.height]) / max(atlas.width, atlas.height))
    return uvs[corners.astype(np.int64)].astype(np.float32).clip(0, 1)
