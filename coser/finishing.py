"""From a surface to the asset that was asked for, and again with other options; kept in files of plain arrays."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from coser.cameras import Cameras
from coser.reconstruction import Mesh, Surface, finish
from coser.reconstruction.placement import place
from coser.request import AssetOptions
from coser.views import ViewSet
from coser.whole_files import whole_file


@dataclass(frozen=True)
class FinishedAsset:
    """mesh: as asked for, placed, in metres. surface: what it was made from, in the cameras' world. scale, offset [3]:
    metres = scale * (a point of that world) + offset."""

    mesh: Mesh
    surface: Surface
    options: AssetOptions
    scale: float
    offset: tuple[float, float, float]


def finish_asset(surface: Surface, options: AssetOptions) -> FinishedAsset:
    """The surface with the triangles, colours, place and size that `options` ask for."""
    texture_size = options.texture_size if options.coloring == "texture" else None
    mesh = finish(surface, max_faces=options.max_faces, texture_size=texture_size)
    placed = place(mesh, options.origin, options.longest_side)
    before, after = mesh.vertices.astype(np.float64), placed.vertices.astype(np.float64)
    scale = np.ptp(after, axis=0).max() / np.ptp(before, axis=0).max()
    offset = after.mean(0) - scale * before.mean(0)
    return FinishedAsset(placed, surface, options, float(scale), tuple(map(float, offset)))


def save_finished(asset: FinishedAsset, path: Path) -> Path:
    """Writes the asset as one numpy archive without pickled objects; half precision for colours and coverage."""
    surface, mesh = asset.surface, asset.mesh
    arrays = {f"mesh_{name}": value for name, value in vars(mesh).items() if value is not None}
    arrays |= {f"surface_{name}": value for name, value in vars(surface.mesh).items() if value is not None}
    arrays |= {"views": surface.views.views.half().cpu().numpy(), "masks": surface.views.masks.half().cpu().numpy(),
               "depths": surface.views.depths.float().cpu().numpy(),
               "camera_to_world": surface.cameras.camera_to_world.cpu().numpy(),
               "numbers": np.array([surface.voxel, surface.cameras.fov, asset.scale, *asset.offset]),
               "options": np.array(json.dumps(asdict(asset.options)))}
    with whole_file(path) as writing, writing.open("wb") as file:
        np.savez(file, **arrays)
    return path


def load_finished(path: Path) -> FinishedAsset:
    """What `save_finished` wrote."""
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    mesh, surface = ({name.removeprefix(part): value for name, value in arrays.items() if name.startswith(part)}
                     for part in ("mesh_", "surface_"))
    views = ViewSet(*(torch.from_numpy(arrays[name]).float() for name in ("views", "masks", "depths")))
    voxel, fov, scale, *offset = map(float, arrays["numbers"])
    cameras = Cameras(torch.from_numpy(arrays["camera_to_world"]), fov)
    return FinishedAsset(Mesh(**mesh), Surface(Mesh(**surface), voxel, views, cameras),
                         AssetOptions(**json.loads(str(arrays["options"]))), scale, tuple(offset))
