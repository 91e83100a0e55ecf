"""What others would do with the same views: Open3D's TSDF fusion and screened Poisson, to compare ours with.

Open3D is only needed here, is no requirement of the app, and is imported when asked for: `pip install open3d`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from coser.cameras import Cameras
from coser.reconstruction import Mesh
from coser.views import ViewSet

COVERED = 0.99  # pixels covered by less mix the object with what is behind it, and so do their depths
TRUNCATION = 4.0  # voxels
BLOCKS = 20_000  # of 16^3 voxels that the TSDF may hold
NEIGHBOURS = 20  # points whose plane is a point's normal
OCTREE_DEPTH = 8  # of Poisson: 256 cells a side
THINNEST = 0.02  # Poisson's surface is cut off where its samples' density is in this lowest share


def tsdf_fusion(views: ViewSet, cameras: Cameras, voxel: float) -> Mesh:
    """Open3D's VoxelBlockGrid (Curless and Levoy 1996; Dong et al. 2021) of views with depth => a coloured mesh,
    open where no view sees.

    voxel: the grid's step in world units. Raises ImportError without Open3D.
    """
    import open3d as o3d

    core = o3d.core
    grid = o3d.t.geometry.VoxelBlockGrid(
        ("tsdf", "weight", "color"), (core.float32, core.float32, core.float32), ((1,), (1,), (3,)),
        voxel_size=voxel, block_resolution=16, block_count=BLOCKS)
    depths, colors = (t.permute(0, 2, 3, 1).contiguous().numpy() for t in _measured(views))
    intrinsic = core.Tensor(_intrinsic(cameras, views.views.shape[-1]))
    far = float(depths.max()) + 1
    for depth, color, pose in zip(depths, colors, _extrinsics(cameras)):
        depth, color = o3d.t.geometry.Image(core.Tensor(depth)), o3d.t.geometry.Image(core.Tensor(color))
        extrinsic = core.Tensor(pose)
        blocks = grid.compute_unique_block_coordinates(depth, intrinsic, extrinsic, 1.0, far, TRUNCATION)
        grid.integrate(blocks, depth, color, intrinsic, intrinsic, extrinsic, 1.0, far, TRUNCATION)
    found = grid.extract_triangle_mesh(weight_threshold=0.5)
    return Mesh(found.vertex.positions.numpy().astype(np.float32), found.triangle.indices.numpy().astype(np.int64),
                found.vertex.colors.numpy().clip(0, 1).astype(np.float32))


def poisson(views: ViewSet, cameras: Cameras, depth: int = OCTREE_DEPTH, thinnest: float = THINNEST) -> Mesh:
    """Screened Poisson reconstruction (Kazhdan and Hoppe 2013, in Open3D) of the depth maps' points => coloured mesh.

    Normals are those of the planes through each point's neighbours in its own view, turned to the camera. depth: of
    the octree. thinnest: the share of the vertices, those with the fewest points about them, that is cut away; 0
    leaves the surface closed. Raises ImportError without Open3D.
    """
    import open3d as o3d

    depths, colors = _measured(views)
    intrinsic = o3d.camera.PinholeCameraIntrinsic(*[views.views.shape[-1]] * 2, _intrinsic(
        cameras, views.views.shape[-1]))
    cloud = o3d.geometry.PointCloud()
    for seen, color, pose in zip(depths[:, 0].numpy(), colors.permute(0, 2, 3, 1).numpy(), _extrinsics(cameras)):
        part = o3d.geometry.PointCloud.create_from_depth_image(
            o3d.geometry.Image(seen), intrinsic, pose, depth_scale=1.0, depth_trunc=1e3)
        part.colors = o3d.utility.Vector3dVector(color[seen > 0].astype(np.float64))
        part.estimate_normals(o3d.geometry.KDTreeSearchParamKNN(NEIGHBOURS))
        part.orient_normals_towards_camera_location(np.linalg.inv(pose)[:3, 3])
        cloud += part
    found, density = o3d.geometry.TriangleMesh.create_from_point_cloud_poisson(cloud, depth=depth, linear_fit=True)
    if thinnest > 0:
        density = np.asarray(density)
        found.remove_vertices_by_mask(density < np.quantile(density, thinnest))
    return Mesh(np.asarray(found.vertices, np.float32), np.asarray(found.triangles, np.int64),
                np.asarray(found.vertex_colors, np.float32).clip(0, 1))


def _measured(views: ViewSet) -> tuple[Tensor, Tensor]:
    """Depths [N,1,S,S], 0 where a pixel is not wholly the object's, and colours [N,3,S,S] no longer premultiplied."""
    kept = views.masks >= COVERED
    return torch.where(kept, views.depths, 0.0), views.views / views.masks.clamp_min(1e-3)


def _intrinsic(cameras: Cameras, size: int) -> np.ndarray:
    """[3,3] float64 in pixels, pixel centres at whole numbers."""
    focal, middle = cameras.focal * size / 2, (size - 1) / 2
    return np.array([[focal, 0, middle], [0, focal, middle], [0, 0, 1]])


def _extrinsics(cameras: Cameras) -> np.ndarray:
    """World to camera [N,4,4] float64, the camera's y down and z ahead."""
    return np.diag([1.0, -1, -1, 1]) @ np.linalg.inv(cameras.camera_to_world.double().numpy())
