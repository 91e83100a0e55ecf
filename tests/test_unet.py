"""The multi-view UNet: what it inherits from its 2D parent, and what its mixers add."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from coser.cameras import Cameras
from coser.models.block import BASELINES, MIXERS, NEEDS_WEIGHTS
from coser.models.unet import RAY_CHANNELS, ConditionEmbedding, MultiviewUNet, camera_features, harmonics, ray_maps

SMALL = dict(sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32),
             down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), cross_attention_dim=12, norm_num_groups=4,
             up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=(2, 4))
# as Stable Diffusion 2.1: linear projections, 64 channels a head, attention at several resolutions
LIKE_SD21 = dict(SMALL, use_linear_projection=True, layers_per_block=2, block_out_channels=(32, 64, 64),
                 down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
                 up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=(1, 2, 2))
NARROW = dict(mixer_head_size=8, scan_head_size=8, scan_state_size=4, scan_chunk_size=16)


def build(seed=0, awake=True, **options):
    """A small model; awake: with the mixers' last projections and the condition drawn at random instead of zero."""
    torch.manual_seed(seed)
    model = MultiviewUNet(unet=dict(SMALL), **{**NARROW, **options}).eval()
    if awake:
        for name, parameter in model.named_parameters():
            mixes = ".to_out.weight" in name and any(m in name for m in NEEDS_WEIGHTS)
            if mixes or "class_embedding" in name or "conv_in.rays" in name:
                torch.nn.init.normal_(parameter, std=0.1 if "rays" in name else 0.2)  # rays have many taps
    return model


def inputs(num_views=3, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, num_views, 4, 8, 8, generator=generator)
    return latents, torch.tensor([3.0, 700.0])[:batch], torch.randn(batch, 5, 12, generator=generator)


@pytest.mark.parametrize("config", [SMALL, LIKE_SD21], ids=["conv-projection", "like-sd21"])
@pytest.mark.parametrize("mixers", [MIXERS, ("dense", "glance"), ()], ids=["all", "dense", "none"])
def test_inflated_unet_equals_its_2d_parent(config, mixers):
    torch.manual_seed(0)
    parent = UNet2DConditionModel(**config).eval()
    model = MultiviewUNet.from_unet2d(parent, mixers=mixers, **NARROW).eval()
    latents, timesteps, text = inputs(num_views=1)
    with torch.no_grad():
        torch.testing.assert_close(model(latents, timesteps, text, Cameras.orbit(1))[:, 0],
                                   parent(latents[:, 0], timesteps, text).sample, rtol=1e-4, atol=1e-5)


def test_without_mixers_every_view_is_drawn_as_by_the_2d_parent():
    torch.manual_seed(0)
    parent = UNet2DConditionModel(**SMALL).eval()
    model = MultiviewUNet.from_unet2d(parent, mixers=()).eval()
    latents, timesteps, text = inputs()
    with torch.no_grad():
        expected = parent(latents.flatten(0, 1), timesteps.repeat_interleave(3), text.repeat_interleave(3, 0)).sample
        torch.testing.assert_close(model(latents, timesteps, text, Cameras.orbit(3)).flatten(0, 1), expected,
                                   rtol=1e-4, atol=1e-5)


def test_masked_text_equals_shorter_text():
    model, (latents, timesteps, text) = build(), inputs()
    mask = torch.tensor([True, True, True, False, False]).expand(2, -1)
    with torch.no_grad():
        torch.testing.assert_close(model(latents, timesteps, text, Cameras.orbit(3), attention_mask=mask),
                                   model(latents, timesteps, text[:, :3], Cameras.orbit(3)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mixers", [("adjacent",), ("trajectory",), ("rectification",), ("dense",), ("temporal",),
                                    ("adjacent", "trajectory", "rectification")], ids="+".join)
