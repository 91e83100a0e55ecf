"""What a recipe renders: which rings, in which order, how it goes on, and when it stops."""

import math
import time

import pytest
from painted import write_assets

from coser.data.dataset import is_copy, list_rings
from coser.data.index import is_repainted, is_stretched, original_id
from coser.recipe_renders import RecipeRenders

SIZES = dict(num_views=4, size=64)


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    return write_assets(tmp_path_factory.mktemp("solids") / "assets", repeats=1)


@pytest.fixture(scope="module")
def made(assets, tmp_path_factory):
    renders = RecipeRenders(tmp_path_factory.mktemp("recipe"), assets, scenes=3, repainted=True, stretched=1, **SIZES)
    assert not renders.made() and renders.count() == 0
    renders.make("cpu", 1, math.inf)
    return renders


def stamps(renders: RecipeRenders) -> dict:
    return {p: p.stat().st_mtime_ns for p in renders.folder.rglob("*.safetensors")}


def test_assets_scenes_and_copies_lie_in_one_folder_and_held_out_assets_in_another(made, assets):
    assert made.made()
    rings = list_rings(made.train)
    scenes, copies = [r for r in rings if r.kinds], [r for r in rings if is_copy(r)]
    stretched = [r for r in copies if not is_repainted(r.asset_id)]
    plain = [r for r in rings if r not in scenes and r not in copies]
    assert len(scenes) == 3 and all(len(r.kinds) == 2 for r in scenes)
    assert {r.asset_id for r in plain} == {a.id for a in made.assets}
    assert {original_id(r.asset_id) for r in stretched} == {a.id for a in made.assets} and len(stretched) == len(plain)
    assert {is_stretched(r.asset_id) for r in copies if is_repainted(r.asset_id)} == {True, False}
    assert {r.asset_id for r in list_rings(made.held_out)} == {a.id for a in made.held_out_assets}
    figures = made.figures(2.0, 8)
    assert figures["rings"] == figures["of"] == len(rings) == made.count()
    assert figures["views_per_second"] == 16 and figures["held_out"] == len(made.held_out_assets)


def test_what_is_there_is_not_made_again(made):
    before = stamps(made)
    made.make("cpu", 1, math.inf)
    assert stamps(made) == before
    lost = next(p for p in before if p.stem.startswith("scene-"))
    lost.unlink()
    assert not made.made()
    made.make("cpu", 1, math.inf)
    assert made.made() and {p for p, when in stamps(made).items() if when != before[p]} == {lost}


def test_stretched_copies_that_join_later_are_repainted_too(assets, tmp_path):
    first = RecipeRenders(tmp_path, assets, repainted=True, **SIZES)
    first.make("cpu", 1, math.inf)
    before = stamps(first)
    later = RecipeRenders(tmp_path, assets, repainted=True, stretched=1, **SIZES)
    assert first.made() and not later.made()
    later.make("cpu", 1, math.inf)
    assert later.made() and {p: when for p, when in stamps(later).items() if p in before} == before
    repainted = [r.asset_id for r in list_rings(later.train) if is_repainted(r.asset_id)]
    assert {is_stretched(asset_id) for asset_id in repainted} == {True, False}
    assert later.figures()["of"] == later.count()


def test_rings_that_join_later_are_repainted_too(assets, tmp_path):
    RecipeRenders(tmp_path, assets, repainted=True, **SIZES).make("cpu", 1, math.inf)
    later = RecipeRenders(tmp_path, assets, rings=2, repainted=True, **SIZES)
    later.make("cpu", 1, math.inf)
    second = [r.path.stem for r in list_rings(later.train) if is_repainted(r.asset_id) and r.path.stem[-2:] == "-1"]
    assert second and later.made() and later.figures()["of"] == later.count()


def test_when_the_time_is_over_nothing_is_begun_and_the_next_call_goes_on(assets, tmp_path):
    renders = RecipeRenders(tmp_path, assets, scenes=2, repainted=True, stretched=2, **SIZES)
    renders.make("cpu", 1, time.perf_counter())
    assert not renders.made() and renders.count() <= 1 and not (tmp_path / "scenes").exists()
    assert renders.figures()["of"] == 3 * len(renders.assets) + 2
    renders.make("cpu", 1, math.inf)
    assert renders.made()


def test_without_scenes_and_copies_assets_are_all(assets, made):
    plain = RecipeRenders(made.folder, assets, **SIZES)
    assert plain.made() and plain.figures()["of"] == len(plain.assets)


def test_another_number_of_scenes_than_lie_there_is_refused(assets, made):
    with pytest.raises(ValueError, match="scenes must be as many as .* holds, 3, got 5"):
        RecipeRenders(made.folder, assets, scenes=5, **SIZES).made()
