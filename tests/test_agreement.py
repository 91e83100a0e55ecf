"""Agreement of rings with themselves: known answers, and views that contradict the others."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from solids import cube, joined, patchwork, sphere
from torch import Tensor

from coser.agreement import (chamfer_distance, cross_render, cross_render_psnr, held_out_rerender,
                             leave_one_out_hull_iou, neighbour_color_psnr, neighbour_depth_agreement, sample_surface,
                             shuffled_ring)
from coser.cameras import Cameras, pixel_centers
from coser.rasterizer import render
from coser.reconstruction import Mesh
from coser.views import ViewSet

RING = Cameras.orbit(8)
CUBE = render(*cube(0.5), RING, 64)


def mesh_of(solid) -> Mesh:
    return Mesh(solid[0].numpy(), solid[1].numpy())


def changed(ring: ViewSet, index: int, **parts) -> ViewSet:
    """The same views, but parts of one of them replaced."""
    fresh = {name: getattr(ring, name).clone() for name in parts}
    for name, value in parts.items():
        fresh[name][index] = value
    return replace(ring, **fresh)


def test_cross_render_marks_the_view_that_contradicts_the_others():
    agreeing = cross_render_psnr(CUBE, RING, resolution=48)
    assert agreeing.shape == (4,) and agreeing.min() > 20
    wrong = changed(CUBE, 5, views=CUBE.views[5].flip(0))
    scores = cross_render_psnr(wrong, RING, resolution=48)
    assert scores.argmin() == 2 and scores[2] < agreeing.min() - 3


def test_cross_render_measures_how_far_apart_the_halves_lie():
    same = cross_render(CUBE, RING, resolution=48)
    torch.testing.assert_close(same.psnr, cross_render_psnr(CUBE, RING, resolution=48))
    smaller = render(*cube(0.4), RING, 64)  # every side of the odd views' cube lies 0.1 further in
    odd = (torch.arange(8) % 2 == 1)[:, None, None, None]
    pairs = ((getattr(smaller, k), getattr(CUBE, k)) for k in ("views", "masks", "depths"))
    apart = cross_render(ViewSet(*(torch.where(odd, a, b) for a, b in pairs)), RING, resolution=48)
    assert same.chamfer < 0.02
    assert apart.chamfer == pytest.approx(0.1, abs=0.02)


def test_cross_render_needs_four_views():
    with pytest.raises(ValueError, match="at least 4"):
        cross_render_psnr(CUBE[:3], RING[:3])
    with pytest.raises(ValueError, match=r"as many as the views \(8\), got 4"):
        cross_render(CUBE, RING[:4])


def test_chamfer_distance_of_concentric_spheres_is_the_difference_of_their_radii():
    outer, inner = mesh_of(sphere(0.6, 64)), mesh_of(sphere(0.5, 64))
    assert chamfer_distance(outer, inner, 4000) == pytest.approx(0.1, abs=0.001)
    assert chamfer_distance(outer, inner, 4000) == pytest.approx(chamfer_distance(inner, outer, 4000), abs=0.001)


def test_chamfer_distance_does_not_depend_on_how_a_surface_is_cut_into_triangles():
    assert chamfer_distance(mesh_of(cube(0.5)), mesh_of(patchwork(5)), 4000) < 1e-4
    moved = mesh_of(cube(0.5, (0.03, 0, 0)))
    # one side is 0.03 away, one too but for its rim (nearer to the other's walls), of four a strip sticks out
    expected = (0.03 + (0.03 - 2 * 0.03**2 + 4 / 3 * 0.03**3) + 4 * 0.03 * 0.015) / 6
    assert chamfer_distance(mesh_of(cube(0.5)), moved, 20_000) == pytest.approx(expected, rel=0.05)


def test_samples_lie_evenly_on_the_surface():
    solid = joined(cube(0.4, (-0.5, 0, 0)), cube(0.2, (0.5, 0, 0)))  # areas 4 to 1
    points, faces = sample_surface(mesh_of(solid), 20_000, seed=1)
    assert (points[:, 0] < 0).mean() == pytest.approx(0.8, abs=0.01)
    assert np.abs(points[faces < 12] - (-0.5, 0, 0)).max(1) == pytest.approx(0.4, abs=1e-6)
    assert points[points[:, 0] > 0].mean(0) == pytest.approx((0.5, 0, 0), abs=0.01)


def in_sphere_silhouette(center: Tensor, points: Tensor, radius: float) -> Tensor:
    """Whether the line from a camera's centre through the points [P,3] passes the origin within the radius."""
    ways = torch.nn.functional.normalize(points - center, dim=-1)
    return torch.linalg.cross(ways, center.expand_as(ways)).norm(dim=-1) <= radius


