"""Fusion: closed, true to the views, cut where nobody sees, and patient with views that do not quite agree."""

from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
import torch
from solids import cube, joined, sphere, table
from test_mesh import facing_away

from coser.cameras import Cameras
from coser.metrics import psnr, render_mesh, silhouette_iou
from coser.rasterizer import render
from coser.reconstruction import reconstruct
from coser.reconstruction.floor import cut_floor
from coser.reconstruction.fuse import smoothed
from coser.reconstruction.maps import silhouette_distances, view_maps
from coser.views import ViewSet

RING = Cameras.orbit(12)
BETWEEN = Cameras.orbit(3, start=15)
SIZE = 128


def rebuilt(solid, cameras=RING, size=SIZE, **options):
    options = {"resolution": 80, "max_faces": 6000, "texture_size": None, **options}
    return reconstruct(render(*solid, cameras, size), cameras, **options)


@pytest.mark.parametrize("solid", [cube(0.5), sphere(0.7, 24), table()], ids=["cube", "sphere", "table"])
def test_rendered_solids_come_back_closed_and_look_the_same_from_between_the_views(solid):
    mesh = rebuilt(solid)
    assert mesh.is_watertight and mesh.volume > 0 and len(mesh.faces) <= 6000
    seen, truth = render_mesh(mesh, BETWEEN, SIZE), render(*solid, BETWEEN, SIZE)
    assert silhouette_iou(seen.masks, truth.masks).min() > 0.95
    assert psnr(seen.on_background(), truth.on_background()).min() > 24


def test_surface_of_a_sphere_lies_on_its_radius():
    mesh = rebuilt(sphere(0.7, 48), size=128)
    seen = mesh.vertices[mesh.vertices[:, 1] > -0.5]
    off = np.abs(np.linalg.norm(seen, axis=1) - 0.7)
    assert np.median(off) < 0.003 and off.max() < 0.03


def test_waves_stay_where_views_see_them_and_go_where_none_does():
    """A wavy wall, the waves of which views see squarely in one half and do not see in the other."""
    waves = 0.02 * torch.tensor([1.0, -1.0]).repeat(8)[:, None, None]
    flat = torch.linspace(-1, 1, 9).expand(16, 16, 9)
    weights = torch.zeros(16, 16, 9)
    weights[:, :8] = 3.0
    assert torch.allclose(smoothed(flat, weights)[..., 2:-2], flat[..., 2:-2], atol=1e-2)  # but for the grid's edge
    left = (smoothed(flat + waves, weights) - smoothed(flat, weights))[3:-3].abs()
    seen, unseen = left[:, :7].mean(), left[:, 9:].mean()
    assert unseen < 0.4 * 0.02 < 0.9 * 0.02 < seen < 0.02


def test_a_sphere_of_few_views_is_rounder_for_being_smoothed(monkeypatch):
    ring, truth = Cameras.orbit(6), render(*sphere(0.7, 24), BETWEEN, SIZE)

    def likeness() -> float:
        seen = render_mesh(rebuilt(sphere(0.7, 24), ring), BETWEEN, SIZE)
        return float(psnr(seen.on_background(), truth.on_background()).mean())

    smooth = likeness()
    monkeypatch.setattr(import_module("coser.reconstruction.fuse"), "ROUNDS", 0)
    assert smooth > likeness() + 1  # decibels


def test_object_ends_at_its_lowest_seen_surface():
    mesh = rebuilt(cube(0.5))
    assert mesh.vertices[:, 1].min() == pytest.approx(-0.5, abs=0.02)  # sight lines alone would meet at -0.7
    assert mesh.vertices[:, 1].max() == pytest.approx(0.5, abs=0.02)


def test_table_keeps_no_cone_under_its_top():
    mesh = rebuilt(table(), size=128, resolution=96)
    level = Cameras.orbit(2, elevation=0, start=30)
    iou = silhouette_iou(render_mesh(mesh, level, 128).masks, render(*table(), level, 128).masks)
    assert iou.min() > 0.93


def test_sheet_without_thickness_survives_the_views_along_it():
    fin = torch.tensor([[0., .2, -.5], [0, .2, .5], [0, .7, .5], [0, .7, -.5]])  # seen edge-on from azimuths 0 and 180
    solid = joined(cube(0.3, (0, -.1, 0)), (fin, torch.tensor([[0, 1, 2], [0, 2, 3]]), torch.full((2, 3, 3), 0.5)))
    mesh = rebuilt(solid, max_faces=10**6)
    assert mesh.is_watertight
    side = Cameras.look_at_origin([75, 105], 20)
    assert silhouette_iou(render_mesh(mesh, side, SIZE).masks, render(*solid, side, SIZE).masks).min() > 0.93
    thickness = np.ptp(mesh.vertices[(mesh.vertices[:, 1] > 0.3) & (np.abs(mesh.vertices[:, 2]) < 0.4)][:, 0])
    assert thickness < 0.1


