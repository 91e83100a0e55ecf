"""On CUDA, here a pretended one: everything lies where it computes, and what comes out is what the processor makes."""

import numpy as np
import pytest
import torch
from drawn_pipeline import box_views, quarter_size
from pretend_cuda import pretend_cuda
from safetensors.torch import load_file
from tiny import lighten, tiny_pipeline

from coser import train_denoiser
from coser.cameras import Cameras
from coser.consistency import fused_views
from coser.reconstruction import QUICK, reconstruct
from coser.reconstruction.fit import fit
from coser.train import main
from coser.train_loop import checkpoints
from coser.views import ViewSet


def test_what_cuda_refuses_is_refused():
    with pretend_cuda():
        there, here = torch.ones(3, 4, device="cuda"), torch.ones(3, 4)
        for mixing in (lambda: there + here, lambda: torch.cat([there, here]), lambda: here[there[:, 0].long()],
                       lambda: there.mul_(torch.from_numpy(np.ones((3, 4), np.float32))),
                       lambda: torch.nn.Linear(4, 2).to("cuda")(here)):
            with pytest.raises(RuntimeError, match="same device"):
                mixing()
        with pytest.raises(TypeError, match="numpy"):
            np.asarray(there)
        with pytest.raises(RuntimeError, match="generator"):
            torch.randn(3, generator=torch.Generator(), device="cuda")
        assert there.is_cuda and (there @ there.T)[0].is_cuda and there[torch.tensor([1])].is_cuda
        assert not there.cpu().is_cuda and here.to(there).is_cuda and np.asarray(there.cpu()).sum() == 12


def test_a_prompt_is_drawn_as_on_the_processor():
    def fuse(views: ViewSet, cameras: Cameras) -> ViewSet:
        return box_views("red", Cameras.orbit(len(cameras))).to(views.views.device)

    noise = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    asked = dict(num_views=4, num_inference_steps=2, latents=noise, consistency=0.5, fuse=fuse)
    expected = list(tiny_pipeline().stream("a red box", **asked))
    with pretend_cuda():
        steps = list(tiny_pipeline().to("cuda").stream("a red box", **asked))
        for step, other in zip(steps, expected, strict=True):
            for found, wanted in ((step.latents, other.latents), (step.denoised, other.denoised),
                                  (step.views.views, other.views.views), (step.views.depths, other.views.depths)):
                assert found.is_cuda
                torch.testing.assert_close(found.cpu(), wanted)


def test_views_become_the_same_surface():
    cameras = Cameras.orbit(6)
    views = quarter_size(box_views("red", cameras))
    expected = reconstruct(views, cameras, resolution=40, **QUICK)
    fitting = dict(resolution=32, steps=(2, 2, 1))
    fitted = fit(views, cameras, **fitting)
    with pretend_cuda():
        found = reconstruct(views.to("cuda"), cameras.to("cuda"), resolution=40, **QUICK)
        assert fused_views(views.to("cuda"), cameras.to("cuda")).views.is_cuda
        fitted_there = fit(views.to("cuda"), cameras.to("cuda"), **fitting)
    assert np.array_equal(found.vertices, expected.vertices) and np.array_equal(found.faces, expected.faces)
    assert np.array_equal(found.vertex_colors, expected.vertex_colors)
    assert all(np.array_equal(a, b) for a, b in zip(fitted_there, fitted))


@pytest.mark.parametrize("verb, arguments", [("autoencoder", []), ("denoiser", ["--correspondence", "0.1"])])
def test_a_training_runs(verb, arguments, renders, pipeline_folder, tmp_path, monkeypatch):
    lighten(monkeypatch)
    monkeypatch.setattr(train_denoiser, "rate_here", lambda device, dtype: 1.0)  # a GPU's product takes minutes here
    command = [verb, "--preset", "tiny", "--renders", str(renders[0]), "--held-out", str(renders[1]), "--steps", "1",
               "--dtype", "float32", "--data-on-device", *arguments]
    command += ["--autoencoder", str(pipeline_folder / "vae"), "--no-samples"] if verb == "denoiser" else []
    with pretend_cuda():
        main([*command, "--run", str(tmp_path / "run"), "--device", "cuda"])
    state = load_file(checkpoints(tmp_path / "run")[-1] / "training_state.safetensors")
    moments = [value for name, value in state.items() if name.endswith("exp_avg")]
    assert moments and any(m.any() for m in moments) and all(value.isfinite().all() for value in state.values())
