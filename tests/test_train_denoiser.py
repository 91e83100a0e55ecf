"""The parts of the denoiser's training: noise levels, text states, cached latents and the loss."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from coser.cameras import Cameras
from coser.caption_states import encode_captions
from coser.data.dataset import RingBatch, check_view_counts, list_rings, mirror_views
from coser.data.render import load_ring
from coser.flow import LEVELS, SHIFT, TRAINING_SHIFT, flow_loss, noise_levels, small_scheduler
from coser.latents import encode_rings
from coser.models.block import MIXERS
from coser.train_denoiser import drop_mixers, encode_together, rings_to_train_on, view_counts_of


def test_noise_levels_lie_between_nothing_and_all_shifted_towards_noise():
    levels = noise_levels(20_000, torch.Generator().manual_seed(0))
    assert 0 <= float(levels.min()) < 0.01 and 0.999 < float(levels.max()) <= 1
    middle = TRAINING_SHIFT * 0.5 / (1 + (TRAINING_SHIFT - 1) * 0.5)  # where the shift puts the median
    assert float(levels.median()) == pytest.approx(middle, abs=0.01)


@pytest.mark.parametrize("levels", LEVELS)
def test_noise_levels_of_a_batch_lie_one_in_each_part(levels):
    generator = torch.Generator().manual_seed(0)
    batches = torch.stack([noise_levels(20, generator, 1.0, levels) for _ in range(500)])
    likely = batches if levels == "uniform" else torch.special.ndtr(batches.logit())
    assert torch.equal((likely.double() * 20).floor().sort(1)[0], torch.arange(20.0).double().expand(500, 20))
    assert (likely.mean(0) - 0.5).abs().max() < 0.06, "whichever sample of a batch"


def test_noise_levels_do_not_leave_out_what_a_sampler_begins_with():
    levels, first = noise_levels(20_000, torch.Generator().manual_seed(0)), small_scheduler()
    first.set_timesteps(20)
    assert float((levels > float(first.sigmas[2])).float().mean()) > 0.1


def test_sampling_goes_from_pure_noise_to_none_on_the_same_shift():
    scheduler = small_scheduler()
    scheduler.set_timesteps(21)
    assert float(scheduler.sigmas[0]) == pytest.approx(1, abs=1e-3) and float(scheduler.sigmas[-1]) == 0
    plain = small_scheduler(shift=1.0)
    plain.set_timesteps(21)
    shifted = SHIFT * plain.sigmas / (1 + (SHIFT - 1) * plain.sigmas)
    torch.testing.assert_close(scheduler.sigmas, shifted, atol=2e-3, rtol=0)
    torch.testing.assert_close(scheduler.timesteps.float(), scheduler.sigmas[:-1] * 1000, atol=1.01, rtol=0)


def test_cached_text_states_are_what_the_pipeline_encodes(pipeline):
    captions = ["a red barrel", "", "a wooden chair with four legs"]
    ours = encode_captions(pipeline, captions).batch(captions, "cpu", torch.float32)
    theirs = pipeline.encode_prompt(captions)
    assert torch.equal(ours.mask, theirs.mask)
    torch.testing.assert_close(ours.states[ours.mask], theirs.states[theirs.mask], atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(ours.pooled, theirs.pooled, atol=2e-3, rtol=1e-3)


def test_the_flow_loss_is_zero_for_who_knows_the_noise(pipeline, monkeypatch):
    clean = torch.randn(2, 3, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    batch = RingBatch(clean, Cameras.orbit(3), ["", ""])
    embeds = pipeline.encode_prompt(batch.captions)

    def oracle(noisy, timesteps, *_, **__):
        sigma = (timesteps / 1000)[:, None, None, None, None]
        return (noisy - clean) / sigma  # noisy = (1 - sigma) clean + sigma noise

    assert float(flow_loss(pipeline.unet, batch, embeds, torch.Generator().manual_seed(0)).detach()) > 0.1
    monkeypatch.setattr(pipeline.unet, "forward", oracle)
    assert float(flow_loss(pipeline.unet, batch, embeds, torch.Generator().manual_seed(0))) < 1e-6


def test_each_mixer_is_dropped_about_as_often_as_asked():
    generator = torch.Generator().manual_seed(0)
    kept = [drop_mixers(MIXERS, generator, 0.1) for _ in range(1000)]
    assert all(list(k) == [m for m in MIXERS if m in k] for k in kept)
    for name in MIXERS:
        assert 0.07 < sum(name not in k for k in kept) / 1000 < 0.13


def test_ring_sizes_are_those_asked_for_or_the_usual_ones_that_divide_the_rings():
    usual = SimpleNamespace(preset="small", view_counts=None)
    assert [view_counts_of(usual, length) for length in (24, 12, 8)] == [(4, 6, 8, 12), (4, 6, 12), (4, 8)]
    assert view_counts_of(usual, 5) == (4, 6, 8, 12), "which is refused by name"
    assert view_counts_of(SimpleNamespace(preset="small", view_counts=[5]), 24) == (5,)


@pytest.mark.parametrize("counts", [(5,), (4, 0), (-4,)])
def test_ring_sizes_that_are_no_part_of_a_ring_are_refused(counts):
    with pytest.raises(ValueError, match="view_counts must divide the 24 rendered views"):
        check_view_counts(counts, 24)


def test_mirror_images_have_latents_and_elevations_of_their_own(renders, pipeline, pipeline_folder, tmp_path):
    ring, folder = list_rings(renders[0])[0], pipeline_folder / "vae"
    latents, elevations = encode_rings(pipeline.vae, folder, [ring, ring.mirror()], tmp_path)
    views, _ = load_ring(ring.path)
    torch.testing.assert_close(latents[0], pipeline.vae.views_to_latents(views).half())
    torch.testing.assert_close(latents[1], pipeline.vae.views_to_latents(mirror_views(views)).half())
    assert elevations[0] == elevations[1] and not torch.equal(latents[0], latents[1])


def test_processes_share_the_encoding_and_all_latents_lie_in_files_then(renders, pipeline, pipeline_folder, tmp_path):
    vae, met = pipeline_folder / "vae", []
    shutil.copytree(renders[0], tmp_path / "renders", ignore=shutil.ignore_patterns("latents"))
    cache = tmp_path / "renders" / "latents"
    options = SimpleNamespace(renders=cache.parent, limit=None, min_kind_count=1, mirror=True, autoencoder=vae)

    def encode(rank, size, encoded_only):
        options.encoded_only = encoded_only
        encode_together(options, pipeline.vae, SimpleNamespace(rank=rank, size=size, wait=lambda: met.append(rank)))

    encode(0, 1, False)  # one alone has nobody to share with
    encode(0, 2, True)
    assert not cache.exists() and not met
    rings = rings_to_train_on(options)
    assert [ring.mirrored for ring in rings] == [False] * 3 + [True] * 3
    for rank in (0, 1):
        encode(rank, 2, False)
        there = set().union(*(load_file(file) for file in cache.glob("*.safetensors")))
        assert {r.key for r in rings if r.key in there} == {r.key for i, r in enumerate(rings) if i % 2 <= rank}
    assert met == [0, 1]
    files = sorted(cache.iterdir())
    together, _ = encode_rings(pipeline.vae, vae, rings, cache)
    alone, _ = encode_rings(pipeline.vae, vae, rings, tmp_path / "alone")
    assert sorted(cache.iterdir()) == files, "nothing was left to encode"
    assert all(torch.equal(a, b) for a, b in zip(together, alone))


def test_latents_are_encoded_once_for_each_ring_and_autoencoder(renders, pipeline, pipeline_folder, tmp_path, capsys):
    rings = list_rings(renders[0])
    folder, cache = pipeline_folder / "vae", tmp_path / "latents"
    first, elevations = encode_rings(pipeline.vae, folder, rings[:2], cache)
    views, cameras = load_ring(rings[1].path)
    torch.testing.assert_close(first[1], pipeline.vae.views_to_latents(views).half())
    assert elevations[1] == pytest.approx(float(cameras.elevations[0]), abs=1e-3)
    (cache / "writing").write_bytes(b"half a fi")  # what a killed run left, or another is about to finish
    capsys.readouterr()
    again, _ = encode_rings(pipeline.vae, folder, rings[:2], cache)
    assert capsys.readouterr().out == "" and all(torch.equal(a, b) for a, b in zip(first, again))
    more, _ = encode_rings(pipeline.vae, folder, rings, cache)
    assert len(more) == 3 and torch.equal(more[0], first[0]) and len(list(cache.glob("*.safetensors"))) == 2
    other, weights = tmp_path / "vae", load_file(folder / "diffusion_pytorch_model.safetensors")
    shutil.copytree(folder, other)
    for part, files in (("decoder", 2), ("encoder", 3)):  # a decoder trained on reads the same latents
        name = next(name for name in weights if name.startswith(f"{part}."))
        save_file(weights | {name: weights[name] + 1}, other / "diffusion_pytorch_model.safetensors")
        encode_rings(pipeline.vae, other, rings, cache)
        assert len(list(cache.glob("*.safetensors"))) == files
    assert (cache / "writing").read_bytes() == b"half a fi"
