"""Train the judge of views: what object and colour they show, from which side, and which sentence fits them.

Objects and colours are asked as choices between sentences. Measured beside classifiers on the same trunk after 1,800
steps, over rings of assets kept aside (350 for objects, 356 for colours): first guesses right for objects 51 % (49 % by
a classifier of kinds), for colours 74 % (65 % by a classifier that sees colours without shapes), and of 123 repainted
rings 80 % (69 %). Sides need places: on one trunk, frozen, 4 x 4 places told 60 % of the sectors, the mean of all 41 %.
Widths begin at 32, not 64: 71 views a second on a core instead of 28, at as many weights. After 18 minutes of two cores
(96,000 views) 52 % of the objects of 252 rings kept aside came first, with 64, 128, 256 35 % after 40 of one (64,000);
after 4,500 steps (288,000) 61 %, and 72 % of 82 held-out ones.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import math
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from coser.data.assets import in_color, with_article
from coser.data.dataset import CHANNEL_ORDERS, Prefetched, Ring, is_copy, list_rings, step_generator
from coser.data.index import is_repainted
from coser.devices import choose_dtype
from coser.judge import SECTORS, Judgement, ViewJudge, azimuth_to_sector, sentence_states
from coser.judge_figures import (JudgedRing, SmallRing, fit_janus_rule, fronted, fronted_kinds, janus_figures,
                                 judge_rings, shape_of, side_figures, small_rings, word_figures)
from coser.models.efficientnet_lite import load_efficientnet_lite
from coser.optimizer import MasterOptimizer, learning_rate
from coser.train_loop import Log, Options, train_loop

VERB = "judge"
PRESETS = {
    "small": dict(model={}, batch_size=64, lr=1.5e-3, muon_lr=4e-3),
    "tiny": dict(model=dict(channels=(16, 16, 16), blocks=(1, 1, 1), embedding_dim=16), batch_size=4, lr=1e-3,
                 muon_lr=3e-3),
}
HELD_OUT_SHARE = 10  # one training asset in so many is kept aside, for figures about kinds that were trained on
# generated views are soft, a little noisy and not quite in place
SCALES, SHIFT, GAINS, TINT, NOISE = (0.85, 1.15), 0.06, (0.8, 1.15), 0.06, 0.02
SHARP, BLUR = 0.5, 1.6  # pixels; half a pixel is what resampling costs anyway
RECOLORED = 0.1  # share of views with swapped colour channels: their kind stays, but no colour word holds
PLAIN = 0.5  # share of views that are not altered, where the trunk is a backbone: it cannot learn not to mind
SECTOR_WEIGHT = 2.0
EMA = 0.995  # runs are short
SMOOTHING = 0.05
FORMS = ("caption", "object", "color_object")
FRONTS_OF_KIND = 8  # assets at most that say whether a kind has a front
NOTHING = -100  # a label that is not known; what cross_entropy ignores


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch-size", type=int, help="views a step, else the preset's")
    parser.add_argument("--min-kind-count", type=int, default=3, help="kinds of objects with so many assets")
    parser.add_argument("--min-color-count", type=int, default=10, help="main colours of so many assets")
    parser.add_argument("--start", type=Path, help="judge's folder to start from instead of random weights")
    parser.add_argument("--backbone", help="folder or hub id of an EfficientNet-Lite with timm's names, trained on "
                        "photographs, to see with instead of a trunk of its own")
    parser.add_argument("--seen-views", type=int, default=25_600, help="with --backbone, which is not trained: altered "
                        "views that it looks at once, before the training")


def is_kept_aside(ring: Ring) -> bool:
    """Whether an asset of the training folder is kept out of the training, and its copies with it."""
    return zlib.crc32(shape_of(ring).encode()) % HELD_OUT_SHARE == 0


def text_forms(ring: Ring) -> dict[str, list[str]]:
    """What people may type for an asset: one of FORMS => texts; none where colours are unknown."""
    colored = [in_color(ring.colors[0], noun) for noun in (ring.object, ring.kind)] if ring.colors else []
    return {"caption": list(ring.captions), "object": [with_article(ring.object)], "color_object": colored}


def load_states(texts: list[str], cache: Path) -> Tensor:
    """The sentence states of texts [M,384], kept in the file `cache` for the next start with the same texts."""
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    if cache.is_file():
        with safe_open(cache, "pt") as file:
            if (file.metadata() or {}).get("texts") == digest:
                return file.get_tensor("states")
    states = sentence_states(texts)
    save_file({"states": states}, cache, metadata={"texts": digest})
    return states


@dataclass(frozen=True)
class Labels:
    """What B views show.

    kinds, colors, sectors [B], NOTHING where unknown; texts: form => the rows of the text states that fit [B], NOTHING
    where none does.
    """

    kinds: Tensor
    colors: Tensor
    sectors: Tensor
    texts: dict[str, Tensor]

    def __getitem__(self, rows: Tensor) -> Labels:
        return Labels(self.kinds[rows], self.colors[rows], self.sectors[rows],
                      {form: found[rows] for form, found in self.texts.items()})

    @staticmethod
    def cat(parts: list[Labels]) -> Labels:
        kinds, colors, sectors = (torch.cat([getattr(p, n) for p in parts]) for n in ("kinds", "colors", "sectors"))
        return Labels(kinds, colors, sectors, {form: torch.cat([p.texts[form] for p in parts]) for form in FORMS})


@dataclass(frozen=True)
class JudgeBatch:
    """B views, pictures [B,4,128,128], and what they show."""

    pictures: Tensor
    labels: Labels


class JudgeBatches:
    """Draws altered views of random shapes, rare kinds more often than their number; a function of (seed, step).

    plain: the share of views that are at most mirrored.
    """

    def __init__(self, rings: list[SmallRing], kinds: list[str], colors: list[str], texts: list[str], batch_size: int,
                 seed: int = 0, plain: float = 0.0):
        self.assets: dict[str, list[SmallRing]] = defaultdict(list)
        for ring in rings:
            self.assets[shape_of(ring.ring)].append(ring)
        self.names = sorted(self.assets)
        counts = Counter(self.assets[n][0].ring.kind for n in self.names)
        self.weights = torch.tensor([counts[self.assets[n][0].ring.kind] ** -0.5 for n in self.names])
        self.kinds, self.colors = ({w: i for i, w in enumerate(words)} for words in (kinds, colors))
        self.rows = {text: i for i, text in enumerate(texts)}
        self.batch_size, self.seed, self.plain = batch_size, seed, plain

    def __call__(self, step: int) -> JudgeBatch:
        generator = step_generator(self.seed, step)

        def draw(n: int) -> int:
            return int(torch.randint(n, (), generator=generator))

        picks = torch.multinomial(self.weights, self.batch_size, replacement=True, generator=generator).tolist()
        recolored = torch.rand(self.batch_size, generator=generator) < RECOLORED
        mirrored = torch.rand(self.batch_size, generator=generator) < 0.5
        pictures, labels = [], defaultdict(list)
        for pick, other_colors in zip(picks, recolored.tolist()):
            rings = self.assets[self.names[pick]]
            small = rings[draw(len(rings))]
            view = draw(len(small.azimuths))
            pictures.append(small.pictures(slice(view, view + 1)))
            ring = small.ring
            labels["kinds"].append(self.kinds[ring.kind])
            known = ring.colors and not other_colors
            labels["colors"].append(self.colors.get(ring.colors[0], NOTHING) if known else NOTHING)
            sector = int(azimuth_to_sector(small.azimuths[view]))
            labels["sectors"].append(sector if small.front_known else NOTHING)
            for form, texts in text_forms(ring).items():
                text = draw(len(texts)) if texts else 0
                fits = texts and (form == "object" or not other_colors)
                labels[form].append(self.rows[texts[text]] if fits else NOTHING)
        found = {name: torch.tensor(values) for name, values in labels.items()}
        turned = torch.where(mirrored & (found["sectors"] != NOTHING), -found["sectors"] % SECTORS, found["sectors"])
        as_they_are = torch.cat(pictures)
        altered = alter(as_they_are, recolored, mirrored, generator)
        if self.plain:  # what swapped colours hide stays hidden
            plain = (torch.rand(self.batch_size, generator=generator) < self.plain) & ~recolored
            flipped = torch.where(mirrored[:, None, None, None], as_they_are.flip(-1), as_they_are)
            altered = torch.where(plain[:, None, None, None], flipped, altered)
        return JudgeBatch(altered, Labels(found["kinds"], found["colors"], turned,
                                          {form: found[form] for form in FORMS}))


class SeenViews:
    """Altered views that a judge whose trunk is not trained has looked at once; a batch is a function of the step."""

    @torch.no_grad()
    def __init__(self, judge: ViewJudge, batches: JudgeBatches, count: int):
        upcoming, parts, labels = Prefetched(batches), [], []
        for step in range(math.ceil(count / batches.batch_size)):
            batch = upcoming(step)
            parts.append([t.half().cpu() for t in judge.look(batch.pictures)])
            labels.append(batch.labels)
        self.seen, self.places = (torch.cat(tensors) for tensors in zip(*parts))
        self.labels, self.batch_size, self.seed = Labels.cat(labels), batches.batch_size, batches.seed

    def __call__(self, step: int) -> tuple[Tensor, Tensor, Labels]:
        rows = torch.randint(len(self.seen), (self.batch_size,), generator=step_generator(self.seed, step))
        return self.seen[rows], self.places[rows], self.labels[rows]


def alter(pictures: Tensor, recolored: Tensor, mirrored: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures [B,4,S,S] as a generator might have made them: moved, scaled, half of them blurred, tinted, and noisy.

    recolored, mirrored [B]: which to give swapped colour channels, which to flip left to right.
    """
    count = len(pictures)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    order = CHANNEL_ORDERS[torch.randint(1, 6, (count,), generator=generator) * recolored][:, :, None, None]
    color = pictures[:, :3].gather(1, order.expand_as(pictures[:, :3]))
    scale = uniform(*SCALES, count)
    shift = uniform(-SHIFT, SHIFT, 2, count) * pictures.shape[-1]
    sigma = torch.where(torch.rand(count, generator=generator) < 0.5, SHARP, uniform(SHARP, BLUR, count))
    down, across = (resampling(pictures.shape[-1], factor, along, sigma)
                    for factor, along in ((scale, shift[0]), (torch.where(mirrored, -scale, scale), shift[1])))
    moved = resample(torch.cat([color, pictures[:, 3:]], 1), down, across)
    gain = uniform(*GAINS, count, 1, 1, 1) * uniform(1 - TINT, 1 + TINT, count, 3, 1, 1)
    color, coverage = moved[:, :3] * gain, moved[:, 3:].clamp(0, 1)
    amount = uniform(0, NOISE, count, 1, 1, 1)
    color = color + amount * torch.randn(color.shape, generator=generator) * coverage
    return torch.cat([torch.minimum(color.clamp_min(0), coverage), coverage], 1)


