"""The command line: `python -m coser "a red barrel" -o barrel.glb`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from coser.request import GenerationRequest
from coser.studio import SMALL, GenerationUpdate, Studio, file_name, log_to_terminal

DEFAULTS = GenerationRequest(prompt="a red barrel")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 1 could not be made, 2 wrong arguments, 130 interrupted."""
    args = parser().parse_args(argv)
    log_to_terminal()
    try:
        request = GenerationRequest(
            prompt=args.prompt, num_views=args.num_views, guidance_scale=args.guidance_scale,
            num_inference_steps=args.num_inference_steps, elevation=args.elevation, seed=args.seed,
            randomize_seed=args.randomize_seed, consistency=args.consistency,
            negative_prompt=args.negative_prompt).with_drawn_seed()
        output = output_path(args.output, request)
    except ValueError as error:
        print(f"coser: {error}", file=sys.stderr)
        return 2
    try:
        done = show(Studio(args.checkpoint, args.device).generate(request, output))
    except (ValueError, OSError) as error:
        print(f"\ncoser: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ncoser: interrupted, nothing was written", file=sys.stderr)
        return 130
    print(done.glb)
    return 0


def parser() -> argparse.ArgumentParser:
    """The arguments; their defaults are GenerationRequest's."""
    arguments = argparse.ArgumentParser(
        prog="python -m coser", description="Turn a sentence into a 3D asset: a GLB, its views and a run file.")
    arguments.add_argument("prompt", help='what to make, for example "a red barrel"')
    arguments.add_argument("-o", "--output", type=Path, help="the GLB to write (default: named after the prompt); the "
                           "views (.png) and the settings (.json) are written beside it")
    arguments.add_argument("--num-views", type=int, default=DEFAULTS.num_views, help="4 to 24 (default %(default)s)")
    arguments.add_argument("--guidance-scale", type=float, default=DEFAULTS.guidance_scale,
                           help="how strictly to follow the prompt, 1 to 12 (default %(default)s)")
    arguments.add_argument("--num-inference-steps", type=int, default=DEFAULTS.num_inference_steps,
                           help="1 to 50 (default %(default)s)")
    arguments.add_argument("--elevation", type=float, default=DEFAULTS.elevation,
                           help="the cameras' height in degrees, 0 to 30 (default %(default)s)")
    arguments.add_argument("--seed", type=int, default=DEFAULTS.seed, help="same seed, same asset (%(default)s)")
    arguments.add_argument("--randomize-seed", action="store_true", help="draw a new seed; the run file tells which")
    arguments.add_argument("--consistency", type=float, default=DEFAULTS.consistency,
                           help="how much of the views to replace by the object they make together, at some "
                           "steps, 0 to 1 (default %(default)s)")
    arguments.add_argument("--negative-prompt", default=DEFAULTS.negative_prompt, help="what to keep away from")
    arguments.add_argument("--checkpoint", default=SMALL, help="a folder in diffusers layout (the shipped one)")
    arguments.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    return arguments


def output_path(output: Path | None, request: GenerationRequest) -> Path:
    """Where the GLB goes; ValueError for a name that does not end in .glb or a folder that does not exist."""
    path = output or Path(file_name(request.prompt, request.seed))
    if path.suffix.lower() != ".glb":
        raise ValueError(f"output must end in .glb, got {path}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"output must lie in a folder that exists, got {path}")
    return path


def show(updates: Iterator[GenerationUpdate]) -> GenerationUpdate:
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
