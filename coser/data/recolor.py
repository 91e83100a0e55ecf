"""Repaint rendered rings so that colour must be read from the prompt: `python -m coser.data.recolor RENDERS`.

A copy of a ring gets another main colour, and its captions the word for it; grey, black, white and the other colours of
the object stay. Written beside the originals as `<asset id>~<colour>-<ring>.safetensors`, an asset of its own in
`index.jsonl`. Some pairs of colour and kind that no asset shows natively are held out (`questions.json`): they are
never painted, so that a model can be asked for what it has never seen. `python -m coser.data.recolor RENDERS --held-out
RENDERS_VAL --out FOLDER` paints held-out assets so, for evaluation alone: true renders to compare with.
"""

from __future__ import annotations

import argparse
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from coser.data.assets import head_word, in_color
from coser.data.dataset import Ring, first_rings, list_rings
from coser.data.index import INDEX, is_repainted, original_id, read_index, repainted_id, write_index
from coser.questions import QUESTIONS, is_name_of, load_questions
from coser.whole_files import whole_file

# Hue (degrees) that each word names, and where it ends: both sides of a peak are looked for within it.
HUES = {"red": (340, 16), "orange": (14, 42), "brown": (8, 46), "gold": (34, 58), "yellow": (40, 70),
        "green": (70, 165), "teal": (155, 198), "blue": (192, 256), "purple": (252, 312), "pink": (305, 355)}
MIDDLES = {w: (low + (high - low) % 360 / 2) % 360 for w, (low, high) in HUES.items()}
MIDDLES |= {"tan": 35.0, "beige": 40.0, "cyan": 188.0}
TARGETS = ("red", "orange", "yellow", "green", "teal", "blue", "purple", "pink")
# Words in a caption that name a colour, or a stuff that has one: a caption that keeps one of them is not taken over.
OTHER_COLOR_WORDS = re.compile(
    r"\b(\w+ish|crimson|scarlet|maroon|ruby|amber|golden|lemon|lime|olive|emerald|mint|jade|turquoise|aqua|cyan|navy"
    r"|azure|indigo|violet|lilac|lavender|magenta|rose|salmon|coral|peach|wood|wooden|timber|oak|copper|bronze|rust"
    r"|rusty|tan|beige|cream|sandy|terracotta|chestnut|leather|autumn|brick|clay)\b")
HALF_WIDTH, FALL_OFF = 20.0, 12.0  # degrees of hue on each side of the peak: repainted whole, and fading
MIN_SATURATION = 0.15  # below it a pixel is grey, black or white and stays
PALETTE = 12  # paints of a colour for held-out assets
MIN_SHARE = 0.25  # of the object's pixels that must change, else the new word would be untrue


@dataclass(frozen=True)
class Paint:
    """A colour as an asset wears it: hue (degrees), saturation and value where it is lit, both in [0,1]."""

    hue: float
    saturation: float
    value: float


