"""The command line: `python -m coser "a red barrel" -o barrel.glb`, or `--views FOLDER` for views of one's own."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from coser.own_views import PosedViews, load_views
from coser.reconstruction.exports import FORMATS, export
from coser.request import (COLORING, ELEVATION, MAX_FACES, MODULES, ORIGINS, SYMMETRY, TEXTURE_SIZES,
                           AssetOptions, GenerationRequest)
from coser.sessions import file_name
from coser.studio import SMALL, RunUpdate, Studio, log_to_terminal

DEFAULTS = GenerationRequest(prompt="a red barrel")
ASSET = AssetOptions()


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 1 could not be made, 2 wrong arguments, 130 interrupted."""
    args = parser().parse_args(argv)
    log_to_terminal()
    try:
        options = AssetOptions(args.max_faces, args.texture_size, args.coloring, args.origin, args.longest_side)
        work = own_views(args) if args.views else request(args)
        output = output_path(args.output, work)
    except (ValueError, OSError) as error:
        print(f"coser: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ncoser: interrupted, nothing was written", file=sys.stderr)
        return 130
    written = []
    try:
        studio = Studio(args.checkpoint, args.device)
        if isinstance(work, PosedViews):
            updates = studio.rebuild(work, args.views.stem, output, options=options)
        else:
            updates = studio.generate(work, output, options=options)
        done = show(updates)
        written.append(done.glb)
        asset = done.asset
        record = json.loads(done.run_file.read_text("utf-8"))
        for name in args.also:
            written.append(export(name, asset.mesh, asset.surface.views, asset.surface.cameras,
                                  output.with_name(f"{output.stem}{FORMATS[name].suffix}"), extras=record))
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        print(f"\ncoser: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ncoser: interrupted" + ("" if written else ", nothing was written"), file=sys.stderr)
        return 130
    finally:  # also what was there when something went wrong after it
        for path in written:
            print(path)
    return 0


def parser() -> argparse.ArgumentParser:
    """The arguments; their defaults are those of GenerationRequest and AssetOptions."""
    arguments = argparse.ArgumentParser(
        prog="python -m coser", description="Turn a sentence, or views of one's own, into a 3D asset: a GLB, its views "
        "and a run file.")
    arguments.add_argument("prompt", nargs="?", help='what to make, for example "a red barrel"')
    arguments.add_argument("--views", type=Path, help="instead of a prompt: a folder or zip of pictures, with a "
                           "transforms.json (NeRF convention) or a closed ring in the order of their names")
    arguments.add_argument("-o", "--output", type=Path, help="the GLB to write (default: named after the prompt); the "
                           "views (.png) and the settings (.json) are written beside it")
    drawing = arguments.add_argument_group("drawing")
    drawing.add_argument("--num-views", type=int, help=f"4 to 24 (default {DEFAULTS.num_views}); with --views: how "
                         "many there must be")
    drawing.add_argument("--guidance-scale", type=float, default=DEFAULTS.guidance_scale,
                         help="how strictly to follow the prompt, 1 to 12 (default %(default)s)")
    drawing.add_argument("--guidance-rescale", type=float, default=DEFAULTS.guidance_rescale,
                         help="how much of what guidance does to brightness and contrast to take back, 0 to 1 "
                         "(default %(default)s)")
    drawing.add_argument("--skip-guidance-scale", type=float, default=DEFAULTS.skip_guidance_scale,
                         help="how far to move away from what each view would show by itself, 0 to 6 "
                         "(default %(default)s)")
    drawing.add_argument("--num-inference-steps", type=int, default=DEFAULTS.num_inference_steps,
                         help="1 to 50 (default %(default)s)")
    drawing.add_argument("--elevation", type=float, help="the cameras' height in degrees, 0 to 30 (default "
                         f"{ELEVATION:g}); with --views: that of a ring without transforms.json, any")
    drawing.add_argument("--seed", type=int, default=DEFAULTS.seed, help="same seed, same asset (%(default)s)")
    drawing.add_argument("--randomize-seed", action="store_true", help="draw a new seed; the run file tells which")
    drawing.add_argument("--consistency", type=float, default=DEFAULTS.consistency,
                         help="how much of the views to replace by the object they make together, at some "
                         "steps, 0 to 1 (default %(default)s)")
    drawing.add_argument("--redraw", type=float, default=DEFAULTS.redraw, help="share of the steps to take once more, "
                         "from the finished views noised again, 0 to 0.9: tidier (default %(default)s)")
    drawing.add_argument("--symmetry", default=DEFAULTS.symmetry, help="what to pull the object to, one of "
                         f"{', '.join(SYMMETRY)} (default %(default)s; auto: what its kind usually has)")
    drawing.add_argument("--in-one-go", action="store_true", help="draw several objects (\"a lantern on a barrel\") in "
                         "one go instead of one by one")
    drawing.add_argument("--mixers", nargs="*", metavar="MIXER", help="the modules between views that work, of "
                         f"{', '.join(MODULES)} (default: all that the checkpoint has)")
    drawing.add_argument("--negative-prompt", default=DEFAULTS.negative_prompt, help="what to keep away from")
    drawing.add_argument("--checkpoint", default=SMALL, help="a folder in diffusers layout (the shipped one)")
    drawing.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    asset = arguments.add_argument_group("asset")
    asset.add_argument("--max-faces", type=int, default=ASSET.max_faces,
                       help=f"triangles, {MAX_FACES[0]} to {MAX_FACES[1]} (default %(default)s)")
    asset.add_argument("--texture-size", type=int, default=ASSET.texture_size,
                       help=f"pixels a side, one of {', '.join(map(str, TEXTURE_SIZES))} (default %(default)s)")
    asset.add_argument("--coloring", default=ASSET.coloring,
                       help=f"where the colours are, one of {', '.join(COLORING)} (default %(default)s)")
    asset.add_argument("--origin", default=ASSET.origin,
                       help=f"what lies at (0, 0, 0), one of {', '.join(ORIGINS)} (default %(default)s)")
    asset.add_argument("--longest-side", type=float, default=ASSET.longest_side,
                       help="of the object's box, metres (default %(default)s)")
    asset.add_argument("--also", nargs="+", default=[], choices=[name for name in FORMATS if name != "glb"],
                       help="more formats to write beside the GLB")
    return arguments


