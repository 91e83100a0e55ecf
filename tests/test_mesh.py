"""Mesh: closedness, parts, simplification, normals, and GLB files that say what they should."""

import json

import numpy as np
import pygltflib
import pytest
import trimesh
from solids import cube, joined, sphere, table

from coser.cameras import Cameras
from coser.metrics import render_mesh, silhouette_iou
from coser.rasterizer import render
from coser.reconstruction import reconstruct
from coser.reconstruction.glb import save_glb, srgb_to_linear
from coser.reconstruction.mesh import Mesh, keep_parts, part_pinches, simplify, smooth
from coser.reconstruction.normals import with_normals
from coser.reconstruction.primitive import split_vertices
from tests.drawn_pipeline import box_views


def mesh_of(solid) -> Mesh:
    """A solid with the corners at one place made one."""
    vertices, faces, _ = solid
    places, index = np.unique(vertices.numpy().round(5), axis=0, return_inverse=True)
    return Mesh(places.astype(np.float32), index.ravel()[faces.numpy()])


BALL = mesh_of(sphere(0.6, 24))
BOX = mesh_of(cube(0.5))


def test_watertight_says_what_trimesh_says():
    open_box, turned = Mesh(BOX.vertices, BOX.faces[1:]), BOX.faces.copy()
    turned[0] = turned[0][::-1]
    for mesh in (BALL, BOX, open_box):
        assert mesh.is_watertight == trimesh.Trimesh(mesh.vertices, mesh.faces, process=False).is_watertight
    assert BALL.is_watertight and not Mesh(BOX.vertices, turned).is_watertight
    assert not Mesh(BOX.vertices, BOX.faces[:0]).is_watertight


def test_volume_of_a_cube():
    assert BOX.volume == pytest.approx(1.0, abs=1e-5)
    assert Mesh(BOX.vertices, BOX.faces[:, ::-1]).volume == pytest.approx(-1.0, abs=1e-5)


def test_every_edge_of_a_closed_mesh_is_listed_once():
    edges = BALL.edges()
    assert len(edges) == len(BALL.faces) * 3 // 2 and (edges[:, 0] < edges[:, 1]).all()


def test_smoothing_takes_roughness_off_and_leaves_the_shape_closed():
    rough = Mesh(BALL.vertices + np.random.default_rng(0).normal(0, 0.01, BALL.vertices.shape).astype(np.float32),
                 BALL.faces)
    before, even = rough.vertices.copy(), smooth(rough, 5)
    assert np.array_equal(rough.vertices, before) and even.is_watertight and even.vertices.dtype == np.float32
    off = [np.abs(np.linalg.norm(m.vertices, axis=1) - 0.6) for m in (rough, even)]
    tilt = [facing_away(m) for m in (rough, even)]
    assert np.median(tilt[1]) < 0.4 * np.median(tilt[0]) and off[1].max() < off[0].max() < 0.04
    assert np.array_equal(smooth(rough, 0).vertices, rough.vertices)


def facing_away(mesh: Mesh) -> np.ndarray:
    """Degrees by which the faces [F] of something like a sphere around the origin turn away from its radius."""
    corners = mesh.vertices[mesh.faces]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    middles = corners.mean(1)
    lengths = np.linalg.norm(normals, axis=1) * np.linalg.norm(middles, axis=1)
    return np.degrees(np.arccos(np.clip((normals * middles).sum(1) / np.maximum(lengths, 1e-12), -1, 1)))


def test_normals_of_a_sphere_point_outward():
    mesh = with_normals(BALL)
    assert np.allclose(mesh.normals, (BALL.vertices / 0.6)[BALL.faces], atol=0.01)
    assert np.allclose(np.linalg.norm(mesh.normals, axis=2), 1, atol=1e-6)


def test_normals_of_a_box_are_those_of_its_sides_and_smooth_ones_point_through_its_corners():
    sides = np.cross(*np.diff(BOX.vertices[BOX.faces], axis=1).transpose(1, 0, 2))
    hard, smooth = with_normals(BOX), with_normals(BOX, 180.0)
    assert np.allclose(hard.normals, sides[:, None], atol=1e-5)
    assert np.allclose(smooth.normals, BOX.vertices[BOX.faces] / np.sqrt(0.75), atol=1e-5)


