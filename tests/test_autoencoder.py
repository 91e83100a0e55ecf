"""The autoencoder's shapes, its normalised latents, and that it learns."""

import math

import pytest
import torch
import torch.nn.functional as F
from solids import cube, sphere
from tiny import STATISTICS, plain_config, tiny_pipeline

from coser.cameras import Cameras
from coser.models.autoencoder import ViewAutoencoder, decoded_views
from coser.rasterizer import render
from coser.reconstruction import QUICK, reconstruct
from coser.studio import SMALL
from coser.train_autoencoder import PRESETS, autoencoder_figures, reconstruction_loss
from coser.views import FAR, NEAR, ViewSet, channels_to_views, views_to_channels

TINY = PRESETS["tiny"]["model"]


@pytest.fixture(scope="module")
def views():
    return render(*sphere(0.7, rows=8), Cameras.orbit(2), 64)


@pytest.fixture(scope="module")
def vae(pipeline):
    return pipeline.vae


@torch.no_grad()
def test_latents_are_sixteen_times_smaller_and_previews_a_quarter(vae, views):
    latents = vae.views_to_latents(views)
    assert latents.shape == (2, 4, 4, 4) and latents.dtype == torch.float32
    assert vae.latents_to_views(latents).views.shape == (2, 3, 64, 64)
    assert vae.latents_to_preview(latents).views.shape == (2, 3, 16, 16)


@torch.no_grad()
def test_latents_are_normalised_by_the_statistics_and_decoding_undoes_it(vae, views):
    raw = vae.encode(views_to_channels(views))
    latents = vae.views_to_latents(views)
    mean, std = (torch.tensor(STATISTICS[k])[:, None, None] for k in ("latent_mean", "latent_std"))
    torch.testing.assert_close(latents * std + mean, raw)
    torch.testing.assert_close(vae.latents_to_views(latents).masks[:, 0], vae.decode(raw)[:, 3].clamp(0, 1))


def test_what_shows_nothing_has_no_figures_but_does_not_stop_the_others(views):
    empty = ViewSet(*(torch.zeros_like(t) for t in (views.views, views.masks, views.depths)))
    figures = autoencoder_figures(empty, views)
    assert math.isnan(figures["depth_error"]) and figures["alpha_iou"] == 0 and 0 < figures["psnr"] < 20
    assert math.isnan(autoencoder_figures(views, empty)["psnr"])


@pytest.mark.parametrize("way", ["encode", "decode", "decode_preview"])
def test_weights_that_wait_elsewhere_are_fetched_for_each_way_through(way):
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Fetching(ModelHook):
        fetched = 0

        def pre_forward(self, module, *args, **kwargs):
            self.fetched += 1
            return args, kwargs

    vae, hook = ViewAutoencoder(**TINY), Fetching()
    add_hook_to_module(vae, hook)
    getattr(vae, way)(torch.zeros(1, 5, 32, 32) if way == "encode" else torch.zeros(1, vae.config.latent_channels, 2, 2))
    assert hook.fetched == 1


def test_without_statistics_there_are_no_normalised_latents(views):
    with pytest.raises(ValueError, match="latent statistics"):
        ViewAutoencoder(**TINY).views_to_latents(views)


@torch.no_grad()
def test_each_view_is_coded_by_itself(vae, views):
    together = vae.views_to_latents(views)
    torch.testing.assert_close(vae.views_to_latents(views[1:2]), together[1:2], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_saving_keeps_every_weight_and_the_statistics(vae, tmp_path):
    vae.save_pretrained(tmp_path)
    loaded = ViewAutoencoder.from_pretrained(tmp_path)
    assert plain_config(loaded) == plain_config(vae)
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in vae.state_dict().items())


def test_every_weight_takes_part(views):
    vae = tiny_pipeline().vae
    channels = views_to_channels(views)
    latents = vae.encode(channels)
    (reconstruction_loss(vae.decode(latents), channels) + vae.decode_preview(latents).square().mean()).backward()
    assert [n for n, p in vae.named_parameters() if p.grad is None or not p.grad.any()] == []


