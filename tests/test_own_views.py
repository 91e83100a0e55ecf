"""Own pictures come in as posed views: where their pixels lie and what their cameras are, whatever wrote them."""

import io
import json
import math

import numpy as np
import pytest
import torch
from captures import (FILE_AXES, SIZE, SOLID, STEP, around, capture, encoded, in_folder, placed, six_views, straight,
                      truth, zipped)
from PIL import Image
from solids import cube

from coser.cameras import Cameras
from coser.metrics import psnr, render_mesh, silhouette_iou
from coser.own_views import load_views
from coser.rasterizer import render
from coser.reconstruction import reconstruct
from coser.reconstruction.views_zip import save_views
from coser.transforms import cameras_to_transforms
from coser.views import ViewSet


@pytest.fixture(scope="module")
def ring() -> tuple[ViewSet, Cameras]:
    return six_views()


@pytest.fixture(scope="module")
def foreign() -> tuple[dict[str, bytes], tuple]:
    """A capture of a large object far from the origin, and the solid that it shows."""
    middle, scale = (5.0, -2.0, 1.5), 3.7
    solid, cameras = placed(scale, middle), around(middle, 12, 4.1 * scale, 35)
    views = render(*solid, cameras, 128)
    transforms = cameras_to_transforms(cameras, 128, depth_file_paths=[f"depth/{i}.png" for i in range(12)],
                                       depth_scale=5e-4, unit_sphere=False)
    return capture(views, transforms, 5e-4), solid


def test_own_export_comes_back_untouched(ring, tmp_path):
    views, cameras = ring
    transforms = cameras_to_transforms(cameras, SIZE, depth_file_paths=[f"depth/{i}.png" for i in range(6)],
                                       depth_scale=STEP)
    own = load_views(zipped(capture(views, transforms), tmp_path / "own.zip"), size=SIZE)
    assert (own.views.views - views.views).abs().max() <= 1 / 255
    assert (own.views.masks - views.masks).abs().max() <= 0.5001 / 255
    solid = views.masks >= 0.502
    assert (own.views.depths - views.depths)[solid].abs().max() <= STEP
    assert torch.allclose(own.cameras.camera_to_world, cameras.camera_to_world, atol=1e-5)
    assert own.cameras.fov == pytest.approx(cameras.fov, abs=1e-5)
    assert torch.allclose(own.world_to_source, FILE_AXES)
    assert own.notes == ()


def test_exported_views_come_back_untouched(foreign, tmp_path):
    own = load_views(zipped(foreign[0], tmp_path / "foreign.zip"), size=SIZE)
    again = load_views(save_views(own.views, own.cameras, tmp_path / "again.zip"), size=SIZE)
    assert (again.views.views - own.views.views).abs().max() <= 1 / 255
    assert (again.views.depths - own.views.depths).abs().max() <= own.views.depths.max() / 65535
    assert torch.allclose(again.cameras.camera_to_world, own.cameras.camera_to_world, atol=1e-5)
    assert again.cameras.fov == pytest.approx(own.cameras.fov, abs=1e-5)


def test_views_of_a_ring_that_was_drawn_come_back_as_drawn(ring, tmp_path):
    drawn = [load_views(save_views(*ring, tmp_path / f"{i}.zip", extras=extras), size=SIZE).drawn for i, extras in
             enumerate([{"settings": {"prompt": "a box"}}, {"own_views": {"count": 6}}, None,
                        {"settings": {"prompt": "a cup on a box"}, "scene": {}}])]
    assert drawn == [True, False, False, False]


