"""The rasteriser against analytic solids, against a ray caster, and against itself."""

import math

import numpy as np
import pytest
import torch
import trimesh
from solids import cube, joined, sphere
from trimesh.ray.ray_pyembree import RayMeshIntersector

from coser.cameras import Cameras, pixel_centers
from coser.rasterizer import AMBIENT, DIFFUSE, LIGHT, barycentrics, rasterize, render

SIZE = 128


def test_depth_of_a_cube_is_that_of_its_front_plane():
    fragments = rasterize(*cube(0.5)[:2], Cameras.look_at_origin([0], 0, distance=3), SIZE)
    hit = fragments.faces[0] >= 0
    assert torch.allclose(fragments.depths[0][hit], torch.tensor(2.5), atol=1e-5)
    side = SIZE * Cameras.look_at_origin([0], 0).focal * 0.5 / 2.5  # projected by hand
    assert abs(int(hit.sum()) - side**2) <= 2 * side + 1


@pytest.mark.parametrize("elevation", [0, 35])
def test_depth_of_a_sphere_is_within_a_pixels_slope(elevation):
    radius, cameras = 0.6, Cameras.look_at_origin([40], elevation)
    vertices, faces, _ = sphere(radius, rows=96)
    depth = rasterize(vertices, faces, cameras, SIZE).depths[0].flatten()
    origins, directions = (r[0] for r in cameras.rays(pixel_centers(SIZE)))
    a, b = directions.square().sum(-1), (origins * directions).sum(-1)
    root = b.square() - a * (origins.square().sum(-1) - radius**2)
    expected = (-b - root.clamp_min(0).sqrt()) / a
    hit = (depth > 0) & (root > 0)
    point = origins + expected[:, None] * directions
    cosine = -(point * directions).sum(-1)[hit] / (radius * a[hit].sqrt())
    pixel = 2 * 3.2 / (cameras.focal * SIZE)
    slope = (1 - cosine.square()).clamp_min(0).sqrt() / cosine.clamp_min(0.02)
    assert ((depth[hit] - expected[hit]).abs() <= 1e-3 + pixel * slope).all()
    assert (depth[hit] - expected[hit]).abs().median() < 3e-4


def test_silhouette_of_a_sphere_has_the_area_of_its_cone():
    radius, distance = 0.7, 3.2
    views = render(*sphere(radius, rows=96), Cameras.look_at_origin([10], 25, distance=distance), SIZE)
    reach = math.tan(math.asin(radius / distance)) / math.tan(math.radians(20)) * SIZE / 2  # pixels
    assert float(views.masks.sum()) == pytest.approx(math.pi * reach**2, rel=3e-3)


def test_every_pixel_sees_what_a_ray_caster_sees():
    vertices, faces, _ = joined(cube(0.3, (0.3, 0.1, 0)), sphere(0.45, 16, (-0.3, 0, 0.2)), cube(0.15, (0, 0.5, 0.4)))
    cameras = Cameras.orbit(3, elevation=20, start=7)
    fragments = rasterize(vertices, faces, cameras, SIZE)
    caster = RayMeshIntersector(trimesh.Trimesh(vertices.numpy(), faces.numpy(), process=False))
    origins, directions = cameras.rays(pixel_centers(SIZE))
    for view in range(len(cameras)):
        face = caster.intersects_first(origins[view].numpy(), directions[view].numpy())
        ours = fragments.faces[view].flatten().numpy()
        differ = ours != face
        assert differ.mean() < 2e-3  # rays that graze an edge may fall to either side
        depth = fragments.depths[view].flatten().numpy()
        location, ray, _ = caster.intersects_location(origins[view].numpy(), directions[view].numpy(),
                                                      multiple_hits=False)
        expected = np.zeros(SIZE * SIZE)
        expected[ray] = cameras.project(torch.tensor(location, dtype=torch.float32))[1][view]
        assert np.abs(depth - expected)[~differ].max() < 2e-3