@torch.no_grad()
def test_a_deeper_decoder_starts_as_the_shallower_one_it_was_given_and_no_block_is_lost(views):
    torch.manual_seed(0)
    shallow, deep = ViewAutoencoder(**TINY), ViewAutoencoder(**TINY | {"decoder_blocks": (1, 2, 3)})
    for weight in shallow.parameters():
        weight.normal_(0, 0.1)  # fresh blocks are silent in both
    deep.load_shallower(shallow.state_dict(), (1, 1, 1))
    channels = views_to_channels(views)
    raw = shallow.encode(channels)
    assert torch.equal(deep.encode(channels), raw)
    assert torch.equal(deep.decode(raw), shallow.decode(raw))
    assert torch.equal(deep.decode_preview(raw), shallow.decode_preview(raw))
    with pytest.raises(ValueError, match=r"\(1, 2, 3\) residual blocks .* has \(1, 1, 1\)"):
        shallow.load_shallower(deep.state_dict(), (1, 2, 3))


def test_a_few_steps_on_one_view_bring_it_closer(views):
    vae = tiny_pipeline().vae.train()
    optimizer = torch.optim.Adam(vae.parameters(), lr=3e-3)
    channels, losses = views_to_channels(views), []
    for _ in range(40):
        loss = reconstruction_loss(vae.decode(vae.encode(channels)), channels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 3


def test_the_loss_is_smallest_for_the_truth_and_looks_at_every_channel(views):
    channels = views_to_channels(views)
    least = float(reconstruction_loss(channels, channels))
    assert 0 <= least < 0.05  # not quite zero: the step at half coverage is softened
    for channel in range(5):
        for wrong_by in (0.1, -0.1):
            wrong = channels.clone()
            wrong[:, channel] += wrong_by
            assert float(reconstruction_loss(wrong, channels)) >= least + 0.03


def test_a_small_object_missed_costs_as_much_as_a_large_one(views):
    channels = views_to_channels(views)
    small = torch.nn.functional.pad(torch.nn.functional.avg_pool2d(channels, 2), (16,) * 4)
    losses = [float(reconstruction_loss(torch.zeros_like(c), c)) for c in (channels, small)]
    assert losses[1] > 0.6 * losses[0]  # it has a quarter of the pixels


def test_figures_tell_a_known_error(views):
    further = torch.where(views.depths > 0, views.depths + 0.02, 0.0)
    shifted = ViewSet(views.views + 0.1 * (views.masks > 0.5), views.masks, further)
    figures = autoencoder_figures(shifted, views)
    assert figures["psnr"] == pytest.approx(20.0, abs=0.01) and figures["alpha_iou"] == 1.0
    assert figures["depth_error"] == pytest.approx(0.02, abs=1e-4)


def test_depth_of_rims_comes_from_within():
    """Where nearness is softer than coverage, their ratio says of an outermost pixel that it is far away."""
    truth = render(*cube(0.45), Cameras.orbit(3, 20.0), 192)
    channels = views_to_channels(truth)
    channels[:, 4:] = F.avg_pool2d(channels[:, 4:], 3, 1, 1)
    shown = (truth.masks >= 0.5) & (truth.depths > 0)
    rim = shown & (F.max_pool2d((truth.masks < 0.5).float(), 3, 1, 1) > 0)

    def error(views: ViewSet) -> float:
        return float((views.depths - truth.depths)[rim].abs().median())

    assert error(channels_to_views(channels)) > 0.15
    decoded = decoded_views(channels)
    assert error(decoded) < 0.05
    torch.testing.assert_close(decoded.depths[shown & ~rim], channels_to_views(channels).depths[shown & ~rim])
    assert torch.equal(decoded.depths > 0, shown)


def test_depth_of_parts_without_an_inside_comes_from_around():
    channels = torch.zeros(1, 5, 32, 32)
    channels[:, 3, 16, 4:28] = 1.0  # a line one pixel wide, 3.25 away
    channels[:, 4:] = F.avg_pool2d(channels[:, 3:4] * (FAR - 3.25) / (FAR - NEAR), 3, 1, 1)
    assert float(channels_to_views(channels).depths[0, 0, 16, 16]) > 3.9
    torch.testing.assert_close(decoded_views(channels).depths[0, 0, 16, 7:25], torch.full((18,), 3.25))


@torch.no_grad()
def test_what_the_shipped_autoencoder_decodes_stands_on_a_flat_underside():
    vae = ViewAutoencoder.from_pretrained(SMALL / "vae")
    cameras = Cameras.orbit(8)
    views = render(*cube(0.45), cameras, 256)
    mesh = reconstruct(vae.latents_to_views(vae.views_to_latents(views)), cameras, **QUICK)
    assert mesh.vertices[:, 1].min() == pytest.approx(-0.45, abs=0.04)
