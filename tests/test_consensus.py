"""Consensus fusion: a shape that fits views which contradict each other, and nothing changed where they do not."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from solids import cube, joined, sphere, table

import coser.reconstruction as reconstruction
from coser.cameras import Cameras
from coser.metrics import render_mesh, silhouette_iou
from coser.rasterizer import render
from coser.reconstruction import reconstruct
from coser.reconstruction.consensus import fuse_consensus, silhouette_distances_everywhere
from coser.reconstruction.mesh import Mesh
from coser.views import ViewSet

RING = Cameras.orbit(8)
SIZE = 64


def contradicting():
    """A cube whose silhouettes are right, and whose depth maps are too near in some views and too far in others."""
    views = render(*cube(0.45), RING, SIZE)
    wrong = 0.3 * torch.tensor([-1., 1, 0, 1, -1, 0, 1, -1])[:, None, None, None]
    return replace(views, depths=torch.where(views.depths > 0, views.depths + wrong, 0.0))


def own_iou(mesh, views):
    return float(silhouette_iou(render_mesh(mesh, RING, views.masks.shape[-1]).masks, views.masks).mean())


def block_on_a_post(x, z):
    """A cube on a post of an eighth of its width, whose foot is at x, z."""
    (block, faces, colors), (post, *rest) = cube(0.4, (0.0, 0.4, 0.0)), cube(1.0)
    return joined((block, faces, colors), (post * torch.tensor([0.05, 0.4, 0.05]) + torch.tensor([x, -0.4, z]), *rest))


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("solid", [cube(0.5), sphere(0.6, 24), table()], ids=["cube", "sphere", "table"])
def test_views_that_agree_give_their_object(solid, local):
    views = render(*solid, RING, SIZE)
    vertices, faces, voxel = fuse_consensus(views, RING, 48, local)
    mesh = Mesh(vertices, faces)
    assert mesh.is_watertight and mesh.volume > 0 and 0.005 < voxel < 0.1
    assert own_iou(Mesh(vertices, faces, np.ones_like(vertices)), views) > 0.9


def test_holes_in_depth_maps_are_no_air():
    views = render(*sphere(0.6, 24), RING, SIZE)
    torn = replace(views, depths=views.depths.clone())
    torn.depths[:, :, 24:40] = 0
    volumes = [Mesh(*fuse_consensus(v, RING, 40)[:2]).volume for v in (views, torn)]
    assert volumes[1] == pytest.approx(volumes[0], rel=0.05)


def test_contradicting_views_lose_less_than_by_carving(monkeypatch):
    views = contradicting()
    agreed = reconstruct(views, RING, resolution=64)
    monkeypatch.setattr(reconstruction, "CONTRADICTION", 0.0)  # nothing is bad enough for the second way
    carved = reconstruct(views, RING, resolution=64)
    assert agreed.is_watertight and carved.is_watertight
    assert own_iou(agreed, views) > own_iou(carved, views) + 0.1
    assert agreed.volume > carved.volume


def test_local_levels_keep_a_post_that_every_view_shows_somewhere_else():
    shifts = 0.11 * torch.tensor([[1, 0], [0, -1], [-1, 0], [0, 1], [1, 1], [-1, 0], [0, -1], [-1, 1.]])
    views = ViewSet.cat([render(*block_on_a_post(*shift.tolist()), RING[i:i + 1], 128)
                         for i, shift in enumerate(shifts)])
    lower = (torch.arange(128) > 75)[:, None]  # pixels of the post's lower half
    covered = {}
    for local in (False, True):
        vertices, faces, _ = fuse_consensus(views, RING, 64, local)
        mesh = Mesh(vertices, faces, np.ones_like(vertices))
        rows = (render_mesh(mesh, RING, 128).masks >= 0.5) & lower
        covered[local] = float(rows.any(3).float().sum() / (views.masks >= 0.5)[..., 76:, :].any(3).sum())
        assert mesh.is_watertight and own_iou(mesh, views) > 0.7
    assert covered[False] < 0.3 and 0.7 < covered[True] < 1.1, covered


def test_views_of_a_real_object_never_come_to_a_consensus(monkeypatch):
    def refuse(*_):
        raise AssertionError("carving was good enough")

    monkeypatch.setattr(reconstruction, "fuse_consensus", refuse)
    assert reconstruct(render(*table(), RING, 128), RING).is_watertight


def test_silhouette_distances_reach_everywhere():
    masks = torch.zeros(1, 32, 32)
    masks[:, :, 16:] = 1
    distances = silhouette_distances_everywhere(masks)[0, 5]
    torch.testing.assert_close(distances, 15.5 - torch.arange(32.0))


def test_views_without_a_surface_are_refused():
    nothing = ViewSet(torch.zeros(8, 3, 32, 32), torch.zeros(8, 1, 32, 32), torch.zeros(8, 1, 32, 32))
    with pytest.raises(ValueError, match="show nothing"):
        reconstruct(nothing, RING)
