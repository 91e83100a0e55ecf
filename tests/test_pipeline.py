"""The pipeline: what a seed, an argument or another scheduler changes, and what it must not change."""

import pytest
import torch
from diffusers import (DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler,
                       FlowMatchEulerDiscreteScheduler)
from solids import cube
from tiny import plain_config, tiny_pipeline

from coser.cameras import Cameras
from coser.consistency import fused_views
from coser.flow import small_scheduler
from coser.metrics import silhouette_iou
from coser.models.block import MIXERS
from coser.pipeline import CoSERPipeline, fused_steps, heeding, rescaled, step_order
from coser.rasterizer import render
from coser.views import ViewSet

PROMPT = "a red barrel"


def draw(pipeline, seed=0, num_views=4, num_inference_steps=2, **arguments):
    """The last step of a short run."""
    generator = torch.Generator().manual_seed(seed)
    return pipeline(PROMPT, num_views=num_views, num_inference_steps=num_inference_steps, generator=generator,
                    **arguments)


def steps(pipeline, seed=0, num_views=4, num_inference_steps=4, **arguments):
    generator = torch.Generator().manual_seed(seed)
    return list(pipeline.stream(PROMPT, num_views=num_views, num_inference_steps=num_inference_steps,
                                generator=generator, **arguments))


@pytest.fixture
def swapped():
    """A function that gives the tiny pipeline another scheduler."""
    def swap(scheduler):
        pipeline = tiny_pipeline()
        pipeline.scheduler = scheduler
        return pipeline

    return swap


def test_same_seed_same_views_and_another_seed_others(pipeline):
    first, again, other = draw(pipeline, 3), draw(pipeline, 3), draw(pipeline, 4)
    assert torch.equal(first.views.views, again.views.views) and torch.equal(first.latents, again.latents)
    assert not torch.equal(first.latents, other.latents)


def test_last_streamed_step_equals_call(pipeline):
    last, called = steps(pipeline)[-1], draw(pipeline, num_inference_steps=4)
    assert torch.equal(last.latents, called.latents) and torch.equal(last.views.views, called.views.views)
    assert torch.equal(last.views.depths, called.views.depths)


def test_every_step_is_streamed_and_previews_are_a_quarter_of_the_finished_views(pipeline):
    streamed = steps(pipeline, num_inference_steps=3)
    assert [(s.index, s.total) for s in streamed] == [(1, 3), (2, 3), (3, 3)]
    assert [tuple(s.views.views.shape) for s in streamed] == [(4, 3, 64, 64)] * 2 + [(4, 3, 256, 256)]
    assert len({s.latents.sum().item() for s in streamed}) == 3


def test_a_stream_that_is_left_early_does_not_disturb_the_next(pipeline):
    expected = draw(pipeline)
    next(pipeline.stream(PROMPT, num_views=6, num_inference_steps=5))
    assert torch.equal(draw(pipeline).latents, expected.latents)


@pytest.mark.parametrize("num_views", range(4, 25))
def test_each_view_count_runs(pipeline, num_views):
    step = draw(pipeline, num_views=num_views, num_inference_steps=1)
    assert step.views.views.shape == (num_views, 3, 256, 256) and bool(step.latents.isfinite().all())
    assert len(step.cameras) == num_views
    torch.testing.assert_close(step.cameras.azimuths, torch.arange(num_views) * 360 / num_views, atol=1e-3, rtol=0)


def test_elevation_moves_the_cameras_and_changes_the_views(pipeline):
    low, high = draw(pipeline, elevation=0), draw(pipeline, elevation=30)
    torch.testing.assert_close(high.cameras.elevations, torch.full((4,), 30.0), atol=1e-3, rtol=0)
    assert not torch.equal(low.latents, high.latents)


@pytest.mark.parametrize("num_inference_steps", [1, 2, 20])
def test_at_the_last_step_the_final_latents_are_the_denoised_ones(pipeline, num_inference_steps):
    assert float(pipeline.scheduler.sigmas[-1]) == 0
    last = draw(pipeline, num_inference_steps=num_inference_steps)
    torch.testing.assert_close(last.denoised, last.latents, rtol=1e-4, atol=1e-4)


def test_steps_of_one_rounded_timestep_have_noise_levels_of_their_own(pipeline, monkeypatch):
    """Of more than 500 steps the first two have the timestep 999."""
    monkeypatch.setattr(pipeline, "_predict", lambda latents, *others: latents[None])
    monkeypatch.setattr(pipeline, "latents_to_views", lambda latents, preview=False: None)
    streamed = list(pipeline.stream(PROMPT, num_views=4, guidance_scale=1.0, num_inference_steps=501))
    assert pipeline.scheduler.timesteps[0] == pipeline.scheduler.timesteps[1]
    assert [step.index for step in streamed] == list(range(1, 502))
    assert torch.equal(streamed[-1].latents, streamed[-1].denoised)


