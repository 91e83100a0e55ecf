"""The mean of several trainings' weights as one pipeline: `python -m coser.average OUT FOLDER[=WEIGHT] ...`.

Legs of training that begin from one another's weights lie in one valley of the loss, where the mean of their weights
is often better than each (model soups, Wortsman et al. 2022, section 2): docs/training.md has when it was and when not.
All but the UNet is the first folder's.
"""

from __future__ import annotations

import argparse
import math
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from coser.latents import weights_hash
from coser.models.unet import SAME_SHAPES, MultiviewUNet
from coser.shards import TRAINING_STATE
from coser.whole_files import fresh_folder

UNET = Path("unet", "diffusion_pytorch_model.safetensors")
VAE = Path("vae", "diffusion_pytorch_model.safetensors")


def average_unets(out: str | Path, shares: Mapping[Path, float]) -> None:
    """Writes into `out` the first pipeline folder's copy whose UNet is the weighted mean of all folders' UNets.

    shares: pipeline folder => its weight, more than 0; their sum may be anything. Computed in float32, written in the
    first one's dtypes. Training states stay behind. Raises ValueError, before anything is written, when there are
    fewer than two folders, `out` holds something already, a folder is no pipeline, a UNet is of another shape than the
    first or told otherwise by its config what to do with its weights, or an autoencoder's latents are others: means of
    weights that speak of different latents are noise.
    """
    out, folders = Path(out), list(shares)
    if len(folders) < 2:
        raise ValueError(f"an average takes two pipeline folders or more, got {len(folders)}")
    for folder, share in shares.items():
        if not (math.isfinite(share) and share > 0):
            raise ValueError(f"a folder's weight must be more than 0, got {share:g} for {folder}")
        for file in (UNET, VAE):
            if not (folder / file).is_file():
                raise ValueError(f"every folder must be a pipeline's, with {file.as_posix()} in it, got {folder}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out must be new or empty, got {out}")
    configs = {folder: MultiviewUNet.load_config(folder / "unet", local_files_only=True) for folder in folders}
    for folder in folders[1:]:
        for name in SAME_SHAPES:
            values = [configs[f].get(name) for f in (folders[0], folder)]
            if values[0] != values[1]:
                raise ValueError(f"{folder} must have {folders[0]}'s {name}, {values[0]}, got {values[1]}")
    latents = weights_hash(folders[0] / "vae")
    for folder in folders[1:]:
        if weights_hash(folder / "vae") != latents:
            raise ValueError(f"{folder} must have {folders[0]}'s latents, but its autoencoder's encoder is another")
    first = load_file(folders[0] / UNET)
    total = sum(shares.values())
    mean = {name: weight.float() * (shares[folders[0]] / total) for name, weight in first.items()}
    for folder in folders[1:]:
        weights = load_file(folder / UNET)
        refuse_other_shapes(first, weights, folders[0], folder)
        for name, weight in weights.items():
            mean[name] += weight.float() * (shares[folder] / total)
    with safe_open(folders[0] / UNET, "pt") as file:
        metadata = file.metadata()
    writing = fresh_folder(out)
    shutil.copytree(folders[0], writing, ignore=shutil.ignore_patterns(*TRAINING_STATE), dirs_exist_ok=True)
    save_file({name: weight.to(first[name].dtype) for name, weight in mean.items()}, writing / UNET, metadata)
    if out.exists():
        out.rmdir()
    writing.rename(out)  # under its name only when whole


def refuse_other_shapes(first: Mapping[str, Tensor], other: Mapping[str, Tensor], first_folder: Path,
                        folder: Path) -> None:
    """Raises ValueError, which names the first weight in which two UNets differ, unless they are of one shape."""
    for name in sorted(first.keys() | other.keys()):
        shapes = [list(of[name].shape) if name in of else "none" for of in (first, other)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{folder} must have a UNet of {first_folder}'s shape: {name} is {shapes[0]} there, "
                             f"got {shapes[1]}")


def folder_and_share(text: str) -> tuple[Path, float]:
    """FOLDER or FOLDER=WEIGHT of the command line; a folder's own name may have `=` in it where no number follows."""
    folder, _, share = text.rpartition("=")
    try:
        return (Path(folder), float(share)) if folder else (Path(text), 1.0)
    except ValueError:
        return Path(text), 1.0


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m coser.average", description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("folders", nargs="+", metavar="FOLDER[=WEIGHT]", type=folder_and_share,
                        help="pipeline folders, such as a training's checkpoints; a weight is 1 unless given")
    options = parser.parse_args(arguments)
    if len(dict(options.folders)) < len(options.folders):
        parser.error("a folder may be given once: give it a weight instead")
    try:
        with torch.inference_mode():
            average_unets(options.out, dict(options.folders))
    except ValueError as error:
        parser.exit(2, f"coser.average: {error}\n")
    print(f"mean of {len(options.folders)} UNets in {options.out}")


if __name__ == "__main__":
    main()
