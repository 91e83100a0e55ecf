"""The rings of a recipe: of assets and held-out assets, and if asked of scenes of several and as copies."""

from __future__ import annotations

import time
from pathlib import Path

from coser.data.assets import Asset, list_assets, split_assets
from coser.data.compose import held_out_compositions, write_scenes
from coser.data.recolor import recolor_rings
from coser.data.render import is_rendered, render_assets
from coser.data.stretch import are_stretched, render_stretched
from coser.whole_files import whole_file

HELD_OUT_VIEWS = 12
REPAINTED = "repainted.txt"  # beside the rings: the assets' copies, written when all are there


class RecipeRenders:
    """What lies below `folder`: train/ and val/, rings to train on and to measure with, and scenes/, composed assets.

    assets: packed folder, or GLB, glTF or OBJ files, split as `split_assets` does. rings: of each asset, num_views
    views of size x size pixels each. scenes: so many scenes of the assets to train on join, with as many rings each.
    stretched: so many stretched copies of each asset join. repainted: whether copies in other colours join, of
    stretched ones, too. Raises ValueError for fewer than two assets.
    """

    def __init__(self, folder: Path, assets: Path, min_quality: int = 0, rings: int = 1, num_views: int = 24,
                 size: int = 256, scenes: int = 0, repainted: bool = False, stretched: int = 0):
        self.folder, self.train, self.held_out = folder, folder / "train", folder / "val"
        self.assets, self.held_out_assets = split_assets(assets, min_quality)
        self.rings, self.num_views, self.size = rings, num_views, size
        self.scenes, self.repainted, self.stretched = scenes, repainted, stretched

    def made(self) -> bool:
        """Whether all rings are there."""
        return (self.held_out_made() and is_rendered(self.assets, self.rings, self.train)
                and (not self.scenes or self._composed() and is_rendered(self._scenes(), self.rings, self.train))
                and are_stretched(self.assets, self.stretched, self.train)
                and (not self.repainted or self._copies() is not None))

    def held_out_made(self) -> bool:
        return is_rendered(self.held_out_assets, 1, self.held_out)

    def count(self) -> int:
        """How many rings to train on are there."""
        return sum(1 for _ in self.train.glob("*.safetensors"))

    def make(self, device: str, workers: int, until: float) -> None:
        """Makes what is missing, until a reading of time.perf_counter(): held-out rings first, which trainings need
        from the start, then assets, scenes, stretched and repainted copies. Composing and repainting are not
        interrupted."""
        sizes = dict(size=self.size, device=device, workers=workers, until=until)
        if not self.held_out_made():
            render_assets(self.held_out_assets, self.held_out, 1, min(HELD_OUT_VIEWS, self.num_views), **sizes)
        if not is_rendered(self.assets, self.rings, self.train):
            (self.train / REPAINTED).unlink(missing_ok=True)  # copies of those that join now are lacking
            render_assets(self.assets, self.train, self.rings, self.num_views, **sizes)
        if self.scenes and time.perf_counter() < until:
            render_assets(self._scenes(), self.train, self.rings, self.num_views, **sizes)
        if not are_stretched(self.assets, self.stretched, self.train) and time.perf_counter() < until:
            (self.train / REPAINTED).unlink(missing_ok=True)
            render_stretched(self.assets, self.train, self.stretched, num_views=self.num_views, **sizes)
        if self.repainted and self._copies() is None and time.perf_counter() < until:
            copies = recolor_rings(self.train, rings=tuple(range(self.rings)))
            with whole_file(self.train / REPAINTED) as writing:
                writing.write_text("".join(f"{name}\n" for name in copies), "utf-8")

    def figures(self, seconds: float = 0.0, new_rings: int = 0) -> dict:
        """What the record says of them; with seconds, also how quickly new rings came."""
        copies = len(self._copies() or ()) if self.repainted else 0
        rings = len(self.assets) * (self.rings + self.stretched) + self.scenes * self.rings + copies
        figures = {"rings": self.count(), "of": rings, "held_out": len(self.held_out_assets),
                   "num_views": self.num_views}
        if new_rings:
            figures["views_per_second"] = new_rings * self.num_views / seconds
        return figures

    def _copies(self) -> list[str] | None:
        """The repainted copies, None until all are there."""
        file = self.train / REPAINTED
        return file.read_text("utf-8").splitlines() if file.is_file() else None

    def _composed(self) -> bool:
        return (self.folder / "scenes" / "index.jsonl").is_file()

    def _scenes(self) -> list[Asset]:
        """The scenes, composed when first asked for."""
        folder = self.folder / "scenes"
        if not self._composed():
            write_scenes(self.assets, folder, self.scenes, held_out=held_out_compositions())
        found = list_assets(folder)
        if len(found) != self.scenes:
            raise ValueError(f"scenes must be as many as {folder} holds, {len(found)}, got {self.scenes}")
        return found
