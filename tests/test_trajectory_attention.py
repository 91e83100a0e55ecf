"""Trajectory attention: where windows lie, and that nothing outside them has influence."""

import math

import pytest
import torch

from coser.cameras import Cameras, pixel_centers
from coser.models.trajectory_attention import (TrajectoryAttention, TrajectoryGeometries, cylinder_depths,
                                               trajectory_coordinates, trajectory_geometry, window_samples)
from coser.rasterizer import rasterize


def layer(channels=16, inner=16, head_size=8):
    torch.manual_seed(0)
    module = TrajectoryAttention(channels, inner, head_size)
    torch.nn.init.normal_(module.to_out.weight)
    return module


def tokens(views, size=4, channels=16, seed=1):
    return torch.randn(views, size * size, channels, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("num_views", [3, 8, 12, 24])
@pytest.mark.parametrize("offset", [-1, 1])
def test_level_orthographic_coordinates_are_the_papers_formula(num_views, offset):
    cameras = Cameras.orbit(num_views, elevation=0, orthographic=True)
    uv = pixel_centers(8)
    behind_axis = torch.rand(num_views, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    there, _ = trajectory_coordinates(cameras, uv, behind_axis + 3.2, offset)
    width = 2.0  # an orthographic picture is two world units wide, so depths need no scaling
    angle = math.radians(offset * 360 / num_views)
    x = uv[:, 0] * width
    expected = width / 2 + (x - width / 2) * math.cos(angle) + behind_axis * math.sin(angle)
    torch.testing.assert_close(there[..., 0] * width, expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(there[..., 1], uv[:, 1].expand(num_views, -1), rtol=0, atol=2e-6)


def cube():
    """A turned cube: vertices [8,3], faces [12,3] (two a side, in turn), outward normals [12,3]."""
    corners = torch.tensor([[x, y, z] for x in (-0.5, 0.5) for y in (-0.5, 0.5) for z in (-0.5, 0.5)])
    quads = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    faces = torch.tensor([t for a, b, c, d in quads for t in ((a, b, c), (a, c, d))])
    turn = math.radians(25)
    cos, sin = math.cos(turn), math.sin(turn)
    turned = corners @ torch.tensor([[cos, 0, -sin], [0, 1, 0], [sin, 0, cos]])
    middles = turned[faces.view(6, 6)].mean(1).repeat_interleave(2, 0)
    return turned, faces, middles / middles.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("offset", [-1, 1])
@pytest.mark.parametrize("orthographic", [False, True])
def test_with_true_depth_points_of_a_cube_land_on_their_match(offset, orthographic):
    (vertices, faces, normals), size, num_views = cube(), 96, 12
    cameras = Cameras.orbit(num_views, elevation=20, orthographic=orthographic)
    picture = rasterize(vertices, faces, cameras, size)
    depths, sides = picture.depths.flatten(1), picture.faces.flatten(1)
    uv = pixel_centers(size)
    there, depth = trajectory_coordinates(cameras, uv, depths, offset)
    points = cameras.unproject(uv, depths)
    neighbour = cameras[(torch.arange(num_views) + offset) % num_views]
    pixel = (there * size).floor().long().clamp(0, size - 1)
    index = pixel[..., 1] * size + pixel[..., 0]
    seen_depth, seen_side = depths.roll(-offset, 0).gather(1, index), sides.roll(-offset, 0).gather(1, index)

    towards = neighbour.centers[:, None] - points if not orthographic else neighbour.camera_to_world[:, None, :3, 2]
    facing = (normals[sides.clamp_min(0)] * towards).sum(-1) > 0.1
    matched = (sides >= 0) & facing  # a cube is convex: a side that faces the neighbour is seen by it
    same = seen_side // 2 == sides // 2
    assert matched.float().mean() > 0.05
    assert same[matched].float().mean() > 0.95  # the others fell on the far side of an edge, within a pixel
    assert (seen_depth - depth)[matched & same].abs().max() < 0.1  # a pixel's slope on the steepest side
    assert (seen_depth - depth)[matched & same].abs().mean() < 0.02


def test_cylinder_depths_lie_on_the_cylinder_and_in_front():
    cameras, uv = Cameras.orbit(5, elevation=25), pixel_centers(16)
    points = cameras.unproject(uv, cylinder_depths(cameras, uv, 0.45))
    radius = points[..., [0, 2]].norm(dim=-1)
    hits = (radius - 0.45).abs() < 1e-4
    assert hits.any(1).all() and (radius[~hits] > 0.45).all()
    axis_depth = cameras.unproject(uv, cylinder_depths(cameras, uv, 1e-3))[..., [0, 2]].norm(dim=-1)
    assert (radius[~hits] - axis_depth[~hits]).abs().max() < 1e-3  # a miss takes the nearest approach to the axis
    assert (cylinder_depths(cameras, uv, 0.45)[hits] < cylinder_depths(cameras, uv, 1e-3)[hits]).all()


def test_windows_by_hand():
    index, distances, inside = window_samples(torch.tensor([[0.5 / 4, 1.5 / 4]]), size=4, window=3)
    assert index[0][inside[0]].tolist() == [0, 1, 4, 5, 8, 9]
    assert inside[0].tolist() == [False, True, True] * 3
    assert distances[0].tolist() == pytest.approx([2, 1, 2, 1, 0, 1, 2, 1, 2], abs=1e-5)


def reachable(geometry, size):
    """[N,T,K*T] boolean: which tokens of the neighbours each token asks."""
    return geometry.dense_bias().isfinite() & (geometry.asks > 0)


@pytest.mark.parametrize("route", ["attend_dense", "attend_windows"])
@pytest.mark.parametrize("num_views", [2, 3, 12])
def test_only_samples_in_the_windows_have_influence(route, num_views):
    size, module = 4, layer()
    geometries = TrajectoryGeometries(Cameras.orbit(num_views, elevation=30), 3, 0.45)
    q, k, v = (tokens(num_views, seed=s) for s in range(3))
    keep = torch.zeros(num_views, 16, num_views, 16, dtype=torch.bool)
    geometry = geometries.sparse(size)
    table = reachable(geometry, size).view(num_views, 16, len(geometry.offsets), 16)
    for view in range(num_views):
        for place, offset in enumerate(geometry.offsets):
            keep[view, :, (view + offset) % num_views] |= table[view, :, place]
    v = v.requires_grad_()
    out = getattr(module, route)(q, k, v, num_views, geometries)
    for view, token in ((0, 0), (1, 5), (num_views - 1, 15), (0, 10)):
        gradient, = torch.autograd.grad(out[view, token].sum(), v, retain_graph=True)
        assert torch.equal(gradient.abs().sum(-1) > 0, keep[view, token])


@pytest.mark.parametrize("route", ["attend_dense", "attend_windows"])
def test_out_of_view_samples_have_no_influence(route):
    # seen from far above, the cylinder's front lies below many tokens' pictures: some ask nothing at all
    num_views, module = 3, layer()
    geometries = TrajectoryGeometries(Cameras.orbit(num_views, elevation=60, distance=2.0), 3, 0.45)
    asks = geometries.sparse(4).asks[..., 0] > 0
    assert asks.any() and not asks.all()
    q, k, v = (tokens(num_views, seed=s) for s in range(3))
    out = getattr(module, route)(q, k, v, num_views, geometries)
    assert (out[~asks] == 0).all() and (out[asks].abs().sum(-1) > 0).all() and out.isfinite().all()


@pytest.mark.parametrize("num_views", [2, 3, 4, 12])
@pytest.mark.parametrize("window", [1, 3, 5])
def test_masked_and_gathered_windows_agree_in_values_and_gradients(num_views, window):
    module = layer()
    geometries = TrajectoryGeometries(Cameras.orbit(num_views, elevation=20), window, 0.45)
    results = []
    for route in (module.attend_dense, module.attend_windows):
        q, k, v = (tokens(2 * num_views, seed=s).requires_grad_() for s in range(3))
        out = route(q, k, v, num_views, geometries)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_views", [2, 3, 4, 6, 12, 24])
@pytest.mark.parametrize("elevation", [0, 20])
def test_turning_the_ring_turns_the_output(num_views, elevation):
    module, h = layer(), tokens(num_views, size=8)
    geometries = TrajectoryGeometries(Cameras.orbit(num_views, elevation), 3, 0.45)
    torch.testing.assert_close(module(h.roll(1, 0), num_views, geometries),
                               module(h, num_views, geometries).roll(1, 0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("elevation", [0, 20])
@pytest.mark.parametrize("size", [4, 8, 16])
def test_every_view_of_a_level_ring_asks_the_same_windows(elevation, size):
    geometry = trajectory_geometry(Cameras.orbit(12, elevation), size, 3, 0.45)
    assert (geometry.samples == geometry.samples[:1]).all()


def test_the_window_holds_the_true_match_of_a_cylinder():
    # the depth hypothesis is exact on its own cylinder, so the nearest sample is within half a token each way
    geometry = trajectory_geometry(Cameras.orbit(12, elevation=20), 8, 3, 0.45)
    middle = geometry.bias.view(12, 64, 2, 9)[..., 4]
    assert (middle[middle.isfinite()] >= -0.5 / (2 * 1.5**2) - 1e-3).all()


def test_one_view_has_no_neighbours_and_gets_nothing():
    geometries = TrajectoryGeometries(Cameras.orbit(1), 3, 0.45)
    assert (layer()(tokens(1), 1, geometries) == 0).all()


def test_geometry_is_computed_once_a_resolution():
    geometries = TrajectoryGeometries(Cameras.orbit(4), 3, 0.45)
    assert geometries.sparse(4) is geometries.sparse(4)
    assert geometries.dense(4, 2, torch.float32) is geometries.dense(4, 2, torch.float32)
    assert geometries.dense(4, 2, torch.bfloat16)[0].dtype == torch.bfloat16
