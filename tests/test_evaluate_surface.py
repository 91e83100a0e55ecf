"""Surface figures: right on solids whose answers are known, blind to what nobody can see, and a table that resumes."""

import json
import math
import mmap

import numpy as np
import pytest
import torch
from solids import cube, joined, sphere

from coser import evaluate_surface, surface_metrics
from coser.cameras import Cameras
from coser.data.assets import list_assets
from coser.evaluate_surface import MemoryWatch, make_scene, markdown, summarise
from coser.evaluate_surface import evaluate_surface as evaluate
from coser.reconstruction import Mesh
from coser.surface_metrics import all_around, look_at_truth, seen_by, surface_figures

SAMPLES = 3000
SAME = 1e-4  # radii; a distance to the nearest of a few triangles is not quite the distance to all


@pytest.fixture(autouse=True)
def small_looks(monkeypatch):
    monkeypatch.setattr(surface_metrics, "GRID", 32)
    monkeypatch.setattr(surface_metrics, "LOOK_SIZE", 128)
    monkeypatch.setattr(evaluate_surface, "look_at_truth", lambda v, f: look_at_truth(v, f, SAMPLES))


def mesh_of(solid, scale: float = 1.0) -> Mesh:
    return Mesh((solid[0] * scale).numpy(), solid[1].numpy())


def truth_of(solid):
    return look_at_truth(*solid[:2], SAMPLES)


def test_surface_compared_with_itself_is_perfect():
    figures = surface_figures(mesh_of(cube(0.5)), truth_of(cube(0.5)))
    assert figures["chamfer"] < SAME and figures["fscore_1"] >= figures["fscore_0.5"] > 0.999
    assert figures["normal_error"] < 0.1 and figures["volume_iou"] == 1


def test_larger_cube_is_off_by_its_margin(monkeypatch):
    monkeypatch.setattr(surface_metrics, "GRID", 80)
    monkeypatch.setattr(surface_metrics, "LOOK_SIZE", 256)
    figures = surface_figures(mesh_of(cube(0.5), 1.03), truth_of(cube(0.5)))
    assert figures["completeness"] == pytest.approx(0.015, abs=1e-4)
    assert figures["accuracy"] == pytest.approx(0.015, rel=0.05)  # a little more at the edges
    assert figures["fscore_0.5"] == pytest.approx(0, abs=0.01) and figures["fscore_1"] > 0.97
    assert figures["volume_iou"] == pytest.approx(1 / 1.03**3, abs=0.03)


def test_windings_of_the_truth_do_not_matter():
    vertices, faces, colors = sphere(0.6, 16)
    turned = torch.where(torch.arange(len(faces))[:, None] % 2 == 0, faces, faces.flip(1))
    figures = surface_figures(mesh_of((vertices, faces, colors)), look_at_truth(vertices, turned, SAMPLES))
    assert figures["chamfer"] < SAME and figures["normal_error"] < 0.1 and figures["volume_iou"] > 0.99


def test_walls_that_nobody_can_see_do_not_count():
    nested = truth_of(joined(cube(0.6), cube(0.3), sphere(0.1, 8)))
    assert np.abs(nested.points).max(1).min() > 0.599
    assert surface_figures(mesh_of(cube(0.6)), nested)["chamfer"] < SAME


def test_views_from_above_do_not_see_the_underside():
    truth = truth_of(cube(0.5))
    seen = seen_by(truth, Cameras.orbit(6, 20))
    under = truth.points[:, 1] < -0.499
    assert not seen[under & (np.abs(truth.points[:, [0, 2]]).max(1) < 0.48)].any() and seen[~under].mean() > 0.99
    open_box = Mesh(truth.mesh.vertices, truth.mesh.faces[[0, 1, 2, 3, 4, 5, 8, 9, 10, 11]])  # without the side -y
    figures = surface_figures(open_box, truth, Cameras.orbit(6, 20))
    assert figures["accuracy"] < SAME and figures["completeness_seen"] < 0.01 < 0.1 < figures["completeness_unseen"]
    assert figures["volume_iou"] < 0.1  # one can look into it


def test_open_shells_have_no_volume_to_compare():
    vertices, faces, _ = cube(0.5)
    shell = look_at_truth(vertices, faces[:10], SAMPLES)
    assert not shell.encloses and math.isnan(surface_figures(mesh_of(cube(0.5)), shell)["volume_iou"])


def test_directions_around_are_even():
    toward = torch.nn.functional.normalize(all_around(60).centers, dim=1)
    assert toward.mean(0).norm() < 0.03
    nearest = (toward @ toward.T).fill_diagonal_(-1).amax(1).acos().rad2deg()
    assert nearest.min() > 15 and nearest.max() < 35


