"""The smallest real parts: a random CoSERPipeline, and folders of rendered solids to train on."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from solids import cube, sphere

from coser import train_autoencoder, train_denoiser, train_loop
from coser.data.assets import list_assets
from coser.data.render import render_assets
from coser.flow import small_scheduler
from coser.models.autoencoder import ViewAutoencoder
from coser.models.text_encoder import SentenceTextEncoder, load_tokenizer
from coser.models.unet import MultiviewUNet
from coser.pipeline import CoSERPipeline

STATISTICS = dict(latent_mean=(0.1, -0.2, 0.3, 0.0), latent_std=(0.5, 0.6, 0.7, 0.8))


class Killed(BaseException):
    """Nothing in the code may catch it."""


@contextlib.contextmanager
def kill_at_step(killed_at: int) -> Iterator[None]:
    """Inside, a training is killed when it is about to end its step of that number."""
    schedule = train_loop.schedule

    def until_then(progress, step, *args):
        if step == killed_at:
            raise Killed
        return schedule(progress, step, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_loop, "schedule", until_then)
        yield


def lighten(monkeypatch) -> None:
    """Trainings do less of what is not training: one small sample picture, statistics of few latents, nothing counted.

    Counting operations has its own tests; it takes longer than all steps of a tiny run.
    """
    statistics = train_autoencoder.latent_statistics
    monkeypatch.setattr(train_autoencoder, "latent_statistics", lambda model, batches: statistics(model, batches, 2))
    monkeypatch.setattr(train_denoiser, "SAMPLE_PROMPTS", ("a red cube",))
    monkeypatch.setattr(train_denoiser, "SAMPLE", dict(num_views=4, num_inference_steps=2))
    monkeypatch.setattr(train_denoiser, "sample_flop", lambda *args: 1)


def tiny_pipeline(seed: int = 0) -> CoSERPipeline:
    """All parts real, the sizes of the presets called tiny, weights random but without a zero: every part has a say."""
    torch.manual_seed(seed)
    vae = ViewAutoencoder(**train_autoencoder.PRESETS["tiny"]["model"], **STATISTICS)
    unet = MultiviewUNet(**train_denoiser.PRESETS["tiny"]["model"])
    for model in (vae, unet):
        for parameter in model.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.05)
    pipeline = CoSERPipeline(vae=vae.eval(), text_encoder=SentenceTextEncoder(), tokenizer=load_tokenizer(),
                             unet=unet.eval(), scheduler=small_scheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def plain_config(part) -> dict:
    """A model's or scheduler's config as JSON knows it, without where it was loaded from and by which version."""
    return {k: v for k, v in json.loads(part.to_json_string()).items() if not k.startswith("_")}


def write_packed_assets(folder: Path) -> Path:
    """Four solids as a packed folder, one of them held out."""
    solids = {"cube-a": cube(0.5), "cube-b": cube(0.3), "ball": sphere(0.8, rows=6), "held": cube(0.4)}
    folder.mkdir(parents=True)
    rows, arrays = [], {}
    for name, (vertices, faces, colors) in solids.items():
        arrays |= {f"{name}_v": vertices.numpy().astype(np.float16), f"{name}_f": faces.numpy().astype(np.uint16),
                   f"{name}_c": (colors.numpy() * 255).round().astype(np.uint8)}
        kind = "rubber ball" if name == "ball" else "cube"
        rows.append({"id": name, "shard": "meshes.npz", "split": "val" if name == "held" else "train", "object": kind,
                     "captions": [f"a red {kind}", f"a {kind}"], "colors": ["red"],
                     "quality": 0 if name == "cube-b" else 2})
    np.savez(folder / "meshes.npz", **arrays)
    (folder / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_renders(folder: Path, num_views: int = 4, size: int = 256, rings: int = 1) -> tuple[Path, Path]:
    """Rendered rings of the packed solids: (folder to train on, folder of the held out)."""
    assets = write_packed_assets(folder / "assets")
    for split in ("train", "val"):
        render_assets(list_assets(assets, split), folder / split, rings=rings, num_views=num_views, size=size)
    return folder / "train", folder / "val"