def rgb_to_hsv(rgb: Tensor) -> Tensor:
    """[...,3] in [0,1] => hue in degrees [0,360), saturation, value."""
    top, low = rgb.amax(-1), rgb.amin(-1)
    spread = top - low
    safe = spread.clamp_min(1e-6)
    r, g, b = rgb.unbind(-1)
    hue = torch.where(top == r, (g - b) / safe, torch.where(top == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    hue = torch.where(spread > 1e-6, hue * 60 % 360, 0.0)
    return torch.stack([hue, spread / top.clamp_min(1e-6), top], -1)


def hsv_to_rgb(hsv: Tensor) -> Tensor:
    """The inverse of `rgb_to_hsv`."""
    hue, saturation, value = hsv.unbind(-1)
    offset = (hue[..., None] / 60 + hue.new_tensor([5.0, 3.0, 1.0])) % 6
    drop = torch.minimum(offset, 4 - offset).clamp(0, 1)
    return value[..., None] * (1 - saturation[..., None] * drop)


def hue_distance(a: Any, b: Any) -> Any:
    """Degrees between two hues, [0,180]."""
    return abs((a - b + 180) % 360 - 180)


def _membership(hsv: Tensor, hue: float) -> Tensor:
    near = ((HALF_WIDTH + FALL_OFF - hue_distance(hsv[..., 0], hue)) / FALL_OFF).clamp(0, 1)
    return near * ((hsv[..., 1] - MIN_SATURATION) / 0.1).clamp(0, 1)


def worn_paint(pixels: Tensor, word: str) -> tuple[Paint, float] | None:
    """What colour an object wears under the name `word`, from its opaque pixels [P,3] in [0,1].

    Returns the paint and the share of the pixels that wear it; None where the word's hues are hardly there.
    """
    hsv = rgb_to_hsv(pixels)
    low, high = HUES[word]
    width = (high - low) % 360
    counted = hsv[:, 1] > MIN_SATURATION
    inside = counted & ((hsv[:, 0] - low) % 360 <= width)
    if inside.float().mean() < MIN_SHARE / 2:
        return None
    offsets = ((hsv[inside, 0] - low) % 360).round().long()
    histogram = torch.bincount(offsets, minlength=width + 1).float()
    smooth = torch.nn.functional.avg_pool1d(histogram[None, None], 11, 1, 5, count_include_pad=False)[0, 0]
    hue = (low + int(smooth.argmax())) % 360
    wears = _membership(hsv, hue) > 0.5
    share = float(wears.float().mean())
    if share < MIN_SHARE:
        return None
    chosen = hsv[wears]
    return Paint(float(hue), float(chosen[:, 1].median()), float(chosen[:, 2].quantile(0.85))), share


def repaint(rgba: Tensor, old: Paint, new: Paint) -> Tensor:
    """uint8 [N,4,S,S], colour premultiplied => the same with what wears `old` wearing `new`; shading stays."""
    opaque = rgba[:, 3] > 0
    pixels = rgba.permute(0, 2, 3, 1)[opaque].float() / 255
    alpha = pixels[:, 3:]
    hsv = rgb_to_hsv((pixels[:, :3] / alpha).clamp(0, 1))
    painted = torch.stack([(hsv[:, 0] + new.hue - old.hue) % 360,
                           (hsv[:, 1] * new.saturation / max(old.saturation, 0.05)).clamp(0, 1),
                           (hsv[:, 2] * new.value / max(old.value, 0.05)).clamp(0, 1)], -1)
    worn = _membership(hsv, old.hue)[:, None]
    rgb = worn * hsv_to_rgb(painted) + (1 - worn) * hsv_to_rgb(hsv)
    out = rgba.clone()
    changed = (torch.cat([rgb * alpha, alpha], 1) * 255).round().clamp(0, 255)
    out.permute(0, 2, 3, 1)[opaque] = changed.to(torch.uint8)
    return out


def beside(color: str) -> set[str]:
    """Other words for hues so near to a colour's that repainting it changes them, too."""
    return {w for w in MIDDLES if w != color and hue_distance(MIDDLES[color], MIDDLES[w]) < 40}


def rewrite(caption: str, old: str, new: str) -> str | None:
    """The caption with the colour's word exchanged; None where it is not there or another word would contradict it:
    one for a stuff, or for a hue beside the old one's, which is repainted with it."""
    changed, count = re.subn(rf"\b{old}\b", new, caption.lower())
    if not count or OTHER_COLOR_WORDS.search(changed) or (beside(old) - {new}) & set(re.findall(r"\w+", changed)):
        return None
    return re.sub(r"\b(an?)(?= (\w))", lambda m: "an" if m[2] in "aeiou" else "a", changed)


def opaque_pixels(rgba: Tensor, limit: int = 20_000) -> Tensor:
    """Evenly drawn fully covered pixels of a ring, [P,3] in [0,1], `limit` at most."""
    pixels = rgba[:, :3].permute(0, 2, 3, 1)[rgba[:, 3] == 255].float() / 255
    return pixels[::max(1, len(pixels) // limit)]


def native_pairs(rings: list[Ring]) -> set[tuple[str, str]]:
    """(colour, kind) for every colour that an asset's list or captions name."""
    found = set()
    for ring in rings:
        words = set(ring.colors) | {w for caption in ring.captions for w in re.findall(r"[a-z]+", caption.lower())}
        found |= {(color, ring.kind) for color in HUES if color in words}
    return found


def held_out_pairs() -> set[tuple[str, str]]:
    """(colour, kind) that are in no training: evaluation asks for them."""
    return {(question.color, question.object) for question in load_questions(QUESTIONS, "held_out_pairs")}


def _paintable(ring: Ring) -> bool:
    """Whether the main colour is one that can be exchanged, and no other named colour lies beside it."""
    if not ring.colors or ring.colors[0] not in HUES:
        return False
    return not beside(ring.colors[0]) & set(ring.colors[1:])


def recolor_rings(renders: Path, seed: int = 0, rings: tuple[int, ...] = (0, 1)) -> list[str]:
    """Writes at most one repainted copy of each ring that allows it; returns the new assets' ids.

    The colour is drawn evenly from TARGETS less the ring's own colours and those held out with what it is called by its
    last noun or by the one that it is about, in any of its words and numbers ("two tables with food"), and looks as one
    of the assets that natively wear it. Copies that exist are kept.
    """
    found = [r for r in list_rings(renders)
             if not is_repainted(r.asset_id) and int(r.path.stem.rsplit("-", 1)[1]) in rings]
    rows = read_index(renders)
    held_out = held_out_pairs()
    worn: dict[Path, Paint] = {}
    palette: dict[str, list[Paint]] = {word: [] for word in TARGETS}
    for ring in found:
        if _paintable(ring):
            paint = worn_paint(opaque_pixels(load_file(ring.path)["rgba"]), ring.colors[0])
            if paint:
                worn[ring.path] = paint[0]
                palette.setdefault(ring.colors[0], []).append(paint[0])
    copies: dict[Path, tuple[Ring, Paint]] = {}
    for ring in found:
        if ring.path not in worn:
            continue
        draw = np.random.default_rng([seed, zlib.crc32(ring.path.stem.encode())])
        names = {ring.kind, head_word(ring)}
        kept_out = {color for color, kind in held_out if any(is_name_of(name, kind) for name in names)}
        allowed = [w for w in TARGETS if w not in ring.colors and w not in kept_out and palette[w]]
        if not allowed:
            continue
        word = allowed[draw.integers(len(allowed))]
        captions = [c for c in (rewrite(c, ring.colors[0], word) for c in ring.captions) if c]
        if not captions:
            continue
        new_id = repainted_id(ring.asset_id, word)
        name = re.sub(rf"\b({ring.colors[0]}|{OTHER_COLOR_WORDS.pattern}) ", "", ring.object)
        rows[new_id] = rows[ring.asset_id] | {"id": new_id, "captions": captions, "object": name,
                                              "colors": [word, *ring.colors[1:]]}
        path = renders / f"{new_id}-{ring.path.stem.rsplit('-', 1)[1]}.safetensors"
        copies[path] = ring, palette[word][draw.integers(len(palette[word]))]
    write_index(renders, rows.values())  # before the rings: whoever lists them finds their rows
    for path, (ring, new) in copies.items():
        if not path.is_file():
            tensors = load_file(ring.path)
            tensors["rgba"] = repaint(tensors["rgba"], worn[ring.path], new)
            with whole_file(path) as writing:
                save_file({k: v.contiguous() for k, v in tensors.items()}, writing)
    return [path.stem.rsplit("-", 1)[0] for path in copies]


def paint_held_out_pairs(renders: Path, held_out: Path, folder: Path, seed: int = 0) -> list[str]:
    """Writes copies of held-out assets in the colours of the held-out pairs into a new folder; returns their ids.

    renders: of the training assets, for how the colours look. Rings of `held_out` of the pairs' kinds, each in every
    colour held out with its kind; other colours of theirs may change along. Raises ValueError where it has an index.
    """
    if (folder / INDEX).exists():
        raise ValueError(f"out must be a new or empty folder, got {folder}, which holds an {INDEX}")
    pairs = sorted(held_out_pairs())
    palette: dict[str, list[Paint]] = {color: [] for color, _ in pairs}
    for ring in first_rings(list_rings(renders)):
        color = ring.colors[0] if ring.colors else ""
        if color in palette and len(palette[color]) < PALETTE:
            paint = worn_paint(opaque_pixels(load_file(ring.path)["rgba"]), color)
            palette[color] += [paint[0]] if paint else []
    folder.mkdir(parents=True, exist_ok=True)
    rows = {}
    for ring in first_rings(list_rings(held_out)):
        wanted = [color for color, kind in pairs if kind == ring.kind and color not in ring.colors and palette[color]]
        if not wanted or not ring.colors or ring.colors[0] not in HUES:
            continue
        tensors = load_file(ring.path)
        worn = worn_paint(opaque_pixels(tensors["rgba"]), ring.colors[0])
        for color in wanted if worn else ():
            new_id = repainted_id(ring.asset_id, color)
            draw = np.random.default_rng([seed, zlib.crc32(new_id.encode())])
            paint = palette[color][draw.integers(len(palette[color]))]
            rows[new_id] = {"id": new_id, "object": ring.kind, "colors": [color],
                            "captions": [in_color(color, ring.kind)]}
            painted = tensors | {"rgba": repaint(tensors["rgba"], worn[0], paint)}
            save_file({k: v.contiguous() for k, v in painted.items()}, folder / f"{new_id}-0.safetensors")
    write_index(folder, rows.values())
    return list(rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m coser.data.recolor", description=__doc__.split("\n")[0])
    parser.add_argument("renders", type=Path, help="folder written by coser.data.render")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rings", type=int, nargs="+", default=[0, 1], help="which rings of an asset get a copy")
    parser.add_argument("--held-out", type=Path, help="renders of held-out assets: paint these instead, in the "
                        "colours of the held-out pairs, for evaluation")
    parser.add_argument("--out", type=Path, help="with --held-out: the new folder that they go into")
    options = parser.parse_args(arguments)
    if bool(options.held_out) != bool(options.out):
        parser.error("--held-out and --out belong together")
    if options.held_out:
        try:
            painted = paint_held_out_pairs(options.renders, options.held_out, options.out, options.seed)
        except ValueError as error:
            parser.exit(1, f"coser: {error}\n")
        print(f"{len(painted)} rings of {len(set(map(original_id, painted)))} held-out assets")
        return
    written = recolor_rings(options.renders, options.seed, tuple(options.rings))
    print(f"{len(written)} repainted rings of {len(set(map(original_id, written)))} assets")


if __name__ == "__main__":
    main()
