"""The table of quality: prompts => views => mesh, beside true renders (the ceiling) and shuffled views (the floor)."""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from coser import agreement
from coser.benchmark import watch_run
from coser.cameras import Cameras
from coser.consistency import CONSISTENCY, fused_views
from coser.data.dataset import Ring, list_rings
from coser.data.render import load_ring, save_ring
from coser.devices import add_dtype_option, dtype_asked_for
from coser.evaluate_prompts import SMALL, contact_sheet, sheet_row
from coser.judge import ViewJudge, is_janus, load_judge, nearest_distances, ring_embedding
from coser.metrics import psnr, render_mesh, sharpness, silhouette_iou
from coser.pipeline import CoSERPipeline
from coser.reconstruction import QUICK, reconstruct
from coser.stopwatch import Watch
from coser.views import ViewSet, views_to_uint8

VERB = "table"
QUESTIONS = Path(__file__).parent / "data" / "questions.json"
MIN_KIND_COUNT = 3  # a kind with fewer assets is a word that a model has hardly met
WORDS = ("object_right", "object_in_5", "color_right", "both_right", "kinds_in_2", "kinds_in_5", "caption_fit")
TSED_SHOWN = (1.0, 2.0, 5.0)  # pixels; the JSON file has the whole curve


@dataclass(frozen=True)
class Question:
    """A prompt and what its picture must show: the kind of object and the main colour.

    Or, of a composition, all of several `kinds`; it has no main colour, "".
    """

    prompt: str
    object: str
    color: str = ""
    kinds: tuple[str, ...] = ()


def draw_questions(rings: list[Ring], count: int, seed: int = 0) -> list[Question]:
    """Different prompts "a <colour> <kind>" from the captions' vocabulary.

    Kinds with at least MIN_KIND_COUNT assets, no plurals, drawn by the square root of their number; the colour is the
    main one of an asset of that kind. Raises ValueError where the rings do not hold so many different pairs.
    """
    assets = {r.asset_id: r for r in rings if r.colors and "~" not in r.asset_id}
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


def load_questions(path: Path, name: str) -> list[Question]:
    """One list of a questions file. Raises ValueError naming the lists there are."""
    lists = json.loads(path.read_text("utf-8"))["lists"]
    if name not in lists:
        raise ValueError(f"questions must be one of {', '.join(lists)}, got {name!r}")
    known = {field.name for field in fields(Question)}
    return [Question(**{k: tuple(v) if k == "kinds" else v for k, v in entry.items() if k in known})
            for entry in lists[name]]


def slug(prompt: str) -> str:
    """A prompt as a file name."""
    return re.sub(r"[^a-z0-9]+", "_", prompt.lower()).strip("_")