def test_narrow_gap_between_two_boxes_stays_open():
    solid = joined(cube(0.3, (-0.36, 0, 0)), cube(0.3, (0.36, 0, 0)))
    mesh = rebuilt(solid, max_faces=10**6)
    middle = np.abs(mesh.vertices[:, 0]) < 0.03
    assert not (middle & (mesh.vertices[:, 1] > 0.25)).any()


def test_floor_cut_touches_nothing_that_a_view_knows():
    generator = np.random.default_rng(0)
    distances = generator.uniform(-1, 1, (6, 8, 6)).astype(np.float32)
    heights = np.linspace(-1, 1, 8, dtype=np.float32)
    everything = cut_floor(distances, np.ones_like(distances, bool), heights, -2.0, 1.0)
    assert np.array_equal(everything, distances)
    nothing = cut_floor(np.full_like(distances, -1), np.zeros_like(distances, bool), heights, 0.1, 1.0)
    assert (nothing[:, heights < 0.1] > 0).all() and (nothing[:, heights > 0.1] < 0).all()


def test_parts_that_touch_nothing_are_kept_and_specks_are_not():
    solid = joined(sphere(0.35, 16, (-0.5, 0, 0)), sphere(0.2, 16, (0.5, 0, 0)))
    views = render(*solid, RING, SIZE)
    masks, depths = views.masks.clone(), views.depths.clone()
    for i, (y, x) in enumerate([(10, 10), (110, 20), (12, 112)]):  # a speck in one view each
        masks[i, :, y:y + 3, x:x + 3], depths[i, :, y:y + 3, x:x + 3] = 1, 3.2
    mesh = reconstruct(replace(views, masks=masks, depths=depths), RING, resolution=64)
    left = mesh.vertices[:, 0] < 0
    for side, center, radius in ((left, (-.5, 0, 0), .35), (~left, (.5, 0, 0), .2)):
        distance = np.linalg.norm(mesh.vertices[side] - center, axis=1)
        assert side.any() and distance.max() < radius + 0.04


