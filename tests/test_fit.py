"""Fitting by colour: hollows that silhouettes cannot show, and nothing lost of what they can."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from solids import cube, joined, sphere

from coser.cameras import Cameras
from coser.metrics import psnr, render_mesh, silhouette_iou
from coser.rasterizer import render
from coser.reconstruction import finish, stream_surface
from coser.reconstruction.fit import fit, neus_weights, stream_fit
from coser.reconstruction.hull import agreed_hull
from coser.reconstruction.mesh import Mesh
from coser.views import ViewSet

RING = Cameras.orbit(10, elevation=30)
SIZE, RESOLUTION = 64, 40
FEW = (6, 6, 4)  # steps, where their result does not matter


def box(low, high, color) -> tuple:
    vertices, faces, colors = cube(1.0)
    low, high = torch.tensor(low), torch.tensor(high)
    shade = colors.mean(-1, keepdim=True)
    return vertices * (high - low) / 2 + (high + low) / 2, faces, shade * torch.tensor(color)


def tub() -> tuple:
    """Four walls around a hollow, open above; its floor is striped."""
    walls = [box((-.6, -.3, -.6), (-.4, .3, .6), (.9, .3, .3)), box((.4, -.3, -.6), (.6, .3, .6), (.3, .9, .3)),
             box((-.4, -.3, -.6), (.4, .3, -.4), (.3, .3, .9)), box((-.4, -.3, .4), (.4, .3, .6), (.9, .9, .3))]
    floor = [box((-.4 + .2 * i, -.3, -.4), (-.2 + .2 * i, -.2, .4), c) for i, c in enumerate(
        ((1.0, 1.0, 1.0), (0.3, 0.3, 0.3), (1.0, 0.6, 0.9), (0.2, 0.7, 0.7)))]
    return joined(*walls, *floor)


def seen(solid, cameras=RING, size=SIZE) -> ViewSet:
    views = render(*solid, cameras, size)
    return replace(views, depths=torch.zeros_like(views.depths))


def height_over_hollow(mesh: Mesh) -> float:
    over = (np.abs(mesh.vertices[:, [0, 2]]) < 0.35).all(1) & (mesh.vertices[:, 1] > -0.25)
    return float(mesh.vertices[over, 1].mean())


def test_colours_hollow_out_what_silhouettes_cannot():
    views = seen(tub())
    hull = Mesh(*agreed_hull(views.masks, RING, RESOLUTION).surface()[:2])
    fitted = Mesh(*fit(views, RING, RESOLUTION)[:2])
    assert fitted.is_watertight
    assert fitted.volume < hull.volume - 0.05  # the hollow holds 0.32
    assert height_over_hollow(fitted) < height_over_hollow(hull) - 0.03


@pytest.mark.parametrize("solid", [cube(0.5), sphere(0.6, 16)], ids=["cube", "sphere"])
def test_what_bulges_everywhere_keeps_its_hull(solid):
    views = seen(solid)
    hull = agreed_hull(views.masks, RING, RESOLUTION)
    *_, last = stream_fit(views, RING, RESOLUTION, steps=(30, 40, 20))
    assert (last.grid.distances >= hull.distances - 1e-6).all()  # it is never left
    mesh, start = (Mesh(*grid.surface()[:2]) for grid in (last.grid, hull))
    assert mesh.is_watertight and 0.85 * start.volume < mesh.volume <= 1.001 * start.volume


def test_last_step_carries_the_grid_and_equals_fit():
    views = seen(cube(0.5))
    steps = list(stream_fit(views, RING, RESOLUTION, steps=FEW))
    assert [step.index for step in steps] == list(range(steps[0].total + 1))
    assert all(step.grid is None for step in steps[:-1])
    vertices, _, voxel = fit(views, RING, RESOLUTION, steps=FEW)
    off = steps[-1].grid.at(torch.from_numpy(vertices)).abs()
    assert steps[-1].grid.voxel == voxel and off.max() < 0.02 * voxel  # threads add up in no fixed order


def test_stream_surface_fits_views_without_depth_and_gives_them_depths():
    views, between = seen(cube(0.5)), Cameras.orbit(3, elevation=30, start=18)
    steps = list(stream_surface(views, RING, RESOLUTION))
    assert steps[40].message == f"Fitting the surface, step 40 of {steps[40].total}"
    surface = steps[-1].surface
    found = surface.views.depths > 0
    assert silhouette_iou(found.float(), views.masks).min() > 0.9
    off = (surface.views.depths - render(*cube(0.5), RING, SIZE).depths)[found & (views.masks > 0.99)]
    assert off.abs().median() < 0.06
    mesh = finish(surface, max_faces=2000, texture_size=None)
    truth = render(*cube(0.5), between, SIZE)
    assert psnr(render_mesh(mesh, between, SIZE).on_background(), truth.on_background()).min() > 20


def test_what_covers_no_pixel_of_the_small_pictures_is_fitted_in_the_large_ones():
    cameras = Cameras.orbit(6)
    views = seen(box((-.014, -.9, -.014), (.014, .9, .014), (.9, .6, .3)), cameras, 128)
    assert not (torch.nn.functional.avg_pool2d(views.masks, 4) > 0.9).any()
    steps = list(stream_fit(views, cameras, RESOLUTION, steps=FEW))
    assert steps[-1].index == steps[-1].total == sum(FEW)
    assert Mesh(*steps[-1].grid.surface()[:2]).is_watertight
    surface = list(stream_surface(views, cameras, RESOLUTION))[-1].surface
    assert finish(surface, max_faces=500, texture_size=None).is_watertight


def test_a_bright_object_is_not_carved_at_its_rims():
    vertices, faces, colors = sphere(0.2, 24)
    views = render(vertices, faces, torch.ones_like(colors), RING, SIZE, shade=False)
    views = replace(views, depths=torch.zeros_like(views.depths))
    hull = Mesh(*agreed_hull(views.masks, RING, RESOLUTION).surface()[:2])
    fitted = Mesh(*fit(views, RING, RESOLUTION, steps=(30, 40, 20))[:2])
    assert 0.95 * hull.volume < fitted.volume <= 1.001 * hull.volume


def test_fitting_does_not_mind_who_wants_no_gradients():
    views = seen(cube(0.5))
    with torch.no_grad():
        vertices, _, voxel = fit(views, RING, RESOLUTION, steps=FEW)
    *_, last = stream_fit(views, RING, RESOLUTION, steps=FEW)
    assert last.grid.at(torch.from_numpy(vertices)).abs().max() < 0.02 * voxel


def test_views_that_contradict_each_other_keep_the_object():
    views = seen(cube(0.5))
    shifts = [(0, 0), (3, 2), (-3, 0), (0, -3), (2, 2), (0, 3), (-2, -2), (3, 0), (0, 0), (-3, 3)]
    masks = torch.stack([m.roll(s, (1, 2)) for m, s in zip(views.masks, shifts)])
    masks[2] = 0
    masks[2, :, 5:20, 5:20] = 1  # one view shows something else altogether
    volume = Mesh(*agreed_hull(masks, RING, RESOLUTION).surface()[:2]).volume
    assert volume == pytest.approx(1.0, rel=0.35)


def test_neus_weights_peak_where_the_distance_changes_sign():
    distances = torch.linspace(1, -1, 41)[None]
    weights = neus_weights(distances, 0.05)
    assert weights.argmax() in (19, 20) and weights.sum() == pytest.approx(1, abs=1e-3)
    assert neus_weights(torch.full((1, 9), 0.8), 0.05).sum() < 1e-3  # nothing in sight


def test_neus_weights_let_the_first_surface_hide_the_second():
    distances = torch.cat([torch.linspace(1, -1, 21), torch.linspace(-1, 1, 21), torch.linspace(1, -1, 21)])[None]
    weights = neus_weights(distances, 0.05)[0]
    assert weights[:21].sum() > 0.99 and weights[42:].sum() < 0.01


def test_neus_weights_and_their_gradients_equal_the_formula_written_out():
    torch.manual_seed(0)
    distances = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)

    def written_out(values):
        phi = torch.sigmoid(values / 0.5)
        rows = []
        for ray in phi:
            through, row = 1.0, []
            for near, far in zip(ray[:-1], ray[1:]):
                alpha = torch.relu((near - far) / near)
                row.append(through * alpha)
                through = through * (1 - alpha)
            rows.append(torch.stack(row))
        return torch.stack(rows)

    ours, theirs = neus_weights(distances, 0.5), written_out(distances)
    assert torch.allclose(ours, theirs, atol=1e-3)
    pull = torch.randn(3, 6, dtype=torch.float64)
    gradients = [torch.autograd.grad((w * pull).sum(), distances)[0] for w in (ours, theirs)]
    assert torch.allclose(*gradients, atol=1e-2)