def test_vertices_are_split_only_where_corners_differ():
    assert np.array_equal(split_vertices(with_normals(BALL)).positions, BALL.vertices)
    box = split_vertices(with_normals(BOX))
    assert len(box.positions) == 24
    assert np.array_equal(box.positions[box.faces], BOX.vertices[BOX.faces])
    assert np.array_equal(box.positions, BOX.vertices[box.vertices])
    assert np.array_equal(box.normals[box.faces], with_normals(BOX).normals)


@pytest.mark.parametrize("budget", [120, 500, 10**6])
def test_simplified_meshes_are_closed_and_within_budget(budget):
    simple = simplify(BALL, budget)
    assert simple.is_watertight and len(simple.faces) <= budget
    assert simple.volume == pytest.approx(BALL.volume, rel=0.05)


@pytest.mark.parametrize("solid", [sphere(0.6, 64), table()], ids=["sphere", "table"])
def test_simplified_meshes_keep_their_silhouettes(solid):
    cameras = Cameras.orbit(4)
    dense = reconstruct(render(*solid, cameras, 128), cameras, resolution=96, max_faces=10**6, texture_size=None)
    coarse = simplify(dense, 500)
    assert len(coarse.faces) <= 500 < len(dense.faces) / 20
    seen, kept = (render_mesh(Mesh(m.vertices, m.faces, np.zeros_like(m.vertices)), cameras, 128).masks
                  for m in (dense, coarse))
    assert silhouette_iou(kept, seen).min() > 0.93


def test_where_collapses_come_to_an_end_the_mesh_stays_whole():
    """Flat sides whose triangles no longer collapse drove the simplifier's target below nothing."""
    cameras = Cameras.orbit(6, 20.0)
    mesh = reconstruct(box_views("a red box", cameras), cameras, resolution=96, max_faces=100, texture_size=None)
    assert mesh.is_watertight and len(mesh.faces) < 2000


def test_specks_and_bubbles_go_and_parts_stay():
    speck, bubble = sphere(0.02, 6, (0.9, 0, 0)), sphere(0.2, 8)
    bubble = bubble[0], bubble[1].flip(1), bubble[2]
    mesh = keep_parts(mesh_of(joined(sphere(0.6, 24), sphere(0.1, 12, (0, 0.9, 0)), speck, bubble)), smallest=0.1)
    assert len(mesh.vertices) == len(BALL.vertices) + len(mesh_of(sphere(0.1, 12)).vertices)
    assert mesh.is_watertight and not ((mesh.vertices[:, 0] > 0.7).any())


def test_boxes_that_share_an_edge_are_parted():
    pinched = mesh_of(joined(cube(0.25, (-0.25, 0, -0.25)), cube(0.25, (0.25, 0, 0.25))))
    assert not pinched.is_watertight
    parted = part_pinches(pinched)
    assert parted.is_watertight and trimesh.Trimesh(parted.vertices, parted.faces).is_watertight
    assert parted.volume == pytest.approx(0.25, rel=0.02)
    assert len(trimesh.Trimesh(parted.vertices, parted.faces).split()) == 2


def test_boxes_that_share_a_corner_are_parted():
    parted = part_pinches(mesh_of(joined(cube(0.25, (-0.25, -0.25, -0.25)), cube(0.25, (0.25, 0.25, 0.25)))))
    assert len(parted.vertices) == 16 and parted.is_watertight


def test_faces_folded_flat_are_dropped():
    flap = np.array([[0, 1, len(BOX.vertices)], [1, 0, len(BOX.vertices)]])
    vertices = np.concatenate([BOX.vertices, [[2, 2, 2]]]).astype(np.float32)
    mesh = part_pinches(Mesh(vertices, np.concatenate([BOX.faces, flap])))
    assert mesh.is_watertight and len(mesh.faces) == len(BOX.faces) and len(mesh.vertices) == len(BOX.vertices)