def resampling(size: int, scale: Tensor, shift: Tensor, sigma: Tensor) -> Tensor:
    """Matrices [B,size,size] that move and blur columns of pixels: one a picture, so that both cost two products.

    Pixel i of the outcome is a Gaussian of `sigma` [B] pixels around `scale` [B] times its place (from the middle; a
    negative scale mirrors) plus `shift` [B] pixels; beyond the edges there is nothing.
    """
    ticks = torch.arange(size) - (size - 1) / 2
    sources = scale[:, None] * ticks + shift[:, None]
    distance = (sources[:, :, None] - ticks) / sigma[:, None, None]
    return torch.exp(-distance.square() / 2) / (math.sqrt(2 * math.pi) * sigma[:, None, None])


def resample(pictures: Tensor, down: Tensor, across: Tensor) -> Tensor:
    """Pictures [B,C,S,S] moved by the matrices [B,S,S] of `resampling`, its columns and its rows.

    In the dtype that is quick there: bfloat16 takes a thirtieth of float32's time on a core with AMX, and a product of
    64 pictures 67 times as long on one without.
    """
    b, c, size, _ = pictures.shape
    dtype, _ = choose_dtype(pictures.device)
    columns = pictures.to(dtype).permute(0, 2, 1, 3).reshape(b, size, c * size)
    rows = torch.bmm(down.to(dtype), columns).view(b, size * c, size)
    moved = torch.bmm(rows, across.to(dtype).transpose(1, 2)).view(b, size, c, size)
    return moved.permute(0, 2, 1, 3).float().contiguous()


