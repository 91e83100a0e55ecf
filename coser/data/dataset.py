"""What training reads: batches of rendered views for the autoencoder and latent rings with captions for the denoiser.

Batches are functions of (seed, step) and of the rings, nothing else: a resumed run draws what the uninterrupted one
would have drawn. While rings are still being rendered (`ViewBatches` with `relist`) that does not hold: a step then
draws from the rings that were there when it was made, and no two runs see them come at the same step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from coser.cameras import Cameras
from coser.data.assets import head_word, in_color, last_word, other_sides, subject_of
from coser.data.index import INDEX, is_stretched, original_id, read_index
from coser.data.render import load_ring, ring_to_views
from coser.data.stretch import WORDS, with_size
from coser.views import ViewSet, views_to_channels

CHANNEL_ORDERS = torch.tensor([[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]])


def step_generator(seed: int, step: int) -> torch.Generator:
    """The random numbers of one training step, whatever happened before it."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


@dataclass(frozen=True)
class Ring:
    """One rendered ring file and what is known of its asset.

    mirrored: whether its mirror image is meant. kinds: of a scene of several assets (`coser.data.compose`), the kinds
    it shows; empty for a single object.
    """

    path: Path
    asset_id: str
    object: str
    captions: tuple[str, ...]
    colors: tuple[str, ...]
    mirrored: bool = False
    kinds: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """What its latents are named."""
        return self.path.stem + "/mirrored" * self.mirrored

    def mirror(self) -> "Ring":
        """The mirror image, in whose captions left is right."""
        return replace(self, object=other_sides(self.object), captions=tuple(map(other_sides, self.captions)),
                       mirrored=not self.mirrored)

    @property
    def short_captions(self) -> tuple[str, ...]:
        """What people type: the first caption, and "a <colour> <object>" and "a <colour> <kind>" where both are known.

        A kind that the object is not about is no name for it: of a robot with a gun none says "a yellow gun", but "a
        yellow robot". Those of a stretched copy say how it is stretched, where that shows: what is called by its kind
        looks as usual.
        """
        if not self.colors or not self.object:
            return self.captions[:1]
        how = self.stretch
        names = (self.object.removeprefix(how).strip(), head_word(self))
        named = (with_size(in_color(self.colors[0], name), how) for name in names if name)
        return tuple(dict.fromkeys((self.captions[0], *filter(None, named))))

    @property
    def stretch(self) -> str:
        """How the captions of a stretched copy call its shape (`coser.data.stretch`); "" where nothing shows."""
        first = self.object.split(" ", 1)[0]
        return first if is_stretched(self.asset_id) and first in WORDS else ""

    @property
    def kind(self) -> str:
        """The last word of the object: "oak tree" -> "tree"."""
        return last_word(self)

    @property
    def subject(self) -> str:
        """What the object is about: its kind, but of a "table with two plates" the table."""
        return subject_of(self)


def mirror_views(views: ViewSet) -> ViewSet:
    """A whole ring's N views at even azimuths, the first at 0 => those of the mirror image, at the same azimuths."""
    return views[-torch.arange(len(views)) % len(views)].mirrored()


def is_copy(ring: Ring) -> bool:
    """Whether it shows no asset, but a repainted or stretched copy of one."""
    return original_id(ring.asset_id) != ring.asset_id


def first_rings(rings: list[Ring]) -> list[Ring]:
    """The first ring of each asset, none of copies."""
    return [r for r in rings if not is_copy(r) and r.path.stem.endswith("-0")]


def list_rings(renders: str | Path, limit: int | None = None, min_kind_count: int = 1,
               subjects: bool = False) -> list[Ring]:
    """The ring files of a folder written by coser.data.render, sorted by name.

    limit: the first so many. min_kind_count: only those whose kind has at least so many assets; copies do not
    count, and scenes of several assets neither count nor are left out. subjects: those, too, whose subject has so many.
    Raises ValueError when there are none.
    """
    renders = Path(renders)
    if not (renders / INDEX).is_file():
        raise ValueError(f"{renders} holds no {INDEX}; make it with python -m coser.data.render ASSETS {renders}")
    known = read_index(renders)
    rings = []
    for path in sorted(renders.glob("*.safetensors")):
        asset_id = path.stem.rsplit("-", 1)[0]
        row = known[asset_id]
        rings.append(Ring(path, asset_id, row["object"], tuple(row["captions"]), tuple(row["colors"]),
                          kinds=tuple(row.get("kinds", ()))))
    single = [r for r in rings if not r.kinds]
    of_kind = Counter(kind for kind, _ in {(r.kind, original_id(r.asset_id)) for r in single})
    about = Counter(subject for subject, _ in {(r.subject, original_id(r.asset_id)) for r in single})
    rings = [r for r in rings if r.kinds or of_kind[r.kind] >= min_kind_count
             or subjects and about[r.subject] >= min_kind_count]
    if not rings:
        raise ValueError(f"{renders} holds no rendered rings of kinds with at least {min_kind_count} assets yet")
    return rings[:limit]


