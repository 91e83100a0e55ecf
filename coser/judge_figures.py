"""How right the judge is about renders that it was not trained on, and the rules that are measured on renders."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from coser.data.dataset import Ring
from coser.data.index import original_id, read_index
from coser.data.render import load_ring
from coser.judge import (SIZE, ViewJudge, angular_distance, azimuth_to_sector, is_janus, ring_embedding, second_front,
                         views_to_pictures)
from coser.whole_files import whole_file

TOLD_RATIO, TOLD_SHARE = 0.5, 0.8  # see `is_front_told` and `fronted_kinds`
RING_VIEWS = 12  # of a ring that is judged
MOST_FALSE_JANUS = 0.015


def shape_of(ring: Ring) -> str:
    """The asset whose shape a ring shows: repainted copies share that of the original, stretched ones nearly."""
    return original_id(ring.asset_id)


@dataclass(frozen=True)
class SmallRing:
    """A ring as the judge reads it.

    path: safetensors file of rgba uint8 [N,4,128,128], premultiplied, and azimuths. azimuths [N], degrees. front_known:
    whether the asset's front is known to lie at azimuth 0.
    """

    path: Path
    ring: Ring
    azimuths: Tensor
    front_known: bool

    def pictures(self, views: slice = slice(None)) -> Tensor:
        """Some of its pictures, [n,4,128,128] in [0,1]."""
        with safe_open(self.path, "pt") as file:
            return file.get_slice("rgba")[views].float() / 255


def small_rings(rings: list[Ring], cache: Path) -> list[SmallRing]:
    """The rings at the judge's size, kept in `cache` under their own names for the next start.

    Scenes of several kinds are left out: neither would be their name.
    """
    fronts = {asset: row.get("front_known", True) for asset, row in read_index(rings[0].path.parent).items()}
    cache.mkdir(parents=True, exist_ok=True)
    rings = [r for r in rings if not r.kinds]
    for ring in rings:
        path = cache / ring.path.name
        if not path.is_file():
            views, cameras = load_ring(ring.path)
            rgba = (views_to_pictures(views).clamp(0, 1) * 255).round().to(torch.uint8)
            with whole_file(path) as writing:
                save_file({"rgba": rgba, "azimuths": cameras.azimuths.float().contiguous()}, writing)
    out = []  # what is kept comes after all that is not: between the rings' megabytes it held on to 13 of each
    for ring in rings:
        with safe_open(cache / ring.path.name, "pt") as file:
            azimuths = file.get_tensor("azimuths").clone()  # without the file's memory
        out.append(SmallRing(cache / ring.path.name, ring, azimuths, fronts[ring.asset_id]))
    return out


@dataclass(frozen=True)
class JudgedRing:
    """What the judge says of a ring's RING_VIEWS views or fewer: [N,...], see `coser.judge.Judgement`.

    copied_front: the front-likeness of a copy of the view from the front, a tenth smaller and at half the sharpness.
    """

    small: SmallRing
    azimuths: Tensor
    embeddings: Tensor
    sectors: Tensor
    copied_front: float

    @property
    def front_likeness(self) -> Tensor:
        return self.sectors[:, 0].exp()


def judge_rings(judge: ViewJudge, rings: list[SmallRing]) -> list[JudgedRing]:
    """Every ring judged, its views spread evenly."""
    out = []
    for small in rings:
        stride = slice(0, None, max(1, len(small.azimuths) // RING_VIEWS))
        pictures, azimuths = small.pictures(stride), small.azimuths[stride]
        front = pictures[_nearest(azimuths, 0.0)][None]
        copy = F.pad(F.interpolate(F.avg_pool2d(front, 2), (SIZE - 12, SIZE - 12), mode="bilinear"), (6, 6, 6, 6))
        said = judge.judge_pictures(torch.cat([pictures, copy]))
        out.append(JudgedRing(small, azimuths, said.embeddings[:-1], said.sectors[:-1],
                              float(said.sectors[-1, 0].exp())))
    return out


def _nearest(azimuths: Tensor, azimuth: float) -> int:
    return int(angular_distance(azimuths, torch.tensor(azimuth)).argmin())


def _share(hits: list[Tensor]) -> float:
    """Of lists of true and false [n], the share of true; nan of none."""
    return float(torch.cat([h.float().reshape(-1) for h in hits]).mean()) if hits else float("nan")


@torch.no_grad()
def word_figures(judged: list[JudgedRing], judge: ViewJudge) -> dict[str, float]:
    """How often the kind and the main colour are the first guess, or among the first: by view, and by ring.

    objects, colored: how many rings have a kind and a colour that the judge knows.
    """
    figures = {}
    for name, count, words, word_of, scores_of, tops in (
            ("object", "objects", judge.config.kinds, lambda r: r.kind, judge.name_kinds, (1, 5)),
            ("color", "colored", judge.config.colors, lambda r: (r.colors or ("",))[0], judge.name_colors, (1, 2))):
        words = list(words)
        asked = [(r, words.index(word_of(r.small.ring))) for r in judged if word_of(r.small.ring) in words]
        figures[count] = len(asked)
        for level, pick in (("view", lambda e: e), ("ring", lambda e: ring_embedding(e)[None])):
            scores = [scores_of(pick(r.embeddings).to(judge.device)).cpu() for r, _ in asked]
            for top in tops:
                hits = [(s.topk(min(top, len(words))).indices == label).any(1) for s, (_, label) in zip(scores, asked)]
                figures[f"{name}_top{top}_{level}"] = _share(hits)
    return figures


def side_figures(judged: list[JudgedRing]) -> dict[str, float]:
    """How often sides are told rightly, of rings that have a front.

    sector: the eighth of the circle. front: more front than not is right; front_recall: of the views from the front;
    front_false: of views at least 90 degrees from it. front_first: the ring's most front-like view is one.
    """
    sectors = [azimuth_to_sector(r.azimuths) for r in judged]
    likeness = [r.front_likeness for r in judged]
    away = [angular_distance(r.azimuths, torch.zeros(())) >= 90 for r in judged]
    return {"fronted": len(judged),
            "sector_view": _share([r.sectors.argmax(1) == s for r, s in zip(judged, sectors)]),
            "front_view": _share([(f > 0.5) == (s == 0) for f, s in zip(likeness, sectors)]),
            "front_recall": _share([f[s == 0] > 0.5 for f, s in zip(likeness, sectors)]),
            "front_false": _share([f[a] > 0.5 for f, a in zip(likeness, away)]),
            "front_first_ring": _share([s[f.argmax()] == 0 for f, s in zip(likeness, sectors)])}


def is_front_told(judged: JudgedRing) -> bool:
    """Whether a ring's most front-like view is from the front, and views elsewhere are clearly less so."""
    likeness = judged.front_likeness
    first, second = second_front(likeness, judged.azimuths)
    return int(azimuth_to_sector(judged.azimuths[likeness.argmax()])) == 0 and second < TOLD_RATIO * first