def test_a_prompt_changes_the_views_and_a_negative_prompt_too(pipeline):
    plain, other = draw(pipeline), pipeline("a green tree", num_views=4, num_inference_steps=2,
                                            generator=torch.Generator().manual_seed(0))
    assert not torch.equal(plain.latents, other.latents)
    assert not torch.equal(plain.latents, draw(pipeline, negative_prompt="blue").latents)


def test_guidance_goes_from_the_text_free_prediction_through_the_prompted_one(pipeline):
    predictions = {}
    for scale in (1.0, 1.5, 4.0):
        first = steps(pipeline, num_inference_steps=1, guidance_scale=scale)[0]
        predictions[scale] = first.denoised  # linear in the prediction
    expected = predictions[1.0] + (predictions[4.0] - predictions[1.0]) * 0.5 / 3
    torch.testing.assert_close(predictions[1.5], expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(predictions[1.0], predictions[4.0], atol=1e-3)


@pytest.mark.parametrize("guidance_scale, batch", [(1.0, 1), (1, 1), (1.01, 2), (4.0, 2)])
def test_without_guidance_the_text_free_half_is_left_out(pipeline, monkeypatch, guidance_scale, batch):
    seen = []
    forward = pipeline.unet.forward

    def watched(latents, *arguments, **options):
        seen.append(len(latents))
        return forward(latents, *arguments, **options)

    monkeypatch.setattr(pipeline.unet, "forward", watched)
    draw(pipeline, guidance_scale=guidance_scale)
    assert seen == [batch, batch]


def test_each_mixer_has_a_say_and_all_of_them_are_the_default(pipeline):
    whole = draw(pipeline)
    assert torch.equal(draw(pipeline, mixers=MIXERS).latents, whole.latents)
    for name in MIXERS:
        rest = tuple(m for m in MIXERS if m != name)
        assert not torch.equal(draw(pipeline, mixers=rest).latents, whole.latents), name


def test_without_mixers_no_view_knows_the_others(pipeline):
    noise = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    changed = noise.clone()
    changed[0] += 1
    arguments = dict(num_views=4, num_inference_steps=1)
    alone = [pipeline(PROMPT, latents=n, mixers=(), **arguments).latents for n in (noise, changed)]
    torch.testing.assert_close(alone[0][1:], alone[1][1:], rtol=1e-4, atol=1e-4)
    mixed = [pipeline(PROMPT, latents=n, **arguments).latents for n in (noise, changed)]
    assert not torch.allclose(mixed[0][1:], mixed[1][1:], atol=1e-3)


def test_given_latents_are_the_starting_noise(pipeline):
    noise = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    given = pipeline(PROMPT, num_views=4, num_inference_steps=2, latents=noise)
    assert torch.equal(given.latents, draw(pipeline, seed=5).latents)


@pytest.mark.parametrize("wrong, allowed", [
    ({"prompt": None}, "prompt must be a string, got None"),
    ({"negative_prompt": 3}, "negative_prompt must be a string, got 3"),
    ({"num_views": 3}, "num_views must be a whole number from 4 to 24, got 3"),
    ({"num_views": 25}, "num_views must be a whole number from 4 to 24, got 25"),
    ({"num_views": 12.0}, "num_views must be a whole number from 4 to 24, got 12.0"),
    ({"num_views": True}, "num_views must be a whole number from 4 to 24, got True"),
    ({"num_inference_steps": 0}, "num_inference_steps must be a whole number from 1 to 1000, got 0"),
    ({"elevation": -1}, r"elevation must be a number from 0.0 to 30.0, got -1"),
    ({"elevation": float("nan")}, r"elevation must be a number from 0.0 to 30.0, got nan"),
    ({"guidance_scale": 0.5}, r"guidance_scale must be a number from 1.0 to 100.0, got 0.5"),
    ({"consistency": 0.5}, "fuse must be a function where consistency is above 0, got None and 0.5"),
    ({"guidance_rescale": 1.5}, "guidance_rescale must be a number from 0.0 to 1.0, got 1.5"),
    ({"skip_guidance_scale": -1}, "skip_guidance_scale must be a number from 0.0 to 100.0, got -1"),
    ({"redraw": 1.0}, "redraw must be a number from 0.0 to 0.9, got 1.0"),
    ({"consistency": 1.5}, "consistency must be a number from 0.0 to 1.0, got 1.5"),
    ({"guidance_scale": "4"}, r"guidance_scale must be a number from 1.0 to 100.0, got '4'"),
    ({"latents": torch.zeros(5, 4, 16, 16)}, r"latents must be \[4, 4, 16, 16\], got \[5, 4, 16, 16\]"),
    ({"mixers": ("telepathy",)}, "mixers must be .*adjacent.*, got .*telepathy"),
    ({"mixers": ("adjacent", "adjacent")}, "mixers must be different"),
])
def test_wrong_arguments_are_named_with_their_value_and_what_is_allowed(pipeline, wrong, allowed):
    with pytest.raises(ValueError, match=allowed):
        pipeline(**({"prompt": PROMPT, "num_views": 4, "num_inference_steps": 1} | wrong))


def test_saving_keeps_every_weight_and_config_and_nothing_is_pickled(pipeline, pipeline_folder):
    loaded = CoSERPipeline.from_pretrained(pipeline_folder)
    for name in ("vae", "unet", "text_encoder"):
        expected, found = getattr(pipeline, name), getattr(loaded, name)
        assert plain_config(found) == plain_config(expected)
        assert expected.state_dict().keys() == found.state_dict().keys()
        assert all(torch.equal(v, found.state_dict()[k]) for k, v in expected.state_dict().items()), name
    assert type(loaded.scheduler) is type(pipeline.scheduler)
    assert plain_config(loaded.scheduler) == plain_config(pipeline.scheduler)
    assert loaded.tokenizer.get_vocab() == pipeline.tokenizer.get_vocab()
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(draw(loaded).latents, draw(pipeline).latents)
    assert {p.suffix for p in pipeline_folder.rglob("*") if p.is_file()} == {".json", ".safetensors"}


def test_a_pipeline_saved_in_half_precision_loads_in_what_is_asked(pipeline_folder):
    loaded = CoSERPipeline.from_pretrained(pipeline_folder, dtype=torch.bfloat16)
    assert {loaded.vae.dtype, loaded.unet.dtype, loaded.text_encoder.dtype} == {torch.bfloat16}
    step = draw(loaded)
    assert step.latents.dtype == step.views.views.dtype == torch.float32  # the solver's state stays exact


def test_another_order_of_the_solver_draws_something_else_from_the_same_noise(pipeline, swapped):
    first_order = swapped(DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, solver_order=1))
    first, second = draw(first_order, num_inference_steps=4), draw(pipeline, num_inference_steps=4)
    assert not torch.equal(first.latents, second.latents)


