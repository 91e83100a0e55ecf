"""Switching mixers off one by one: every variant is drawn, from the same noise, and differences are told."""

from dataclasses import replace

import pytest
import torch
from drawn_pipeline import DrawnPipeline

from coser.evaluate_mixers import evaluate_mixers, markdown, variants
from coser.models.unet import MIXERS
from coser.pipeline import MultiviewStep


class DimmedPipeline(DrawnPipeline):
    """Draws a box that is the darker the fewer mixers work."""

    def __init__(self):
        super().__init__()
        self.noise = []

    def __call__(self, prompt: str, *, generator: torch.Generator, num_views: int, mixers: tuple) -> MultiviewStep:
        *_, last = self.stream(prompt, num_views=num_views, elevation=20.0, guidance_scale=1.0, num_inference_steps=1,
                               negative_prompt="", generator=generator, mixers=mixers)
        self.noise.append(last.latents)
        return replace(last, views=replace(last.views, views=last.views.views * (1 + len(mixers)) / 5))


def test_variants_leave_out_none_each_and_all():
    found = variants(MIXERS)
    assert list(found) == ["none", *MIXERS, "all"] and found["none"] == MIXERS and found["all"] == ()
    assert all(set(MIXERS) - set(found[name]) == {name} for name in MIXERS)


@pytest.fixture(scope="module")
def drawn():
    pipeline = DimmedPipeline()
    return pipeline, [score for score, _ in evaluate_mixers(pipeline, ["a red box"], num_views=6)]


def test_every_variant_starts_from_the_same_noise_and_only_the_first_is_the_whole(drawn):
    pipeline, scores = drawn
    assert all(torch.equal(noise, pipeline.noise[0]) for noise in pipeline.noise)
    assert [score.switched_off for score in scores] == ["none", *MIXERS, "all"]
    apart = [score.apart for score in scores]
    assert apart[0] == 0 < apart[1] == apart[2] == apart[3] == apart[4] < apart[5]
    assert all(score.cross > 15 and score.coverage > 0.05 and score.seconds > 0 for score in scores)


def test_the_table_has_a_row_a_variant(drawn):
    table = markdown([vars(score) for score in drawn[1]])
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == [f"| {n}" for n in ("none", *MIXERS, "all")]
