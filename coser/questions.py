"""What a model is asked to draw where its drawings are judged: prompts drawn by lot, and lists of a file."""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from coser.data.dataset import Ring, is_copy

QUESTIONS = Path(__file__).parent / "data" / "questions.json"
MIN_KIND_COUNT = 3  # a kind with fewer assets is a word that a model has hardly met


@dataclass(frozen=True)
class Question:
    """A prompt and what its picture must show: the kind of object and the main colour.

    Or, of a composition, all of several `kinds`, the first of them in this `relation` to the second (one of
    `coser.data.scene_words.RELATIONS`); it has no main colour, "".
    """

    prompt: str
    object: str
    color: str = ""
    kinds: tuple[str, ...] = ()
    relation: str = ""


def draw_questions(rings: list[Ring], count: int, seed: int = 0) -> list[Question]:
    """Different prompts "a <colour> <kind>" from the captions' vocabulary.

    Kinds with at least MIN_KIND_COUNT assets, no plurals, drawn by the square root of their number; the colour is the
    main one of an asset of that kind. Raises ValueError where the rings do not hold so many different pairs.
    """
    assets = {r.asset_id: r for r in rings if r.colors and not is_copy(r)}
    counts = Counter(r.kind for r in assets.values())
    kinds = sorted(k for k, n in counts.items() if n >= MIN_KIND_COUNT and not re.search(r"[^su]s$", k))
    pairs = {k: sorted((a, r.colors[0]) for a, r in assets.items() if r.kind == k) for k in kinds}
    possible = sum(len({color for _, color in pairs[k]}) for k in kinds)
    if possible < count:
        raise ValueError(f"count must be at most {possible}, the pairs of colour and kind in these rings, got {count}")
    draw = np.random.default_rng(seed)
    chance = np.array([counts[k] ** 0.5 for k in kinds])
    found: dict[str, Question] = {}
    while len(found) < count:
        kind = kinds[draw.choice(len(kinds), p=chance / chance.sum())]
        color = pairs[kind][draw.integers(len(pairs[kind]))][1]
        prompt = f"{'an' if color[0] in 'aeiou' else 'a'} {color} {kind}"
        found.setdefault(prompt, Question(prompt, kind, color))
    return list(found.values())


def read_prompts(file: Path) -> list[str]:
    """The prompts of a text file, a line each; lines with nothing in them are none."""
    return [line.strip() for line in file.read_text("utf-8").splitlines() if line.strip()]


def load_questions(path: Path, name: str) -> list[Question]:
    """One list of a questions file. Raises ValueError naming the lists there are."""
    lists = json.loads(path.read_text("utf-8"))["lists"]
    if name not in lists:
        raise ValueError(f"questions must be one of {', '.join(lists)}, got {name!r}")
    return [Question(**{k: tuple(v) if k == "kinds" else v for k, v in entry.items()}) for entry in lists[name]]


def is_name_of(word: str, kind: str) -> bool:
    """Whether who calls a thing of this kind by this word is right: the kind itself, its plural, or a word for the
    same things (`same_words` in the questions file)."""
    return word == kind or word in (f"{kind}s", kind.removesuffix("s")) or frozenset((word, kind)) in _same_words()


@functools.cache
def _same_words() -> frozenset[frozenset[str]]:
    """All pairs of words of a group."""
    groups = json.loads(QUESTIONS.read_text("utf-8"))["same_words"]
    return frozenset(frozenset(pair) for group in groups for pair in itertools.combinations(group, 2))


def slug(prompt: str) -> str:
    """A prompt as a file name."""
    return re.sub(r"[^a-z0-9]+", "_", prompt.lower()).strip("_")