class ViewBatches:
    """Random views of random rings as channels [B,5,S,S] in [0,1], mirrored and with swapped colour channels at random.

    on_device: keep all views on `device` as uint8 and float16 (24 views of 256x256 are 9 MiB), else read from disk.
    relist: lists the rings anew every `relist_every` steps, for rings that are still being rendered. A batch is then a
    function of seed, step and the rings listed so far; only once all are there does a resumed run draw what an
    uninterrupted one draws.
    """

    def __init__(self, rings: list[Ring], batch_size: int, seed: int = 0, device: str = "cpu", on_device: bool = False,
                 relist: Callable[[], list[Ring]] | None = None, relist_every: int = 100):
        self.batch_size, self.seed, self.device = batch_size, seed, device
        self.relist, self.relist_every = relist, relist_every
        self.cache: dict[Path, dict[str, Tensor]] | None = {} if on_device else None
        self.take(rings)

    def take(self, rings: list[Ring]) -> None:
        """Draws from these rings from now on."""
        if self.cache is not None:
            for path in (r.path for r in rings if r.path not in self.cache):
                self.cache[path] = {k: v.to(self.device) for k, v in load_file(path).items()}
        self.rings = rings

    def _view(self, ring: Ring, pick: float) -> dict[str, Tensor]:
        if self.cache is not None:
            cached = self.cache[ring.path]
            i = int(pick * len(cached["rgba"]))
            return {k: cached[k][i:i + 1] for k in ("rgba", "depths")}
        with safe_open(ring.path, "pt") as file:
            rgba, depths = file.get_slice("rgba"), file.get_slice("depths")
            i = int(pick * rgba.get_shape()[0])
            return {"rgba": rgba[i:i + 1].to(self.device), "depths": depths[i:i + 1].to(self.device)}

    def __call__(self, step: int, share: slice = slice(None)) -> Tensor:
        """The step's batch, or the part of it that a process wants which trains together with others."""
        if self.relist is not None and step % self.relist_every == 0:
            self.take(self.relist())
        generator, listed = step_generator(self.seed, step), self.rings  # another thread may list meanwhile
        rings = torch.randint(len(listed), (self.batch_size,), generator=generator).tolist()
        picks = torch.rand(self.batch_size, generator=generator).tolist()
        views = [self._view(listed[ring], pick) for ring, pick in zip(rings[share], picks[share])]
        channels = views_to_channels(ring_to_views({k: torch.cat([v[k] for v in views]) for k in ("rgba", "depths")}))
        # three quarters keep their colours: swapped channels teach other hues, not what is common
        order = torch.randint(6, (self.batch_size,), generator=generator)
        order = order * (torch.rand(self.batch_size, generator=generator) < 0.25)
        order = CHANNEL_ORDERS[order[share]].to(self.device)[:, :, None, None]
        rgb = channels[:, :3].gather(1, order.expand_as(channels[:, :3]))
        channels = torch.cat([rgb, channels[:, 3:]], 1)
        mirror = (torch.rand(self.batch_size, generator=generator) < 0.5)[share]
        return torch.where(mirror.to(self.device)[:, None, None, None], channels.flip(3), channels)


class Prefetched:
    """Makes the batch of the next step in a thread while the current one is trained on."""

    def __init__(self, batches: Callable[[int], Any]):
        self.batches, self.pool = batches, ThreadPoolExecutor(1)
        self.ahead: dict[int, Future] = {}

    def __call__(self, step: int) -> Any:
        now = self.ahead.pop(step, None) or self.pool.submit(self.batches, step)
        self.ahead = {step + 1: self.pool.submit(self.batches, step + 1)}
        return now.result()


