"""Losses beside the flow's: where tokens truly go, and what the losses reward."""

import copy
import functools
import math

import pytest
import torch
from solids import cube, sphere

from coser.auxiliary_losses import (DEPTH_SIZE, Overheard, correspondence_loss, dispersive_loss, sampled_depths,
                                    true_matches)
from coser.cameras import Cameras, pixel_centers
from coser.data.dataset import RingBatch, list_rings
from coser.data.render import load_ring
from coser.flow import flow_loss
from coser.models.trajectory_attention import TrajectoryAttention, TrajectoryGeometries
from coser.rasterizer import render

RING = Cameras.orbit(12)
CELLS = pixel_centers(DEPTH_SIZE)


@functools.cache
def coarse_depths(solid, ring=RING):
    return render(*solid(), ring, 256).depths[:, 0, 4::8, 4::8]


def ball():
    return sphere(0.8, 16)


def box():
    return cube(0.5)


def test_matches_show_the_same_place_of_a_ball():
    depths, size = coarse_depths(ball), 8
    rows = (torch.arange(size) + 0.5).mul(DEPTH_SIZE / size).long()
    rows = (rows[:, None] * DEPTH_SIZE + rows).flatten()
    for offset in (-1, 1):
        (matches,) = true_matches(depths[None], RING, size, offset)
        assert 0.2 < (matches >= 0).float().mean() < 0.6
        for view in (0, 5, 11):
            found = matches[view] >= 0
            points = RING.unproject(CELLS[rows], depths.flatten(1)[:, rows])[view][found]
            assert ((points.norm(dim=-1) - 0.8).abs() < 0.03).all()
            other = (view + offset) % 12
            uv, _ = (t[0] for t in RING[other:other + 1].project(points))
            expected = (uv * size).long()
            assert torch.equal(matches[view][found], expected[:, 1] * size + expected[:, 0])


def test_what_the_neighbour_does_not_see_has_no_match():
    quarter = Cameras.orbit(4, 0.0)
    depths = coarse_depths(box, quarter)
    (matches,) = true_matches(depths[None], quarter, 8, 1)
    assert (matches == -1).all()  # each view sees one side of the cube alone
    assert (true_matches(depths[None, ::2], quarter[::2], 8, 1) == -1).all()


def test_rings_of_a_batch_have_matches_of_their_own():
    both = torch.stack([coarse_depths(ball), coarse_depths(box)])
    together = true_matches(both, RING, 8, 1)
    assert not torch.equal(together[0], together[1])
    for ring, alone in zip(together, both):
        assert torch.equal(ring, true_matches(alone[None], RING, 8, 1)[0])


def test_depths_are_those_at_the_middles_of_cells_and_mirror_with_the_ring(renders):
    ring = list_rings(renders[0])[0]
    views, _ = load_ring(ring.path)
    assert torch.equal(sampled_depths(ring), views.depths[:, 0, 4::8, 4::8])
    mirrored = sampled_depths(ring.mirror())
    assert torch.equal(mirrored[0], views.depths[0, 0].flip(-1)[4::8, 4::8])


def asking_for(matches, strength):
    """A trajectory attention and tokens [N,T,C] by which each token asks for its match in either neighbour.

    The first half of a token's channels is its name, the second the names of those it asks for.
    """
    (views, count), channels = matches[0].shape, 128
    names = torch.nn.functional.normalize(torch.randn(views, count, channels), dim=-1)
    wanted = torch.zeros_like(names)
    for offset, match in zip((-1, 1), matches):
        there = names.roll(-offset, 0).gather(1, match.clamp_min(0)[..., None].expand(-1, -1, channels))
        wanted += there * (match >= 0)[..., None]
    module = TrajectoryAttention(2 * channels, channels, channels)
    module.norm = torch.nn.Identity()
    with torch.no_grad():
        module.to_k.weight.copy_(torch.eye(channels, 2 * channels))
        module.to_q.weight.copy_(strength * channels**0.5 * torch.eye(2 * channels)[channels:])
    return module, torch.cat([names, wanted], -1)


def test_attention_to_the_true_place_costs_nothing_and_even_attention_the_window():
    torch.manual_seed(0)
    depths, geometries = coarse_depths(ball)[None], TrajectoryGeometries(RING, 5, 0.45)
    matches = [true_matches(depths, RING, 8, offset)[0] for offset in (-1, 1)]
    costs = [float(correspondence_loss(*asking_for(matches, strength), 12, geometries, depths).detach())
             for strength in (0, 40)]
    assert math.log(9) < costs[0] < math.log(25) + 1 and costs[1] < 0.01
    wrong = [match.roll(1, 1) for match in matches]
    assert float(correspondence_loss(*asking_for(wrong, 40), 12, geometries, depths).detach()) > 10


def test_the_loss_teaches_queries_and_keys(pipeline):
    latents, depths = torch.randn(2, 4, 4, 16, 16), torch.full((2, 4, DEPTH_SIZE, DEPTH_SIZE), 3.2)
    batch = RingBatch(latents, Cameras.orbit(4), ["", ""], depths)
    unet, embeds = copy.deepcopy(pipeline.unet), pipeline.encode_prompt(batch.captions)  # hooks stay
    heard = Overheard(unet)
    with torch.no_grad():
        flow_loss(unet, batch, embeds, torch.Generator().manual_seed(0))
    assert not heard.trajectories and heard.middle is None
    flow_loss(unet, batch, embeds, torch.Generator().manual_seed(0))
    loss = heard.correspondence(depths)
    assert float(loss.detach()) > 0 and heard.middle.shape[0] == 8
    attention = heard.trajectories[0][0]
    gradients = torch.autograd.grad(loss, [attention.to_q.weight, attention.to_k.weight])
    assert all(g.abs().sum() > 0 for g in gradients)
    heard.forget()
    assert float(heard.correspondence(depths)) == 0


def test_dispersion_by_hand_only_between_samples_and_bounded():
    features = torch.tensor([[0.0, 0.0], [0.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
    # four pairs of strangers, twice, each 4 apart squared, over two channels and a temperature of a half; four selves
    assert float(dispersive_loss(features, 2)) == pytest.approx(math.log((8 * math.exp(-4) + 4) / 12))
    assert float(dispersive_loss(features, 4)) == 0
    closer = features * torch.tensor([0.5, 1.0])
    assert float(dispersive_loss(closer, 2)) > float(dispersive_loss(features, 2))
    far = (1000 * features).requires_grad_()
    loss = dispersive_loss(far, 2)
    loss.backward()
    assert float(loss) == pytest.approx(math.log(4 / 12)) and not far.grad.any()  # far enough is far enough