def in_box_silhouette(center: Tensor, points: Tensor, half: Tensor) -> Tensor:
    """Whether it hits the box of these half sides: the slab test."""
    ways = points - center
    ends = torch.stack([(-half - center) / ways, (half - center) / ways])
    return ends.amin(0).amax(-1) <= ends.amax(0).amin(-1)


def exact_hull_iou(cameras: Cameras, size: int, inside) -> Tensor:
    """The same figure from formulas instead of pictures: a pixel is covered where any of 200 points of its ray is."""
    uv = pixel_centers(size)
    scores = []
    for i in range(len(cameras)):
        origins, directions = (t[0].double() for t in cameras[i].rays(uv))
        points = (origins[:, None] + torch.linspace(2.3, 4.1, 200)[None, :, None] * directions[:, None]).reshape(-1, 3)
        kept = torch.ones(len(points), dtype=torch.bool)
        for j in range(len(cameras)):
            if j != i:
                kept[kept.clone()] = inside(cameras.centers[j].double(), points[kept])
        hull, own = kept.view(len(uv), -1).any(1), inside(cameras.centers[i].double(), (origins + directions))
        scores.append((hull & own).sum() / (hull | own).sum())
    return torch.stack(scores)


def test_hull_iou_of_a_sphere_and_of_a_thin_board_is_that_of_exact_cones():
    cameras = Cameras.orbit(5, 20)
    ball = leave_one_out_hull_iou(render(*sphere(0.7, 64), cameras, 256), cameras, 32)
    expected = exact_hull_iou(cameras, 32, lambda c, p: in_sphere_silhouette(c, p, 0.7))
    torch.testing.assert_close(ball.double(), expected.double(), atol=0.01, rtol=0)
    half = torch.tensor([0.7, 0.6, 0.012])  # three pixels thick
    vertices, faces, colors = cube(1.0)
    board = leave_one_out_hull_iou(render(vertices * half, faces, colors, cameras, 256), cameras, 48)
    expected = exact_hull_iou(cameras, 48, lambda c, p: in_box_silhouette(c, p, half.double()))
    torch.testing.assert_close(board.double(), expected.double(), atol=0.02, rtol=0)
    assert ball.min() > 0.85 and ball.max() < 1


def test_hull_of_the_others_marks_the_view_that_shows_more_than_they_do():
    cameras = Cameras.orbit(8)
    before = leave_one_out_hull_iou(CUBE, cameras, 48)
    wide = torch.nn.functional.max_pool2d(CUBE.masks[3], 9, 1, 4)
    after = leave_one_out_hull_iou(changed(CUBE, 3, masks=wide), cameras, 48)
    assert after.argmin() == 3 and after[3] < before[3] - 0.1
    others = torch.arange(8) != 3
    assert (after[others] - before[others]).abs().max() < 0.03  # the rest still bound each other
    emptied = leave_one_out_hull_iou(changed(CUBE, 3, masks=0 * wide), cameras, 48)
    assert not emptied.any()  # one empty silhouette leaves no hull for the others, and is filled by theirs
    with pytest.raises(ValueError, match="show nothing"):
        leave_one_out_hull_iou(replace(CUBE, masks=0 * CUBE.masks), cameras)


