"""Finished examples, shown before any computing; `python -m coser.examples PROMPTS FOLDER` makes them all anew.

An example is what a run of the studio leaves, made smaller: NAME.webp, the grid of its views; NAME.glb, with fewer
triangles; NAME.json, the run's settings and figures, with the checkpoint's name and the hash of its weights.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from coser.questions import read_prompts
from coser.request import AssetOptions, GenerationRequest
from coser.sessions import file_name
from coser.studio import SMALL, TILE, RunUpdate, Studio, log_to_terminal

ASSET = AssetOptions(max_faces=5000, texture_size=512)  # twelve examples lie in every clone of the repository
QUALITY = 85  # of the WebP: an eighteenth of the PNG, and hard to tell from it


@dataclass(frozen=True)
class Example:
    """One finished run: what was asked, which checkpoint drew it and how long that took, its grid and its mesh.

    checkpoint: its folder's name. weights_sha256: see `weights_hash`. seconds: prompt to mesh, where it was made.
    views: the grid, WebP. glb: the mesh.
    """

    request: GenerationRequest
    checkpoint: str
    weights_sha256: str
    seconds: float
    views: Path
    glb: Path

    def thumbnail(self) -> Image.Image:
        """The first view of the grid, the object's front, TILE pixels a side."""
        with Image.open(self.views) as grid:
            return grid.convert("RGB").crop((0, 0, TILE, TILE))


def load_examples(folder: str | Path) -> list[Example]:
    """The examples in `folder`, by name; none where there is no such folder.

    Raises ValueError for settings that cannot be read or whose picture or mesh is missing.
    """
    return [load_example(path) for path in sorted(Path(folder).glob("*.json"))]


def load_example(settings: Path) -> Example:
    """The example whose settings lie in the file `settings`; ValueError when it is not whole."""
    try:
        record = json.loads(settings.read_text("utf-8"))
        example = Example(GenerationRequest(**record["settings"]), record["checkpoint"], record["weights_sha256"],
                          record["seconds"]["total"], settings.with_suffix(".webp"), settings.with_suffix(".glb"))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{settings} must hold an example's settings, got {error!r}") from error
    for path in (example.views, example.glb):
        if not path.is_file():
            raise ValueError(f"{settings} must have {path.name} beside it, which is missing")
    return example


def make_examples(studio: Studio, requests: Iterable[GenerationRequest], folder: str | Path) -> Iterator[Example]:
    """Draws every request and yields its example once its files lie in `folder`.

    After the last one, examples in `folder` that were not asked for are removed. Raises ValueError where views hold
    nothing that a mesh could be made of.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights_sha256 = weights_hash(studio.checkpoint)
    made = set()
    for request in requests:
        name = Path(file_name(request.prompt, request.seed))
        with tempfile.TemporaryDirectory(dir=folder) as unfinished:
            for done in studio.generate(request, Path(unfinished) / name, options=ASSET):
                pass
            for path in _smaller(done, studio.checkpoint, weights_sha256):
                os.replace(path, folder / path.name)
        example = load_example(folder / name.with_suffix(".json"))
        made |= {example.views, example.glb, folder / name.with_suffix(".json")}
        yield example
    for settings in folder.glob("*.json"):
        for path in (settings, settings.with_suffix(".webp"), settings.with_suffix(".glb")):
            if path not in made:
                path.unlink(missing_ok=True)


def _smaller(done: RunUpdate, checkpoint: str, weights_sha256: str) -> tuple[Path, Path, Path]:
    """A finished run's files as an example's: the settings come last, so that an example that is listed is whole."""
    views = done.glb.with_suffix(".webp")
    with Image.open(done.glb.with_suffix(".png")) as grid:
        grid.save(views, quality=QUALITY, method=6)
    record = json.loads(done.run_file.read_text("utf-8"))
    record |= {"checkpoint": Path(checkpoint).name, "weights_sha256": weights_sha256}  # no folder of whoever made it
    done.run_file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return views, done.glb, done.run_file


def weights_hash(checkpoint: str | Path) -> str:
    """SHA-256 over the weights (*.safetensors) of a checkpoint's parts, in the order of their names; hexadecimal.

    It changes with whatever makes old examples untrue, and not with notes, words or line ends. A hub id has "".
    """
    paths = sorted(Path(checkpoint).glob("*/*.safetensors"))
    total = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest() if paths else ""


def main(argv: list[str] | None = None) -> None:
    """Draw a file's prompts and put the examples into a folder, in place of those that lie there."""
    parser = argparse.ArgumentParser(prog="python -m coser.examples", description="Make the app's examples anew.")
    parser.add_argument("prompts", type=Path, help="text file, a prompt a line: examples/gallery.txt")
    parser.add_argument("folder", type=Path, help="where the examples go: examples/gallery")
    parser.add_argument("--checkpoint", default=SMALL, help="a folder in diffusers layout (default: the shipped one)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--seed", type=int, default=0, help="for all of them (default %(default)s)")
    args = parser.parse_args(argv)
    log_to_terminal()
    try:
        requests = [GenerationRequest(prompt, seed=args.seed) for prompt in read_prompts(args.prompts)]
        if not requests:
            raise ValueError(f"{args.prompts} must hold a prompt a line, got none")
        for example in make_examples(Studio(args.checkpoint, args.device), requests, args.folder):
            size = example.glb.stat().st_size + example.views.stat().st_size
            print(f"{example.glb}  {example.seconds:.0f} s  {size / 1024:.0f} KiB", flush=True)
    except (ValueError, OSError) as error:
        parser.exit(1, f"coser: {error}\n")


if __name__ == "__main__":
    main()