def test_a_foreign_capture_becomes_views_of_a_unit_object(foreign, tmp_path):
    files, solid = foreign
    own = load_views(zipped(files, tmp_path / "foreign.zip"), size=SIZE)
    expected = truth(own, solid, SIZE)
    assert silhouette_iou(own.views.masks, expected.masks).min() > 0.95
    assert psnr(own.views.views, expected.views).min() > 32
    back = torch.linalg.inv(own.world_to_source) @ FILE_AXES
    radii = (solid[0].double() @ back[:3, :3].T + back[:3, 3]).norm(dim=-1)
    assert 0.9 < radii.max() < 1
    both = (own.views.depths > 0) & (expected.masks > 0.99)
    assert (own.views.depths - expected.depths)[both].abs().quantile(0.9) < 2e-3
    rows = (expected.masks.amax((0, 1, 3)) > 0.5).nonzero()
    columns = (expected.masks.amax((0, 1, 2)) > 0.5).nonzero()
    assert min(rows.min(), columns.min(), SIZE - 1 - rows.max(), SIZE - 1 - columns.max()) in (1, 2)  # they fill it


def test_a_foreign_capture_is_reconstructed_where_it_is(foreign, tmp_path):
    files, solid = foreign
    own = load_views(in_folder(files, tmp_path), size=SIZE)
    mesh = reconstruct(own.views, own.cameras, resolution=64, texture_size=None)
    seen = render_mesh(mesh, own.cameras, SIZE)
    assert silhouette_iou(seen.masks, truth(own, solid, SIZE).masks).min() > 0.93


def test_blender_s_names_without_suffix_and_with_an_angle_alone_are_found(foreign, tmp_path):
    files, _ = foreign
    transforms = json.loads(files["transforms.json"])
    short = {"camera_angle_x": transforms["camera_angle_x"],
             "frames": [{"file_path": f"./train/r_{i}", "rotation": 0.01, "transform_matrix": f["transform_matrix"]}
                        for i, f in enumerate(transforms["frames"])]}
    renamed = {f"lego/train/r_{i}.png": files[f"views/{i:03d}.png"] for i in range(12)}
    renamed["lego/transforms_train.json"] = json.dumps(short).encode()
    renamed["__MACOSX/lego/._transforms_train.json"] = b"\0"
    own = load_views(zipped(renamed, tmp_path / "lego.zip"), size=SIZE)
    same = load_views(zipped(files, tmp_path / "foreign.zip"), size=SIZE)
    assert torch.equal(own.views.views, same.views.views)
    assert torch.allclose(own.cameras.camera_to_world, same.cameras.camera_to_world, atol=1e-6)
    assert not own.views.depths.any()


def test_lists_of_files_are_found_by_their_last_names(foreign, tmp_path):
    folder = in_folder({name: data for name, data in foreign[0].items() if "depth" not in name}, tmp_path)
    transforms = json.loads(foreign[0]["transforms.json"])
    for frame in transforms["frames"]:
        frame.pop("depth_file_path")
    (folder / "transforms.json").write_text(json.dumps(transforms))
    listed = load_views([*(folder / "views").iterdir(), folder / "transforms.json"], size=SIZE)
    assert torch.equal(listed.views.views, load_views(folder, size=SIZE).views.views)


def test_wide_pictures_with_a_lens_off_the_middle_and_distorted_are_straightened(foreign, tmp_path):
    files, solid = foreign
    transforms = json.loads(files["transforms.json"])
    k1, focal = -0.08, transforms["fl_x"]
    x, y = np.meshgrid((np.arange(168) + 0.5 - 94) / focal, (np.arange(136) + 0.5 - 68) / focal)
    ideal = np.stack([x, y], -1)
    for _ in range(20):
        ideal = np.stack([x, y], -1) / (1 + k1 * (ideal**2).sum(-1, keepdims=True))
    grid = torch.tensor(ideal * focal / 64, dtype=torch.float32)[None]
    bent = {}
    for i in range(12):
        picture = torch.from_numpy(np.array(Image.open(io.BytesIO(files[f"views/{i:03d}.png"]))))
        picture = picture.permute(2, 0, 1)[None].float()
        picture = torch.nn.functional.grid_sample(picture, grid, align_corners=False)[0]
        bent[f"images/{i:03d}.png"] = encoded(picture.round().byte().permute(1, 2, 0).numpy())
        transforms["frames"][i] = {"file_path": f"images/{i:03d}.png",
                                   "transform_matrix": transforms["frames"][i]["transform_matrix"]}
    transforms.update(w=168, h=136, cx=94, cy=68, k1=k1, camera_model="OPENCV")
    bent["transforms.json"] = json.dumps(transforms).encode()
    own = load_views(in_folder(bent, tmp_path), size=SIZE)
    expected = truth(own, solid, SIZE)
    assert silhouette_iou(own.views.masks, expected.masks).min() > 0.95
    assert any("distortion" in note for note in own.notes)
    transforms.pop("k1")
    bent["transforms.json"] = json.dumps(transforms).encode()
    wrong = load_views(in_folder(bent, tmp_path), size=SIZE)
    agreement = silhouette_iou(wrong.views.masks, truth(wrong, solid, SIZE).masks).mean()
    assert agreement < silhouette_iou(own.views.masks, expected.masks).mean()


