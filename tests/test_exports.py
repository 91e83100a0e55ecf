"""Every format says what it should to readers that are not ours, and nothing half-done is ever left behind."""

import errno
import json
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import trimesh
from arms import COLORS, LENGTHS, arms, expect_arms
from PIL import Image
from test_mesh import BALL

from coser.cameras import Cameras
from coser.metrics import render_mesh
from coser.reconstruction import exports, turntable
from coser.reconstruction.exports import FORMATS, export
from coser.reconstruction.mesh import Mesh
from coser.reconstruction.splat import save_splat
from coser.transforms import FILE_TO_WORLD

TEXTURED, COLORED, PLAIN = arms("texture"), arms("vertices"), arms("none")
CAMERAS = Cameras.look_at_origin([10.0, 100.0, 190.0, 280.0], [20.0, -10.0, 50.0, 0.0])
VIEWS = render_mesh(TEXTURED, CAMERAS, 96)
MESHES = ("glb", "obj", "stl", "ply")


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(exports, "save_splat", lambda mesh, path: save_splat(mesh, path, 3000))
    monkeypatch.setattr(turntable, "SIZE", 96)
    monkeypatch.setattr(turntable, "FRAMES", 8)
    monkeypatch.setattr(turntable, "GIF_SIZE", 64)
    monkeypatch.setattr(turntable, "GIF_FRAMES", 8)


def written(kind: str, folder, mesh: Mesh = TEXTURED, **options):
    return export(kind, mesh, VIEWS, CAMERAS, folder / f"three arms{FORMATS[kind].suffix}", **options)


def read_obj(path, **options) -> trimesh.Trimesh:
    with zipfile.ZipFile(path) as archive:
        beside = trimesh.resolvers.ZipResolver({name: archive.open(name) for name in archive.namelist()})
        return trimesh.load(archive.open("three-arms.obj"), file_type="obj", force="mesh", resolver=beside, **options)


@pytest.mark.parametrize("mesh", [TEXTURED, COLORED, PLAIN], ids=["textured", "colored", "plain"])
@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_written_whatever_colours_the_mesh_has(kind, mesh, tmp_path):
    path = written(kind, tmp_path, mesh)
    assert path == tmp_path / f"three arms{FORMATS[kind].suffix}" and list(tmp_path.iterdir()) == [path]


def test_suffixes_and_labels_differ():
    assert len({f.suffix for f in FORMATS.values()}) == len({f.label for f in FORMATS.values()}) == len(FORMATS)


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind != "mp4"])
def test_the_same_asset_makes_the_same_file(kind, tmp_path):
    first = written(kind, tmp_path).read_bytes()
    assert written(kind, tmp_path).read_bytes() == first


@pytest.mark.parametrize("kind", ["glb", "obj"])
def test_textured_formats_have_each_arm_in_its_colour_where_it_belongs(kind, tmp_path):
    path = written(kind, tmp_path)
    back = read_obj(path) if kind == "obj" else trimesh.load(path, force="mesh")
    material = back.visual.material
    picture = material.image if kind == "obj" else material.baseColorTexture
    corners, uv = back.vertices[back.faces], back.visual.uv[back.faces].mean(1)
    colors = trimesh.visual.color.uv_to_color(uv, picture)[:, :3]
    expect_arms(corners.reshape(-1, 3), colors.repeat(3, 0))
    assert (np.einsum("fk,fk->f", back.face_normals, back.vertex_normals[back.faces].mean(1)) > 0.99).all()


def test_obj_names_its_own_files_without_spaces_and_colours_vertices_without_a_texture(tmp_path):
    with zipfile.ZipFile(written("obj", tmp_path)) as archive:
        assert sorted(archive.namelist()) == ["three-arms.mtl", "three-arms.obj", "three-arms.png"]
        lines = archive.read("three-arms.obj").decode().splitlines()
        assert "mtllib three-arms.mtl" in lines and "usemtl matt" in lines
        material = archive.read("three-arms.mtl").decode().splitlines()
        assert "newmtl matt" in material and "map_Kd three-arms.png" in material
        assert sum(line.startswith("v ") for line in lines) == 24  # welded
        assert sum(line.startswith("vn ") for line in lines) == 6 and any(line.startswith("vt ") for line in lines)
        assert all(entry.external_attr >> 16 == 0o644 for entry in archive.infolist())
    back = read_obj(written("obj", tmp_path, COLORED), skip_materials=True)
    expect_arms(back.vertices, back.visual.vertex_colors[:, :3])


def test_stl_is_in_millimetres_z_up_and_closed(tmp_path):
    path = written("stl", tmp_path)
    back = trimesh.load(path)
    assert back.is_watertight and back.is_winding_consistent and back.volume > 0
    assert len(path.read_bytes()) == 84 + 50 * 36
    high, low = 1000 * np.array(LENGTHS), -80.0
    assert np.allclose(back.bounds, [[low, -high[2], low], [high[0], -low, high[1]]], atol=1e-3)  # front along -y
    assert np.dot(np.cross([1, 0, 0], [0, 0, 1]), [0, -1, 0]) == 1  # x, up and front are right-handed as before


