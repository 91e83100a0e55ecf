"""Turntables show the front first, turn once without a jump, and fit the picture."""

import av
import numpy as np
import pytest
from arms import COLORS, arms
from PIL import Image
from test_mesh import BALL

from coser.reconstruction import turntable
from coser.reconstruction.mesh import Mesh
from coser.reconstruction.turntable import check_gif, check_mp4, save_gif, save_mp4, turntable_frames


def middles(picture: np.ndarray) -> np.ndarray:
    """Where (x, y) the three arms' colours are in the middle, in shares of the picture; NaN for one that is hidden."""
    near = np.abs(picture[:, :, None].astype(int) - COLORS).sum(-1) < 40
    rows, columns, _ = np.indices(near.shape) / len(picture)
    sums = np.stack([(columns * near).sum((0, 1)), (rows * near).sum((0, 1))], -1)
    return sums / np.where(near.any((0, 1)), near.sum((0, 1)), np.nan)[:, None]


@pytest.mark.parametrize("coloring", ["texture", "vertices"])
def test_the_first_frame_sees_the_front_and_a_quarter_later_the_side_of_plus_x(coloring):
    frames = list(turntable_frames(arms(coloring), 96, 4))
    red, green, blue = middles(frames[0])
    assert red[0] > blue[0] + 0.1 and green[1] < blue[1] - 0.1  # x to the right, y up
    red, green, blue = middles(frames[1])
    assert blue[0] < red[0] - 0.1 and green[1] < red[1] - 0.1  # from +x, z is on the left
    assert np.isclose(frames[0][0, 0], 255).all()


def test_any_place_and_size_look_the_same():
    mesh = arms()
    moved = Mesh((mesh.vertices * 50 + np.float32([7, 300, -20])).astype(np.float32), mesh.faces, uvs=mesh.uvs,
                 texture=mesh.texture)
    one, other = next(turntable_frames(mesh, 96, 8)), next(turntable_frames(moved, 96, 8))
    assert np.abs(one.astype(int) - other).mean() < 0.5
    shown = (one < 250).any(-1)
    assert not (shown[[0, -1]].any() or shown[:, [0, -1]].any()) and shown.any(0).mean() > 0.5


def test_open_meshes_show_their_inside():
    """Leaving out what faces away is for closed meshes alone."""
    lid_off = Mesh(BALL.vertices, BALL.faces[BALL.vertices[BALL.faces, 1].max(1) < 0.3],
                   np.full(BALL.vertices.shape, 0.2, np.float32))
    assert not lid_off.is_watertight
    seen = (next(turntable_frames(lid_off, 64, 8)) < 250).all(-1)
    rows = np.flatnonzero(seen.any(1))
    assert all(seen[row].sum() == np.ptp(np.flatnonzero(seen[row])) + 1 for row in rows)


def test_the_video_streams_loops_and_keeps_its_colours(tmp_path, monkeypatch):
    monkeypatch.setattr(turntable, "FRAMES", 24)
    monkeypatch.setattr(turntable, "SIZE", 96)
    path = save_mp4(arms(), tmp_path / "turn.mp4")
    check_mp4(arms(), path)
    raw = path.read_bytes()
    assert 0 < raw.index(b"moov") < raw.index(b"mdat")
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 24)
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]).astype(int)
    assert len(frames) == 24 and np.abs(frames[:, 0, 0] - 255).max() <= 2
    steps = np.abs(frames - np.roll(frames, -1, 0)).mean((1, 2, 3))
    assert steps[-1] < 1.5 * steps[:-1].max()  # from the last to the first is a step like the others
    drawn = np.stack(list(turntable_frames(arms(), 96, 24)))
    assert np.abs(frames - drawn).mean() < 3


def test_the_gif_loops_for_ever_in_one_palette(tmp_path, monkeypatch):
    monkeypatch.setattr(turntable, "GIF_SIZE", 64)
    path = save_gif(arms(), tmp_path / "turn.gif")
    check_gif(arms(), path)
    with Image.open(path) as gif:
        assert gif.n_frames == 36 and gif.info["loop"] == 0
        palettes = set()
        for i in range(gif.n_frames):
            gif.seek(i)
            palettes.add(bytes(gif.global_palette.palette if hasattr(gif, "global_palette") else b""))
            assert (np.asarray(gif.convert("RGB"))[0, 0] == 255).all() and gif.info["duration"] == 80
    assert len(palettes) == 1


def test_frames_that_look_the_same_still_last_their_time(tmp_path, monkeypatch):
    monkeypatch.setattr(turntable, "GIF_SIZE", 64)
    monkeypatch.setattr(turntable, "turntable_frames", lambda mesh, size, count: iter(
        [np.full((size, size, 3), 200, np.uint8)] * count))
    check_gif(BALL, save_gif(BALL, tmp_path / "still.gif"))
