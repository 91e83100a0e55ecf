"""Textures: charts that keep apart, colours from the views that see a place, and calm where none does."""


import numpy as np
import pytest
import torch
from solids import cube, joined, sphere

from coser.cameras import Cameras
from coser.metrics import psnr, render_mesh
from coser.rasterizer import covered_pixels, render
from coser.reconstruction import finish, find_surface
from coser.reconstruction.mesh import Mesh
from coser.reconstruction.texels import Texels, padded, texels_of
from coser.reconstruction.texture import bake_texture
from coser.reconstruction.unwrap import unwrap
from coser.views import ViewSet
from tests.test_mesh import mesh_of

RING = Cameras.orbit(8)
BALL, BOX = sphere(0.6, 24), cube(0.5)


def without_depth(views: ViewSet) -> ViewSet:
    return ViewSet(views.views, views.masks, torch.zeros_like(views.depths))


def colors_at(mesh: Mesh, points: np.ndarray) -> np.ndarray:
    """What the texture shows at the middles of the faces nearest to points [P,3]: [P,3] in [0,1]."""
    middles = mesh.vertices[mesh.faces].mean(1)
    face = np.linalg.norm(middles[None] - points[:, None], axis=2).argmin(1)
    place = (mesh.uvs[face].mean(1) * len(mesh.texture)).astype(int)
    return mesh.texture[place[:, 1], place[:, 0]] / 255


@pytest.mark.parametrize("solid", [BALL, BOX, joined(sphere(0.3, 12, (-.5, 0, 0)), cube(0.2, (.5, 0, 0)))],
                         ids=["ball", "box", "two parts"])
def test_charts_do_not_overlap_and_give_every_face_a_place(solid):
    mesh = mesh_of(solid)
    uvs = unwrap(mesh, 256)
    assert uvs.shape == (len(mesh.faces), 3, 2) and uvs.min() >= 0 and uvs.max() <= 1
    _, row, column = covered_pixels(torch.from_numpy(uvs).double() * 1024, 1024)
    assert torch.bincount(row * 1024 + column).max() == 1
    a, b = (uvs[:, k] - uvs[:, 0] for k in (1, 2))
    assert (np.abs(a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]) > 0).all()
    assert np.array_equal(uvs, unwrap(mesh, 256))


@pytest.mark.parametrize("depth", [True, False], ids=["with depth", "without"])
def test_a_textured_box_looks_like_its_views(depth):
    views = render(*BOX, RING, 128, shade=False)
    baked = bake_texture(mesh_of(BOX), views if depth else without_depth(views), RING, 256)
    seen = render_mesh(baked, RING, 128)
    assert psnr(seen.on_background(), views.on_background()).min() > 36
    assert baked.texture.shape == (256, 256, 3) and baked.vertex_colors.shape == baked.vertices.shape


def test_what_hides_in_front_does_not_paint_what_is_behind():
    front, back = cube(0.2, (0, 0, .6)), cube(0.4, (0, 0, -.3))
    white, red = torch.ones(12, 3, 3), torch.tensor([.8, .1, .1]).expand(12, 3, 3)
    solid = joined((*front[:2], white), (*back[:2], red))
    views = without_depth(render(*solid, RING, 128, shade=False))
    baked = bake_texture(mesh_of(solid), views, RING, 256)
    seen, truth = (render_mesh(baked, RING, 128), views)
    inside = (seen.masks == 1) & (truth.masks == 1)
    assert ((seen.views - truth.views).abs() * inside).mean() < 2e-3
    hidden = colors_at(baked, np.array([[0, 0, .1], [.1, -.1, .1]]))  # seen past the white one or not at all
    assert np.allclose(hidden, [.8, .1, .1], atol=0.03)


def test_unseen_places_continue_their_surroundings():
    colors = torch.tensor([0.2, 0.4, 0.6]).expand(len(BALL[1]), 3, 3)
    views = render(*BALL[:2], colors, RING, 64, shade=False)
    baked = bake_texture(mesh_of(BALL), views, RING, 256)
    below = colors_at(baked, np.array([[0, -.6, 0], [.1, -.59, 0]]))
    assert np.abs(below - [0.2, 0.4, 0.6]).max() < 0.02
    assert np.abs(baked.texture / 255 - [0.2, 0.4, 0.6]).max() < 0.03  # gaps between the charts, too