def disagreeing(views: ViewSet, seed: int = 0) -> ViewSet:
    """Every view shifted by up to a pixel, its depth off by about 0.01, and a hole torn into one silhouette."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for view in range(len(views)):
        shift = tuple(torch.randint(-1, 2, (2,), generator=generator).tolist())
        moved = [t[view:view + 1].roll(shift, (2, 3)) for t in (views.views, views.masks, views.depths)]
        moved[2] = torch.where(moved[2] > 0, moved[2] + 0.01 * torch.randn(1, generator=generator), 0.0)
        out.append(ViewSet(*moved))
    out = ViewSet.cat(out)
    for part in (out.views, out.masks, out.depths):
        part[0, :, 60:66, 60:66] = 0
    return out


def test_views_that_disagree_a_little_still_make_the_object():
    solid = cube(0.5)
    mesh = reconstruct(disagreeing(render(*solid, RING, SIZE)), RING, resolution=64)
    assert mesh.is_watertight
    iou = silhouette_iou(render_mesh(mesh, BETWEEN, SIZE).masks, render(*solid, BETWEEN, SIZE).masks)
    assert iou.min() > 0.93
    assert mesh.volume == pytest.approx(1.0, rel=0.1)  # the hole of one view does not go through


def with_holes(views: ViewSet) -> ViewSet:
    """Without depth in a band of every picture, as a scanner has it of what is dark or shines."""
    depths = views.depths.clone()
    depths[:, :, SIZE * 3 // 8:SIZE * 9 // 16] = 0
    return replace(views, depths=depths)


def test_holes_in_depth_maps_carve_nothing_away():
    whole = render(*sphere(0.7, 32), RING, SIZE)
    torn = with_holes(whole)
    assert float((torn.depths > 0).sum() / (whole.depths > 0).sum()) < 0.8
    meshes = [reconstruct(views, RING, resolution=64, max_faces=6000, texture_size=256) for views in (whole, torn)]
    assert all(mesh.is_watertight for mesh in meshes)
    assert meshes[1].volume == pytest.approx(meshes[0].volume, rel=0.05)
    shown = [render_mesh(mesh, BETWEEN, SIZE) for mesh in meshes]
    assert silhouette_iou(shown[1].masks, shown[0].masks).min() > 0.97
    assert psnr(shown[1].on_background(), shown[0].on_background()).min() > 28, "colours there are those of the views"


def test_what_a_model_drew_becomes_less_rough():
    views = disagreeing(render(*sphere(0.7, 48), RING, SIZE))
    noise = 0.01 * torch.randn(views.depths.shape, generator=torch.Generator().manual_seed(1))
    views = replace(views, depths=torch.where(views.depths > 0, views.depths + noise, 0.0))
    rough, even = (reconstruct(views, RING, drawn=drawn, resolution=64, texture_size=None) for drawn in (False, True))
    tilt = []
    for mesh in (rough, even):
        seen = mesh.vertices[mesh.faces].mean(1)[:, 1] > -0.4  # above the floor that is made up
        tilt.append(np.median(facing_away(mesh)[seen]))
    assert even.is_watertight and tilt[1] < 0.5 * tilt[0]
    assert even.volume == pytest.approx(rough.volume, rel=0.05)


def test_an_empty_view_does_not_carve_the_others_away():
    views = render(*cube(0.5), RING, SIZE)
    for part in (views.views, views.masks, views.depths):
        part[3] = 0
    mesh = reconstruct(views, RING, resolution=64)
    assert mesh.is_watertight and mesh.volume == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize("num_views", [1, 4, 24])
def test_any_number_of_views_makes_a_closed_mesh(num_views):
    mesh = rebuilt(cube(0.5), Cameras.orbit(num_views), size=64)
    assert mesh.is_watertight and mesh.vertex_colors.min() >= 0 and mesh.vertex_colors.max() <= 1


def test_same_views_same_mesh():
    first, second = rebuilt(cube(0.5), size=64), rebuilt(cube(0.5), size=64)
    for part in ("vertices", "faces", "vertex_colors", "normals"):
        assert np.array_equal(getattr(first, part), getattr(second, part))


def test_empty_views_are_refused():
    zero = torch.zeros(12, 1, 32, 32)
    with pytest.raises(ValueError, match="nothing"):
        reconstruct(ViewSet(zero.expand(-1, 3, -1, -1), zero, zero), RING)


def test_noise_that_no_two_views_share_makes_an_error_or_a_closed_mesh():
    generator = torch.Generator().manual_seed(0)
    masks = (torch.rand(12, 1, 32, 32, generator=generator) > 0.97).float()
    views = ViewSet(masks.expand(-1, 3, -1, -1) * 0.5, masks, masks * 3.2)
    try:
        assert reconstruct(views, RING, resolution=32).is_watertight
    except ValueError as error:
        assert "nothing" in str(error)


@pytest.mark.parametrize("wrong, match", [
    (dict(cameras=Cameras.orbit(3)), "cameras"), (dict(cameras=Cameras.orbit(12, orthographic=True)), "perspective"),
    (dict(resolution=4), "resolution"), (dict(max_faces=3), "max_faces")])
def test_wrong_arguments_are_refused_by_name(wrong, match):
    with pytest.raises(ValueError, match=match):
        reconstruct(**{"views": render(*cube(0.5), RING, 32), "cameras": RING, "resolution": 32, **wrong})


def test_silhouette_distance_of_a_half_plane_is_the_way_to_its_edge():
    columns = torch.arange(16.0)
    edge = 6.3  # pixels from the left are covered up to here
    masks = (edge - columns).clamp(0, 1).expand(1, 16, 16)
    expected = (columns + 0.5 - edge).clamp(-4, 4)
    assert torch.allclose(silhouette_distances(masks)[0], expected.expand(16, -1), atol=1e-5)


def test_cosines_of_a_plane_turn_depth_into_distance():
    cameras = Cameras.look_at_origin([0], 0)
    maps = view_maps(render(*cube(0.4), Cameras.look_at_origin([0], 0), 64), cameras)
    assert maps.cosines[0, 32, 32].item() == pytest.approx(1, abs=1e-4)
    tilted = Cameras.look_at_origin([30], 0)
    maps = view_maps(render(*cube(0.4), tilted, 64), tilted)
    across = (2 * 24.5 / 64 - 1) / tilted.focal  # the ray of that pixel is (across, down, -1)
    assert maps.cosines[0, 32, 24].item() == pytest.approx(np.cos(np.radians(30)) + across * 0.5, abs=1e-3)