def draw_rings(pipeline: CoSERPipeline, questions: list[Question], folder: Path, seed: int = 0,
               **arguments) -> list[Ring]:
    """Draws each question's ring into `folder`, as coser.data.render writes renders; rings that exist are kept.

    `arguments` go to the pipeline. What each stage took, in seconds, stands in the index.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = read_index(folder)
    for question in questions:
        name = slug(question.prompt)
        if name in rows and (folder / f"{name}-0.safetensors").is_file():
            continue
        with Watch(pipeline.device) as watch:
            watch_run(watch, pipeline)
            began = time.perf_counter()
            result = pipeline(question.prompt, generator=torch.Generator().manual_seed(seed), **arguments)
            seconds = time.perf_counter() - began
        save_ring(folder / f"{name}-0.safetensors", result.views.to("cpu"), result.cameras.to("cpu"))
        stages = {stage.name: round(stage.seconds, 4) for stage in watch.stages.values() if stage.calls}
        rows[name] = {"id": name, "object": question.object, "captions": [question.prompt],
                      "colors": [question.color] if question.color else [], "kinds": list(question.kinds),
                      "seconds": round(seconds, 4), "stages": stages}
        (folder / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows.values()), "utf-8")
        print(f"{len(rows):4} {question.prompt:32} {seconds:6.1f} s", flush=True)
    wanted = {slug(q.prompt) for q in questions}
    return [r for r in list_rings(folder) if r.asset_id in wanted]


def read_index(folder: Path) -> dict[str, dict]:
    """What index.jsonl says of each asset, by id; empty where there is none."""
    index = folder / "index.jsonl"
    return {row["id"]: row for row in map(json.loads, index.read_text("utf-8").splitlines())} if index.is_file() else {}


def geometry_figures(views: ViewSet, cameras: Cameras) -> tuple[dict[str, float], ViewSet]:
    """How well a ring agrees with itself, and what its mesh is like: name => figure; and the mesh from its cameras."""
    began = time.perf_counter()
    mesh = reconstruct(views, cameras, **QUICK)
    seconds = time.perf_counter() - began
    seen = render_mesh(mesh, cameras, views.views.shape[-1])
    crossed = agreement.cross_render(views, cameras)
    curve = agreement.tsed(views, cameras)
    held_out_psnr, held_out_ssim = agreement.held_out_rerender(views, cameras)
    figures = {
        "cross_psnr": float(crossed.psnr.median()), "cross_chamfer": crossed.chamfer,
        "hull_iou": float(agreement.leave_one_out_hull_iou(views, cameras).mean()),
        "depth_agreement": float(agreement.neighbour_depth_agreement(views, cameras).mean()),
        "held_out_psnr": float(held_out_psnr.mean()), "held_out_ssim": float(held_out_ssim.mean()),
        "own_psnr": float(psnr(seen.on_background(), views.on_background()).mean()),
        "own_iou": float(silhouette_iou(seen.masks, views.masks).mean()),
        "sharpness": float(sharpness(views).median()), "matches": curve.matches,
        "watertight": float(mesh.is_watertight), "reconstruct_seconds": seconds,
    }
    return figures | {f"tsed_{t:g}": float(s) for t, s in zip(curve.thresholds, curve.consistent)}, seen


@torch.no_grad()
def judge_figures(judge: ViewJudge, reference: Tensor, ring: Ring, views: ViewSet,
                  cameras: Cameras) -> dict[str, float]:
    """Whether a ring shows what was asked for, once only, and how near it lies to the training assets.

    reference [M,D]: embeddings of the training assets' rings. Questions that make no sense for the ring's words (a kind
    that the judge was not taught, a Janus of a barrel) are left out. A composition is right when all its kinds are
    among the judge's first guesses for the ring: `kinds_in_2` and `kinds_in_5`. The judge was taught single objects
    alone, and a softmax has one first place: so no kind is asked for to be first, and true renders of compositions of
    held-out assets beside it say what such a count can reach.
    """
    said = judge.judge(views)
    figures = {"nearest": float(nearest_distances(ring_embedding(said.embeddings)[None], reference)[0]),
               "caption_fit": float((said.embeddings @ judge.embed_text([ring.captions[0]])[0]).mean())}
    if ring.kinds:
        if set(ring.kinds) <= set(judge.config.kinds):
            guesses = judge.verdict(said.embeddings, ring.kinds[0]).top_objects
            figures |= {f"kinds_in_{n}": float(set(ring.kinds) <= set(guesses[:n])) for n in (2, 5)}
        return figures
    if judge.has_front(ring.object):
        figures["janus"] = float(is_janus(said.sectors[:, 0].exp(), cameras.azimuths, **judge.janus_rule))
    color = ring.colors[0] if ring.colors and ring.colors[0] in judge.config.colors else None
    if ring.kind in judge.config.kinds:
        verdict = judge.verdict(said.embeddings, ring.object, color)
        figures |= {"object_right": float(verdict.object_rank == 1), "object_in_5": float(verdict.object_rank <= 5)}
        if color:
            figures |= {"color_right": float(verdict.color_rank == 1),
                        "both_right": float(verdict.object_rank == 1 == verdict.color_rank)}
    return figures


def reference_embeddings(judge: ViewJudge, rings: list[Ring], cache: Path) -> Tensor:
    """Embeddings [M,D] of the training assets, each from six views of its first ring; kept in `cache`."""
    rings = [r for r in rings if "~" not in r.asset_id and r.path.stem.endswith("-0")]
    weights = judge.to_embedding.weight.detach().numpy().tobytes()
    key = sha256(str([r.path.stem for r in rings]).encode() + weights).hexdigest()
    file = cache / f"reference-{key[:16]}.safetensors"
    if not file.is_file():
        found = []
        for ring in rings:
            views, _ = load_ring(ring.path)
            found.append(ring_embedding(judge.embed(views[::max(1, len(views) // 6)])))
        save_file({"embeddings": torch.stack(found)}, file)
    return load_file(file)["embeddings"]


class ClipScore:
    """CLIP's opinion: 100 x cosine of picture and prompt (Hessel et al. 2021 without the factor 2.5), mean over views.

    source: a folder or a hub id.
    """

    def __init__(self, source: str):
        from transformers import CLIPModel, CLIPProcessor  # a large model that only this figure needs

        self.model, self.processor = CLIPModel.from_pretrained(source).eval(), CLIPProcessor.from_pretrained(source)

    @torch.no_grad()
    def __call__(self, views: ViewSet, prompt: str) -> float:
        inputs = self.processor(text=[prompt], images=list(views_to_uint8(views)), return_tensors="pt", padding=True)
        return float(self.model(**inputs).logits_per_image.mean() / self.model.logit_scale.exp() * 100)


@dataclass(frozen=True)
class Column:
    """One column of the table: rings, how many of their views, in which order, and what is measured."""

    name: str
    rings: list[Ring]
    shuffled: bool = False


def score_column(column: Column, judge_of: Callable[[Ring, ViewSet, Cameras], dict[str, float]], num_views: int,
                 file: Path) -> list[dict]:
    """The figures of every ring of a column; those that `file` has already are taken from there.

    A shuffled column holds only figures of how the views agree. What a ring is judged by its words is asked of its
    mesh, too, seen by the same cameras: mesh_<name>. A ring that shows no surface gets `failed` in place of what it
    lacks.
    """
    done = {}
    if file.is_file():
        done = {row["id"]: row for row in map(json.loads, file.read_text("utf-8").splitlines())}
    for ring in column.rings:
        if ring.asset_id in done:
            continue
        views, cameras = load_ring(ring.path)
        stride = max(1, len(views) // num_views)
        views, cameras = views[::stride], cameras[::stride]
        figures = {} if column.shuffled else judge_of(ring, views, cameras)
        try:
            found, seen = geometry_figures(agreement.shuffled_ring(views) if column.shuffled else views, cameras)
            of_mesh = {} if column.shuffled else judge_of(ring, seen, cameras)
            figures |= found | {f"mesh_{k}": v for k, v in of_mesh.items() if k in WORDS} | {"failed": 0.0}
        except ValueError as error:  # views that show nothing, or shuffled ones that allow no surface
            figures |= {"failed": 1.0, "why": str(error)}
        done[ring.asset_id] = {"id": ring.asset_id, "prompt": ring.captions[0], **figures}
        with file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(done[ring.asset_id]) + "\n")
        print(f"{column.name:10} {ring.captions[0][:40]:40}", *(f"{k} {figures[k]:.2f}" for k in
              ("cross_psnr", "hull_iou", "object_right", "color_right") if k in figures), flush=True)
    return [done[ring.asset_id] for ring in column.rings]


@dataclass(frozen=True)
class Line:
    """One line of the table. figure: its name in the scores. of: how the rings' figures become one."""

    label: str
    figure: str
    of: Callable[[list[float]], float] = statistics.median
    form: str = "{:.3f}"


