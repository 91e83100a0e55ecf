"""Symmetries of objects: what they do to a ring of views, and which ones the object of a prompt usually has.

Six in ten training assets look alike from the left and the right, cars, chairs and spaceships nearly all of them;
bottles look alike all round. What the denoiser draws leans. It may be told: its estimates are then averaged over the
symmetries asked for, or over those that the prompt's kind usually has, while the whole is decided. On rendered training
assets `coser.learn_symmetry` measures two files in a checkpoint's folder: `symmetries.json`, {kind: symmetries}, "" for
kinds that it does not list, and `symmetries.safetensors`, the map of the autoencoder's latents to those of the mirror
image, `weight` [C,C,3,3] and `bias` [C].
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from coser.data.assets import before_details

FILE, MIRROR = "symmetries.json", "symmetries.safetensors"
# Alike from the left and the right; from the front and the back; from four sides, a quarter turn apart; from all sides
SYMMETRIES = ("mirror", "back", "quarter", "round")
SEVERAL = re.compile(r"\b(?:on|beside|next to|behind|between|under|near|in front of|left of|right of)\b"
                     r"|\band (?:an?|the|one|two|three|four|some)\b")


@dataclass(frozen=True)
class Symmetries:
    """of_kind: kind => its usual symmetries (names of SYMMETRIES); "" => those of kinds that are not listed.

    mirror: weight and bias for the autoencoder's `set_mirror`, or None. nearest: a noun that is not listed => the kind
    that is nearest to it, or None.
    """

    of_kind: dict[str, tuple[str, ...]]
    mirror: tuple[Tensor, Tensor] | None = None
    nearest: Callable[[str], str | None] = lambda noun: None

    def of_prompt(self, prompt: str) -> tuple[str, ...]:
        """The usual symmetries of what a prompt asks for; none of several objects."""
        if SEVERAL.search(prompt.lower()):
            return ()
        words = re.findall(r"[^\W\d_]+(?:[-'][^\W\d_]+)*", before_details(prompt.lower()))
        if not words:
            return ()
        noun = words[-1]
        if noun not in self.of_kind and noun.removesuffix("s") in self.of_kind:
            return ()  # several of a kind
        if noun in self.of_kind:
            return self.of_kind[noun]
        near = self.of_kind.get(self.nearest(noun) or "", self.of_kind.get("", ()))
        return tuple(name for name in near if name in SYMMETRIES[:2])[:1]  # a teapot is near a pot, but not round

    def save(self, checkpoint: str | Path) -> None:
        """Writes symmetries.json and, of a map, symmetries.safetensors into a checkpoint's folder."""
        (Path(checkpoint) / FILE).write_text(json.dumps(self.of_kind) + "\n", "utf-8")
        if self.mirror:
            save_file(dict(zip(("weight", "bias"), self.mirror)), Path(checkpoint) / MIRROR)


def load_symmetries(checkpoint: str | Path, nearest: Callable[[str], str | None] = lambda noun: None) -> Symmetries:
    """Those in a checkpoint's folder; where it has none, nothing is known to be symmetric. nearest: see there."""
    folder, mirror = Path(checkpoint), None
    if not (folder / FILE).is_file():
        return Symmetries({}, None, nearest)
    if (folder / MIRROR).is_file():
        stored = load_file(folder / MIRROR)
        mirror = stored["weight"], stored["bias"]
    of_kind = json.loads((folder / FILE).read_text("utf-8"))
    return Symmetries({kind: tuple(names) for kind, names in of_kind.items()}, mirror, nearest)


def ring_symmetries(names: tuple[str, ...], num_views: int) -> list[tuple[list[int], bool]]:
    """The group that symmetries make of a ring of views: (which view takes each one's place, whether it is flipped).

    The first is the ring itself. names: some of SYMMETRIES; those that a ring of `num_views` lacks are left out. Views
    go round in even steps from the front: a mirror image's view i is view -i, flipped, one's from the back N/2 - i.
    """
    turns = [num_views // 4 if name == "quarter" else 1 for name in names
             if name == "round" or name == "quarter" and num_views % 4 == 0]
    mirrors = [num_views // 2 if name == "back" else 0 for name in names
               if name == "mirror" or name == "back" and num_views % 2 == 0]
    # two mirrors make a turn; all turns are multiples of the smallest
    smallest = math.gcd(num_views, *turns, *(m - mirrors[0] for m in mirrors))
    shifts = range(0, num_views, smallest)
    group = [([(i + shift) % num_views for i in range(num_views)], False) for shift in shifts]
    if mirrors:
        group += [([(mirrors[0] + shift - i) % num_views for i in range(num_views)], True) for shift in shifts]
    return group