def test_parting_leaves_sound_meshes_alone():
    parted = part_pinches(BALL)
    assert parted.volume == pytest.approx(BALL.volume) and len(parted.vertices) == len(BALL.vertices)


def test_glb_comes_back_as_it_was_written(tmp_path):
    colors = (BALL.vertices / 1.2 + 0.5).clip(0, 1).astype(np.float32)
    mesh = with_normals(Mesh(BALL.vertices, BALL.faces, colors))
    path = save_glb(mesh, tmp_path / "ball.glb", {"prompt": "ein Ball «rot»", "seed": 7})
    back = trimesh.load(path, force="mesh", process=False)
    assert np.allclose(back.vertices, mesh.vertices) and np.array_equal(back.faces, mesh.faces) and back.is_watertight
    assert np.allclose(back.vertex_normals[back.faces], mesh.normals, atol=1e-5)
    file = pygltflib.GLTF2().load(str(path))
    assert file.asset.extras == {"prompt": "ein Ball «rot»", "seed": 7}
    material = file.materials[file.meshes[0].primitives[0].material].pbrMetallicRoughness
    assert material.metallicFactor == 0 and material.roughnessFactor == pytest.approx(0.9)
    accessor = file.accessors[file.meshes[0].primitives[0].attributes.COLOR_0]
    view = file.bufferViews[accessor.bufferView]
    stored = np.frombuffer(file.binary_blob(), "<f4", accessor.count * 3, view.byteOffset).reshape(-1, 3)
    assert np.allclose(stored, srgb_to_linear(colors))


def test_glb_keeps_its_texture_and_where_it_lies(tmp_path):
    texture = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    uvs = np.random.default_rng(1).random((len(BOX.faces), 3, 2), np.float32)
    path = save_glb(with_normals(Mesh(BOX.vertices, BOX.faces, uvs=uvs, texture=texture)), tmp_path / "box.glb")
    back = trimesh.load(path, force="mesh", process=False)
    assert np.array_equal(np.asarray(back.visual.material.baseColorTexture)[..., :3], texture)
    flipped = back.visual.uv * (1, -1) + (0, 1)  # trimesh counts v from below
    assert np.allclose(flipped[back.faces], uvs, atol=1e-6)
    assert np.allclose(back.vertices[back.faces], BOX.vertices[BOX.faces])


def test_glb_bounds_and_lengths_are_right(tmp_path):
    raw = save_glb(BOX, tmp_path / "box.glb").read_bytes()
    assert raw[:4] == b"glTF" and int.from_bytes(raw[8:12], "little") == len(raw)
    description = json.loads(raw[20:20 + int.from_bytes(raw[12:16], "little")])
    position = description["accessors"][description["meshes"][0]["primitives"][0]["attributes"]["POSITION"]]
    assert np.allclose(position["min"], -0.5) and np.allclose(position["max"], 0.5)
    assert "COLOR_0" not in description["meshes"][0]["primitives"][0]["attributes"]


def test_linear_light_of_black_middle_grey_and_white():
    assert np.allclose(srgb_to_linear(np.array([0.0, 0.5, 1.0])), [0, 0.21404, 1], atol=1e-5)


def test_mismatched_arrays_are_refused():
    with pytest.raises(ValueError, match="vertex_colors"):
        Mesh(BOX.vertices, BOX.faces, BOX.vertices[:2])
    with pytest.raises(ValueError, match="faces"):
        Mesh(BOX.vertices, BOX.faces[:, :2])
    with pytest.raises(ValueError, match="texture"):
        Mesh(BOX.vertices, BOX.faces, uvs=np.zeros((12, 3, 2), np.float32))
    with pytest.raises(ValueError, match="texture"):
        Mesh(BOX.vertices, BOX.faces, uvs=np.zeros((12, 3, 2), np.float32), texture=np.zeros((4, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="hard_angle"):
        with_normals(BOX, -1.0)
    with pytest.raises(ValueError, match="max_faces"):
        simplify(BOX, 3)
