"""Cameras: the one place that knows the axes, units and signs of poses, rays and projections.

Conventions, all of them:
    world    glTF axes: right-handed, y up; an object's front looks along +z.
    camera   looks along its own -z, x right, y up. `camera_to_world` [N,4,4] maps camera to world points.
    azimuth  degrees; 0 sees the front (camera on +z); grows towards +x (90: camera on +x).
    elevation degrees; 0 level, 90 straight above.
    fov      degrees, vertical; pictures are square, so it is the horizontal one too.
    uv       picture coordinates in [0,1]: u to the right, v DOWN from the top left corner. The centre of pixel (row i,
             column j) of a picture of S pixels a side is u = (j + 0.5) / S, v = (i + 0.5) / S.
    depth    distance along the camera's axis (not along the ray), in world units; 0 stands for "nothing there".
An orbit is a closed ring: view i of N sits at azimuth start + i * 360 / N, so view 0 is the neighbour of view N-1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

FOV = 40.0  # degrees; with DISTANCE the unit sphere just fits the picture
DISTANCE = 3.2
ELEVATION = 20.0


@dataclass(frozen=True)
class Cameras:
    """N posed square cameras.

    camera_to_world: [N,4,4] float, rigid. fov: degrees, shared by all views. orthographic: when true the picture spans
    [-1,1] in camera x and y whatever the depth (fov is not used); the paper's trajectory formula lives in this case.
    """

    camera_to_world: Tensor
    fov: float = FOV
    orthographic: bool = False

    def __post_init__(self):
        if self.camera_to_world.ndim != 3 or self.camera_to_world.shape[1:] != (4, 4):
            raise ValueError(f"camera_to_world must be [N,4,4], got {list(self.camera_to_world.shape)}")
        if not 0 < self.fov < 180:
            raise ValueError(f"fov must lie between 0 and 180 degrees, got {self.fov}")

    @classmethod
    def look_at_origin(cls, azimuths, elevations, distance: float = DISTANCE, fov: float = FOV,
                       orthographic: bool = False) -> "Cameras":
        """Cameras on a sphere of radius `distance` (world units) looking at the origin.

        azimuths [N] and elevations [N] or one number, degrees; elevations strictly between -90 and 90, because straight
        above "up" means nothing. Raises ValueError otherwise.
        """
        azimuths = torch.as_tensor(azimuths, dtype=torch.float64).reshape(-1)
        elevations = torch.as_tensor(elevations, dtype=torch.float64).reshape(-1).expand(len(azimuths))
        if bool((elevations.abs() >= 90).any()):
            raise ValueError(f"elevation must lie strictly between -90 and 90 degrees, got {elevations.tolist()}")
        if distance <= 0:
            raise ValueError(f"distance must be positive, got {distance}")
        a, e = torch.deg2rad(azimuths), torch.deg2rad(elevations)
        zero = torch.zeros_like(a)
        backward = torch.stack([a.sin() * e.cos(), e.sin(), a.cos() * e.cos()], -1)  # camera +z, away from the object
        right = torch.stack([a.cos(), zero, -a.sin()], -1)
        up = torch.cross(backward, right, dim=-1)
        pose = torch.zeros(len(a), 4, 4, dtype=torch.float64)
        pose[:, :3, 0], pose[:, :3, 1], pose[:, :3, 2] = right, up, backward
        pose[:, :3, 3] = backward * distance
        pose[:, 3, 3] = 1
        return cls(pose.float(), fov, orthographic)

    @classmethod
    def orbit(cls, num_views: int, elevation: float = ELEVATION, start: float = 0.0, distance: float = DISTANCE,
              fov: float = FOV, orthographic: bool = False) -> "Cameras":
        """The closed ring of `num_views` (>= 1) views at one elevation; `start` is the azimuth of view 0, degrees."""
        if num_views < 1:
            raise ValueError(f"num_views must be at least 1, got {num_views}")
        azimuths = start + torch.arange(num_views, dtype=torch.float64) * (360.0 / num_views)
        return cls.look_at_origin(azimuths, elevation, distance, fov, orthographic)

    def __len__(self) -> int:
        return len(self.camera_to_world)

    def __getitem__(self, index) -> "Cameras":
        pose = self.camera_to_world[index]
        return Cameras(pose if pose.ndim == 3 else pose[None], self.fov, self.orthographic)

    def to(self, device) -> "Cameras":
        return Cameras(self.camera_to_world.to(device), self.fov, self.orthographic)

    @property
    def device(self) -> torch.device:
        return self.camera_to_world.device

    @property
    def centers(self) -> Tensor:
        """Camera positions in the world, [N,3]."""
        return self.camera_to_world[:, :3, 3]

    @property
    def rotations(self) -> Tensor:
        """World-to-camera rotations, [N,3,3]."""
        return self.camera_to_world[:, :3, :3].transpose(1, 2)

    @property
    def azimuths(self) -> Tensor:
        """Degrees in [0,360), [N], read off the positions."""
        c = self.centers
        return torch.rad2deg(torch.atan2(c[:, 0], c[:, 2])) % 360

    @property
    def elevations(self) -> Tensor:
        """Degrees, [N], read off the positions."""
        c = self.centers
        return torch.rad2deg(torch.asin((c[:, 1] / c.norm(dim=-1)).clamp(-1, 1)))

    @property
    def focal(self) -> float:
        """Focal length in units of half the picture's side."""
        return 1 / math.tan(math.radians(self.fov) / 2)

    def project(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """World points [P,3] (seen by every view) or [N,P,3] => uv [N,P,2], depth [N,P]."""
        points = points if points.ndim == 3 else points[None]
        local = (points - self.centers[:, None]) @ self.rotations.transpose(1, 2)
        depth = -local[..., 2]
        scale = 1.0 if self.orthographic else self.focal / depth[..., None]
        xy = local[..., :2] * scale
        return torch.stack([xy[..., 0] + 1, 1 - xy[..., 1]], -1) / 2, depth

    def rays(self, uv: Tensor) -> tuple[Tensor, Tensor]:
        """uv [P,2] or [N,P,2] => origins [N,P,3] and directions [N,P,3] with origin + depth * direction on the ray."""
        uv = (uv if uv.ndim == 3 else uv[None]).expand(len(self), -1, 2)
        xy = torch.stack([uv[..., 0] * 2 - 1, 1 - uv[..., 1] * 2], -1)
        back = -torch.ones_like(xy[..., :1])
        rotation = self.rotations  # row vectors: camera @ rotations = world
        center = self.centers[:, None].expand(-1, uv.shape[1], -1)
        if self.orthographic:
            offset = torch.cat([xy, torch.zeros_like(back)], -1) @ rotation
            return center + offset, (torch.cat([torch.zeros_like(xy), back], -1) @ rotation)
        return center, torch.cat([xy / self.focal, back], -1) @ rotation

    def unproject(self, uv: Tensor, depth: Tensor) -> Tensor:
        """uv [P,2] or [N,P,2], depth [N,P] => world points [N,P,3]; the inverse of `project`."""
        origins, directions = self.rays(uv)
        return origins + depth[..., None] * directions


def pixel_centers(size: int, device=None) -> Tensor:
    """uv of all pixel centres of a square picture, row by row: [size*size,2]."""
    ticks = (torch.arange(size, dtype=torch.float32, device=device) + 0.5) / size
    v, u = torch.meshgrid(ticks, ticks, indexing="ij")
    return torch.stack([u, v], -1).reshape(-1, 2)