def share(values: list[float]) -> float:
    """The mean, of what is 0 or 1 for each ring."""
    return statistics.fmean(values)


LINES = (
    Line("odd/even cross-render PSNR, dB", "cross_psnr", form="{:.1f}"),
    Line("odd/even Chamfer distance, radii", "cross_chamfer", form="{:.4f}"),
    Line("leave-one-out hull IoU", "hull_iou"),
    *(Line(f"TSED, pairs consistent within {t:g} px", f"tsed_{t:g}", share) for t in TSED_SHOWN),
    Line("SIFT matches a pair of neighbours", "matches", form="{:.0f}"),
    Line("depth agreement of neighbours", "depth_agreement"),
    Line("held-out re-render PSNR, dB", "held_out_psnr", form="{:.1f}"),
    Line("held-out re-render SSIM", "held_out_ssim"),
    Line("mesh against its own views, PSNR, dB", "own_psnr", form="{:.1f}"),
    Line("mesh against its own views, silhouette IoU", "own_iou"),
    Line("sharpness of the views", "sharpness", form="{:.2f}"),
    Line("meshes watertight", "watertight", share, "{:.1%}"),
    Line("rings without a surface", "failed", share, "{:.1%}"),
    Line("object right, first guess of the judge", "object_right", share, "{:.1%}"),
    Line("object among its first five", "object_in_5", share, "{:.1%}"),
    Line("all objects of a composition among its first two", "kinds_in_2", share, "{:.1%}"),
    Line("all objects of a composition among its first five", "kinds_in_5", share, "{:.1%}"),
    Line("colour right", "color_right", share, "{:.1%}"),
    Line("object and colour right", "both_right", share, "{:.1%}"),
    Line("fit of views and caption, cosine", "caption_fit"),
    Line("object right on the mesh", "mesh_object_right", share, "{:.1%}"),
    Line("object among the first five on the mesh", "mesh_object_in_5", share, "{:.1%}"),
    Line("all objects of a composition among the first five on the mesh", "mesh_kinds_in_5", share, "{:.1%}"),
    Line("object and colour right on the mesh", "mesh_both_right", share, "{:.1%}"),
    Line("fit of mesh and caption, cosine", "mesh_caption_fit"),
    Line("CLIP score", "clip", form="{:.1f}"),
    Line("Janus rings", "janus", share, "{:.1%}"),
    Line("distance to the nearest training asset", "nearest"),
    Line("seconds from prompt to views", "seconds", form="{:.1f}"),
    Line("seconds from views to mesh", "reconstruct_seconds", form="{:.2f}"),
)


