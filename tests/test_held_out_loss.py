"""The held-out loss: what is asked of a checkpoint, and what perfect and empty answers come to."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from coser import evaluate
from coser.caption_states import CaptionStates
from coser.data.dataset import Ring
from coser.held_out_loss import LEVELS, held_out_losses

CLEAN = 0.7
TEXTS = CaptionStates({"a cube": torch.zeros(3, 384), "a ball": torch.zeros(5, 384)})


class Answering:
    """A denoiser that answers by a function of the noisy latents and the level, and remembers what it was asked."""

    device, dtype, config = torch.device("cpu"), torch.float32, SimpleNamespace(pooled_dim=0)

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def __call__(self, noisy, times, states, cameras, **others):
        self.asked.append((noisy, float(times) / 1000, len(cameras), float(cameras.elevations[0]), states.shape[1]))
        return self.answer(noisy, float(times) / 1000)


def losses(answer, count: int = 3, length: int = 12) -> tuple[dict, list]:
    unet = Answering(answer)
    rings = [Ring(Path(f"{i}-0"), str(i), "", (("a cube", "a ball")[i % 2],), ()) for i in range(count)]
    latents, elevations = [torch.full((length, 4, 8, 8), CLEAN)] * count, [10.0 * i for i in range(count)]
    return held_out_losses(unet, rings, latents, elevations, TEXTS), unet.asked


def test_who_knows_the_clean_latents_makes_no_error():
    found, _ = losses(lambda noisy, level: (noisy - CLEAN) / level)
    assert found.keys() == {"loss", *(f"loss_{level}" for level in LEVELS)}
    assert max(found.values()) < 1e-9


def test_who_answers_nothing_errs_by_the_flow_s_own_size():
    found, _ = losses(lambda noisy, level: torch.zeros_like(noisy), count=6)
    assert all(value == pytest.approx(1 + CLEAN**2, rel=0.06) for value in found.values())


def test_the_loss_is_the_mean_over_the_levels():
    found, _ = losses(lambda noisy, level: (noisy - CLEAN) / level + level)
    assert [found[f"loss_{level}"] for level in LEVELS] == pytest.approx([level**2 for level in LEVELS], rel=1e-4)
    assert found["loss"] == pytest.approx(sum(level**2 for level in LEVELS) / len(LEVELS), rel=1e-4)


def test_rings_take_turns_in_their_numbers_of_views_and_keep_their_own_elevations_and_captions():
    _, asked = losses(lambda noisy, level: noisy)
    assert [level for _, level, *_ in asked] == pytest.approx(LEVELS * 3)
    assert [rest for _, _, *rest in asked[::len(LEVELS)]] == [[4, 0.0, 3], [6, 10.0, 5], [12, 20.0, 3]]
    _, asked = losses(lambda noisy, level: noisy, length=8)
    assert {views for _, _, views, *_ in asked} == {8}


def test_all_checkpoints_are_asked_the_same():
    _, one = losses(lambda noisy, level: noisy)
    _, other = losses(lambda noisy, level: -noisy)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(one, other, strict=True))
    assert not torch.equal(one[0][0], one[len(LEVELS)][0][:, :4])  # but each ring has noise of its own


def test_the_command_tells_a_checkpoint_s_loss(pipeline_folder, renders, tmp_path, capsys):
    held_out = shutil.copytree(renders[1], tmp_path / "held-out")
    options = evaluate.parser().parse_args(["loss", "--renders", str(held_out), "--checkpoint", str(pipeline_folder)])
    options.run(options)
    options.run(options)  # from the latents that lie there now
    lines = [line for line in capsys.readouterr().out.splitlines() if "loss_" in line]
    assert len(lines) == 2 and lines[0] == lines[1]
    figures = dict(re.findall(r"(loss[_.\d]*) ([\d.]+)", lines[0]))
    assert list(figures) == ["loss", *(f"loss_{level}" for level in LEVELS)]
    assert all(0 < float(value) < 100 for value in figures.values())
