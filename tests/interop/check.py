"""Opens our files in other people's programs: Khronos' glTF validator, three.js in headless Chromium, Blender.

`python tests/interop/check.py [--blender PYTHON_WITH_BPY] [GLB...]` makes the asymmetric figure in every mesh format and
checks that each program shows it upright, unmirrored, unturned, in its colours and its size; GLBs given besides must
pass the validator without errors and warnings and open in three.js (and Blender) with their textures. Exit status 1
where anything fails. README.md beside this file says what to install.
"""

from __future__ import annotations

import argparse
import base64
import functools
import http.server
import io
import json
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import torch
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from coser.cameras import Cameras  # noqa: E402
from coser.metrics import psnr  # noqa: E402
from coser.rasterizer import render  # noqa: E402
from coser.reconstruction import Mesh  # noqa: E402
from coser.surface_metrics import sample_surface, surface_distances  # noqa: E402
from figure import LONGEST_SIDE, colored_glb, figure, make_files  # noqa: E402

FLAGS = ("--no-sandbox --disable-quic --disable-background-networking --use-gl=angle --use-angle=swiftshader "
         "--enable-unsafe-swiftshader --ignore-gpu-blocklist").split()
SIZE = 256
LOOKS = Cameras.look_at_origin([0.0, 90.0, 215.0], [0.0, 0.0, 35.0], orthographic=True)
ALIKE, APART = 20.0, 3.0  # dB: a picture against what it should be, and how much worse every other pose must be
WITHIN = 0.02  # of the longest side
# what axes may be taken for: the figure's x, y and z in the wrong pose
POSES = {"as it is": [[1., 0, 0], [0, 1, 0], [0, 0, 1]],
         "mirrored left to right": [[-1., 0, 0], [0, 1, 0], [0, 0, 1]],
         "mirrored front to back": [[1., 0, 0], [0, 1, 0], [0, 0, -1]],
         "upside down": [[1., 0, 0], [0, -1, 0], [0, 0, 1]],
         "turned by 180 degrees": [[-1., 0, 0], [0, 1, 0], [0, 0, -1]],
         "lying on its back": [[1., 0, 0], [0, 0, 1], [0, -1, 0]],
         "lying on its face": [[1., 0, 0], [0, 0, -1], [0, 1, 0]],
         "turned to the right": [[0., 0, 1], [0, 1, 0], [-1, 0, 0]],
         "turned to the left": [[0., 0, -1], [0, 1, 0], [1, 0, 0]]}


class Checks:
    """Collects what was looked at; prints each line at once."""

    def __init__(self):
        self.failures = 0

    def expect(self, holds: bool, what: str) -> None:
        self.failures += not holds
        print(("ok    " if holds else "FAIL  ") + what, flush=True)


def validate(paths: list[Path], checks: Checks) -> None:
    done = subprocess.run(["node", "validate.mjs", *map(str, paths)], cwd=HERE, capture_output=True, text=True,
                          check=True)
    for report in map(json.loads, done.stdout.splitlines()):
        checks.expect(report["errors"] == report["warnings"] == 0,
                      f"validator: {Path(report['path']).name}: {report['errors']} errors, {report['warnings']} "
                      f"warnings, {report['infos']} infos {'; '.join(report['messages'])}")


def draw_in_three(paths: list[Path]) -> list[dict]:
    """What three.js makes of files: triangles, textures, box, and uint8 pictures [3,SIZE,SIZE,3] from LOOKS."""
    from playwright.sync_api import sync_playwright

    handler = functools.partial(Quiet, directory=str(HERE))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    found = []
    with tempfile.TemporaryDirectory(dir=HERE, prefix=".served-") as served, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        page = browser.new_page()
        page.set_default_timeout(120_000)
        errors = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"{address}/three.html")
        page.wait_for_function("window.ready")
        for i, path in enumerate(paths):
            folder = Path(served) / str(i)
            folder.mkdir()
            for part in [path] if path.suffix != ".obj" else path.parent.iterdir():  # with its material and picture
                shutil.copy(part, folder)
            report = page.evaluate("([url, directions, size]) => draw(url, directions, size)",
                                   [f"{address}/{folder.relative_to(HERE)}/{path.name}", LOOKS.centers.tolist(), SIZE])
            report["pictures"] = np.stack([np.asarray(Image.open(io.BytesIO(base64.b64decode(
                p.split(",")[1]))).convert("RGB")) for p in report["pictures"]])
            found.append(report)
        browser.close()
        if errors:
            raise RuntimeError(f"three.js said: {errors}")
    server.shutdown()
    return found


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def check_three(name: str, report: dict, checks: Checks, out: Path | None) -> None:
    """The pictures must be those of the figure, and not those of any mirrored or turned one."""
    vertices, faces, colors = figure()
    if name == "stl":  # z up, as printers have it
        vertices = vertices[:, [0, 2, 1]] * torch.tensor([1.0, -1, 1])
    colors = colors if report["textures"] or report["colors"] else torch.zeros_like(colors)
    box = vertices.amin(0), vertices.amax(0)
    middle, reach = (box[0] + box[1]) / 2, (box[1] - box[0]).norm() / 2
    drawn = torch.from_numpy(report["pictures"]).permute(0, 3, 1, 2) / 255
    scores = {}
    for kind, pose in POSES.items():
        turned = (vertices - middle) / reach @ torch.tensor(pose).T
        posed = render(turned, faces, colors, LOOKS, SIZE, shade=False).on_background()
        scores[kind] = float(psnr(posed, drawn).mean())
    right = scores.pop("as it is")
    other = max(scores, key=scores.get)
    checks.expect(right > ALIKE and right - scores[other] > APART,
                  f"three.js: {name}: {right:.1f} dB from the figure, {scores[other]:.1f} dB when {other}; "
                  f"{report['triangles']:.0f} triangles, {report['textures']} textures, {report['colors']} coloured")
    unit = 1000 if name == "stl" else 1
    longest = max(np.subtract(report["high"], report["low"])) / unit
    checks.expect(abs(longest - LONGEST_SIDE) < WITHIN * LONGEST_SIDE,
                  f"three.js: {name}: longest side {longest:.3f} m")
    if out:
        Image.fromarray(np.concatenate(report["pictures"], 1)).save(out / f"three-{name}.png")


