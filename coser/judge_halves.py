"""What a judge that knows single objects says of two that stand together: it is shown the halves of the ring.

A whole that two objects make is named as neither: of 44 true compositions of held-out assets the judge had both kinds
among its first five guesses in one. So the ring is cut by planes across the three axes, every half framed as an object
of its own, and both kinds must be among the first five guesses for the two halves of one cut: 28 of the 44. Many cuts
allow many guesses, so it is asked for the kinds of other compositions, too: 2.7 % of these are found.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from coser.cameras import Cameras, pixel_centers
from coser.judge import SIZE, Asked, first_guesses, ring_embedding
from coser.questions import is_name_of
from coser.views import ViewSet

CUTS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)  # where planes lie, as shares of the box
HALF_VIEWS = 6  # of the ring
LEAST_SHARE = 0.003  # of the pictures' pixels: a half that shows less is nothing

Guesses = tuple[str, ...]


def guesses_of_halves(judge: Asked, views: ViewSet, cameras: Cameras) -> list[tuple[Guesses, Guesses]]:
    """The judge's first guesses for both halves of every cut of a ring whose views have depths."""
    stride = max(1, len(views) // HALF_VIEWS)
    pictures = [half for cut in cut_in_two(views[::stride], cameras[::stride]) for half in cut]
    if not pictures:
        return []
    embeddings = judge.judge_pictures(torch.cat(pictures)).embeddings.split([len(half) for half in pictures])
    scores = judge.name_kinds(torch.stack([ring_embedding(e) for e in embeddings]).to(judge.device))
    top = [first_guesses(of_half, judge.config.kinds) for of_half in scores]
    return list(zip(top[::2], top[1::2]))


def share_apart(guesses: list[tuple[Guesses, Guesses]], pairs: Iterable[tuple[str, str]]) -> float:
    """The share of pairs of kinds that `are_apart`."""
    found = [are_apart(guesses, pair) for pair in pairs]
    return sum(found) / len(found)


def are_apart(guesses: Iterable[tuple[Guesses, Guesses]], kinds: tuple[str, str]) -> bool:
    """Whether one half of some cut is taken for one kind and the other half for the other, by any of their names."""
    def shows(half: Guesses, kind: str) -> bool:
        return any(is_name_of(word, kind) for word in half)

    one, other = kinds
    return any(shows(a, one) and shows(b, other) or shows(a, other) and shows(b, one) for a, b in guesses)


def cut_in_two(views: ViewSet, cameras: Cameras) -> list[tuple[Tensor, Tensor]]:
    """Pictures [N,4,128,128] (premultiplied RGB and coverage) of both halves of N views, for every cut that shows two.

    Halves lie on the two sides of a plane across an axis of the world; each is framed as assets are rendered, the
    sphere around it filling the pictures.
    """
    count, size = len(views), views.views.shape[-1]
    views, cameras = views.to("cpu"), cameras.to("cpu")
    rgba = torch.cat([views.views, views.masks], 1).float()
    shown = ((views.masks > 0.5) & (views.depths > 0)).flatten(1)
    points = cameras.unproject(pixel_centers(size).to(cameras.camera_to_world), views.depths.flatten(1).to(
        cameras.camera_to_world))
    if not bool(shown.any()):
        return []
    low, high = points[shown].amin(0), points[shown].amax(0)
    found = []
    for axis in (1, 0, 2):
        for share in CUTS:
            below = points[..., axis] < low[axis] + share * (high[axis] - low[axis])
            sides = [shown & below, shown & ~below]
            if all(float(side.float().mean()) >= LEAST_SHARE for side in sides):
                found.append(tuple(_framed(rgba * side.view(count, 1, size, size), points, side, cameras)
                                   for side in sides))
    return found


def _framed(rgba: Tensor, points: Tensor, side: Tensor, cameras: Cameras) -> Tensor:
    """Pictures of what `side` [N,P] shows of points [N,P,3], its box's middle in the middle of them."""
    seen = points[side]
    middle = (seen.amin(0) + seen.amax(0)) / 2
    radius = float((seen - middle).norm(dim=1).max())
    centers, _ = cameras.project(middle[None])  # [N,1,2]
    uv = centers.float() + (pixel_centers(SIZE) - 0.5) * radius
    grid = (2 * uv - 1).view(len(rgba), SIZE, SIZE, 2)
    return F.grid_sample(rgba, grid, align_corners=False)