@pytest.mark.parametrize("mesh", [TEXTURED, COLORED], ids=["from the texture", "its own"])
def test_ply_is_closed_and_has_colours_at_its_vertices(mesh, tmp_path):
    back = trimesh.load(written("ply", tmp_path, mesh), process=False)
    assert back.is_watertight and len(back.vertices) == 24
    expect_arms(back.vertices, back.visual.vertex_colors[:, :3])


def test_splats_are_flat_discs_on_the_surface_with_y_down(tmp_path):
    raw = written("splat", tmp_path).read_bytes()
    head, body = raw.split(b"end_header\n", 1)
    names = [line.split()[2].decode() for line in head.splitlines() if line.startswith(b"property float")]
    rows = dict(zip(names, np.frombuffer(body, "<f4").reshape(-1, len(names)).T))
    count = int(head.split(b"element vertex ")[1].split()[0])
    assert 2500 <= count == len(rows["x"]) <= 3500
    places = np.stack([rows["x"], rows["y"], rows["z"]], -1)
    colors = (np.stack([rows[f"f_dc_{k}"] for k in range(3)], -1) * 0.28209479177387814 + 0.5) * 255
    expect_arms(places, colors, axes=((1, 0, 0), (0, -1, 0), (0, 0, -1)))
    scales = np.exp(np.stack([rows[f"scale_{k}"] for k in range(3)], -1))
    assert (scales[:, 2] < 0.2 * scales[:, 0]).all() and np.allclose(scales[:, 0], scales[:, 1])
    w, x, y, z = (rows[f"rot_{k}"] for k in range(4))
    smallest = np.stack([2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)], -1)
    normals = np.stack([rows["nx"], rows["ny"], rows["nz"]], -1)
    assert np.allclose(smallest, normals, atol=1e-5) and np.allclose(np.abs(normals).max(1), 1)  # of boxes
    outward = places + 0.01 * normals
    inside = [(np.abs(np.delete(outward * (1, -1, -1), axis, 1)) < 0.08).all(1) for axis in range(3)]
    along = [(o > 0.15) & (o < length) for o, length in zip((outward * (1, -1, -1)).T, LENGTHS)]
    assert not np.any([i & a for i, a in zip(inside, along)])
    assert (1 / (1 + np.exp(-rows["opacity"])) > 0.9).all()


