"""Batches for training: functions of seed and step alone, and each view with its own camera and caption."""

import pytest
import torch

from coser.cameras import Cameras
from coser.data.assets import head_word
from coser.data.dataset import LatentRings, Prefetched, Ring, ViewBatches, held_out_views, list_rings, mirror_views
from coser.data.index import write_index
from coser.data.render import load_ring
from coser.rasterizer import render
from coser.views import views_to_channels
from tests.solids import cube, joined


@pytest.fixture(scope="module")
def rings(renders):
    return list_rings(renders[0])


def marked_latents(count=6, length=12):
    """Rings whose latents say which ring (channel 0) and which view (channel 1) they are."""
    rings = [Ring(None, f"id{i}", "red box", (f"a red box {i}", f"box {i}"), ("red",)) for i in range(count)]
    latents = []
    for i in range(count):
        ring = torch.zeros(length, 2, 4, 4, dtype=torch.float16)
        ring[:, 0], ring[:, 1] = i, torch.arange(length)[:, None, None]
        latents.append(ring)
    return rings, latents, [0.0, 20.0, 20.0, 30.0, 20.0, 0.0][:count]


def latent_rings(seed=0, drop_text=0.1, **options):
    rings, latents, elevations = marked_latents()
    return LatentRings(rings, latents, elevations, seed, (4, 6), views_per_batch=12, drop_text=drop_text, **options)


def same(a, b):
    return torch.equal(a.latents, b.latents) and a.captions == b.captions and torch.equal(
        a.cameras.camera_to_world, b.cameras.camera_to_world)


def test_view_batches_depend_on_seed_and_step_alone(rings):
    batches, again, other = (ViewBatches(rings, 4, seed) for seed in (0, 0, 1))
    wanted = [batches(step) for step in range(3)]
    assert [w.shape for w in wanted] == [(4, 5, 256, 256)] * 3
    assert torch.equal(again(2), wanted[2]) and torch.equal(again(0), wanted[0])  # whatever came before
    torch.manual_seed(123)
    assert torch.equal(again(1), wanted[1])  # whatever else draws
    assert not torch.equal(wanted[0], wanted[1]) and not torch.equal(other(0), wanted[0])


def test_data_on_the_device_gives_the_same_batches(rings):
    from_disk, on_device = ViewBatches(rings, 3), ViewBatches(rings, 3, on_device=True)
    for step in (0, 5):
        assert torch.equal(from_disk(step), on_device(step))


def test_views_of_a_batch_are_views_of_the_rings_but_for_mirrors_and_swapped_colours(rings):
    def signature(channels):  # what neither a mirror nor an order of colours changes
        return torch.stack([channels[:, :3].sum((1, 2, 3)), channels[:, 3].sum((1, 2)), channels[:, 4].sum((1, 2))], 1)

    known = torch.cat([signature(views_to_channels(load_ring(r.path)[0])) for r in rings])
    drawn = signature(ViewBatches(rings, 8)(0))
    assert float(torch.cdist(drawn, known).amin(1).max()) < 0.5
    assert len(drawn.round().unique(dim=0)) > 2


def test_prefetched_batches_are_the_batches(rings):
    ahead, batches = Prefetched(ViewBatches(rings, 2)), ViewBatches(rings, 2)
    for step in (0, 1, 2, 7, 8, 3):  # also after a jump, as on a resumed run
        assert torch.equal(ahead(step), batches(step))


def test_held_out_views_are_the_first_of_each_ring(renders):
    rings = list_rings(renders[1])
    views = held_out_views(rings, per_ring=2)
    assert len(views) == 2 * len(rings)
    assert torch.equal(views.views[1], load_ring(rings[0].path)[0].views[2])


def test_latent_batches_depend_on_seed_and_step_alone():
    batches, again = latent_rings(), latent_rings()
    wanted = [batches(step) for step in range(4)]
    torch.manual_seed(123)
    assert all(same(again(step), wanted[step]) for step in (3, 1, 0, 2))
    assert not same(latent_rings(seed=1)(0), wanted[0])


def test_every_view_of_a_latent_batch_comes_with_the_camera_that_saw_it():
    batches, counts = latent_rings(), set()
    elevations = marked_latents()[2]
    for step in range(40):
        batch = batches(step)
        number, num_views = batch.latents.shape[:2]
        assert number * num_views == 12 and len(batch.cameras) == num_views
        counts.add(num_views)
        seen = batch.latents[:, :, 1, 0, 0]
        torch.testing.assert_close(seen * 360 / 12, batch.cameras.azimuths.expand(number, -1), atol=0.01, rtol=0)
        for ring in batch.latents[:, 0, 0, 0, 0].tolist():
            assert float(batch.cameras.elevations[0]) == pytest.approx(elevations[int(ring)], abs=1e-3)
    assert counts == {4, 6}


def test_captions_are_those_of_the_sample_s_own_ring():
    batches, drawn = latent_rings(drop_text=0.0), set()
    for step in range(40):
        batch = batches(step)
        for ring, caption in zip(batch.latents[:, 0, 0, 0, 0].tolist(), batch.captions):
            assert caption in (f"a red box {int(ring)}", f"box {int(ring)}", "a red red box", "a red box")
            drawn.add(caption)
    assert len(drawn) > 10