def test_cameras_that_aim_beside_the_object_are_turned_to_it(tmp_path):
    cameras = Cameras.orbit(8, elevation=20, distance=5, fov=70)
    aside = torch.eye(4)
    aside[0, 0] = aside[2, 2] = math.cos(0.35)
    aside[0, 2], aside[2, 0] = math.sin(0.35), -math.sin(0.35)
    cameras = Cameras(cameras.camera_to_world @ aside, 70)
    views = render(*SOLID, cameras, 256)
    depths = [f"depth/{i}.png" for i in range(8)]
    transforms = cameras_to_transforms(cameras, 256, depth_file_paths=depths, depth_scale=STEP, unit_sphere=False)
    own = load_views(zipped(capture(views, transforms), tmp_path / "aside.zip"), size=SIZE)
    expected = truth(own, SOLID, SIZE)
    assert own.cameras.fov < 30
    assert silhouette_iou(own.views.masks, expected.masks).min() > 0.96
    both = (own.views.depths > 0) & (expected.masks > 0.99)
    assert (own.views.depths - expected.depths)[both].abs().quantile(0.9) < 0.01


def test_a_plain_ring_is_sorted_as_people_count_and_keeps_its_pixels(ring, tmp_path):
    views, cameras = ring
    twelve = render(*SOLID, Cameras.orbit(12, elevation=20), SIZE)
    own = load_views(in_folder({f"view-{i}.png": encoded(p) for i, p in enumerate(straight(twelve))}, tmp_path),
                     size=SIZE, num_views=12)
    assert (own.views.views - twelve.views).abs().max() <= 1 / 255
    assert torch.allclose(own.cameras.camera_to_world, Cameras.orbit(12, elevation=20).camera_to_world)
    assert "elevation 20" in own.notes[0] and "view-0.png to view-11.png" in own.notes[0]


def test_a_clockwise_ring_goes_the_other_way(ring, tmp_path):
    folder = in_folder(capture(ring[0], None), tmp_path)
    own = load_views(folder, size=SIZE, elevation=10, azimuth=30, clockwise=True, fov=50)
    assert torch.allclose(own.cameras.azimuths, torch.tensor([30.0, 330, 270, 210, 150, 90]), atol=1e-3)
    assert torch.allclose(own.cameras.elevations, torch.tensor(10.0), atol=1e-3)
    assert own.cameras.fov == pytest.approx(50)


def test_silhouettes_tell_the_elevation_of_a_ring(tmp_path):
    views = render(*SOLID, Cameras.orbit(8, elevation=43), SIZE)
    own = load_views(in_folder(capture(views, None), tmp_path), size=SIZE)
    assert torch.allclose(own.cameras.elevations, torch.tensor(45.0), atol=1e-3) and "45" in own.notes[-1]
    kept = load_views(tmp_path, size=SIZE, elevation=20)
    assert torch.allclose(kept.cameras.elevations, torch.tensor(20.0), atol=1e-3)