def summarise(scores: dict[str, list[dict]]) -> dict[str, dict[str, float]]:
    """Column => name of the figure => median or share, and "<name>/count": how many rings it was asked of."""
    out: dict[str, dict[str, float]] = {}
    for column, rows in scores.items():
        out[column] = {}
        for line in LINES:
            values = [row[line.figure] for row in rows if line.figure in row]
            if values:
                out[column] |= {line.figure: line.of(values), f"{line.figure}/count": len(values)}
    return out


def markdown(summary: dict[str, dict[str, float]], stages: dict[str, float]) -> str:
    """The table as Markdown; `stages` (name => median seconds a prompt) follow as a second one."""
    columns = list(summary)
    lines = ["| median, or share of the rings | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for line in LINES:
        if any(line.figure in summary[c] for c in columns):
            cells = [line.form.format(summary[c][line.figure]) if line.figure in summary[c] else "" for c in columns]
            lines.append(f"| {line.label} | " + " | ".join(cells) + " |")
    if stages:
        lines += ["", "| stage of drawing | seconds a prompt, median |", "|---|---|",
                  *(f"| {name} | {seconds:.2f} |" for name, seconds in stages.items())]
    return "\n".join(lines) + "\n"


def spread(rings: list[Ring], limit: int | None) -> list[Ring]:
    """`limit` of the rings, evenly from first to last."""
    if limit is None or limit >= len(rings):
        return rings
    return [rings[i * len(rings) // limit] for i in range(limit)]


def draw_sheet(rings: list[Ring], path: Path) -> None:
    """The rings' views and meshes as a labelled picture at `path`; no mesh where views show no surface."""
    rows = []
    for ring in rings:
        views, cameras = load_ring(ring.path)
        try:
            mesh = reconstruct(views, cameras, **QUICK)
        except ValueError:
            mesh = None
        rows.append((ring.captions[0], sheet_row(views, mesh)))
    path.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(rows).save(path)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, default=SMALL, help="pipeline folder")
    parser.add_argument("--judge", type=Path, required=True, help="folder of a trained judge")
    parser.add_argument("--held-out", type=Path, required=True, help="renders of held-out assets: ceiling and floor")
    parser.add_argument("--renders", type=Path, required=True, help="renders of the training assets: what may have "
                        "been memorised")
    parser.add_argument("--out", type=Path, required=True, help="folder for rings, scores and the table; what is there "
                        "already is not made again")
    parser.add_argument("--questions", type=Path, default=QUESTIONS, help="JSON file of lists of prompts")
    parser.add_argument("--list", default="vocabulary", help="which of its lists")
    parser.add_argument("--limit", type=int, help="the first so many prompts")
    parser.add_argument("--held-out-limit", type=int, help="so many of the held-out rings, spread evenly")
    parser.add_argument("--sheet", type=Path, help="where a contact sheet of the first prompts goes (PNG or WebP)")
    parser.add_argument("--sheet-prompts", type=int, default=40, help="how many prompts are on it")
    parser.add_argument("--clip", help="folder or hub id of a CLIP model, for its score")
    parser.add_argument("--num-views", type=int, default=12)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--consistency", type=float, default=CONSISTENCY)
    parser.add_argument("--seed", type=int, default=0)
    add_dtype_option(parser)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def run(options: argparse.Namespace) -> None:
    pipeline = CoSERPipeline.from_pretrained(options.checkpoint, dtype=dtype_asked_for(options)).to(options.device)
    pipeline.set_progress_bar_config(disable=True)
    questions = load_questions(options.questions, options.list)[:options.limit]
    drawn = draw_rings(pipeline, questions, options.out / "rings", options.seed, num_views=options.num_views,
                       num_inference_steps=options.steps, guidance_scale=options.guidance_scale,
                       consistency=options.consistency, fuse=fused_views)
    if options.sheet:
        by_prompt = {ring.captions[0]: ring for ring in drawn}
        draw_sheet([by_prompt[q.prompt] for q in questions[:options.sheet_prompts]], options.sheet)
    judge = load_judge(options.judge)
    reference = reference_embeddings(judge, list_rings(options.renders), options.out)
    clip = ClipScore(options.clip) if options.clip else None

    def judge_of(ring: Ring, views: ViewSet, cameras: Cameras) -> dict[str, float]:
        figures = judge_figures(judge, reference, ring, views, cameras)
        return figures | ({"clip": clip(views, ring.captions[0])} if clip else {})

    held_out = spread(list_rings(options.held_out), options.held_out_limit)
    columns = (Column("generated", drawn), Column("true renders", held_out),
               Column("shuffled renders", held_out, shuffled=True))
    scores = {column.name: score_column(column, judge_of, options.num_views,
                                        options.out / f"{slug(column.name)}.jsonl") for column in columns}
    index = read_index(options.out / "rings")
    scores["generated"] = [row | {"seconds": index[row["id"]]["seconds"]} for row in scores["generated"]]
    summary = summarise(scores)
    names = {name for row in index.values() for name in row["stages"]}
    stages = {name: statistics.median(row["stages"].get(name, 0.0) for row in index.values()) for name in sorted(names)}
    table = markdown(summary, stages)
    (options.out / "table.md").write_text(table, "utf-8")
    chosen = {k: str(v) for k, v in vars(options).items() if k != "run"}
    (options.out / "table.json").write_text(json.dumps(
        {"options": chosen, "summary": summary, "stages": stages, "rings": scores}, indent=1) + "\n", "utf-8")
    print(table)
