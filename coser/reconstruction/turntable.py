"""Turntables: the mesh in its own colours, turning once before a white background, as MP4 and as GIF."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from coser.cameras import ELEVATION, Cameras
from coser.rasterizer import render, render_textured
from coser.reconstruction.mesh import Mesh
from coser.reconstruction.reload import expect_close, expect_equal
from coser.reconstruction.sampling import PLAIN

SUFFIX_MP4, SUFFIX_GIF = "-turntable.mp4", "-turntable.gif"
SIZE, FRAMES, RATE = 512, 72, 24  # pixels a side, frames a turn, frames a second
GIF_SIZE, GIF_FRAMES, GIF_DELAY = 256, 36, 80  # the last in milliseconds; GIFs count hundredths of a second
SAMPLES = 1.5  # a pixel side is drawn with so many samples
MARGIN = 1.05  # the bounding sphere's room in the picture
SIMILAR = 6 / 255  # mean difference of a packed frame and the drawn one


def turntable_frames(mesh: Mesh, size: int, count: int) -> Iterator[np.ndarray]:
    """Pictures [size,size,3] uint8 of one closed turn of `count` views, drawn one by one; the first sees the front.

    The mesh may stand anywhere and have any size: its bounding sphere, around the middle of its box, fills the picture.
    """
    used = mesh.vertices[mesh.faces.ravel()].astype(np.float64)
    middle = (used.min(0) + used.max(0)) / 2
    radius = MARGIN * max(float(np.linalg.norm(used - middle, axis=1).max()), 1e-12)
    vertices = torch.from_numpy(((mesh.vertices - middle) / radius).astype(np.float32))
    faces = torch.from_numpy(mesh.faces)
    corners = vertices[faces]
    normals = torch.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0], dim=-1)
    closed, drawn = mesh.is_watertight, round(SAMPLES * size)
    if mesh.texture is not None:
        uvs, texture = torch.from_numpy(mesh.uvs), torch.from_numpy(mesh.texture).float() / 255
    elif mesh.vertex_colors is not None:
        colors = torch.from_numpy(mesh.vertex_colors)[faces]
    else:
        colors = torch.full((len(faces), 3, 3), PLAIN)
    for camera in (Cameras.orbit(count, ELEVATION)[i] for i in range(count)):
        shown = torch.arange(len(faces))
        if closed:  # what faces away is hidden, and half of the work
            shown = shown[((camera.centers - corners[:, 0]) * normals).sum(1) > 0]
        if mesh.texture is not None:
            view = render_textured(vertices, faces[shown], uvs[shown], texture, camera, drawn, supersample=1)
        else:  # without any colours, shading shows the shape
            view = render(vertices, faces[shown], colors[shown], camera, drawn, 1, shade=mesh.vertex_colors is None)
        picture = F.interpolate(view.on_background(), (size, size), mode="bilinear", antialias=True)
        yield (picture[0].clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def save_mp4(mesh: Mesh, path: str | Path, should_stop: Callable[[], bool] = lambda: False) -> Path | None:
    """Writes a turntable as H.264 video (yuv420p, BT.709, the index in front so that it plays while it loads).

    `should_stop` is asked before every frame; returns the path, or None when stopped, and what is written is then of no
    use.
    """
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=RATE, options={"crf": "18", "preset": "veryfast"})
        stream.width = stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.colorspace, context.color_primaries, context.color_trc, context.color_range = 1, 1, 1, 1  # BT.709
        for picture in turntable_frames(mesh, SIZE, FRAMES):
            if should_stop():
                return None
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace="ITU709")))
        container.mux(stream.encode())
    return Path(path)


def check_mp4(mesh: Mesh, path: str | Path) -> None:
    """Decodes the file; raises ValueError where it is not one whole turn of the mesh."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        expect_equal("video of", (stream.codec_context.name, stream.codec_context.pix_fmt, stream.width, stream.height),
                     ("h264", "yuv420p", SIZE, SIZE))
        count, first = 0, None
        for frame in container.decode(stream):
            first = frame.to_ndarray(format="rgb24") if first is None else first
            count += 1
    expect_equal("frames:", count, FRAMES)
    _expect_similar(first, next(turntable_frames(mesh, SIZE, FRAMES)))


def save_gif(mesh: Mesh, path: str | Path, should_stop: Callable[[], bool] = lambda: False) -> Path | None:
    """Writes a turntable as GIF that loops, with one palette for all frames; otherwise as `save_mp4`."""
    pictures = []
    for picture in turntable_frames(mesh, GIF_SIZE, GIF_FRAMES):
        if should_stop():
            return None
        pictures.append(picture)
    palette = _palette(np.concatenate(pictures[::3]))
    frames = [_in_palette(picture, palette) for picture in pictures]
    frames[0].save(path, "GIF", save_all=True, append_images=frames[1:], duration=GIF_DELAY, loop=0, optimize=False)
    return Path(path)


def check_gif(mesh: Mesh, path: str | Path) -> None:
    """Decodes the file; raises ValueError where it is not one whole turn of the mesh that loops for ever."""
    with Image.open(path) as gif:
        expect_equal("pictures of", gif.size, (GIF_SIZE, GIF_SIZE))
        expect_equal("loops (0: for ever):", gif.info.get("loop"), 0)
        first, duration = np.asarray(gif.convert("RGB")), 0
        for i in range(gif.n_frames):  # frames that look the same have become one that stays longer
            gif.seek(i)
            gif.load()
            duration += gif.info["duration"]
    expect_equal("milliseconds:", duration, GIF_FRAMES * GIF_DELAY)
    _expect_similar(first, next(turntable_frames(mesh, GIF_SIZE, GIF_FRAMES)))


def _palette(picture: np.ndarray) -> Image.Image:
    """A palette for the object's colours; its last one is the white around it."""
    colored = picture[(picture < 255).any(-1)]
    colored = colored if len(colored) else picture[0]
    found = Image.fromarray(colored[None]).quantize(255, Image.Quantize.MEDIANCUT).getpalette()[:765]
    palette = Image.new("P", (1, 1))
    palette.putpalette(found + [255] * (768 - len(found)))
    return palette


def _in_palette(picture: np.ndarray, palette: Image.Image) -> Image.Image:
    index = np.array(Image.fromarray(picture).quantize(palette=palette, dither=Image.Dither.NONE))
    index[(picture == 255).all(-1)] = 255  # the search for the nearest colour is a rough one
    frame = Image.fromarray(index, "P")
    frame.putpalette(palette.getpalette())
    return frame


def _expect_similar(found: np.ndarray, wanted: np.ndarray) -> None:
    off = np.abs(found.astype(np.float64) - wanted).mean() / 255
    expect_close("a first frame as drawn, with a mean difference of", off, 0.0, SIMILAR)
