"""Rings cut in two: halves that show one object each, and what a judge of single objects says of them."""

from types import SimpleNamespace

import pytest
import torch
from drawn_pipeline import NOTHING, box_views

from coser.cameras import Cameras
from coser.judge import SIZE, Judgement
from coser.judge_halves import CUTS, are_apart, cut_in_two, guesses_of_halves, share_apart
from coser.rasterizer import render
from coser.views import ViewSet
from tests.solids import cube, joined

CAMERAS = Cameras.orbit(8, 20.0)
KINDS = ("apple", "pond", "leaf")  # what is red, blue, green


@pytest.fixture(scope="module")
def boxes() -> ViewSet:
    """A small red cube that hovers over a large blue one."""
    (high, top, _), (low, bottom, _) = cube(0.15, (0, 0.55, 0)), cube(0.4, (0, -0.3, 0))
    red, blue = torch.tensor([0.8, 0.1, 0.1]), torch.tensor([0.1, 0.1, 0.8])
    solid = joined((high, top, red.expand(len(top), 3, 3)), (low, bottom, blue.expand(len(bottom), 3, 3)))
    return render(*solid, CAMERAS, 256, supersample=1)


class ColorJudge:
    """Calls pictures by their strongest colour."""

    device, config = torch.device("cpu"), SimpleNamespace(kinds=KINDS)

    def judge_pictures(self, pictures):
        return Judgement(pictures[:, [0, 2, 1]].mean((2, 3)), None)

    def name_kinds(self, embeddings):
        return embeddings


def test_some_cut_parts_two_objects_and_each_fills_its_pictures(boxes):
    halves = cut_in_two(boxes[::2], CAMERAS[::2])
    assert 0 < len(halves) <= 3 * len(CUTS)
    lower, upper = next(half for half in halves if half[1][:, 2].sum() < 0.3 * half[1][:, 0].sum())
    assert lower.shape == upper.shape == (4, 4, SIZE, SIZE)
    assert lower[:, 2].sum() > 3 * lower[:, 0].sum()
    for pictures, least in ((upper, 0.5), (lower, 0.5)):
        covered = pictures[:, 3] > 0.5
        rows, columns = covered.any(2).sum(1), covered.any(1).sum(1)
        assert (rows > least * SIZE).all() and (columns > least * SIZE).all()
        assert not covered[:, [0, -1]].any() and not covered[:, :, [0, -1]].any()  # nothing is cut off
        middle = (torch.arange(SIZE) * covered.any(1)).sum(1) / columns
        assert (middle - SIZE / 2).abs().max() < 0.1 * SIZE


def test_a_judge_of_single_objects_finds_both_in_the_halves_and_no_others(boxes):
    guesses = guesses_of_halves(ColorJudge(), boxes, CAMERAS)
    first = [(a[:1], b[:1]) for a, b in guesses]
    assert are_apart(first, ("apple", "pond")) and are_apart(first, ("pond", "apple"))
    assert not are_apart(first, ("apple", "leaf")) and not are_apart(first, ("apple", "apple"))
    assert share_apart(first, [("apple", "pond"), ("leaf", "pond")]) == 0.5


def test_one_object_is_not_two(boxes):
    guesses = guesses_of_halves(ColorJudge(), box_views("a red box", CAMERAS), CAMERAS)
    assert guesses and not are_apart([(a[:1], b[:1]) for a, b in guesses], ("apple", "pond"))


def test_both_halves_of_one_cut_are_asked_by_any_name():
    assert are_apart([(("sofa", "bed"), ("lamps",))], ("lamp", "couch"))
    assert not are_apart([(("lamp",), ("bed",)), (("sofa",), ("bed",))], ("lamp", "couch"))


def test_views_that_show_nothing_have_no_halves():
    assert guesses_of_halves(ColorJudge(), box_views(NOTHING, CAMERAS), CAMERAS) == []