def expect_64_mib_to_be_seen(meanwhile=lambda: None):
    with MemoryWatch() as memory:
        meanwhile()
        block = np.ones(64 * 2**20 // 8)
        for _ in range(20):
            block.sum()
        memory.done.wait(0.1)
        del block
    assert 40 < memory.added < 150


def test_memory_watch_sees_what_is_taken_and_given_back():
    expect_64_mib_to_be_seen()


def test_memory_watch_sees_what_is_taken_from_memory_that_others_freed():
    small_enough_for_the_heap = np.ones(30 * 2**20 // 8)
    del small_enough_for_the_heap  # from now on glibc takes pieces of that size from its heap, not from the system
    pieces = [np.ones(25 * 2**20 // 8) for _ in range(5)]
    del pieces[:4]  # the last one keeps the heap from shrinking: 100 MiB stay resident and are the next to be taken
    expect_64_mib_to_be_seen()


def test_memory_watch_does_not_count_pages_of_files_that_go(tmp_path):
    (tmp_path / "file").write_bytes(bytes(96 * 2**20))
    with (tmp_path / "file").open("rb") as file:
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    assert not np.frombuffer(pages, np.uint8).any()  # looked at: resident
    expect_64_mib_to_be_seen(pages.close)


@pytest.fixture
def folder(tmp_path):
    """Two assets in the packed form."""
    arrays, rows = {}, []
    for name, (vertices, faces, colors) in {"box": cube(0.5), "ball": sphere(0.6, 12)}.items():
        arrays |= {f"{name}_v": vertices.numpy(), f"{name}_f": faces.numpy(),
                   f"{name}_c": (colors * 255).byte().numpy()}
        rows.append({"id": name, "shard": "meshes.npz", "object": name, "split": "val"})
    np.savez(tmp_path / "meshes.npz", **arrays)
    (tmp_path / "index.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path


def test_rows_are_measured_once_and_failures_are_told(folder, monkeypatch):
    asked = []

    def fake(views, cameras):
        asked.append(len(cameras))
        vertices, faces, _ = cube(0.5)
        return Mesh(vertices.numpy(), faces.numpy(), vertex_colors=np.full(vertices.shape, 0.5, np.float32))

    def failing(views, cameras):
        raise ValueError("views show nothing")

    monkeypatch.setattr(evaluate_surface, "METHODS", {"depth": ("cube", fake), "fit": ("failing", failing)})
    assets = list_assets(folder, "val")
    first = evaluate(assets[:1], [4], ["depth"], folder / "out", size=32)
    rows = evaluate(assets, [4], ["depth", "fit"], folder / "out", size=32)
    assert asked == [4, 4] and len(first) == 1 and len(rows) == 4
    assert [r["error"] for r in rows if r["method"] == "fit"] == ["views show nothing"] * 2
    box = next(r for r in rows if r["id"] == "box" and r["method"] == "depth")
    assert box["chamfer"] < SAME and box["psnr_-20"] > 10 and box["seconds"] > 0
    summary = summarise(rows)
    assert summary["depth, 4"]["assets"] == (2, 2) and summary["fit, 4"]["assets"] == (0, 2)
    assert len(evaluate(assets, [4], ["depth"], folder / "out", size=48)) == 2 and asked == [4] * 4, "other pictures"
    table = markdown(summary, ["chamfer", "psnr_20"])
    assert "| cube | 4 |" in table and "0 of 2" in table


def test_what_a_library_was_missing_for_is_tried_again(folder, monkeypatch):
    def lacking(views, cameras):
        raise ImportError("No module named 'open3d'")

    assets = list_assets(folder, "val")[:1]
    monkeypatch.setattr(evaluate_surface, "METHODS", {"tsdf": ("TSDF", lacking)})
    assert evaluate(assets, [4], ["tsdf"], folder / "out", size=32)[0]["error"] == "No module named 'open3d'"
    vertices, faces, _ = cube(0.5)
    mesh = Mesh(vertices.numpy(), faces.numpy(), vertex_colors=np.full(vertices.shape, 0.5, np.float32))
    monkeypatch.setattr(evaluate_surface, "METHODS", {"tsdf": ("TSDF", lambda views, cameras: mesh)})
    row, = evaluate(assets, [4], ["tsdf"], folder / "out", size=32)
    assert "error" not in row and row["chamfer"] > 0


def test_worst_tenth_is_at_the_bad_end():
    rows = [{"id": str(i), "method": "depth", "num_views": 12, "chamfer": i / 100, "psnr_20": float(i)}
            for i in range(11)]
    rows = [{f: math.nan for f in evaluate_surface.FIGURES} | r for r in rows]
    chamfer, psnr = (summarise(rows)["depth, 12"][f] for f in ("chamfer", "psnr_20"))
    assert chamfer == pytest.approx((0.05, 0.09)) and psnr == pytest.approx((5, 1))


def test_novel_views_stand_halfway_between_the_views(folder):
    scene = make_scene(list_assets(folder, "val")[0], 6, size=16)
    cameras, views = scene.novel[-20.0]
    gap = (cameras.azimuths[:, None] - scene.ring.azimuths).remainder(60)
    assert torch.allclose(gap, torch.full_like(gap, 30), atol=1e-3) and (views.masks.amax((1, 2, 3)) > 0.9).all()