def test_silhouettes_tell_which_way_round_a_ring_was_taken(ring, tmp_path):
    files = capture(ring[0], None)
    names = sorted(files)
    backwards = {name: files[other] for name, other in zip(names, [names[0], *names[:0:-1]])}
    own = load_views(in_folder(backwards, tmp_path / "clockwise"), size=SIZE)
    assert torch.allclose(own.cameras.azimuths, torch.tensor([0.0, 300, 240, 180, 120, 60]), atol=1e-3)
    assert torch.allclose(own.cameras.elevations, torch.tensor(20.0), atol=1e-3) and "clockwise" in own.notes[-1]
    assert torch.equal(load_views(in_folder(files, tmp_path / "counter"), size=SIZE).cameras.camera_to_world,
                       ring[1].camera_to_world)


def test_a_small_ring_aside_is_cropped_around_its_object(ring, tmp_path):
    files = {}
    for i, picture in enumerate(straight(ring[0])):
        wide = np.zeros((180, 320, 4), np.uint8)
        wide[80:80 + SIZE, 210:210 + SIZE] = picture
        files[f"{i}.png"] = encoded(wide)
    own = load_views(in_folder(files, tmp_path), size=SIZE)
    assert any("cropped" in note for note in own.notes)
    solid = own.views.masks >= 0.5
    assert solid.any(2).flatten(1).sum(1).max() > 0.6 * SIZE and own.cameras.fov < 20
    assert (own.cameras.camera_to_world[:, :3, :3] - ring[1].camera_to_world[:, :3, :3]).abs().max() < 1e-5


def test_kinds_of_pictures_are_read_alike(ring, tmp_path):
    picture = Image.fromarray(straight(ring[0])[0])
    grey = Image.merge("LA", [picture.convert("L"), picture.getchannel("A")])
    files = {"0.png": encoded(picture), "1.webp": encoded(picture, "WEBP", lossless=True), "2.png": encoded(grey),
             "3.png": encoded(picture.quantize(64))}
    own = load_views(in_folder(files, tmp_path), size=SIZE)
    assert (own.views.masks - own.views.masks[:1]).abs().max() < 0.2
    assert psnr(own.views.views[1:2], own.views.views[:1]) > 60
    assert psnr(own.views.views[3:], own.views.views[:1]) > 25
    assert torch.equal(own.views.views[2, 0], own.views.views[2, 2])


