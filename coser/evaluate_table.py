"""The table of quality: prompts => views => mesh, beside true renders (the ceiling) and shuffled views (the floor)."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from coser import agreement
from coser.benchmark import watch_run
from coser.cameras import Cameras
from coser.consistency import CONSISTENCY, fused_views
from coser.data.dataset import Ring, first_rings, list_rings
from coser.data.index import read_index, write_index
from coser.data.render import load_ring, save_ring
from coser.devices import dtype_asked_for
from coser.epipolar import tsed
from coser.evaluate_prompts import (add_sampling_options, add_symmetry_option, contact_sheet, load_pipeline,
                                    sampling_arguments, sheet_row, symmetries_asked_for)
from coser.judge import Asked, is_janus, nearest_distances, ring_embedding
from coser.judge_halves import are_apart, guesses_of_halves, share_apart
from coser.judges import load_judges
from coser.metrics import psnr, render_mesh, sharpness, silhouette_iou
from coser.pipeline import CoSERPipeline
from coser.quality_table import markdown, summarise
from coser.questions import QUESTIONS, Question, is_name_of, load_questions, slug
from coser.reconstruction import QUICK, reconstruct
from coser.scene_meshes import put_together
from coser.scene_prompts import LifeSizes, scene_plan
from coser.stopwatch import Watch
from coser.symmetry import Symmetries
from coser.views import ViewSet, views_to_uint8
from coser.vocabulary import sentence_embedder

VERB = "table"
WORDS = ("object_right", "object_named", "object_in_5", "object_log_likelihood", "color_right", "both_right",
         "both_named", "kinds_in_2", "kinds_in_5", "kinds_apart", "caption_fit")


# of them what is so or not: a mesh that there is not is none of it
SHARES = tuple(word for word in WORDS if word not in ("object_log_likelihood", "caption_fit"))
MEASURED = 2  # what these figures mean; a later number measures anew what lies in a folder


def draw_rings(pipeline: CoSERPipeline, questions: list[Question], folder: Path, seed: int = 0,
               symmetries: Symmetries = Symmetries({}), sizes: LifeSizes | None = None, **arguments) -> list[Ring]:
    """Draws each question's ring into `folder`, as coser.data.render writes renders; rings that exist are kept.

    sizes: for several objects of a prompt, which are drawn one by one then, as the app does; without it in one go.
    `arguments` go to the pipeline. What each stage took, in seconds, stands in the index.
    """
    def draw(prompt: str) -> tuple[ViewSet, Cameras]:
        result = pipeline(prompt, generator=torch.Generator().manual_seed(seed),
                          symmetry=symmetries.of_prompt(prompt), **arguments)
        return result.views, result.cameras

    folder.mkdir(parents=True, exist_ok=True)
    rows = read_index(folder)
    for question in questions:
        name = slug(question.prompt)
        if name in rows and (folder / f"{name}-0.safetensors").is_file():
            continue
        with Watch(pipeline.device) as watch:
            watch_run(watch, pipeline)
            began = time.perf_counter()
            plan = scene_plan(question.prompt) if sizes else None
            if plan:
                parts = [draw(one.prompt) for one in plan.objects]
                try:
                    scene = put_together(plan, parts, sizes.of)
                    views, cameras = scene.views, scene.cameras
                except ValueError as error:  # an object that shows no surface: the app hands over nothing, either
                    print(f"{question.prompt}: {error}", flush=True)
                    (views, cameras), *_ = parts
                    views = ViewSet(*(torch.zeros_like(t) for t in (views.views, views.masks, views.depths)))
            else:
                views, cameras = draw(question.prompt)
            seconds = time.perf_counter() - began
        save_ring(folder / f"{name}-0.safetensors", views.to("cpu"), cameras.to("cpu"))
        stages = {stage.name: round(stage.seconds, 4) for stage in watch.stages.values() if stage.calls}
        rows[name] = {"id": name, "object": question.object, "captions": [question.prompt],
                      "colors": [question.color] if question.color else [], "kinds": list(question.kinds),
                      "seconds": round(seconds, 4), "stages": stages, "put_together": bool(plan)}
        write_index(folder, rows.values())
        print(f"{len(rows):4} {question.prompt:32} {seconds:6.1f} s", flush=True)
    wanted = {slug(q.prompt) for q in questions}
    return [r for r in list_rings(folder) if r.asset_id in wanted]


def geometry_figures(views: ViewSet, cameras: Cameras, drawn: bool) -> tuple[dict[str, float], ViewSet]:
    """How well a ring agrees with itself, and what its mesh is like: name => figure; and the mesh from its cameras.

    drawn: by a model, whose mesh is smoothed as in the app; how views agree is measured on what they show as it is.
    Raises ValueError where there is no mesh; a figure that lacks a surface of its own, of half of the views, is left
    out.
    """
    began = time.perf_counter()
    mesh = reconstruct(views, cameras, drawn=drawn, **QUICK)
    seconds = time.perf_counter() - began
    seen = render_mesh(mesh, cameras, views.views.shape[-1])
    curve = tsed(views, cameras)
    figures = {}
    with contextlib.suppress(ValueError):
        crossed = agreement.cross_render(views, cameras)
        figures |= {"cross_psnr": float(crossed.psnr.median()), "cross_chamfer": crossed.chamfer}
    with contextlib.suppress(ValueError):
        figures["hull_iou"] = float(agreement.leave_one_out_hull_iou(views, cameras).mean())
    with contextlib.suppress(ValueError):
        held_out_psnr, held_out_ssim = agreement.held_out_rerender(views, cameras)
        figures |= {"held_out_psnr": float(held_out_psnr.mean()), "held_out_ssim": float(held_out_ssim.mean())}
    figures |= {
        "depth_agreement": float(agreement.neighbour_depth_agreement(views, cameras).mean()),
        "own_psnr": float(psnr(seen.on_background(), views.on_background()).mean()),
        "own_iou": float(silhouette_iou(seen.masks, views.masks).mean()),
        "sharpness": float(sharpness(views).median()), "matches": curve.matches,
        "watertight": float(mesh.is_watertight), "reconstruct_seconds": seconds,
    }
    return figures | {f"tsed_{t:g}": float(s) for t, s in zip(curve.thresholds, curve.consistent)}, seen


@functools.cache
def composed_kinds() -> tuple[tuple[str, ...], ...]:
    """The kinds of each of the held-out compositions."""
    return tuple(question.kinds for question in load_questions(QUESTIONS, "compositions"))


@torch.no_grad()
def judge_figures(judge: Asked, reference: Tensor, ring: Ring, views: ViewSet,
                  cameras: Cameras) -> dict[str, float]:
    """Whether a ring shows what was asked for, once only, and how near it lies to the training assets.

    reference [M,D]: embeddings of the training assets' rings. Questions that make no sense for the ring's words (a kind
    that the judge was not taught, a Janus of a barrel) are left out. `object_right` asks for the very word among the
    judge's kinds, `object_named` is content with another word for the same thing. A composition is right when both its
    kinds are among the judge's first five guesses for the two halves of the ring (`kinds_apart`, see
    `coser.judge_halves`); `others_apart` says how often that is so of the kinds of other compositions, by chance.
    `kinds_in_2` and `kinds_in_5` ask for both among its first guesses for the whole ring, which true compositions
    hardly ever reach: the judge was taught single objects alone.
    """
    said = judge.judge(views)
    text = ring.captions[0] if ring.kinds else ring.short_captions[-1]  # of assets, too, what people type
    figures = {"nearest": float(nearest_distances(ring_embedding(said.embeddings)[None], reference)[0]),
               "caption_fit": float((said.embeddings @ judge.embed_text([text])[0]).mean())}
    if ring.kinds:
        if set(ring.kinds) <= set(judge.config.kinds):
            guesses = judge.verdict(said.embeddings, ring.kinds[0]).top_objects
            figures |= {f"kinds_in_{n}": float(set(ring.kinds) <= set(guesses[:n])) for n in (2, 5)}
            halves = guesses_of_halves(judge, views, cameras)
            others = [kinds for kinds in composed_kinds() if not set(kinds) & set(ring.kinds)]
            figures |= {"kinds_apart": float(are_apart(halves, ring.kinds)),
                        "others_apart": share_apart(halves, others)}
        return figures
    if judge.has_front(ring.object) and judge.config.janus_floor is not None:
        figures["janus"] = float(is_janus(said.sectors[:, 0].exp(), cameras.azimuths, **judge.janus_rule))
    color = ring.colors[0] if ring.colors and ring.colors[0] in judge.config.colors else None
    if ring.kind in judge.config.kinds:
        verdict = judge.verdict(said.embeddings, ring.object, color)
        named = is_name_of(verdict.top_objects[0], ring.kind)
        figures |= {"object_right": float(verdict.object_rank == 1), "object_named": float(named),
                    "object_in_5": float(verdict.object_rank <= 5),
                    "object_log_likelihood": verdict.object_log_likelihood}
        if color:
            figures |= {"color_right": float(verdict.color_rank == 1),
                        "both_right": float(verdict.object_rank == 1 == verdict.color_rank),
                        "both_named": float(named and verdict.color_rank == 1)}
    return figures


def reference_embeddings(judge: Asked, rings: list[Ring], cache: Path) -> Tensor:
    """Embeddings [M,D] of the training assets, each from six views of its first ring; kept in `cache`."""
    rings = first_rings(rings)
    key = sha256(str([r.path.stem for r in rings]).encode() + judge.fingerprint).hexdigest()
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
    """One column of the table: rings, in which order their views come, and whether a model drew them.

    rendered: ids of drawn rings whose views are renders of objects put together, smoothed already. measured: ids of
    the rings of which more is asked than what a judge sees; None: all.
    """

    name: str
    rings: list[Ring]
    shuffled: bool = False
    drawn: bool = False
    rendered: frozenset[str] = frozenset()
    measured: frozenset[str] | None = None

    def measures(self, ring: Ring) -> bool:
        return self.measured is None or ring.asset_id in self.measured


def score_column(column: Column, judge_of: Callable[[Ring, ViewSet, Cameras], dict[str, float]], num_views: int,
                 file: Path) -> list[dict]:
    """The figures of every ring of a column; those that `file` has already are taken from there.

    A shuffled column holds only figures of how the views agree. What a ring is judged by its words is asked of its
    mesh, too, seen by the same cameras: mesh_<name>. A ring that shows no surface has `failed`, and nothing right on
    its mesh. Raises ValueError for rings of which `num_views` are no even share.
    """
    done = {}
    if file.is_file():
        done = {row["id"]: row for row in map(json.loads, file.read_text("utf-8").splitlines())}
    for ring in column.rings:
        if ring.asset_id in done and ("failed" in done[ring.asset_id] or not column.measures(ring)):
            continue
        views, cameras = load_ring(ring.path)
        if len(views) % num_views:
            raise ValueError(f"num_views must divide the {len(views)} views of {ring.path.name}, so that all columns "
                             f"have as many, got {num_views}")
        stride = len(views) // num_views
        views, cameras = views[::stride], cameras[::stride]
        figures = {} if column.shuffled else judge_of(ring, views, cameras)
        if column.measures(ring):
            try:
                shown = agreement.shuffled_ring(views) if column.shuffled else views
                found, seen = geometry_figures(shown, cameras, column.drawn and ring.asset_id not in column.rendered)
                of_mesh = {} if column.shuffled else judge_of(ring, seen, cameras)
                figures |= found | {f"mesh_{k}": v for k, v in of_mesh.items() if k in WORDS} | {"failed": 0.0}
            except ValueError as error:  # views that show nothing, or shuffled ones that allow no surface
                wrong = {f"mesh_{k}": 0.0 for k in figures if k in SHARES}
                figures |= {"failed": 1.0, "why": str(error), "watertight": 0.0} | wrong
        done[ring.asset_id] = {"id": ring.asset_id, "prompt": ring.captions[0], **figures}
        with file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(done[ring.asset_id]) + "\n")
        print(f"{column.name:10} {ring.captions[0][:40]:40}", *(f"{k} {figures[k]:.2f}" for k in
              ("cross_psnr", "hull_iou", "object_right", "color_right") if k in figures), flush=True)
    return [done[ring.asset_id] for ring in column.rings]


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
            mesh = reconstruct(views, cameras, drawn=True, **QUICK)
        except ValueError:
            mesh = None
        rows.append((ring.captions[0], sheet_row(views, mesh)))
    path.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(rows).save(path)


def add_options(parser: argparse.ArgumentParser) -> None:
    add_sampling_options(parser)
    parser.add_argument("--judge", type=Path, nargs="+", required=True, help="folder of a trained judge; several are "
                        "asked as one, and the first alone about sides")
    parser.add_argument("--held-out", type=Path, required=True, help="renders of held-out assets: ceiling and floor")
    parser.add_argument("--renders", type=Path, required=True, help="renders of the training assets: what may have "
                        "been memorised")
    parser.add_argument("--out", type=Path, required=True, help="folder for rings, scores and the table; what is there "
                        "already is not made again")
    parser.add_argument("--questions", type=Path, default=QUESTIONS, help="JSON file of lists of prompts")
    parser.add_argument("--list", default="vocabulary", help="which of its lists")
    parser.add_argument("--limit", type=int, help="the first so many prompts")
    parser.add_argument("--held-out-limit", type=int, help="so many of the held-out rings, spread evenly, for all but "
                        "what a judge sees in the views")
    parser.add_argument("--sheet", type=Path, help="where a contact sheet of the first prompts goes (PNG or WebP)")
    parser.add_argument("--sheet-prompts", type=int, default=40, help="how many prompts are on it")
    parser.add_argument("--clip", help="folder or hub id of a CLIP model, for its score")
    parser.add_argument("--consistency", type=float, default=CONSISTENCY)
    add_symmetry_option(parser)
    parser.add_argument("--in-one-go", action="store_true", help="draw several objects of a prompt in one go, not one "
                        "by one as the app does")


def drawing_of(options: argparse.Namespace) -> dict[str, str]:
    """All that the drawn rings depend on but their prompts, as what `claim` compares."""
    weights = sha256()
    for path in sorted(options.checkpoint.rglob("*.safetensors")):
        weights.update(path.read_bytes())
    chosen = ("num_views", "steps", "guidance_scale", "guidance_rescale", "skip_guidance_scale", "redraw", "seed",
              "consistency", "symmetry", "in_one_go")
    return {"weights": weights.hexdigest()[:16]} | {name: str(getattr(options, name)) for name in chosen}


def claim(folder: Path, drawing: dict[str, str]) -> None:
    """Says in the folder how its rings are drawn; ValueError where it holds rings that were drawn otherwise."""
    told = folder / "drawing.json"
    before = json.loads(told.read_text("utf-8")) if told.is_file() else drawing
    other = [f"{name} {before.get(name)}" for name in drawing if before.get(name) != drawing[name]]
    if other:
        raise ValueError(f"out must be a folder of its own for each way of drawing, got {folder}, whose rings were "
                         f"drawn with {', '.join(other)}")
    folder.mkdir(parents=True, exist_ok=True)
    told.write_text(json.dumps(drawing, indent=1) + "\n", "utf-8")


def run(options: argparse.Namespace) -> None:
    if importlib.util.find_spec("cv2") is None:
        raise ValueError("the table's TSED needs OpenCV: pip install -r requirements-test.txt")
    claim(options.out, drawing_of(options))
    pipeline = load_pipeline(options)
    pipeline.set_progress_bar_config(disable=True)
    questions = load_questions(options.questions, options.list)[:options.limit]
    symmetries = symmetries_asked_for(options, pipeline)
    sizes = None if options.in_one_go else LifeSizes(sentence_embedder(pipeline))
    drawn = draw_rings(pipeline, questions, options.out / "rings", options.seed, symmetries, sizes,
                       consistency=options.consistency, fuse=fused_views, **sampling_arguments(options))
    if options.sheet:
        by_prompt = {ring.captions[0]: ring for ring in drawn}
        draw_sheet([by_prompt[q.prompt] for q in questions[:options.sheet_prompts]], options.sheet)
    judge = load_judges(options.judge, dtype_asked_for(options))
    reference = reference_embeddings(judge, list_rings(options.renders), options.out)
    clip = ClipScore(options.clip) if options.clip else None

    def judge_of(ring: Ring, views: ViewSet, cameras: Cameras) -> dict[str, float]:
        figures = judge_figures(judge, reference, ring, views, cameras)
        return figures | ({"clip": clip(views, ring.captions[0])} if clip else {})

    held_out = list_rings(options.held_out)
    some = spread(held_out, options.held_out_limit)
    index = read_index(options.out / "rings")
    rendered = frozenset(name for name, row in index.items() if row.get("put_together", bool(sizes and row["kinds"])))
    columns = (Column("generated", drawn, drawn=True, rendered=rendered),
               Column("true renders", held_out, measured=frozenset(ring.asset_id for ring in some)),
               Column("shuffled renders", some, shuffled=True))
    measured = judge.fingerprint + f"{MEASURED} {options.num_views} {options.clip}".encode()
    asked = sha256(measured).hexdigest()[:8]  # another judge's figures are not taken over
    scores = {column.name: score_column(column, judge_of, options.num_views,
                                        options.out / f"{slug(column.name)}-{asked}.jsonl") for column in columns}
    scores["generated"] = [row | {"seconds": index[row["id"]]["seconds"]} for row in scores["generated"]]
    summary = summarise(scores)
    names = {name for row in index.values() for name in row["stages"]}
    stages = {name: statistics.median(row["stages"].get(name, 0.0) for row in index.values()) for name in sorted(names)}
    table = markdown(summary, stages)
    (options.out / "table.md").write_text(table, "utf-8")
    chosen = {k: str(v) for k, v in vars(options).items() if k not in ("run", "judge")}
    chosen["judge"] = " ".join(map(str, options.judge))
    (options.out / "table.json").write_text(json.dumps(
        {"options": chosen, "judge": sha256(judge.fingerprint).hexdigest()[:8], "summary": summary, "stages": stages,
         "rings": scores}, indent=1) + "\n", "utf-8")
    print(table)