def request(args: argparse.Namespace) -> GenerationRequest:
    """What the arguments ask to draw, its seed decided; ValueError names what is wrong."""
    if args.prompt is None:
        raise ValueError("prompt must be given, or --views with a folder or zip of pictures")
    return GenerationRequest(
        prompt=args.prompt, num_views=DEFAULTS.num_views if args.num_views is None else args.num_views,
        guidance_scale=args.guidance_scale, guidance_rescale=args.guidance_rescale,
        skip_guidance_scale=args.skip_guidance_scale, num_inference_steps=args.num_inference_steps,
        elevation=DEFAULTS.elevation if args.elevation is None else args.elevation, seed=args.seed,
        randomize_seed=args.randomize_seed, consistency=args.consistency, redraw=args.redraw,
        negative_prompt=args.negative_prompt, mixers=args.mixers, symmetry=args.symmetry,
        one_by_one=not args.in_one_go).with_drawn_seed()


def own_views(args: argparse.Namespace) -> PosedViews:
    """The views that the arguments name, read; ValueError or OSError says what is wrong with them."""
    if args.prompt is not None:
        raise ValueError(f"prompt must not be given together with --views, got {args.prompt!r}")
    return load_views(args.views, num_views=args.num_views, elevation=args.elevation)


def output_path(output: Path | None, work: GenerationRequest | PosedViews) -> Path:
    """Where the GLB goes; ValueError for a name that does not end in .glb or a folder that does not exist."""
    named = file_name(work.prompt, work.seed) if isinstance(work, GenerationRequest) else "views.glb"
    path = output or Path(named)
    if path.suffix != ".glb":
        raise ValueError(f"output must end in .glb, got {path}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"output must lie in a folder that exists, got {path}")
    return path


def show(updates: Iterator[RunUpdate]) -> RunUpdate:
    """Print a note on its own line and the updates as they come, on one line where a terminal can rewrite it.

    Returns the last update.
    """
    live = sys.stderr.isatty()
    noted = ""
    for update in updates:
        if update.note != noted:
            noted = update.note
            print(f"\r\033[K{noted}" if live else noted, file=sys.stderr)
        left = "" if not update.seconds_left else f", {update.seconds_left:.0f} s left"
        line = f"{update.percent:3d} %  {update.message}{left}"
        print(f"\r\033[K{line}" if live else line, end="" if live else "\n", file=sys.stderr, flush=True)
    if live:
        print(file=sys.stderr)
    return update


if __name__ == "__main__":
    sys.exit(main())