def test_plain_backgrounds_are_keyed_out(ring, tmp_path):
    over = (ring[0].on_background(1.0) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    kinds = [("JPEG", "jpg", {"quality": 95}), ("PNG", "png", {}), ("JPEG", "jpeg", {"quality": 95})] * 2
    files = {}
    for i, (picture, (kind, suffix, how)) in enumerate(zip(over, kinds)):
        picture = Image.fromarray(picture).convert("CMYK" if suffix == "jpeg" else "RGB")
        files[f"{i}.{suffix}"] = encoded(picture, kind, **how)
    own = load_views(in_folder(files, tmp_path), size=SIZE)
    assert silhouette_iou(own.views.masks, ring[0].masks).min() > 0.9
    assert psnr(own.views.views, ring[0].views).min() > 20


def test_photographs_of_a_ring_are_turned_as_their_camera_says(ring, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise to be seen
    files = {f"{i}.png": encoded(Image.fromarray(np.rot90(picture).copy()), exif=exif)
             for i, picture in enumerate(straight(ring[0]))}
    own = load_views(in_folder(files, tmp_path), size=SIZE)
    assert (own.views.views - ring[0].views).abs().max() <= 1 / 255


def test_two_hundred_pictures_are_thinned_evenly_and_more_refused(tmp_path):
    cameras = Cameras.orbit(200, elevation=20)
    transforms = cameras_to_transforms(cameras, SIZE)
    pictures = [encoded(picture) for picture in straight(render(*SOLID, cameras, SIZE))]
    files = {f"views/{i:03d}.png": pictures[i] for i in range(200)}
    folder = in_folder({**files, "transforms.json": json.dumps(transforms).encode()}, tmp_path)
    own = load_views(folder, size=SIZE, max_views=20)
    steps = (own.cameras.azimuths.sort().values.diff()) % 360
    assert len(own.views) == 20 and steps.max() < 30 and "20 of 200" in own.notes[0]
    files["views/200.png"] = pictures[0]
    with pytest.raises(ValueError, match="2 to 200 .*201"):
        load_views(in_folder(files, tmp_path / "more"), size=SIZE)


def test_objects_cut_off_are_told_or_left_out(ring, tmp_path):
    views, cameras = ring
    transforms = cameras_to_transforms(Cameras.orbit(12, elevation=20), SIZE, unit_sphere=False)
    pictures = straight(render(*SOLID, Cameras.orbit(12, elevation=20), SIZE))
    pictures[3, :, :20] = pictures[3, :, 20:40]
    files = {f"views/{i:03d}.png": encoded(p) for i, p in enumerate(pictures)}
    named = {**files, "transforms.json": json.dumps(transforms).encode()}
    own = load_views(zipped(named, tmp_path / "cut.zip"), size=SIZE)
    assert len(own.views) == 11 and "views/003.png: left out" in own.notes[0]
    own = load_views(zipped(files, tmp_path / "cut.zip"), size=SIZE)
    assert len(own.views) == 11 and torch.allclose(own.cameras.azimuths[3], torch.tensor(120.0), atol=1e-3)


@pytest.mark.parametrize("count, left", [(6, 4), (4, 4)])
def test_few_pictures_are_used_though_some_are_cut_off(count, left, tmp_path):
    cameras = Cameras.orbit(count, elevation=20)
    transforms = cameras_to_transforms(cameras, SIZE, unit_sphere=False)
    pictures = straight(render(*SOLID, cameras, SIZE))
    pictures[1:4:2, 28:36, :32] = 255  # a bar from the object to the left edge
    files = {f"views/{i:03d}.png": encoded(p) for i, p in enumerate(pictures)}
    own = load_views(in_folder({**files, "transforms.json": json.dumps(transforms).encode()}, tmp_path), size=SIZE)
    assert len(own.views) == left and ("left out" in own.notes[0]) == (left < count)
    assert "views/001.png" in own.notes[0] and "views/003.png" in own.notes[0]


@pytest.mark.parametrize("thickness", [0.05, 0.0125])
def test_blades_that_views_see_from_their_edge_are_taken(thickness, tmp_path):
    vertices, faces, colors = cube(1.0)
    blade = vertices * torch.tensor([0.6, 0.7, thickness / 2]), faces, colors
    cameras = Cameras.orbit(12, elevation=0, start=0)
    views = render(*blade, cameras, 256)
    own = load_views(save_views(views, cameras, tmp_path / "blade.zip"), size=256)
    assert len(own.views) == 12 and not any("hardly agree" in note for note in own.notes)


def test_a_faint_object_in_noise_is_found_as_a_whole(tmp_path):
    rng, pictures = np.random.default_rng(0), []
    for _ in range(4):
        picture = np.full((1600, 1600), 200.0)
        picture[650:950, 650:950] = 180
        picture += rng.normal(0, 8, picture.shape)
        pictures.append(np.repeat(picture.clip(0, 255).round().astype(np.uint8)[..., None], 3, 2))
    files = {f"{i}.png": encoded(picture) for i, picture in enumerate(pictures)}
    own = load_views(in_folder(files, tmp_path), size=SIZE)
    solid = own.views.masks >= 0.5
    rows, columns = solid[0, 0].any(1).sum(), solid[0, 0].any(0).sum()
    assert float(solid[0].sum() / (rows * columns)) > 0.97


def test_a_mask_may_keep_its_shape_in_its_alpha(ring, tmp_path):
    views, cameras = ring
    transforms = cameras_to_transforms(cameras, SIZE)
    files = {}
    for i, (frame, picture) in enumerate(zip(transforms["frames"], straight(views))):
        white = np.full_like(picture, 255)
        white[..., 3] = picture[..., 3]
        frame["mask_path"] = f"masks/{i}.png"
        files[frame["file_path"]] = encoded(np.ascontiguousarray(picture[..., :3]))
        files[frame["mask_path"]] = encoded(white)
    files["transforms.json"] = json.dumps(transforms).encode()
    own = load_views(in_folder(files, tmp_path), size=SIZE)
    assert silhouette_iou(own.views.masks, views.masks).min() > 0.99


def test_lines_thinner_than_a_pixel_are_refused_by_name(tmp_path):
    picture = np.zeros((2400, 2400, 4), np.uint8)
    picture[np.arange(300, 2100), np.arange(300, 2100)] = 255
    files = {f"{i}.png": encoded(picture) for i in range(4)}
    with pytest.raises(ValueError, match="0.png must show something that is wider than a pixel"):
        load_views(in_folder(files, tmp_path), size=SIZE)


def test_depths_that_contradict_the_silhouettes_or_lack_are_left_out(ring, tmp_path):
    views, cameras = ring
    depths = [f"depth/{i}.png" for i in range(6)]
    transforms = cameras_to_transforms(cameras, SIZE, depth_file_paths=depths, depth_scale=1e-3, unit_sphere=False)
    own = load_views(zipped(capture(views, transforms), tmp_path / "own.zip"), size=SIZE)
    assert not own.views.depths.any() and "depth_scale" in own.notes[-1]
    transforms["depth_scale"] = STEP
    assert load_views(zipped(capture(views, transforms), tmp_path / "own.zip"), size=SIZE).views.depths.any()
    transforms["frames"][4].pop("depth_file_path")
    own = load_views(zipped(capture(views, transforms), tmp_path / "own.zip"), size=SIZE)
    assert not own.views.depths.any() and "5 of 6" in own.notes[0]


def test_pictures_without_a_camera_are_named_and_what_belongs_to_others_is_not(ring, tmp_path):
    views, cameras = ring
    transforms = cameras_to_transforms(cameras, SIZE, depth_file_paths=[f"depth/{i}.png" for i in range(6)],
                                       depth_scale=STEP)
    whole = capture(views, transforms)
    few = json.loads(whole["transforms.json"]) | {"frames": json.loads(whole["transforms.json"])["frames"][:4]}
    left = [frame["file_path"] for frame in json.loads(whole["transforms.json"])["frames"][4:]]
    files = {**whole, "transforms.json": json.dumps(few).encode()}
    files[few["frames"][0]["file_path"].replace(".png", "_normal.png")] = whole[left[0]]
    own = load_views(in_folder(files, tmp_path), size=SIZE)
    assert len(own.views) == 4
    assert own.notes == (f"Left out, for they have no camera in transforms.json: {', '.join(left)}.",)


@pytest.mark.parametrize("unit_sphere", [True, False])
def test_cameras_of_other_pictures_are_refused(ring, tmp_path, unit_sphere):
    views, cameras = ring
    order = [0, 3, 1, 5, 2, 4]
    transforms = cameras_to_transforms(cameras, SIZE, unit_sphere=unit_sphere)
    with pytest.raises(ValueError, match="cameras must belong to the pictures"):
        load_views(in_folder(capture(views[order], transforms), tmp_path), size=SIZE)


def test_a_ring_whose_names_put_it_in_disorder_is_told(ring, tmp_path):
    views, _ = ring
    asks = [any("put them in that order?" in note for note in load_views(
        in_folder({f"{i}.png": encoded(picture) for i, picture in enumerate(straight(views[order]))},
                  tmp_path / str(name)), size=SIZE).notes)
        for name, order in enumerate(([0, 1, 2, 3, 4, 5], [0, 3, 1, 5, 2, 4]))]
    assert asks == [False, True]


def test_pictures_of_different_sizes_make_one_ring(ring, tmp_path):
    views, _ = ring
    files = {}
    for i, picture in enumerate(straight(views)):
        side = 48 + 16 * i
        files[f"{i}.png"] = encoded(np.asarray(Image.fromarray(picture).resize((side, side))))
    own = load_views(in_folder(files, tmp_path), size=SIZE)
    assert own.views.views.shape == (6, 3, SIZE, SIZE)
    assert silhouette_iou(own.views.masks, views.masks).min() > 0.9