def test_no_view_no_texture():
    views = render(*BOX, RING, 32)
    with pytest.raises(ValueError, match="do not see the mesh"):
        bake_texture(mesh_of(BOX), ViewSet(views.views * 0, views.masks * 0, views.depths * 0), RING, 64)


def test_one_surface_is_finished_with_any_budget_and_texture_size():
    views = render(*BALL, RING, 96)
    surface = find_surface(views, RING, 48)
    asked = (500, 64), (3000, 512), (500, None)
    small, large, plain = (finish(surface, max_faces=f, texture_size=s) for f, s in asked)
    assert len(small.faces) <= 500 < len(large.faces) <= 3000
    assert len(small.texture) == 64 and len(large.texture) == 512 and plain.texture is None
    for mesh in (small, large, plain):
        assert mesh.is_watertight and mesh.vertex_colors is not None
        assert psnr(render_mesh(mesh, RING, 96).on_background(), views.on_background()).min() > 22
    again = finish(surface, max_faces=500, texture_size=64)
    assert np.array_equal(small.texture, again.texture) and np.array_equal(small.uvs, again.uvs)


def test_a_mesh_without_colours_cannot_be_drawn():
    with pytest.raises(ValueError, match="texture or vertex_colors"):
        render_mesh(mesh_of(BOX), RING, 32)


def test_views_that_contradict_each_other_are_not_cut_into_shards():
    """A rough ball of which neighbouring views have different colours: the texture changes from one to the next within
    bands, not from face to face."""
    rough = np.random.default_rng(0).normal(0, 0.006, BALL[0].shape).astype(np.float32)
    mesh = mesh_of(BALL)
    mesh = Mesh((mesh.vertices + rough[:len(mesh.vertices)]).astype(np.float32), mesh.faces)
    white = torch.ones(len(mesh.faces), 3, 3)
    views = render(torch.from_numpy(mesh.vertices), torch.from_numpy(mesh.faces), white, RING, 96, shade=False)
    shade = torch.where(torch.arange(8) % 2 == 0, 0.3, 0.7).view(8, 1, 1, 1)
    baked = bake_texture(mesh, without_depth(ViewSet(views.views * shade, views.masks, views.depths)), RING, 512)
    middles = baked.uvs.mean(1) * 512
    grey = baked.texture[middles[:, 1].astype(int), middles[:, 0].astype(int), 0] / 255
    neighbours = np.sort(np.stack([mesh.faces, np.roll(mesh.faces, -1, 1)], -1).reshape(-1, 2), 1)
    order = np.lexsort(neighbours.T)
    step = np.abs(np.diff((np.repeat(grey, 3)[order]).reshape(-1, 2), axis=1))
    assert grey.max() - grey.min() > 0.3  # both colours are there
    assert np.quantile(step, 0.95) < 0.12


def test_gaps_continue_their_charts_and_nothing_else_changes():
    texels = Texels(torch.tensor([4, 4, 20]), torch.tensor([4, 5, 20]), torch.zeros(3).long(), torch.ones(3, 3) / 3)
    colors = torch.tensor([[1., 0, 0], [1, 0, 0], [0, 0, 1]])
    picture = padded(texels, colors, 32)
    assert (picture[2:7, 2:8] == [255, 0, 0]).all() and (picture[18:23, 18:23] == [0, 0, 255]).all()
    assert (picture.astype(int).sum(2) > 0).all()  # nothing is left black


def test_texels_know_where_on_their_face_they_lie():
    uvs = torch.tensor([[[0., 0], [1, 0], [0, 1]]])
    texels = texels_of(uvs, 16)
    place = texels.blend(uvs)
    assert len(texels) == 16 * 15 // 2 or len(texels) == 16 * 17 // 2
    torch.testing.assert_close(place * 16, torch.stack([texels.column, texels.row], 1) + 0.5, atol=1e-4, rtol=0)