def test_neighbours_of_one_solid_agree_in_depth_even_where_one_hides_the_other():
    cameras = Cameras.orbit(12)
    solid = joined(cube(0.25, (-0.4, 0, 0)), sphere(0.3, 24, (0.4, 0, 0)))  # each hides the other from some views
    views = render(*solid, cameras, 128)
    before = neighbour_depth_agreement(views, cameras)
    assert before.shape == (12,) and before.min() > 0.98
    nearer = torch.where(views.depths[4] > 0, views.depths[4] - 0.1, 0.0)
    after = neighbour_depth_agreement(changed(views, 4, depths=nearer), cameras)
    pairs = torch.tensor([3, 4])  # of view 4 with its two neighbours
    assert (after[pairs] < before[pairs] - 0.2).all()
    others = [i for i in range(12) if i not in (3, 4)]
    torch.testing.assert_close(after[others], before[others])
    patient = neighbour_depth_agreement(changed(views, 4, depths=nearer), cameras, tolerance=0.2)
    assert (patient[pairs] > after[pairs] + 0.2).all()  # what lands on nothing stays contradicted


def test_points_that_land_on_nothing_are_contradicted_whichever_view_shows_them():
    empty = changed(CUBE, 2, masks=torch.zeros(1, 64, 64), depths=torch.zeros(1, 64, 64))
    shares = neighbour_depth_agreement(empty, RING)
    assert not shares[[1, 2]].any() and shares[[0, 3, 4, 5, 6, 7]].min() > 0.95
    with pytest.raises(ValueError, match="no depth"):
        neighbour_depth_agreement(replace(CUBE, depths=0 * CUBE.depths), RING)


def test_held_out_views_are_rendered_from_the_others():
    for_psnr, for_ssim = held_out_rerender(CUBE, RING, every=4, resolution=48)
    assert for_psnr.shape == for_ssim.shape == (2,)  # views 1 and 5
    assert for_psnr.min() > 22 and for_ssim.min() > 0.85
    wrong, _ = held_out_rerender(changed(CUBE, 5, views=CUBE.views[5].flip(0)), RING, every=4, resolution=48)
    assert wrong[0] == for_psnr[0] and wrong[1] < for_psnr[1] - 3  # what is held out does not change the mesh
    with pytest.raises(ValueError, match="every must be at least 2"):
        held_out_rerender(CUBE, RING, every=1)


@pytest.mark.parametrize("count", [4, 5, 12])
def test_shuffled_ring_keeps_the_views_but_no_view_its_place_and_no_turned_ring(count):
    names = torch.arange(count, dtype=torch.float32)
    views = ViewSet(*(names.view(-1, 1, 1, 1).expand(-1, c, 2, 2) for c in (3, 1, 1)))
    orders = {tuple(shuffled_ring(views, seed).masks[:, 0, 0, 0].tolist()) for seed in range(40)}
    assert len(orders) > 3
    for order in orders:
        turned_by = (torch.tensor(order) - names) % count
        assert sorted(order) == names.tolist() and turned_by.all() and turned_by.unique().numel() > 1
    assert torch.equal(shuffled_ring(views, 7).depths, shuffled_ring(views, 7).depths)


def test_three_views_cannot_be_shuffled():
    with pytest.raises(ValueError, match="at least 4"):
        shuffled_ring(CUBE[:3])


def test_neighbours_that_paint_the_same_places_alike_score_high():
    true = neighbour_color_psnr(CUBE, CUBE, RING)
    assert true > 30 > neighbour_color_psnr(shuffled_ring(CUBE), CUBE, RING) + 10
    assert neighbour_color_psnr(replace(CUBE, views=CUBE.views * 0 + CUBE.masks * 0.3), CUBE, RING) > true - 3


def test_a_known_difference_between_neighbours_is_its_psnr():
    grey = torch.where(torch.arange(8)[:, None, None, None] % 2 == 0, 0.4, 0.5) * torch.ones_like(CUBE.views)
    assert neighbour_color_psnr(ViewSet(grey, torch.ones_like(CUBE.masks), CUBE.depths), CUBE, RING) == \
        pytest.approx(20, abs=1e-3)


def test_neighbours_on_opposite_sides_share_no_place():
    with pytest.raises(ValueError, match="share no place"):
        neighbour_color_psnr(CUBE[::4], CUBE[::4], RING[::4])