def classification_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of scores [B,K] over the labels [B] that are known; 0 if none is."""
    total = F.cross_entropy(scores, labels, reduction="sum", label_smoothing=SMOOTHING, ignore_index=NOTHING)
    return total / (labels != NOTHING).sum().clamp_min(1)


def matching_loss(views: Tensor, texts: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
    """Contrastive loss (Radford et al. 2021, section 2.3) of B views and texts, embeddings [B,D], both ways.

    rows [B]: which text it is; views of the same text all fit it. Views with NOTHING take no part.
    """
    known = rows != NOTHING
    if not bool(known.any()):
        return views.sum() * 0
    scores = scale * views[known] @ texts[known].T
    fits = (rows[known][:, None] == rows[known]).to(scores)
    fits = fits / fits.sum(1, keepdim=True)
    return (F.cross_entropy(scores, fits) + F.cross_entropy(scores.T, fits)) / 2


def judge_loss(judge: ViewJudge, said: Judgement, labels: Labels, states: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of all questions, and its parts. states [M,384]: of all texts."""
    device = judge.device
    parts = {"kind": classification_loss(judge.name_kinds(said.embeddings), labels.kinds.to(device)),
             "color": classification_loss(judge.name_colors(said.embeddings), labels.colors.to(device)),
             "sector": classification_loss(said.sectors, labels.sectors.to(device))}
    matching = [matching_loss(said.embeddings, judge.embed_states(states[rows.clamp_min(0)]), rows.to(device),
                              judge.scale) for rows in labels.texts.values()]
    parts["text"] = torch.stack(matching).mean()
    loss = parts["kind"] + parts["color"] + SECTOR_WEIGHT * parts["sector"] + parts["text"]
    return loss, {name: part.detach() for name, part in parts.items()}