def fronted_kinds(judged: list[JudgedRing]) -> list[str]:
    """The kinds that have a front, in alphabetical order.

    Those of which the front is told (`is_front_told`) in at least TOLD_SHARE of the rings whose front is known, and is
    known in at least half of them. What looks alike from several sides, such as bottles and tables, has none: the judge
    finds its front everywhere. Nor have kinds whose assets do not agree on a front, such as plants.
    """
    told, total = defaultdict(list), Counter(r.small.ring.kind for r in judged)
    for ring in judged:
        if ring.small.front_known:
            told[ring.small.ring.kind].append(is_front_told(ring))
    return sorted(k for k, found in told.items()
                  if len(found) >= total[k] / 2 and sum(found) >= TOLD_SHARE * len(found))


def fronted(judge: ViewJudge, judged: list[JudgedRing]) -> list[JudgedRing]:
    """Those with a front: known of the asset, and usual of its kind."""
    return [r for r in judged if r.small.front_known and r.small.ring.kind in judge.config.fronted_kinds]


def repeated_front(judged: JudgedRing) -> Tensor:
    """A ring's front-likeness [N] had a copy of its front (`JudgedRing.copied_front`) been put at the back."""
    out = judged.front_likeness.clone()
    out[_nearest(judged.azimuths, 180.0)] = judged.copied_front
    return out


def fit_janus_rule(judged: list[JudgedRing]) -> dict[str, float]:
    """The `floor` and `ratio` for `is_janus` that find most repeated fronts.

    Among those by which at most MOST_FALSE_JANUS of the true rings are called Janus; of equals the middle one.
    Raises ValueError when there are no rings to measure it on.
    """
    if not judged:
        raise ValueError("judged must hold rings that have a front, to measure a rule for Janus rings on; got none")
    true = torch.tensor([second_front(r.front_likeness, r.azimuths) for r in judged])
    repeated = torch.tensor([second_front(repeated_front(r), r.azimuths) for r in judged])

    def called(pairs: Tensor, floor: float, ratio: float) -> float:
        return float(((pairs[:, 1] >= floor) & (pairs[:, 1] >= ratio * pairs[:, 0])).float().mean())

    # a second front that must all but equal the first would find nothing but exact copies
    rules = [(floor / 50, ratio / 50) for floor in range(1, 46) for ratio in range(10, 46)]
    mild = [rule for rule in rules if called(true, *rule) <= MOST_FALSE_JANUS] or rules[-1:]
    best = max((called(repeated, *rule), -called(true, *rule)) for rule in mild)
    equals = [rule for rule in mild if (called(repeated, *rule), -called(true, *rule)) == best]
    floor, ratio = (sum(values) / len(equals) for values in zip(*equals))
    floor, ratio = min(equals, key=lambda r: (r[0] - floor)**2 + (r[1] - ratio)**2)
    return {"floor": floor, "ratio": ratio}


def janus_figures(judged: list[JudgedRing], rule: dict[str, float]) -> dict[str, float]:
    """Shares of rings called Janus: as they are, and with the front copied to the back."""
    true = [torch.tensor(is_janus(r.front_likeness, r.azimuths, **rule)) for r in judged]
    repeated = [torch.tensor(is_janus(repeated_front(r), r.azimuths, **rule)) for r in judged]
    return {"janus_true": _share(true), "janus_repeated": _share(repeated)}
