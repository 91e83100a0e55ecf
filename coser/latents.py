"""Latents of rendered rings, encoded once for each autoencoder and kept in files."""

from __future__ import annotations

import hashlib
import json
import math
import time
import zlib
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from coser.data.dataset import Prefetched, Ring, mirror_views
from coser.data.render import ring_to_views
from coser.models.autoencoder import ViewAutoencoder
from coser.whole_files import whole_file


def weights_hash(vae_folder: Path) -> str:
    """What files of an autoencoder's latents are named after: all that these depend on, so not its decoder."""
    config = ViewAutoencoder.load_config(vae_folder)
    digest = hashlib.sha256(json.dumps([config.get("latent_mean"), config.get("latent_std")]).encode())
    for name, weight in sorted(load_file(vae_folder / "diffusion_pytorch_model.safetensors").items()):
        if name.startswith("encoder."):
            digest.update(name.encode() + weight.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def encode_rings(vae: ViewAutoencoder, vae_folder: Path, rings: list[Ring],
                 cache: Path) -> tuple[list[Tensor], list[float]]:
    """Normalised latents [V,C,h,w] float16 and elevation (degrees) of every ring; kept in `cache` for the next start.

    The cache is added to when rings are new and made anew when the autoencoder is another one.
    """
    tensors = encoded_rings(vae, vae_folder, rings, cache)
    return [tensors[r.key] for r in rings], [float(tensors[f"{r.key}/elevation"]) for r in rings]


@torch.no_grad()
def encoded_rings(vae: ViewAutoencoder, vae_folder: Path, rings: list[Ring], cache: Path,
                  until: float = math.inf) -> dict[str, Tensor]:
    """What `cache` holds for an autoencoder once `rings` are encoded, too: key => latents, key/elevation => [1].

    until: a reading of time.perf_counter() at which encoding stops, finished or not; rings go in an order that has
    nothing to do with their names, so that those encoded by then are a fair sample. Several processes may encode
    different rings into one cache at once.
    """
    weights = weights_hash(vae_folder)
    cache.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for file in sorted(cache.glob(f"{weights}-*.safetensors")):
        tensors |= load_file(file)
    fresh: dict[str, Tensor] = {}
    missing = sorted((ring for ring in rings if ring.key not in tensors), key=lambda r: zlib.crc32(r.key.encode()))
    upcoming = Prefetched(lambda i: load_file(missing[i].path) if i < len(missing) else {})  # files are 9 MiB each
    for i, ring in enumerate(missing, 1):
        late = time.perf_counter() >= until
        if late and not fresh:
            break
        stored = upcoming(i - 1)
        views = ring_to_views({k: stored[k].to(vae.device) for k in ("rgba", "depths")})
        views = mirror_views(views) if ring.mirrored else views
        fresh[ring.key] = vae.views_to_latents(views).half().cpu().contiguous()
        fresh[f"{ring.key}/elevation"] = stored["elevations"].mean().reshape(1)
        if len(fresh) >= 400 or i == len(missing) or late:
            first = zlib.crc32(next(iter(fresh)).encode())  # which no other process encodes at the same time
            with whole_file(cache / f"{weights}-{first:08x}.safetensors") as writing:
                save_file(fresh, writing)
            tensors |= fresh
            fresh = {}
            print(f"latents: {i}/{len(missing)} rings", flush=True)
    return tensors


def latent_size(ring: Ring) -> int:
    """Side of the latents of a ring's views."""
    with safe_open(ring.path, "pt") as file:
        return file.get_slice("rgba").get_shape()[-1] // 16


def ring_length(ring: Ring) -> int:
    """How many views a ring has."""
    with safe_open(ring.path, "pt") as file:
        return file.get_slice("rgba").get_shape()[0]


def same_weights(one: Path, other: Path) -> bool:
    """Whether two autoencoder folders hold the same weights, in half precision."""
    a, b = (load_file(f / "diffusion_pytorch_model.safetensors") for f in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[k].half(), b[k].half()) for k in a)
