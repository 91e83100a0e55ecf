"""Small closed solids whose pictures can be worked out by hand, as vertices, faces and corner colours."""

import numpy as np
import torch
from torch import Tensor


def cube(half: float = 0.5, center=(0.0, 0.0, 0.0)) -> tuple[Tensor, Tensor, Tensor]:
    """Axis-aligned cube of side 2 * half; one colour a side: +x, -x, +y, -y, +z, -z."""
    palette = torch.tensor([[.9, .2, .2], [.2, .9, .2], [.2, .2, .9], [.9, .9, .2], [.2, .9, .9], [.9, .2, .9]])
    vertices, faces, colors = [], [], []
    for axis in range(3):
        for sign in (1, -1):
            u, v = (axis + 1) % 3, (axis + 2) % 3
            corners = torch.zeros(4, 3)
            corners[:, axis] = sign
            corners[:, u] = torch.tensor([-1.0, 1, 1, -1]) * sign
            corners[:, v] = torch.tensor([-1.0, -1, 1, 1])
            first = 4 * len(vertices)
            vertices.append(corners)
            faces.append(torch.tensor([[0, 1, 2], [0, 2, 3]]) + first)
            colors.append(palette[len(colors)].expand(2, 3, 3))
    return torch.cat(vertices) * half + torch.tensor(center), torch.cat(faces), torch.cat(colors)


def sphere(radius: float = 0.6, rows: int = 48, center=(0.0, 0.0, 0.0)) -> tuple[Tensor, Tensor, Tensor]:
    """Latitude-longitude sphere with its corners ON the radius, coloured by direction."""
    latitude = np.linspace(-np.pi / 2, np.pi / 2, rows + 1)[1:-1]
    longitude = np.arange(2 * rows) * np.pi / rows
    ring = np.stack(np.broadcast_arrays(np.cos(latitude)[:, None] * np.sin(longitude), np.sin(latitude)[:, None],
                                        np.cos(latitude)[:, None] * np.cos(longitude)), -1).reshape(-1, 3)
    directions = torch.tensor(np.concatenate([ring, [[0, -1, 0], [0, 1, 0]]]), dtype=torch.float32)
    count, faces = 2 * rows, []
    south, north = len(ring), len(ring) + 1
    for j in range(count):
        k = (j + 1) % count
        faces += [(south, k, j), (north, (rows - 2) * count + j, (rows - 2) * count + k)]
        for i in range(rows - 2):
            a, b, c, d = i * count + j, i * count + k, (i + 1) * count + k, (i + 1) * count + j
            faces += [(a, b, c), (a, c, d)]
    faces = torch.tensor(faces)
    return directions * radius + torch.tensor(center), faces, (directions * 0.4 + 0.5)[faces]


def joined(*solids) -> tuple[Tensor, Tensor, Tensor]:
    """Several solids as one."""
    vertices, faces, colors = zip(*solids)
    first = np.cumsum([0] + [len(v) for v in vertices])
    return torch.cat(vertices), torch.cat([f + int(n) for f, n in zip(faces, first)]), torch.cat(colors)


def table() -> tuple[Tensor, Tensor, Tensor]:
    """A flat top on four legs."""
    def box(low, high):
        vertices, faces, colors = cube(1.0)
        low, high = torch.tensor(low), torch.tensor(high)
        return vertices * (high - low) / 2 + (high + low) / 2, faces, colors

    legs = [box((x - .05, -.5, z - .05), (x + .05, .3, z + .05)) for x in (-.5, .5) for z in (-.4, .4)]
    return joined(box((-.6, .3, -.5), (.6, .4, .5)), *legs)


def patchwork(cells: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """A cube whose sides are cut into squares of random greys: corners to match wherever one looks."""
    plain = cube(0.5)[0].view(6, 4, 3)
    ticks = torch.linspace(0, 1, cells + 1)
    v, u = (t.reshape(-1, 1) for t in torch.meshgrid(ticks[:-1], ticks[:-1], indexing="ij"))
    step = 1 / cells
    vertices = []
    for origin, along, _, up in plain:
        at = [origin + (u + du * step) * (along - origin) + (v + dv * step) * (up - origin)
              for du, dv in ((0, 0), (1, 0), (1, 1), (0, 1))]
        vertices.append(torch.stack(at, 1).reshape(-1, 3))
    corner = torch.arange(6 * cells * cells)[:, None, None] * 4
    faces = (corner + torch.tensor([[0, 1, 2], [0, 2, 3]])).reshape(-1, 3)
    greys = torch.rand(6 * cells * cells, generator=torch.Generator().manual_seed(0))
    return torch.cat(vertices), faces, greys.repeat_interleave(2)[:, None, None].expand(-1, 3, 3)
