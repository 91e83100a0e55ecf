"""An object that no mirror and no turn brings onto itself, and the files that the product makes of its views."""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch
from torch import Tensor

from coser.cameras import Cameras
from coser.rasterizer import render
from coser.reconstruction import reconstruct
from coser.reconstruction.exports import FORMATS, export
from coser.reconstruction.glb import save_glb
from coser.reconstruction.placement import place

LONGEST_SIDE = 0.75  # metres
# low corner, high corner, colour: a body, and towards +z a yellow nose, +x a red arm, +y a green hat
BOXES = (((-.3, -.5, -.25), (.3, .3, .25), (.35, .45, .75)), ((-.1, -.05, .25), (.1, .15, .5), (.95, .85, .15)),
         ((.3, -.1, -.15), (.7, .1, .05), (.9, .15, .15)), ((-.25, .3, -.2), (.05, .6, .1), (.2, .75, .25)))


def figure() -> tuple[Tensor, Tensor, Tensor]:
    """Vertices [V,3] in the unit sphere, faces [F,3], corner colours [F,3,3]."""
    signs = torch.tensor([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)])
    quads = torch.tensor([[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]])
    faces = torch.cat([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]])
    vertices = [torch.where(signs > 0, torch.tensor(high), torch.tensor(low)) for low, high, _ in BOXES]
    colors = [torch.tensor(color).expand(len(faces), 3, 3) for _, _, color in BOXES]
    return torch.cat(vertices), torch.cat([faces + 8 * i for i in range(len(BOXES))]), torch.cat(colors)


def make_files(folder: Path) -> dict[str, Path]:
    """Twelve views of the figure => every mesh format, each named by its key; OBJ is unpacked."""
    folder.mkdir(parents=True, exist_ok=True)
    ring = Cameras.orbit(12)
    views = render(*figure(), ring, 256, shade=False)
    mesh = reconstruct(views, ring, max_faces=4000, texture_size=512)
    mesh = place(mesh, "feet", LONGEST_SIDE)
    files = {}
    for name in ("glb", "obj", "stl", "ply"):
        path = export(name, mesh, views, ring, folder / f"figure{FORMATS[name].suffix}")
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                archive.extractall(folder / name)
            path = next((folder / name).glob(f"*.{name}"))
        files[name] = path
    return files


def colored_glb(folder: Path) -> Path:
    """The same views => a GLB with colours at its vertices in place of a texture."""
    ring = Cameras.orbit(12)
    mesh = reconstruct(render(*figure(), ring, 256, shade=False), ring, max_faces=4000, texture_size=None)
    return save_glb(place(mesh, "feet", LONGEST_SIDE), folder / "colored.glb")