def test_shared_edges_leave_no_gap_and_no_overlap():
    generator = torch.Generator().manual_seed(3)
    n = 24
    ticks = torch.linspace(-.8, .8, n)
    grid = torch.cartesian_prod(ticks, ticks)
    inner = (grid.abs() < 0.79).all(-1, keepdim=True)
    grid = grid + inner * 0.02 * torch.randn(grid.shape, generator=generator)
    vertices = torch.cat([grid, torch.zeros(len(grid), 1)], -1)
    corner = (torch.arange(n - 1)[:, None] * n + torch.arange(n - 1)).flatten()
    faces = torch.cat([torch.stack([corner, corner + 1, corner + n], -1),
                       torch.stack([corner + 1, corner + n + 1, corner + n], -1)])
    camera = Cameras.look_at_origin([0], 0)
    together = rasterize(vertices, faces, camera, SIZE).faces[0] >= 0
    rows, columns = together.any(1).nonzero(), together.any(0).nonzero()
    assert together[rows.min():rows.max() + 1, columns.min():columns.max() + 1].all()
    each = sum((rasterize(vertices, part, camera, SIZE).faces[0] >= 0).int() for part in faces.split(1)[::7])
    assert each.max() == 1  # of a seventh of the triangles drawn alone, no two own one pixel


def test_coverage_does_not_depend_on_how_a_face_is_turned():
    vertices, faces, _ = sphere(0.6, 12)
    cameras = Cameras.orbit(2, elevation=11)
    plain, turned = (rasterize(vertices, f, cameras, SIZE) for f in (faces, faces.flip(1).roll(1, 1)))
    assert torch.equal(plain.faces, turned.faces) and torch.allclose(plain.depths, turned.depths, atol=1e-5)


def test_batched_views_equal_views_one_by_one():
    solid, cameras = joined(cube(0.3), sphere(0.4, 12, (0.3, 0.2, 0))), Cameras.orbit(4)
    together = render(*solid, cameras, 64)
    for i in range(len(cameras)):
        alone = render(*solid, cameras[i], 64)
        assert torch.equal(together.views[i], alone.views[0]) and torch.equal(together.depths[i], alone.depths[0])


def test_supersampling_averages_the_finer_picture():
    solid, cameras = sphere(0.6, 16), Cameras.orbit(2)
    fine, coarse = render(*solid, cameras, 128, supersample=1), render(*solid, cameras, 32, supersample=4)
    average = torch.nn.functional.avg_pool2d
    assert torch.allclose(coarse.masks, average(fine.masks, 4), atol=1e-6)
    assert torch.allclose(coarse.views, average(fine.views, 4), atol=1e-5)
    mean_depth = average(fine.depths * fine.masks, 4) / average(fine.masks, 4).clamp_min(1e-6)
    assert torch.allclose(coarse.depths, mean_depth * (coarse.masks > 0), atol=1e-4)


def test_barycentrics_rebuild_the_seen_point():
    vertices, faces, _ = sphere(0.6, 12)
    cameras = Cameras.orbit(2)
    fragments = rasterize(vertices, faces, cameras, 64)
    hit = fragments.faces >= 0
    weights = barycentrics(fragments, hit.nonzero(as_tuple=True), vertices, faces, cameras)
    point = torch.einsum("pk,pkc->pc", weights, vertices[faces[fragments.faces[hit]]])
    seen = cameras.unproject(pixel_centers(64), fragments.depths.flatten(1)).view(2, 64, 64, 3)[hit]
    assert torch.allclose(point, seen, atol=1e-4)
    assert torch.allclose(weights.sum(-1), torch.ones(len(weights)), atol=1e-5)


def test_shading_is_ambient_plus_lambert_on_either_side():
    vertices, faces, colors = cube(0.5)
    cameras = Cameras.look_at_origin([0], 0)
    light = torch.nn.functional.normalize(torch.tensor(LIGHT), dim=0)
    expected = colors[8, 0] * (AMBIENT + DIFFUSE * light[2])  # the +z side
    for turned in (faces, faces.flip(1)):
        middle = render(vertices, turned, colors, cameras, 33).views[0, :, 16, 16]
        assert torch.allclose(middle, expected, atol=1e-5)
    plain = render(vertices, faces, colors, cameras, 33, shade=False)
    assert torch.allclose(plain.views[0, :, 16, 16], colors[8, 0], atol=1e-6)


def test_nothing_in_sight_gives_empty_views():
    vertices, faces, colors = cube(0.1, (0, 0, 10))  # behind the camera
    views = render(vertices, faces, colors, Cameras.look_at_origin([0], 0), 16)
    assert not views.masks.any() and not views.depths.any() and not views.views.any()


@pytest.mark.parametrize("sizes", [dict(size=0), dict(supersample=0)])
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match="at least 1"):
        render(*cube(), Cameras.orbit(1), **sizes)