@pytest.mark.parametrize("num_views", [2, 3, 8])
def test_without_absolute_azimuth_turning_the_ring_turns_the_output(mixers, num_views):
    model, (latents, timesteps, text) = build(mixers=mixers, absolute_azimuth=False), inputs(num_views)
    cameras = Cameras.orbit(num_views)
    with torch.no_grad():
        out = model(latents, timesteps, text, cameras)
        torch.testing.assert_close(model(latents.roll(1, 1), timesteps, text, cameras), out.roll(1, 1),
                                   rtol=1e-3, atol=1e-4)
        assert not torch.allclose(model(latents, timesteps, text, cameras, mixers=()), out, atol=1e-3)


def test_with_absolute_azimuth_views_know_where_they_are():
    model, (latents, timesteps, text) = build(mixers=()), inputs()
    same = latents[:, :1].expand(-1, 3, -1, -1, -1)
    with torch.no_grad():
        out = model(same, timesteps, text, Cameras.orbit(3))
    assert not torch.allclose(out[:, 0], out[:, 1], atol=1e-3)


def test_camera_features_by_hand():
    features = camera_features(Cameras.orbit(4, elevation=30))
    expected = torch.tensor([[0, 1], [1, 0], [0, -1], [-1, 0]], dtype=torch.float32)
    torch.testing.assert_close(features[:, :2], expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(features[:, 2:], torch.tensor([[0.5, 0.75**0.5, 0.5]]).expand(4, -1))
    assert camera_features(Cameras.orbit(1), absolute_azimuth=False)[0, 2] == 0


def test_harmonics_by_hand():
    waves = harmonics(camera_features(Cameras.orbit(8, elevation=30)))
    turn = torch.arange(8) * torch.pi / 4
    for k in range(4):
        torch.testing.assert_close(waves[:, k], ((k + 1) * turn).sin(), rtol=0, atol=1e-5)
        torch.testing.assert_close(waves[:, 4 + k], ((k + 1) * turn).cos(), rtol=0, atol=1e-5)
    torch.testing.assert_close(waves[:, 8:], torch.tensor([[0.5, 0.75**0.5, 0.25]]).expand(8, -1))


def test_what_a_turn_means_depends_on_the_text_once_products_are_learnt():
    torch.manual_seed(0)
    embedding = ConditionEmbedding(5 + 6, 16, pooled_dim=6)
    camera = camera_features(Cameras.orbit(4))
    texts = torch.randn(2, 1, 6)
    features = torch.cat([camera.expand(2, -1, -1), texts.expand(-1, 4, -1)], -1)
    assert not embedding(features.flatten(0, 1)).any()  # silent at first
    torch.nn.init.normal_(embedding.product_out.weight)
    with torch.no_grad():
        one, other = embedding(features.flatten(0, 1)).unflatten(0, (2, 4))
    assert not torch.allclose(one - one[:1], other - other[:1], atol=0.1)
    embedding(features.flatten(0, 1)).sum().backward()
    assert all(p.grad is not None and p.grad.any() for n, p in embedding.named_parameters() if "product" in n)


def test_ray_maps_by_hand():
    maps = ray_maps(Cameras.orbit(4, elevation=0, distance=2), 3)
    assert maps.shape == (4, RAY_CHANNELS, 3, 3)
    centre = maps[:, :, 1, 1]  # the middle pixel looks along the camera's axis, through the origin
    expected = torch.tensor([[0, 0, -1], [-1, 0, 0], [0, 0, 1], [1, 0, 0]], dtype=torch.float32)
    torch.testing.assert_close(centre[:, :3], expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(centre[:, 3:6], torch.zeros(4, 3), rtol=0, atol=1e-6)
    directions, nearest = maps[:, :3], maps[:, 3:6]
    torch.testing.assert_close(directions.norm(dim=1), torch.ones(4, 3, 3))
    torch.testing.assert_close((directions * nearest).sum(1), torch.zeros(4, 3, 3), rtol=0, atol=1e-6)
    torch.testing.assert_close(maps[:, 9:12], (torch.pi * nearest).sin())
    assert nearest[0, 1, 0, 1] > 0 > nearest[0, 0, 1, 0]  # the top row looks above the origin, the left column beside


def test_without_absolute_azimuth_rays_tell_the_elevation_alone():
    maps = ray_maps(Cameras.orbit(5, elevation=30), 4, absolute_azimuth=False)
    torch.testing.assert_close(maps, maps[:1].expand(5, -1, -1, -1), rtol=0, atol=1e-6)
    assert not torch.allclose(maps[0], ray_maps(Cameras.orbit(1, elevation=0), 4, absolute_azimuth=False)[0], atol=0.1)


def test_without_ray_maps_there_are_no_weights_for_them():
    model, (latents, timesteps, text) = build(ray_maps=False), inputs()
    assert not [name for name, _ in model.named_parameters() if "rays" in name]
    with torch.no_grad():
        assert model(latents, timesteps, text, Cameras.orbit(3)).shape == latents.shape


@pytest.mark.parametrize("mixer", (*MIXERS, *BASELINES))
def test_every_mixers_gradient_reaches_its_weights(mixer):
    model, (latents, timesteps, text) = build(mixers=(mixer,)), inputs()
    model(latents, timesteps, text, Cameras.orbit(3)).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("mixer", NEEDS_WEIGHTS)
def test_a_new_mixer_starts_silent_but_its_last_projection_learns_at_once(mixer):
    model, (latents, timesteps, text) = build(awake=False, mixers=(*MIXERS, *{mixer} - set(MIXERS))), inputs()
    cameras = Cameras.orbit(3)
    without = tuple(name for name in MIXERS if name != mixer)
    torch.testing.assert_close(model(latents, timesteps, text, cameras, mixers=without),
                               model(latents, timesteps, text, cameras))
    model(latents, timesteps, text, cameras).square().mean().backward()
    gradients = [p.grad.abs().sum() for n, p in model.named_parameters() if f".{mixer}.to_out." in n]
    assert gradients and all(g > 0 for g in gradients)


@pytest.mark.parametrize("num_views", range(1, 25))
def test_any_number_of_views_from_1_to_24_runs(num_views):
    model, (latents, timesteps, text) = build(), inputs(num_views, batch=1)
    with torch.no_grad():
        out = model(latents, timesteps, text, Cameras.orbit(num_views))
    assert out.shape == latents.shape and out.isfinite().all()


def test_samples_of_a_batch_do_not_see_each_other():
    model, (latents, timesteps, text) = build(pooled_dim=6), inputs()
    pooled, cameras = torch.randn(2, 6), Cameras.orbit(3)
    with torch.no_grad():
        alone = [model(latents[i:i + 1], timesteps[i:i + 1], text[i:i + 1], cameras, pooled[i:i + 1]) for i in (0, 1)]
        torch.testing.assert_close(model(latents, timesteps, text, cameras, pooled), torch.cat(alone),
                                   rtol=1e-3, atol=1e-4)


def test_save_and_load_keep_every_weight_and_setting(tmp_path):
    model, (latents, timesteps, text) = build(pooled_dim=6, scan_order="zigzag", trajectory_window=5), inputs()
    model.save_pretrained(tmp_path)
    loaded = MultiviewUNet.from_pretrained(tmp_path).eval()
    kept = loaded.state_dict()
    assert kept.keys() == model.state_dict().keys()
    assert all(torch.equal(kept[name], value) for name, value in model.state_dict().items())
    assert loaded.unet2d.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert loaded.config.scan_order == "zigzag" and loaded.config.trajectory_window == 5
    with torch.no_grad():
        arguments = (latents, timesteps, text, Cameras.orbit(3), torch.ones(2, 6))
        assert torch.equal(loaded(*arguments), model(*arguments))


def test_inactive_mixers_equal_a_model_without_them():
    model, (latents, timesteps, text) = build(), inputs()
    fewer = MultiviewUNet(unet=dict(SMALL), mixers=("adjacent", "glance"), **NARROW).eval()
    fewer.load_state_dict({k: v for k, v in model.state_dict().items() if k in fewer.state_dict()})
    with torch.no_grad():
        assert torch.equal(model(latents, timesteps, text, Cameras.orbit(3), mixers=("glance", "adjacent")),
                           fewer(latents, timesteps, text, Cameras.orbit(3)))


def test_new_cameras_are_noticed():
    model, (latents, timesteps, text) = build(mixers=("trajectory",), absolute_azimuth=False), inputs()
    fresh = build(mixers=("trajectory",), absolute_azimuth=False)
    with torch.no_grad():
        model(latents, timesteps, text, Cameras.orbit(3, elevation=0))
        assert torch.equal(model(latents, timesteps, text, Cameras.orbit(3, elevation=30)),
                           fresh(latents, timesteps, text, Cameras.orbit(3, elevation=30)))


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        model, (latents, timesteps, text) = build().train(), inputs()
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(latents, timesteps, text, Cameras.orbit(3)).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_bfloat16_stays_near_float32(how):
    model, (latents, timesteps, text) = build(), inputs(6)
    with torch.no_grad():
        expected = model(latents, timesteps, text, Cameras.orbit(6))
        if how == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                got = model(latents, timesteps, text, Cameras.orbit(6))
        else:
            got = model.bfloat16()(latents.bfloat16(), timesteps, text.bfloat16(), Cameras.orbit(6))
    assert got.dtype == torch.bfloat16
    assert (got - expected).norm() < 0.05 * expected.norm()


def test_after_inference_mode_training_still_works():
    model, (latents, timesteps, text) = build(), inputs()
    cameras = Cameras.orbit(3)
    with torch.inference_mode():
        model(latents, timesteps, text, cameras)
    model(latents, timesteps, text, cameras).square().mean().backward()


@pytest.mark.parametrize("options, message", [
    (dict(mixers=("adjacent", "psychic")), "mixers must be different names out of .*psychic"),
    (dict(mixers=("adjacent", "dense")), "mixers must not hold both"),
    (dict(trajectory_window=4), "trajectory_window must be a positive odd number, got 4"),
    (dict(trajectory_radius=0.0), r"trajectory_radius must lie in \(0, 1\], got 0.0"),
    (dict(scan_order="hilbert"), "scan_order must be one of .*hilbert"),
    (dict(scan_layout="diagonal"), "scan_layout must be one of .*diagonal"),
    (dict(pool_window=0), "pool_window must be positive, got 0"),
    (dict(scan_chunk_size=0), "scan_chunk_size must be positive, got 0"),
    (dict(unet=dict(SMALL, num_class_embeds=3)), "must have no class embedding"),
])
def test_options_that_are_not_allowed_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        MultiviewUNet(**{"unet": dict(SMALL), **NARROW, **options})


def test_arguments_that_do_not_fit_together_are_named():
    model, (latents, timesteps, text), cameras = build(), inputs(), Cameras.orbit(3)
    for arguments, message in [
        ((latents, timesteps, text, Cameras.orbit(4)), "cameras must be 3 .* got 4"),
        ((latents[..., :4], timesteps, text, cameras), "latents must be .*H = W"),
        ((latents, timesteps[:1], text, cameras), r"timesteps must be \[2\], got \[1\]"),
        ((latents, timesteps, text[:1], cameras), r"prompt_embeds must be \[2,L,D\]"),
        ((latents, timesteps, text, cameras, torch.ones(2, 6)), "pooled must be None"),
        ((latents, timesteps, text, cameras, None, None, ("dense",)), "mixers must be different names out of"),
    ]:
        with pytest.raises(ValueError, match=message):
            model(*arguments)
