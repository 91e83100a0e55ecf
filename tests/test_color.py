"""Colours: from the views that see a place, without the views that do not."""

import numpy as np
import torch
from solids import cube, joined, sphere

from coser.cameras import Cameras
from coser.rasterizer import render
from coser.reconstruction import reconstruct
from coser.reconstruction.color import color_vertices, sample_colors
from coser.reconstruction.mesh import Mesh
from coser.reconstruction.normals import with_normals

RING = Cameras.orbit(8)


def test_sides_of_a_cube_keep_their_own_colours():
    vertices, faces, colors = cube(0.5)
    views = render(vertices, faces, colors, RING, 96, shade=False)
    points = torch.tensor([[0., 0, .5], [0, 0, -.5], [.5, 0, 0], [-.5, 0, 0], [0, .5, 0]])
    seen, weight = sample_colors(points, points * 2, views, RING, tolerance=0.02)
    expected = colors[[8, 10, 0, 2, 4], 0]
    assert (weight > 0).all() and torch.allclose(seen, expected, atol=1e-3)


def test_hidden_places_have_no_colour_of_their_own():
    views = render(*joined(cube(0.5), cube(0.1, (0, 0, 0))), RING, 96)
    points, normals = torch.tensor([[0., 0, .1], [0, -.5, 0]]), torch.tensor([[0., 0, 1], [0, -1, 0]])
    _, weight = sample_colors(points, normals, views, RING, 0.02)
    assert not weight.any()


def test_unseen_vertices_take_the_colour_of_their_nearest_seen_neighbours():
    vertices, faces, _ = cube(0.5)
    colors = torch.tensor([0.2, 0.4, 0.6]).expand(len(faces), 3, 3)
    mesh = reconstruct(render(vertices, faces, colors, RING, 64, shade=False), RING, resolution=32)
    assert np.abs(mesh.vertex_colors - [0.2, 0.4, 0.6]).max() < 0.02  # the underside too


def test_interpolated_colours_agree_with_a_smoothly_coloured_sphere():
    vertices, faces, colors = sphere(0.7, 24)
    views = render(vertices, faces, colors, RING, 128, shade=False)
    mesh = with_normals(Mesh(vertices.numpy(), faces.numpy()))
    fitted = color_vertices(mesh, views, RING, tolerance=0.03)
    high = mesh.vertices[:, 1] > -0.3
    assert np.abs(fitted - (mesh.vertices / 0.7 * 0.4 + 0.5))[high].max() < 0.06
