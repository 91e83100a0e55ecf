"""The lines of the table of quality: what each figure is called, and how the rings' figures become one."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

TSED_SHOWN = (1.0, 2.0, 5.0)  # pixels; the JSON file has the whole curve


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
    Line("object right, or by another of its names", "object_named", share, "{:.1%}"),
    Line("object among its first five", "object_in_5", share, "{:.1%}"),
    Line("all objects of a composition among its first two", "kinds_in_2", share, "{:.1%}"),
    Line("all objects of a composition among its first five", "kinds_in_5", share, "{:.1%}"),
    Line("both objects of a composition among its first five for the two halves", "kinds_apart", share, "{:.1%}"),
    Line("the same of other compositions' objects, by chance", "others_apart", share, "{:.1%}"),
    Line("log-likelihood of the object, by the judge", "object_log_likelihood", statistics.fmean, "{:.2f}"),
    Line("colour right", "color_right", share, "{:.1%}"),
    Line("object and colour right", "both_right", share, "{:.1%}"),
    Line("object, by any of its names, and colour right", "both_named", share, "{:.1%}"),
    Line("fit of views and caption, cosine", "caption_fit"),
    Line("object right on the mesh", "mesh_object_right", share, "{:.1%}"),
    Line("object right on the mesh, or by another of its names", "mesh_object_named", share, "{:.1%}"),
    Line("object among the first five on the mesh", "mesh_object_in_5", share, "{:.1%}"),
    Line("all objects of a composition among the first five on the mesh", "mesh_kinds_in_5", share, "{:.1%}"),
    Line("both objects of a composition among the first five for the mesh's halves", "mesh_kinds_apart", share,
         "{:.1%}"),
    Line("log-likelihood of the object on the mesh", "mesh_object_log_likelihood", statistics.fmean, "{:.2f}"),
    Line("object and colour right on the mesh", "mesh_both_right", share, "{:.1%}"),
    Line("object, by any of its names, and colour right on the mesh", "mesh_both_named", share, "{:.1%}"),
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