def test_views_come_with_cameras_that_see_the_arms_where_the_pictures_show_them(tmp_path):
    """NeRF's convention, read in plain numpy: world z up, cameras look along their -z, pictures from the top left."""
    with zipfile.ZipFile(written("views", tmp_path, extras={"prompt": "three arms"})) as archive:
        transforms = json.loads(archive.read("transforms.json"))
        assert transforms["extras"] == {"prompt": "three arms"}
        checked = 0
        for frame in transforms["frames"]:
            picture = np.asarray(Image.open(archive.open(frame["file_path"])))
            depth = np.asarray(Image.open(archive.open(frame["depth_file_path"])))
            assert picture.shape == (96, 96, 4) and depth.dtype == np.uint16
            assert ((depth > 0) == (VIEWS.depths[checked // 3, 0].numpy() > 0)).all()
            for axis, length in enumerate(LENGTHS):
                tip = FILE_TO_WORLD.T @ np.append(np.eye(3)[axis] * length * 0.95, 1)
                x, y, z, _ = np.linalg.inv(frame["transform_matrix"]) @ tip
                column = transforms["cx"] + transforms["fl_x"] * x / -z
                row = transforms["cy"] - transforms["fl_y"] * y / -z
                found = picture[int(row), int(column)]
                away = -z - depth[int(row), int(column)] * transforms["depth_scale"]
                assert abs(away) < 0.2 or away > 0  # the arm, or something before it
                if abs(away) < 0.2:
                    assert np.abs(found[:3].astype(int) - COLORS[axis]).max() <= 2 and found[3] == 255
                checked += 1
    assert checked == 12


def test_views_come_back_through_the_door_for_own_views(tmp_path):
    from coser.own_views import load_views

    back = load_views(written("views", tmp_path), size=96)
    assert (back.cameras.camera_to_world - CAMERAS.camera_to_world).abs().max() < 1e-5
    assert back.cameras.fov == pytest.approx(CAMERAS.fov)
    assert (back.views.views - VIEWS.views).abs().max() <= 1.01 / 255
    assert (back.views.masks - VIEWS.masks).abs().max() <= 0.51 / 255
    inside = VIEWS.masks >= 0.5
    assert (back.views.depths - VIEWS.depths)[inside].abs().max() < 1e-4


def test_glb_and_views_keep_the_runs_words(tmp_path):
    assert trimesh.load(written("glb", tmp_path, extras={"seed": 7})).metadata is not None
    raw = (tmp_path / "three arms.glb").read_bytes()
    assert json.loads(raw[20:20 + int.from_bytes(raw[12:16], "little")])["asset"]["extras"] == {"seed": 7}


@pytest.mark.parametrize("kind", FORMATS)
def test_what_was_there_stays_when_writing_fails_and_nothing_else_is_left(kind, tmp_path, monkeypatch):
    def fills_the_disk(asset, path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    before = written(kind, tmp_path).read_bytes()
    monkeypatch.setitem(FORMATS, kind, replace(FORMATS[kind], write=fills_the_disk))
    with pytest.raises(OSError, match="No space left"):
        written(kind, tmp_path)
    files = list(tmp_path.iterdir())
    assert len(files) == 1 and files[0].read_bytes() == before


def test_a_folder_that_cannot_be_written_to_is_an_error_of_the_system(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "missing", tmp_path / "file"):
        with pytest.raises(OSError):
            written("stl", folder)


DAMAGE = {"a face lost": lambda mesh: replace(mesh, faces=mesh.faces[1:], normals=None, uvs=mesh.uvs[1:]),
          "mirrored": lambda mesh: replace(mesh, vertices=mesh.vertices * np.float32([-1, 1, 1]))}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("kind", MESHES)
def test_a_file_with_other_triangles_than_the_mesh_is_refused(kind, damage, tmp_path, monkeypatch):
    save = getattr(exports, f"save_{kind}")
    monkeypatch.setattr(exports, f"save_{kind}", lambda mesh, path, *rest: save(DAMAGE[damage](mesh), path, *rest))
    with pytest.raises(ValueError, match="the written file must hold"):
        written(kind, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["glb", "obj"])
def test_a_file_with_another_texture_or_other_places_on_it_is_refused(kind, tmp_path, monkeypatch):
    save = getattr(exports, f"save_{kind}")
    for wrong in ({"texture": 255 - TEXTURED.texture}, {"uvs": TEXTURED.uvs[..., ::-1].copy()}):
        monkeypatch.setattr(exports, f"save_{kind}",
                            lambda mesh, path, *rest, wrong=wrong: save(replace(mesh, **wrong), path, *rest))
        with pytest.raises(ValueError, match="the written file must hold .*texture"):
            written(kind, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mesh, wrong", [
    (TEXTURED, {"normals": -TEXTURED.normals}), (COLORED, {"vertex_colors": 1 - COLORED.vertex_colors}),
    (COLORED, {"vertex_colors": None})], ids=["turned normals", "other colours", "no colours"])
def test_a_glb_with_other_normals_or_colours_is_refused(mesh, wrong, tmp_path, monkeypatch):
    save = exports.save_glb
    monkeypatch.setattr(exports, "save_glb", lambda mesh, path, *rest: save(replace(mesh, **wrong), path, *rest))
    with pytest.raises(ValueError, match="the written file must hold (normals|colours)"):
        written("glb", tmp_path, mesh)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["stl", "ply", "splat", "gif", "mp4", "views", "glb", "obj"])
def test_a_file_cut_short_is_refused(kind, tmp_path, monkeypatch):
    whole = FORMATS[kind]

    def cut_short(asset, path):
        whole.write(asset, path)
        path.write_bytes(path.read_bytes()[:-400])
        return path

    monkeypatch.setitem(FORMATS, kind, replace(whole, write=cut_short))
    with pytest.raises((ValueError, OSError), match="the written file|truncated|incorrect|length"):
        written(kind, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_views_that_came_out_changed_are_refused(tmp_path, monkeypatch):
    save = exports.save_views
    for views, cameras in ((VIEWS[[1, 0, 2, 3]], CAMERAS), (VIEWS, CAMERAS[[1, 0, 2, 3]])):
        monkeypatch.setattr(exports, "save_views", lambda *args, v=views, c=cameras: save(v, c, *args[2:]))
        with pytest.raises(ValueError, match="the written file must hold"):
            written("views", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["mp4", "gif"])
def test_a_turntable_stops_between_frames_when_asked(kind, tmp_path):
    answers = iter([False, False, False, True])
    assert written(kind, tmp_path, should_stop=lambda: next(answers)) is None
    assert next(answers, "no more asked") == "no more asked" and list(tmp_path.iterdir()) == []


def test_wrong_arguments_are_told():
    with pytest.raises(ValueError, match="format must be one of glb, obj, stl, ply, splat, views, mp4, gif, got 'fbx'"):
        export("fbx", BALL, None, None, "ball.fbx")
    with pytest.raises(ValueError, match=r"path must end with a name and -obj.zip for obj, got ball.obj"):
        export("obj", BALL, None, None, "ball.obj")
    with pytest.raises(ValueError, match="views and cameras must be given"):
        export("views", BALL, None, None, "ball-views.zip")
    with pytest.raises(ValueError, match="mesh must have at least one face"):
        export("stl", Mesh(BALL.vertices, BALL.faces[:0]), None, None, "ball.stl")
