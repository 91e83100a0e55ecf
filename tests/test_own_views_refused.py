"""Own pictures that cannot be used are refused with one sentence that names the file and what is allowed."""

import json
import math
import stat
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from captures import SIZE, capture, encoded, six_views, zipped

from coser import picture_files
from coser.cameras import Cameras
from coser.own_views import load_views
from coser.transforms import cameras_to_transforms
from coser.views import ViewSet


@pytest.fixture(scope="module")
def ring() -> tuple[ViewSet, Cameras]:
    return six_views()


def failure(files: dict[str, bytes] | Path, folder: Path, **options) -> str:
    """What load_views says of such files."""
    path = files if isinstance(files, Path) else zipped(files, folder / "own.zip")
    with pytest.raises(ValueError) as caught:
        load_views(path, size=SIZE, **options)
    return str(caught.value)


@pytest.fixture(scope="module")
def posed(ring) -> dict[str, bytes]:
    """A good capture of six views, to be spoilt."""
    return capture(ring[0], cameras_to_transforms(ring[1], SIZE, unit_sphere=False))


def with_transforms(files: dict[str, bytes], change) -> dict[str, bytes]:
    transforms = json.loads(files["transforms.json"])
    change(transforms)
    return {**files, "transforms.json": json.dumps(transforms).encode()}


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that claims to be that large and holds next to nothing."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    data = zlib.compress(b"\0" * 99)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("data, said", [
    (b"not a picture", "views/003.png must be a PNG, JPEG or WebP"), (b"", "views/003.png must be a PNG"),
    (None, "views/003.png must be a whole picture"),
    (png_of_size(64, 64), "views/003.png must be a whole picture"),
    (png_of_size(50_000, 50_000), "views/003.png must have at most 80 million pixels"),
    (png_of_size(9_500, 9_500), "views/003.png must have at most 80 million pixels"),
    (encoded(np.zeros((SIZE, SIZE, 4), np.uint8)), "views/003.png must show the object"),
    (encoded(np.random.default_rng(0).integers(0, 255, (SIZE, SIZE, 3), np.uint8)), "views/003.png: "),
    (encoded(np.zeros((SIZE, 2 * SIZE, 4), np.uint8)), "64 x 64 pixels, got 128 x 64")])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_pictures_are_refused_by_name(posed, tmp_path, data, said):
    data = posed["views/003.png"][:-700] if data is None else data
    assert said in failure({**posed, "views/003.png": data}, tmp_path)


def _set(key, value):
    return lambda transforms: transforms["frames"][2].update({key: value})


def _away(transforms):
    matrix = transforms["frames"][2]["transform_matrix"]
    for row in matrix[:3]:
        row[0], row[2] = -row[0], -row[2]


def _same(transforms):
    for frame in transforms["frames"]:
        frame["transform_matrix"] = transforms["frames"][0]["transform_matrix"]


def _shuffled(transforms):
    matrices = [frame["transform_matrix"] for frame in transforms["frames"]]
    for frame, matrix in zip(transforms["frames"], [matrices[i] for i in (3, 1, 5, 2, 0, 4)]):
        frame["transform_matrix"] = matrix


@pytest.mark.parametrize("change, said", [
    (_set("file_path", "views/900"), "1 of 6 that are not: views/900"),
    (_set("file_path", "../../etc/passwd"), "1 of 6 that are not: ../../etc/passwd"),
    (_set("file_path", "views/000.png"), "different pictures, got views/000.png"),
    (_set("mask_path", "masks/1.png"), "must name masks that are there"),
    (_set("transform_matrix", (np.eye(4) * 3).tolist()), "frames[2]"),
    (_away, "views/002.png"), (_same, "in one place"), (_shuffled, "contradict each other"),
    (lambda transforms: transforms.update(frames=transforms["frames"][:1]), "2 to 200"),
    (lambda transforms: transforms.pop("frames"), "frames")])
def test_bad_transforms_are_refused(posed, tmp_path, change, said):
    assert said in failure(with_transforms(posed, change), tmp_path)


@pytest.mark.parametrize("text", [b"{", b"\xff\xfe\0", b"[" * 100_000, b""])
def test_unreadable_json_is_refused(posed, tmp_path, text):
    assert "transforms.json must be JSON" in failure({**posed, "transforms.json": text}, tmp_path)


@pytest.mark.parametrize("options, said", [
    ({"num_views": 5}, "num_views must be the number of pictures, 6, got 5"), ({"elevation": 90}, "elevation"),
    ({"fov": 0}, "fov"), ({"azimuth": math.nan}, "azimuth"), ({"max_views": 1}, "max_views")])
def test_options_out_of_range_are_refused(ring, tmp_path, options, said):
    assert said in failure(capture(ring[0], None), tmp_path, **options)


def test_places_without_usable_pictures_are_refused(ring, posed, tmp_path):
    one = {"0.png": posed["views/000.png"]}
    assert "2 to 200" in failure(one, tmp_path)
    assert "files with .txt" in failure({"a.txt": b"a"}, tmp_path)
    assert "no files" in failure({}, tmp_path)
    assert "one folder, got a, b" in failure({"a/0.png": one["0.png"], "b/0.png": one["0.png"]}, tmp_path)
    assert "not there" in failure(tmp_path / "nowhere", tmp_path)
    (tmp_path / "a.gif").write_bytes(b"GIF")
    assert "the file a.gif" in failure(tmp_path / "a.gif", tmp_path)
    with pytest.raises(ValueError, match="64 to 1024"):
        load_views(tmp_path, size=32)


def test_hostile_zips_are_refused(posed, tmp_path, monkeypatch):
    monkeypatch.setattr(picture_files, "MAX_FILE_BYTES", 2**20)
    for name in ("../views/1.png", "/etc/1.png", "C:/1.png"):
        assert "plain relative paths" in failure({**posed, name: b"1"}, tmp_path)
    link = zipfile.ZipInfo("views/link.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    path = zipped(posed, tmp_path / "link.zip")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(link, "/etc/passwd")
    assert "link" in failure(path, tmp_path)
    assert "at most 2000 files" in failure({f"{i}.txt": b"" for i in range(2001)}, tmp_path)
    bomb = tmp_path / "bomb.zip"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.png", bytes(2**20 + 1))
    assert "1 MiB a file" in failure(bomb, tmp_path)


def test_damaged_zips_are_refused(posed, tmp_path):
    whole = zipped(posed, tmp_path / "whole.zip").read_bytes()
    damaged = tmp_path / "damaged.zip"
    damaged.write_bytes(whole[:len(whole) // 2])
    assert "own views must be a folder, a .zip or" in failure(damaged, tmp_path)
    at = whole.index(b"IDAT") + 40
    damaged.write_bytes(whole[:at] + bytes(20) + whole[at + 20:])
    assert "views/000.png in damaged.zip must be whole" in failure(damaged, tmp_path)
