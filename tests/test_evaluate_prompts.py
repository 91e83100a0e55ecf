"""Scores and contact sheets of prompts, on a pipeline that draws boxes."""

import numpy as np
import pytest
import torch

from coser.evaluate_prompts import SHEET_TILE, SHEET_VIEWS, contact_sheet, evaluate_prompts, sheet_row
from coser.symmetry import Symmetries
from tests.drawn_pipeline import DrawnPipeline


class CalledPipeline(DrawnPipeline):
    def __call__(self, prompt: str, *, generator: torch.Generator, num_views: int, num_inference_steps: int,
                 symmetry: tuple[str, ...] = ()):
        *_, last = self.stream(prompt, num_views=num_views, elevation=20.0, guidance_scale=1.0, symmetry=symmetry,
                               num_inference_steps=num_inference_steps, negative_prompt="", generator=generator)
        return last


@pytest.fixture(scope="module")
def drawn():
    return list(evaluate_prompts(CalledPipeline(), ["a red box", "a blue box"], num_views=6, num_inference_steps=1))


def test_consistent_views_score_high_and_close_up(drawn):
    for score, _, _ in drawn:
        assert score.watertight and score.own_iou > 0.95 and score.own_psnr > 20 and score.cross > 18, score
        assert 0 < score.coverage < 1 and score.seconds > 0


def test_each_prompt_is_drawn_with_the_symmetries_of_its_kind():
    pipeline, seen = CalledPipeline(), []
    known = Symmetries({"box": ("back",), "fish": ()})
    for _ in evaluate_prompts(pipeline, ["a red box", "a blue fish"], symmetries=known, num_views=6,
                              num_inference_steps=1):
        seen.append(pipeline.symmetry)
    assert seen == [("back",), ()]


def test_shuffled_views_score_lower_than_consistent_ones(drawn):
    """The figure must fall where views contradict each other, or it measures nothing."""
    class Shuffled(CalledPipeline):
        def __call__(self, *args, **kwargs):
            step = super().__call__(*args, **kwargs)
            turned = type(step.cameras)(step.cameras.camera_to_world[[3, 0, 4, 1, 5, 2]])
            return type(step)(step.index, step.total, step.views, step.latents, step.denoised, turned)

    (score, _, _), = evaluate_prompts(Shuffled(), ["a red box"], num_views=6, num_inference_steps=1)
    assert score.own_psnr < drawn[0][0].own_psnr and score.own_iou < drawn[0][0].own_iou


def test_the_sheet_shows_every_prompt_and_its_colour(drawn):
    rows = [(score.prompt, sheet_row(result.views, mesh)) for score, result, mesh in drawn]
    assert rows[0][1].shape == (SHEET_VIEWS + 2, SHEET_TILE, SHEET_TILE, 3)
    sheet = np.asarray(contact_sheet(rows, columns=1)).astype(int)
    assert sheet.shape[1] == (SHEET_VIEWS + 2) * SHEET_TILE
    top, bottom = np.split(sheet, 2)
    assert (top[..., 0] - top[..., 2]).sum() > 0 > (bottom[..., 0] - bottom[..., 2]).sum()