def test_the_asked_share_of_captions_is_dropped():
    batches = latent_rings(drop_text=0.25)
    captions = [c for step in range(300) for c in batches(step).captions]
    assert 0.2 < sum(c == "" for c in captions) / len(captions) < 0.3


@pytest.mark.parametrize("balance, share", [(0, 1 / 6), (0.5, 1 / (1 + 5**0.5)), (1, 1 / 2)])
def test_balance_says_how_often_a_rare_kind_is_drawn(balance, share):
    rings, latents, _ = marked_latents()
    rings[0] = Ring(None, "id0", "hat", ("a hat",), ())
    batches = LatentRings(rings, latents, [20.0] * 6, 0, (4,), views_per_batch=48, drop_text=0.0, balance=balance)
    captions = [c for step in range(150) for c in batches(step).captions]
    assert captions.count("a hat") / len(captions) == pytest.approx(share, abs=0.03)


def test_view_counts_must_divide_the_ring():
    with pytest.raises(ValueError, match=r"view_counts .*12.*\[5\]"):
        LatentRings(*marked_latents(), view_counts=(4, 5))


def test_short_captions_name_colour_and_object_and_kind():
    ring = Ring(None, "a", "armchair", ("a cosy red armchair", "an armchair"), ("orange", "brown"))
    assert ring.short_captions == ("a cosy red armchair", "an orange armchair")
    assert Ring(None, "a", "armchair", ("an armchair",), ()).short_captions == ("an armchair",)
    ring = Ring(None, "a", "oak tree", ("an oak tree",), ("orange",))
    assert ring.short_captions == ("an oak tree", "an orange oak tree", "an orange tree")
    ring = Ring(None, "a", "red wooden box", ("a box",), ("red",))
    assert ring.short_captions == ("a box", "a red wooden box", "a red box"), "the colour is said once"
    ring = Ring(None, "a", "robot drone with a gun", ("a robot",), ("yellow",))
    assert ring.short_captions == ("a robot", "a yellow robot drone with a gun", "a yellow drone"), "no yellow gun"
    ring = Ring(None, "a", "pile of gold coins", ("coins",), ("gold",))
    assert ring.short_captions == ("coins", "a pile of gold coins"), "a pile is an amount, of many things"


@pytest.mark.parametrize("name, head", [
    ("oak tree", "tree"), ("table with two plates", "table"), ("pile of gold coins", ""), ("woodpile", "woodpile"),
    ("stack", "stack"), ("built-in washer", "washer"), ("earth-like planet", "planet"), ("key on a ring", "key"),
    ("mug of beer", "mug"), ("in a box", ""), ("", "")])
def test_an_object_is_about_what_stands_before_a_preposition(name, head):
    assert head_word(Ring(None, "a", name, (), ())) == head


def test_rings_are_kept_and_drawn_by_what_they_are_about(tmp_path):
    names = {"a": "table with plates", "b": "small table", "c": "blue plates", "d": "plates", "e": "vase"}
    write_index(tmp_path, [{"id": i, "object": name, "captions": [name], "colors": []} for i, name in names.items()])
    for i in names:
        (tmp_path / f"{i}-0.safetensors").touch()

    def known(**options):
        return "".join(r.asset_id for r in list_rings(tmp_path, **options))

    assert known() == known(subjects=True) == "abcde" and known(min_kind_count=2) == "acd"
    assert known(min_kind_count=2, subjects=True) == "abcd"
    assert known(min_kind_count=3) == "acd", "by its last word a table with plates is plates"
    latents = [torch.zeros(4, 1, 1, 1)] * 5
    batches = LatentRings(list_rings(tmp_path), latents, [20.0] * 5, view_counts=(4,), balance=1.0)
    assert batches.weights.tolist() == [0.5] * 4 + [1.0]


def test_a_folder_that_was_never_rendered_into_is_refused(tmp_path):
    with pytest.raises(ValueError, match="coser.data.render"):
        list_rings(tmp_path)


def test_a_mirrored_ring_is_the_ring_of_the_mirrored_object():
    vertices, faces, colors = joined(cube(0.4), cube(0.2, (0.5, 0.3, 0.2)))
    cameras = Cameras.orbit(5, 20.0)
    original = render(vertices, faces, colors, cameras, 32, shade=False)
    mirrored = render(vertices * torch.tensor([-1.0, 1, 1]), faces.flip(1), colors.flip(1), cameras, 32, shade=False)
    ours = mirror_views(original)
    for name in ("views", "masks", "depths"):
        torch.testing.assert_close(getattr(ours, name), getattr(mirrored, name), atol=2e-3, rtol=0)
    assert not torch.allclose(original.masks, mirrored.masks, atol=0.1), "an object that is its own mirror image"
    twice = mirror_views(ours)
    assert torch.equal(twice.views, original.views) and torch.equal(twice.depths, original.depths)


def test_left_is_right_in_the_captions_of_a_mirror_image():
    ring = Ring(None, "a", "red sign", ("a sign pointing left", "Right arrow, leftover paint, upright", "right-angled"),
                ("red",))
    mirrored = ring.mirror()
    assert mirrored.captions == ("a sign pointing right", "Left arrow, leftover paint, upright", "right-angled")
    assert mirrored.mirrored and mirrored.mirror() == ring and mirrored.kind == ring.kind