def import_in_blender(python: str, paths: list[Path]) -> list[dict]:
    done = subprocess.run([python, str(HERE / "blender_points.py"), *map(str, paths)], capture_output=True, text=True,
                          check=True)
    return [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("REPORT ")]


def check_blender(name: str, report: dict, checks: Checks) -> None:
    """Points on Blender's surface must lie on the figure's, in its colours, and in no mirrored or turned one's."""
    points = np.array(report["points"]) / (1000 if name == "stl" else 1)
    size = np.subtract(report["high"], report["low"]) / (1000 if name == "stl" else 1)
    if name != "ply":  # Blender is z up, and turns what it knows to be y up; PLY files say nothing of their axes
        points, size = points[:, [0, 2, 1]] * [1, 1, -1], size[[0, 2, 1]]
    vertices, faces, colors = figure()
    low, high = vertices.numpy().min(0), vertices.numpy().max(0)
    scale = LONGEST_SIDE / (high - low).max()
    foot = (low + high) / 2 * [1, 0, 1] + low * [0, 1, 0]
    off, wrong = {}, {}
    for kind, pose in POSES.items():
        mesh = Mesh((((vertices.numpy() - foot) * scale) @ np.array(pose).T).astype(np.float32), faces.numpy())
        distances, nearest = surface_distances(points, mesh, *sample_surface(mesh, 20_000))
        off[kind] = float(distances.mean()) / LONGEST_SIDE
        if report["colors"] is not None:
            wrong[kind] = float((np.abs(np.array(report["colors"]) - colors[nearest, 0].numpy()).max(1) > 0.15).mean())
    right = off.pop("as it is")
    other = min(off, key=off.get)
    checks.expect(right < WITHIN / 2 and off[other] > 2 * right,
                  f"Blender: {name}: points {right:.2%} of its size off the figure, {off[other]:.2%} when {other}; "
                  f"{report['triangles']} triangles, images {report['images']}")
    checks.expect(np.abs(size - (high - low) * scale).max() < WITHIN * LONGEST_SIDE,
                  f"Blender: {name}: {' x '.join(f'{s:.3f}' for s in size)} m")
    if wrong:
        own = wrong.pop("as it is")
        checks.expect(own < 0.2 and min(wrong.values()) > own + 0.2,
                      f"Blender: {name}: {own:.1%} of the points in another colour, {min(wrong.values()):.1%} in the "
                      "nearest wrong pose")


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("glb", nargs="*", type=Path)
    options.add_argument("--blender", default=None, help="a Python that has bpy; without it, Blender is left out")
    options.add_argument("--out", type=Path, default=None, help="folder for three.js' pictures")
    arguments = options.parse_args()
    checks = Checks()
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        files = make_files(Path(folder))
        given = [colored_glb(Path(folder)), *(p.resolve() for p in arguments.glb)]
        validate([files["glb"], *given], checks)
        reports = draw_in_three([*files.values(), *given])
        for name, report in zip(files, reports):
            check_three(name, report, checks, arguments.out)
        for path, report in zip(given, reports[len(files):]):
            ink = (report["pictures"] < 250).any(-1).mean()
            checks.expect(report["textures"] + report["colors"] > 0 and ink > 0.01,
                          f"three.js: {path.name}: {report['triangles']:.0f} triangles, {report['textures']} textures, "
                          f"{ink:.0%} of the pictures")
        if arguments.blender:
            reports = import_in_blender(arguments.blender, [*files.values(), *given])
            for name, report in zip(files, reports):
                check_blender(name, report, checks)
            for path, report in zip(given, reports[len(files):]):
                low, high = report["low"][2], report["high"][2]
                stands = min(abs(low), abs(low + high) / 2) < 1e-3 * (high - low)
                checks.expect(stands and (report["images"] or report["colors"] is not None),
                              f"Blender: {path.name}: {report['triangles']} triangles, images {report['images']}, "
                              f"from {low:.4f} to {high:.4f} m high")
    print(f"{checks.failures} failures")
    return int(checks.failures > 0)


if __name__ == "__main__":
    sys.exit(main())