def words_of(rings: list[SmallRing], least_color: int) -> tuple[list[str], list[str]]:
    """The kinds of training rings, and the main colours of at least `least_color` of their assets, each sorted."""
    assets = {r.ring.asset_id: r.ring for r in rings if not is_copy(r.ring)}
    colors = Counter(ring.colors[0] for ring in assets.values() if ring.colors)
    return sorted({ring.kind for ring in assets.values()}), sorted(c for c, n in colors.items() if n >= least_color)


def run(options: argparse.Namespace, loop: Options) -> None:
    """The whole training from parsed options."""
    preset = PRESETS[options.preset]
    known = list_rings(options.renders, options.limit, options.min_kind_count)
    known = small_rings(known, loop.run / "views" / "train")
    rings = [r for r in known if not is_kept_aside(r.ring)]
    aside = [r for r in known if is_kept_aside(r.ring)]
    kept = {"kept": [r for r in aside if not is_copy(r.ring)],
            "repainted": list({shape_of(r.ring): r for r in aside if is_repainted(r.ring.asset_id)}.values()),
            "held_out": small_rings(list_rings(options.held_out), loop.run / "views" / "held-out")}
    kinds, colors = words_of(rings, options.min_color_count)
    texts = sorted({text for r in rings for form in text_forms(r.ring).values() for text in form})
    states = load_states(texts, loop.run / "texts.safetensors").to(options.device)
    torch.manual_seed(options.seed)
    backbone, weights = load_efficientnet_lite(options.backbone) if options.backbone else (None, {})
    judge = ViewJudge(kinds, colors, **preset["model"], backbone=backbone)
    if backbone:
        judge.trunk.load_state_dict(weights)
    if options.start:  # its words may be others; parts that it lacks keep their fresh weights
        start = load_file(options.start / "diffusion_pytorch_model.safetensors")
        judge.load_state_dict({k: v for k, v in start.items() if not k.endswith("_states")}, strict=False)
    judge.read_words()
    judge = judge.to(options.device, getattr(torch, options.dtype), memory_format=torch.channels_last)
    lr = learning_rate(preset, options.muon, options.lr)
    optimizer = MasterOptimizer(judge, lr=lr, ema_decay=EMA, use_muon=options.muon)
    batches = JudgeBatches(rings, kinds, colors, texts, options.batch_size or preset["batch_size"], options.seed,
                           PLAIN if backbone else 0.0)
    print(f"judge: {sum(p.numel() for p in judge.parameters()) / 1e6:.2f} M parameters, {options.dtype} on "
          f"{options.device}, {len(rings)} training rings, {len(aside)} kept aside and "
          f"{len(kept['held_out'])} held out, {len(kinds)} kinds, "
          f"{len(colors)} colours, {len(texts)} texts", flush=True)

    if backbone:
        looked_at = functools.cache(lambda: SeenViews(judge, batches, options.seen_views))  # a finished run needs none

        def loss_of_step(step: int) -> tuple[Tensor, dict]:
            seen, places, labels = looked_at()(step)
            said = judge.say(seen.to(judge.device, judge.dtype), places.to(judge.device, judge.dtype))
            return judge_loss(judge, said, labels, states)
    else:
        upcoming = Prefetched(batches)

        def loss_of_step(step: int) -> tuple[Tensor, dict]:
            batch = upcoming(step)
            return judge_loss(judge, judge(batch.pictures), batch.labels, states)

    def measure_fronts(judged_aside: list[JudgedRing]) -> None:  # of a thousand rings: takes minutes
        originals = {shape_of(r.ring): r for r in reversed(rings) if not is_copy(r.ring)}  # a ring of each shape
        of_kind = defaultdict(list)
        for ring in originals.values():
            of_kind[ring.ring.kind].append(ring)
        some = [ring for same in of_kind.values() for ring in same[:FRONTS_OF_KIND]]
        judge.register_to_config(fronted_kinds=fronted_kinds(judge_rings(judge, some)))
        with_front = fronted(judge, judged_aside)
        if with_front:  # else the judge has no rule, and says so when asked
            rule = fit_janus_rule(with_front)
            judge.register_to_config(janus_floor=rule["floor"], janus_ratio=rule["ratio"])

    def evaluate(step: int, log: Log) -> None:
        judged_groups = {name: judge_rings(judge, group) for name, group in kept.items()}
        measure_fronts(judged_groups["kept"])
        for name, judged in judged_groups.items():
            if not judged:
                continue
            figures = word_figures(judged, judge)
            if with_front := fronted(judge, judged):
                figures |= side_figures(with_front)
                if judge.config.janus_floor is not None:
                    figures |= janus_figures(with_front, judge.janus_rule)
            log(step=step, held_out=True, assets=name, **figures)

    def save_weights(folder: Path) -> None:  # with the fronts of the last evaluation; the run ends with one
        optimizer.averaged_copy(judge).save_pretrained(folder / "judge")

    train_loop(optimizer, loss_of_step, save_weights, evaluate, loop)