def test_flow_matching_euler_walks_straight_towards_what_is_denoised(swapped):
    euler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    latents = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    for i, step in enumerate(steps(swapped(euler), num_inference_steps=3)):
        keep = euler.sigmas[i + 1] / euler.sigmas[i]
        torch.testing.assert_close(step.latents, torch.lerp(step.denoised, latents, keep), rtol=1e-3, atol=1e-4)
        latents = step.latents
    torch.testing.assert_close(step.denoised, step.latents, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("make", [DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler, DDPMScheduler])
def test_denoised_is_the_clean_signal_when_the_prediction_is_right(swapped, make, prediction_type, monkeypatch):
    options = dict(clip_sample=False) if make in (DDIMScheduler, DDPMScheduler) else {}
    pipeline = swapped(make(prediction_type=prediction_type, beta_schedule="scaled_linear", beta_start=0.00085,
                            beta_end=0.012, **options))
    scheduler, clean = pipeline.scheduler, torch.full((4, 4, 16, 16), 0.7)
    alphas = scheduler.alphas_cumprod

    def oracle(latents, timestep, *_, **__):
        """Knows the clean signal: whatever the noisy one holds besides is noise."""
        alpha = alphas[timestep[0].long()]
        noise = (latents - alpha.sqrt() * clean) / (1 - alpha).sqrt()
        answers = {"epsilon": noise, "sample": clean.expand_as(latents),
                   "v_prediction": alpha.sqrt() * noise - (1 - alpha).sqrt() * clean}
        return answers[prediction_type]

    monkeypatch.setattr(pipeline.unet, "forward", oracle)
    goal = torch.full_like(clean, -0.2)
    monkeypatch.setattr(pipeline, "_agreed", lambda denoised, cameras, share, fuse: torch.lerp(denoised, goal, share))
    for step in steps(pipeline, num_inference_steps=4):
        torch.testing.assert_close(step.denoised, clean, rtol=0, atol=0.02)
    # the scheduler goes on from what the views agreed on: the last step's answer is that, and nothing else
    for step in steps(pipeline, num_inference_steps=4, consistency=1.0, fuse=fused_views):
        torch.testing.assert_close(step.denoised, goal if step.index > step.total - 2 else clean, rtol=0, atol=0.02)
    torch.testing.assert_close(step.latents, goal, rtol=0, atol=0.05)


def test_rescaled_estimates_keep_their_pattern_and_take_the_prompted_ones_mean_and_spread():
    generator = torch.Generator().manual_seed(0)
    prompted = torch.randn(5, 4, 8, 8, generator=generator) * torch.tensor([1.0, 2, 3, 4])[:, None, None] + 0.5
    over = torch.tensor([3.0, 0.5, 2, 1])[:, None, None]
    assert torch.allclose(rescaled(prompted * over + 2 * over, prompted), prompted, atol=1e-4)
    flat = torch.full_like(prompted, 7.0)  # nothing is seen yet: no spread to divide by
    assert torch.allclose(rescaled(flat, prompted), prompted.mean((0, 2, 3), keepdim=True).expand_as(flat), atol=1e-4)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_guidance_rescale_takes_back_that_share_of_what_guidance_adds_to_all_views(pipeline, monkeypatch, share):
    prompted, free = torch.tensor([0.3, -0.2, 0.1, 0.5]), torch.tensor([0.1, 0.1, 0.0, 0.4])
    pattern = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    pattern = (pattern - pattern.mean((0, 2, 3), keepdim=True)) / pattern.std((0, 2, 3), keepdim=True)

    def oracle(latents, timestep, states, *_, **__):
        """Its clean estimates: one pattern, whose mean and spread depend on the text."""
        level = pipeline.scheduler.sigmas[pipeline.scheduler.step_index or 0]
        means = torch.stack([free, prompted])[:, None, :, None, None]
        clean = means + torch.tensor([1.0, 1.5])[:, None, None, None, None] * pattern
        return (latents - clean) / level

    monkeypatch.setattr(pipeline.unet, "forward", oracle)
    denoised = draw(pipeline, num_inference_steps=1, guidance_scale=3.0, guidance_rescale=share).denoised
    guided = (free + 3 * (prompted - free))[:, None, None] + 2.5 * pattern
    wanted = torch.lerp(guided, prompted[:, None, None] + 1.5 * pattern, share)
    torch.testing.assert_close(denoised, wanted, rtol=0, atol=1e-3)


def test_heeding_views_move_apart_from_lonely_ones_and_keep_each_views_mean_and_spread():
    generator = torch.Generator().manual_seed(0)
    denoised, prompted, apart = torch.randn(3, 5, 4, 8, 8, generator=generator) * 2 + 0.5
    assert torch.allclose(heeding(denoised, prompted, apart, 0.0), denoised, atol=1e-5)
    assert torch.allclose(heeding(denoised, prompted, prompted, 3.0), denoised, atol=1e-5)  # they heed nothing
    moved = heeding(denoised, prompted, apart, 1.5)
    for figure in (torch.mean, torch.std):
        assert torch.allclose(figure(moved, (2, 3)), figure(denoised, (2, 3)), atol=1e-5)
    both = torch.stack([(moved - denoised).flatten(), (prompted - apart).flatten()])
    assert float(torch.corrcoef(both)[0, 1]) > 0.5
    brighter = prompted + torch.tensor([1.0, -2.0, 0.5, 3.0])[:, None, None]  # what is the same all over a view
    assert torch.allclose(heeding(denoised, brighter, apart, 1.5), moved, atol=1e-4)


def test_skip_guidance_asks_once_more_for_the_prompt_alone_with_every_module_skipped(pipeline, monkeypatch):
    asked = []
    forward = type(pipeline.unet).forward

    def noted(self, latents, timestep, states, *arguments, **named):
        asked.append((len(latents), named["mixers"]))
        return forward(self, latents, timestep, states, *arguments, **named)

    monkeypatch.setattr(type(pipeline.unet), "forward", noted)
    plain = draw(pipeline, num_inference_steps=2)
    assert asked == [(2, None)] * 2
    for scale, mixers, calls in ((1.5, None, [(2, None), (1, ())]), (1.5, ("glance",), [(2, ("glance",)), (1, ())]),
                                 (1.5, (), [(2, ())]), (0.0, None, [(2, None)])):
        asked.clear()
        draw(pipeline, num_inference_steps=2, skip_guidance_scale=scale, mixers=mixers)
        assert asked == calls * 2, (scale, mixers)
    asked.clear()
    draw(pipeline, guidance_scale=1.0, skip_guidance_scale=1.0)
    assert asked == [(1, None), (1, ())] * 2  # by itself, too
    assert not torch.equal(draw(pipeline, skip_guidance_scale=1.5).latents, plain.latents)


def test_the_last_steps_are_taken_once_more_where_asked_for():
    assert step_order(4, 0.0) == [0, 1, 2, 3] and step_order(4, 0.5) == [0, 1, 2, 3, 2, 3]
    assert step_order(20, 0.25)[20:] == [15, 16, 17, 18, 19] and step_order(1, 0.25) == [0]


@pytest.mark.parametrize("scheduler, kept, added", [
    (small_scheduler(), lambda s: 1 - s.sigmas[2], lambda s: s.sigmas[2]),
    (FlowMatchEulerDiscreteScheduler(shift=3.0), lambda s: 1 - s.sigmas[2], lambda s: s.sigmas[2]),
    (EulerDiscreteScheduler(prediction_type="sample"), lambda s: 1, lambda s: s.sigmas[2]),
    (DDIMScheduler(prediction_type="sample", clip_sample=False),
     lambda s: s.alphas_cumprod[s.timesteps[2]].sqrt(), lambda s: (1 - s.alphas_cumprod[s.timesteps[2]]).sqrt()),
], ids=["solver", "flow", "euler", "ddim"])
def test_what_is_drawn_is_noised_to_the_level_of_the_steps_that_are_left(swapped, scheduler, kept, added, monkeypatch):
    pipeline, clean, seen = swapped(scheduler), torch.full((4, 4, 16, 16), 0.5), []

    def oracle(latents, *others):
        seen.append(latents.clone())
        if scheduler.config.get("prediction_type") == "sample":
            return clean[None]
        return ((latents - clean) / scheduler.sigmas[step_order(4, 0.5)[len(seen) - 1]])[None]

    monkeypatch.setattr(pipeline, "_predict", oracle)
    streamed = steps(pipeline, guidance_scale=1.0, redraw=0.5)
    assert [(step.index, step.total) for step in streamed] == [(i, 6) for i in range(1, 7)]
    assert [step.views.views.shape[-1] for step in streamed] == [64] * 5 + [256]
    torch.testing.assert_close(streamed[-1].latents, clean, atol=1e-3, rtol=0)
    noise = float(added(scheduler))
    assert float(seen[4].mean()) == pytest.approx(0.5 * float(kept(scheduler)), abs=0.06 * noise)
    assert float(seen[4].std()) == pytest.approx(noise, rel=0.05)


def test_few_steps_and_many_are_fused_twice_and_late():
    assert fused_steps(20) == {18, 19} and fused_steps(12) == {10, 11} and fused_steps(40) == {36, 38}
    assert fused_steps(1) == {0} and fused_steps(2) == {0, 1}
    for total in range(3, 1001):
        fused = sorted(fused_steps(total))
        assert len(fused) == 2 and fused[1] < total and fused[0] >= min(0.9 * total - 0.5, total - 2), (total, fused)


@torch.no_grad()
def test_fused_views_take_the_place_of_their_share(pipeline, monkeypatch):
    cameras = Cameras.orbit(6)
    drawn = render(*cube(0.5), cameras, 128)
    odd = drawn.masks.clone()
    odd[2, :, :, 80:] = 0  # one view lacks a side; the others know better
    contradicting = ViewSet(drawn.views * odd, odd, drawn.depths * odd)
    monkeypatch.setattr(pipeline, "latents_to_views", lambda latents, preview=False: contradicting)
    zero = torch.zeros(6, 4, 8, 8)
    agreed = pipeline._agreed(zero, cameras, 1.0, fused_views)
    fused = fused_views(contradicting, cameras)
    torch.testing.assert_close(agreed, pipeline.vae.views_to_latents(fused))
    lacking, mended = (silhouette_iou(views.masks, drawn.masks)[2] for views in (contradicting, fused))
    assert lacking < 0.8 and mended > 0.87
    torch.testing.assert_close(pipeline._agreed(zero, cameras, 0.25, fused_views), agreed / 4)
    monkeypatch.setattr(pipeline, "latents_to_views", lambda latents, preview=False: ViewSet(
        *(torch.zeros(6, channels, 128, 128) for channels in (3, 1, 1))))
    assert torch.equal(pipeline._agreed(zero, cameras, 1.0, fused_views), zero)  # nothing to fuse yet


def test_a_stochastic_scheduler_draws_from_the_generator(pipeline, swapped):
    config = pipeline.scheduler.config
    stochastic = swapped(DPMSolverMultistepScheduler.from_config(config, algorithm_type="sde-dpmsolver++"))
    runs = [draw(stochastic, seed, num_inference_steps=4).latents for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
