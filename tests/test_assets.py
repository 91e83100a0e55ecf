"""Assets read from a packed folder and from loose files of every format."""

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from solids import cube
from tiny import write_packed_assets

from coser.cameras import Cameras
from coser.data.assets import linear_to_srgb, list_assets, load_mesh
from coser.rasterizer import render
from coser.reconstruction import Mesh, save_glb
from coser.reconstruction.glb import srgb_to_linear


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return write_packed_assets(tmp_path_factory.mktemp("packed") / "assets")


def unit_cube():
    """A cube that fills the unit sphere, as a packed asset would."""
    return cube(3**-0.5)


def picture(mesh) -> torch.Tensor:
    return render(*mesh, Cameras.orbit(2, start=30.0), 64).views


def write_loose(folder, suffix) -> None:
    """The unit cube, displaced and twice as large, its sides' colours as the format keeps them."""
    vertices, faces, colors = (t.numpy() for t in unit_cube())
    colors = colors[:, 0] if suffix == ".obj" else srgb_to_linear(colors[:, 0])
    vertex_colors = np.zeros((len(vertices), 3))
    vertex_colors[faces.reshape(-1)] = np.repeat(colors, 3, axis=0)  # a side's corners are its own
    vertex_colors = (vertex_colors * 255).round().astype(np.uint8)
    mesh = trimesh.Trimesh(vertices * 2 + [3, 4, 5], faces, vertex_colors=vertex_colors, process=False)
    mesh.export(folder / f"cube{suffix}")


@pytest.mark.parametrize("suffix", [".glb", ".gltf", ".obj"])
def test_loose_and_packed_forms_of_a_mesh_give_the_same_picture(suffix, tmp_path):
    (tmp_path / "loose").mkdir()
    write_loose(tmp_path / "loose", suffix)
    (asset,) = list_assets(tmp_path / "loose")
    assert asset.id == "cube" and asset.captions == ("cube",)
    torch.testing.assert_close(picture(load_mesh(asset)), picture(unit_cube()), atol=0.02, rtol=0)


def test_a_packed_mesh_is_read_as_it_was_written(packed):
    asset = next(a for a in list_assets(packed) if a.id == "cube-a")
    vertices, faces, colors = load_mesh(asset)
    expected = cube(0.5)
    assert vertices.dtype == torch.float32 and faces.dtype == torch.int64
    assert torch.equal(vertices, expected[0]) and torch.equal(faces, expected[1])
    torch.testing.assert_close(colors, expected[2], atol=0.002, rtol=0)


def test_our_own_glb_is_read_with_the_colours_it_was_saved_with(tmp_path):
    vertices, faces, colors = (t.numpy() for t in unit_cube())
    vertex_colors = np.zeros_like(vertices)
    vertex_colors[faces.reshape(-1)] = colors.reshape(-1, 3)
    save_glb(Mesh(vertices, faces, vertex_colors), tmp_path / "cube.glb")
    torch.testing.assert_close(picture(load_mesh(list_assets(tmp_path)[0])), picture(unit_cube()), atol=0.01, rtol=0)


def test_a_texture_colours_the_corners_where_its_coordinates_point(tmp_path):
    image = Image.new("RGB", (2, 1), (255, 0, 0))
    image.putpixel((1, 0), (0, 0, 255))
    triangles = np.array([[-1, 0, 0], [0, 0, 0], [-1, 1, 0], [0, 0, 0], [1, 0, 0], [1, 1, 0]], float)
    uv = np.array([[0.1, 0.5]] * 3 + [[0.9, 0.5]] * 3)
    material = trimesh.visual.material.PBRMaterial(baseColorTexture=image)
    mesh = trimesh.Trimesh(triangles, [[0, 1, 2], [3, 4, 5]], process=False,
                           visual=trimesh.visual.TextureVisuals(uv=uv, material=material))
    mesh.export(tmp_path / "flag.glb")
    _, faces, colors = load_mesh(list_assets(tmp_path)[0])
    red_left = torch.tensor([[1.0, 0, 0], [0, 0, 1.0]])
    assert len(faces) == 2 and torch.equal(colors[:, 0], red_left)


def test_material_colours_of_gltf_are_linear_light(tmp_path):
    mesh = trimesh.creation.box()
    material = trimesh.visual.material.PBRMaterial(baseColorFactor=[128, 0, 255, 255])
    mesh.visual = trimesh.visual.TextureVisuals(material=material)
    mesh.export(tmp_path / "box.glb")
    colors = load_mesh(list_assets(tmp_path)[0])[2]
    torch.testing.assert_close(colors[0, 0], torch.tensor([0.737, 0.0, 1.0]), atol=0.005, rtol=0)


def test_linear_to_srgb_inverts_srgb_to_linear():
    colors = np.linspace(0, 1, 256)
    np.testing.assert_allclose(linear_to_srgb(srgb_to_linear(colors)), colors, atol=1e-5)


def test_every_node_of_a_scene_stands_where_its_pose_puts_it(tmp_path):
    scene = trimesh.Scene()
    box = trimesh.creation.box()
    for x in (-2.0, 2.0):
        scene.add_geometry(box, geom_name="box", transform=trimesh.transformations.translation_matrix([x, 0, 0]))
    scene.export(tmp_path / "pair.glb")
    vertices, faces, _ = load_mesh(list_assets(tmp_path)[0])
    assert len(faces) == 24
    torch.testing.assert_close(vertices.norm(dim=1).max(), torch.tensor(1.0))
    assert float(vertices[:, 0].abs().min()) > 0.5 and float(vertices[:, 0].sum().abs()) < 1e-4


def test_captions_lie_in_a_text_file_beside_the_mesh(tmp_path):
    (tmp_path / "props").mkdir()
    trimesh.creation.box().export(tmp_path / "props" / "old_barrel.glb")
    (tmp_path / "props" / "old_barrel.txt").write_text("a red barrel\n\n an old barrel \n")
    (asset,) = list_assets(tmp_path)
    assert asset.captions == ("a red barrel", "an old barrel") and asset.object == "old barrel"
    assert asset.id == "props__old_barrel"


def test_an_object_in_several_formats_counts_once(tmp_path):
    for suffix in (".obj", ".glb"):
        trimesh.creation.box().export(tmp_path / f"box{suffix}")
    trimesh.creation.box().export(tmp_path / "crate.obj")
    assert [a.path.name for a in list_assets(tmp_path)] == ["box.glb", "crate.obj"]


def test_assets_are_filtered_by_split_quality_words_and_how_common_their_object_is(packed):
    def ids(**options):
        return [a.id for a in list_assets(packed, **options)]

    assert ids() == ["cube-a", "cube-b", "ball", "held"]
    assert ids(split="val") == ["held"]
    assert ids(split="train", min_quality=1) == ["cube-a", "ball"]
    assert ids(words=["ball"]) == ["ball"]
    assert ids(min_object_count=2) == ["cube-a", "cube-b", "held"]


def test_a_smaller_limit_is_part_of_every_larger_one(packed):
    chosen = [{a.id for a in list_assets(packed, limit=n)} for n in (1, 2, 3, 4)]
    assert [len(c) for c in chosen] == [1, 2, 3, 4]
    assert all(small < large for small, large in zip(chosen, chosen[1:]))


def test_a_folder_without_assets_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=str(tmp_path)):
        list_assets(tmp_path)


def test_a_file_without_triangles_is_refused_by_name(tmp_path):
    (tmp_path / "points.obj").write_text("v 0 0 0\nv 1 0 0\n")
    with pytest.raises(ValueError, match="points.obj"):
        load_mesh(list_assets(tmp_path)[0])
