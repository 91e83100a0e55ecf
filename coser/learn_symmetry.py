"""Which symmetries the kinds of training assets have, and the autoencoder's map to latents of the mirror image.

`python -m coser.learn_symmetry RENDERS CHECKPOINT` measures both and writes them into the checkpoint's folder.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from coser.data.dataset import Ring, first_rings, list_rings
from coser.data.render import load_ring
from coser.models.autoencoder import ViewAutoencoder
from coser.symmetry import SYMMETRIES, Symmetries, ring_symmetries
from coser.views import ViewSet

MIN_KIND_COUNT = 3  # assets; fewer say nothing about a kind
USUAL = 0.5  # share of a kind's assets: what most have is nothing unusual
# Of a ring and its image: silhouettes' IoU, and colours' PSNR over both, at a quarter of the side. Each view's
# brightness is matched first, for the light comes from one side: a bottle is no other from behind, a face is.
ALIKE_IOU, ALIKE_PSNR, GAINS = 0.9, 18.0, (0.5, 2.0)
FIT_RINGS, FIT_VIEWS = 300, 4  # for the map, whose weights they outnumber a hundredfold
RIDGE = 1e-4


def is_alike(views: ViewSet, image: ViewSet) -> bool:
    """Whether two rings of N views show the same silhouettes and colours: by ALIKE_IOU and ALIKE_PSNR."""
    a, b = views.masks > 0.5, image.masks > 0.5
    both, either = (a & b).sum((1, 2, 3)), (a | b).sum((1, 2, 3)).clamp_min(1)
    gain = (views.views * image.views).sum((1, 2, 3)) / image.views.square().sum((1, 2, 3)).clamp_min(1e-6)
    error = views.views - gain.clamp(*GAINS)[:, None, None, None] * image.views
    squared = ((error.square().mean(1, keepdim=True) * (a | b)).sum((1, 2, 3)) / either).mean()
    return float((both / either).mean()) >= ALIKE_IOU and float(squared) <= 10 ** (-ALIKE_PSNR / 10)


def symmetries_of_ring(views: ViewSet) -> tuple[str, ...]:
    """The symmetries that a ring of N views shows, the first view from the front."""
    small = ViewSet(*(F.avg_pool2d(t.float(), 4) for t in (views.views, views.masks, views.depths)))
    mirrored, found = small.mirrored(), []
    for name in SYMMETRIES:
        group = ring_symmetries((name,), len(small))
        others = [(mirrored if flipped else small)[order] for order, flipped in group[1:]]
        if others and all(is_alike(small, other) for other in others):
            found.append(name)
    return tuple(found)


def learn_symmetries(rings: Iterable[Ring]) -> Symmetries:
    """What most assets of each kind have, and what most of all assets have. rings: one of each asset (`first_rings`).

    Scenes say nothing of their own and are left out, as are rings that do not begin at the front.
    """
    found: dict[str, list[tuple[str, ...]]] = defaultdict(list)
    for ring in rings:
        views, cameras = load_ring(ring.path)
        if not ring.kinds and abs(float(cameras.azimuths[0])) < 1e-3:
            found[ring.kind].append(symmetries_of_ring(views))
    found = {kind: shown for kind, shown in found.items() if len(shown) >= MIN_KIND_COUNT}
    groups = {"": [shown for kind in found.values() for shown in kind]} | found
    return Symmetries({kind: tuple(name for name in SYMMETRIES
                                   if sum(name in shown for shown in groups[kind]) >= USUAL * len(groups[kind]))
                       for kind in sorted(groups) if groups[kind]})


@torch.no_grad()
def fit_mirror(vae: ViewAutoencoder, views: Iterable[ViewSet]) -> tuple[Tensor, Tensor]:
    """The linear map from normalised latents, flipped, to those of the mirror image: weight [C,C,3,3], bias [C].

    By least squares over all places of all `views`, in float64.
    """
    channels = vae.config.latent_channels
    size = 9 * channels + 1
    products, targets = torch.zeros(size, size, dtype=torch.double), torch.zeros(size, channels, dtype=torch.double)
    for some in views:
        latents, mirrored = (vae.views_to_latents(v).cpu() for v in (some, some.mirrored()))
        seen = F.unfold(F.pad(latents.flip(-1), (1, 1, 1, 1), mode="replicate"), 3)
        seen = torch.cat([seen, torch.ones_like(seen[:, :1])], 1).permute(0, 2, 1).reshape(-1, size).double()
        products += seen.T @ seen
        targets += seen.T @ mirrored.flatten(2).permute(0, 2, 1).reshape(-1, channels).double()
    products.diagonal().add_(RIDGE * products.diagonal().mean())
    solved = torch.linalg.solve(products, targets).float()
    return solved[:-1].T.reshape(channels, channels, 3, 3).contiguous(), solved[-1].contiguous()


def main(argv: list[str] | None = None) -> None:
    """Measure the symmetries of rendered training assets and the autoencoder's mirror map; write both."""
    parser = argparse.ArgumentParser(prog="python -m coser.learn_symmetry", description=__doc__.splitlines()[0])
    parser.add_argument("renders", type=Path, help="rings of training assets, by coser.data.render")
    parser.add_argument("checkpoint", type=Path, help="pipeline folder")
    args = parser.parse_args(argv)
    try:
        rings = first_rings(list_rings(args.renders))
        vae = ViewAutoencoder.from_pretrained(args.checkpoint / "vae").eval()
        chosen = (load_ring(ring.path)[0] for ring in rings[::math.ceil(len(rings) / FIT_RINGS)])
        mirror = fit_mirror(vae, (views[::max(1, len(views) // FIT_VIEWS)] for views in chosen))
        learnt = replace(learn_symmetries(rings), mirror=mirror)
        learnt.save(args.checkpoint)
    except (ValueError, OSError) as error:
        parser.exit(1, f"coser: {error}\n")
    kinds = [names for kind, names in learnt.of_kind.items() if kind]
    counts = {name: sum(name in names for names in kinds) for name in SYMMETRIES}
    print(f"{len(kinds)} kinds of {len(rings)} rings:", ", ".join(f"{name} {n}" for name, n in counts.items()))


if __name__ == "__main__":
    main()