def held_out_views(rings: list[Ring], per_ring: int = 2) -> ViewSet:
    """The first `per_ring` views, evenly spaced, of every ring: a fixed set for evaluation."""
    parts = []
    for ring in rings:
        views, _ = load_ring(ring.path)
        parts.append(views[::max(1, len(views) // per_ring)][:per_ring])
    return ViewSet.cat(parts)


@dataclass(frozen=True)
class RingBatch:
    """B samples of N views: latents [B,N,C,h,w], their shared cameras, and a caption each.

    A caption is "" where text was dropped. depths [B,N,s,s]: where a training asked for them.
    """

    latents: Tensor
    cameras: Cameras
    captions: list[str]
    depths: Tensor | None = None


def check_view_counts(view_counts: tuple[int, ...], ring_length: int) -> None:
    """Raises ValueError unless rings of so many views, evenly spread, are part of one of `ring_length`."""
    bad = [n for n in view_counts if n < 1 or ring_length % n]
    if bad:
        raise ValueError(f"view_counts must divide the {ring_length} rendered views of a ring, got {bad}")


class LatentRings:
    """Latent rings of many assets, cached as one tensor a ring length and elevation; draws batches for the denoiser.

    All samples of a batch share view count, start and elevation, so that they share one geometry; text is dropped for
    `drop_text` of them. latents: per ring [V,C,h,w]; rings of a batch come from one elevation. One tensor [R,V,C,h,w]
    in place of the list, such as one on a GPU, gives the same batches by one indexing each. depths: per ring [V,s,s],
    to go with the latents. multiple: what the number of samples is a multiple of, so that processes can share them.
    balance: 0 draws every ring as often as another, 1 every subject; between, subjects by their rings to the power
    1 - balance.
    """

    def __init__(self, rings: list[Ring], latents: list[Tensor] | Tensor, elevations: list[float], seed: int = 0,
                 view_counts: tuple[int, ...] = (4, 6, 8, 12), views_per_batch: int = 48, drop_text: float = 0.1,
                 depths: list[Tensor] | None = None, multiple: int = 1, balance: float = 0.5):
        self.groups: dict[float, list[int]] = {}
        for i, elevation in enumerate(elevations):
            self.groups.setdefault(round(elevation, 3), []).append(i)
        self.rings, self.latents, self.depths, self.seed, self.multiple = rings, latents, depths, seed, multiple
        # a hundred trees must not hide five hearts, nor scenes with barrels the barrels
        kinds = [(r.kind if r.kinds else r.subject, bool(r.kinds)) for r in rings]
        counts = Counter(kinds)
        self.weights = torch.tensor([counts[kind] ** -balance for kind in kinds], dtype=torch.float32)
        self.view_counts, self.views_per_batch, self.drop_text = view_counts, views_per_batch, drop_text
        self.ring_length = len(latents[0])
        check_view_counts(view_counts, self.ring_length)

    def __call__(self, step: int) -> RingBatch:
        generator = step_generator(self.seed, step)

        def draw(n: int) -> int:
            return int(torch.randint(n, (), generator=generator))

        elevation = _group_of(draw(len(self.rings)), self.groups)
        members = self.groups[elevation]
        num_views = self.view_counts[draw(len(self.view_counts))]
        stride = self.ring_length // num_views
        start = draw(stride)
        samples = max(1, self.views_per_batch // num_views // self.multiple) * self.multiple
        drawn = torch.multinomial(self.weights[members], samples, replacement=True, generator=generator)
        picks = [members[i] for i in drawn.tolist()]
        if isinstance(self.latents, Tensor):
            latents = self.latents[torch.tensor(picks, device=self.latents.device), start::stride].float()
        else:
            latents = torch.stack([self.latents[i][start::stride] for i in picks]).float()
        captions = []
        for i in picks:
            ring = self.rings[i]
            choices = ring.short_captions if draw(2) else ring.captions
            caption = choices[draw(len(choices))]
            captions.append("" if float(torch.rand((), generator=generator)) < self.drop_text else caption)
        cameras = Cameras.orbit(num_views, elevation, start=start * 360 / self.ring_length)
        depths = None if self.depths is None else torch.stack([self.depths[i][start::stride] for i in picks]).float()
        return RingBatch(latents, cameras, captions, depths)


def _group_of(position: int, groups: dict[float, list[int]]) -> float:
    """The group that holds the position-th ring when groups are laid end to end: larger groups are drawn more often."""
    for key, members in groups.items():
        if position < len(members):
            return key
        position -= len(members)
    raise ValueError(f"position {position} lies outside all groups")
