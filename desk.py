"""What the page's events do: check a visitor's values, run the studio, keep the files; the layout is in app.py."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import gradio as gr

from coser.examples import Example
from coser.finishing import FinishedAsset, load_finished, save_finished
from coser.own_views import load_views
from coser.reconstruction.exports import FORMATS, export
from coser.reconstruction.glb import glb_vertices
from coser.reconstruction.placement import place
from coser.request import MODULES, SYMMETRY, AssetOptions, GenerationRequest
from coser.sessions import current_run, file_name, remove_old_runs, run_folder, session_folder, set_current_run
from coser.stage import ALPHA, BETA, SPLATS_SIDE, viewing_distance
from coser.studio import RunUpdate, Studio

STOP = "stop"  # a file of this name in a session's folder asks its run to end; files reach ZeroGPU's worker process too
FINISHED = "finished.npz"  # in a run's folder: what its asset can be made from again
ONE_AT_A_TIME = "One at a time: press Stop first."
RING_ELEVATION = 80  # degrees, up or down: beyond, a ring is hardly one
NO_FILES = "Choose pictures, or a zip of them, first."
NO_RUN = "Make an object first: press Generate, or Reconstruct with your own views. Pre-made examples are GLB only."
ANOTHER = "This file would be of the object before: another has come on the stage since. Ask again for that one's."


class Desk:
    """What the page's events do, around one studio and finished examples; visitors are told apart by their session."""

    def __init__(self, studio: Studio, root: Path, examples: list[Example]):
        self.studio, self.root, self.examples = studio, root, examples
        self.line: set[str] = set()  # the sessions that work or wait to

    def folder(self, request: gr.Request) -> Path:
        return session_folder(self.root, request.session_hash or "")

    def begin(self, prompt, num_views, guidance_scale, num_inference_steps, elevation, seed, randomize_seed,
              consistency, mixers, symmetry, one_by_one, guidance_rescale, skip_guidance_scale, redraw, max_faces,
              texture_size, coloring, origin, longest_side, request: gr.Request):
        """Check a prompt's values at once, before any waiting; then clear the stage and turn the buttons round."""
        checked(prompt, num_views, guidance_scale, num_inference_steps, elevation, seed, randomize_seed, consistency,
                mixers, symmetry, one_by_one, guidance_rescale, skip_guidance_scale, redraw)
        checked_asset(max_faces, texture_size, coloring, origin, longest_side)
        return self._enter_with_an_empty_stage(request)

    def begin_rebuild(self, files, elevation, max_faces, texture_size, coloring, origin, longest_side, num_views,
                      request: gr.Request):
        """The same for views of one's own."""
        if not files:
            raise gr.Error(NO_FILES, print_exception=False)
        checked_elevation(elevation)
        checked_asset(max_faces, texture_size, coloring, origin, longest_side)
        return self._enter_with_an_empty_stage(request)

    def begin_refine(self, max_faces, texture_size, coloring, origin, longest_side, request: gr.Request):
        """The same for other triangles and colours of what is on the stage, which stays until there is news."""
        checked_asset(max_faces, texture_size, coloring, origin, longest_side)
        if current_run(self.folder(request)) is None:
            raise gr.Error(NO_RUN, print_exception=False)
        return *self._enter(request), gr.skip(), gr.skip(), nothing_ready()

    def _enter_with_an_empty_stage(self, request: gr.Request) -> tuple:
        entered = self._enter(request)
        set_current_run(self.folder(request), None)  # else a run that is stopped would leave the object before in reach
        return *entered, None, gr.DownloadButton(value=None, interactive=False), nothing_ready()

    def _enter(self, request: gr.Request) -> tuple:
        """Take a place in the line; the progress line and the buttons (Stop last) while one works."""
        if request.session_hash in self.line:
            raise gr.Error(ONE_AT_A_TIME, print_exception=False)
        (self.folder(request) / STOP).unlink(missing_ok=True)
        ahead = len(self.line)
        self.line.add(request.session_hash)
        message = f"Waiting for {ahead} other visitor{'s' if ahead > 1 else ''}" if ahead else "Starting"
        return status_line("waiting", message), *[gr.Button(interactive=False)] * 4, gr.Button(interactive=True)

    def generate(self, prompt: str, num_views: int, guidance_scale: float, num_inference_steps: int, elevation: float,
                 seed: int, randomize_seed: bool, consistency: float, mixers: list[str],
                 symmetry: str, one_by_one: bool, guidance_rescale: float, skip_guidance_scale: float, redraw: float,
                 max_faces: int, texture_size: int, coloring: str, origin: str, longest_side: float,
                 request: gr.Request) -> Iterator[tuple]:
        """Text to 3D: streams (views picture, status, seed, GLB or nothing yet), an item a denoising step.

        prompt: 1 to 300 characters. num_views: 4 to 24. guidance_scale: 1 to 12. num_inference_steps: 1 to 50.
        elevation: 0 to 30 degrees. seed: 0 to 2147483647, drawn anew with randomize_seed and reported back.
        consistency: 0 to 1, how much of the views is replaced by the object they make together, at some steps.
        mixers: which of the checkpoint's modules between the views work: {mixers}.
        symmetry: what the object is pulled to, one of {symmetry}; auto: what its kind usually has.
        one_by_one: objects of a prompt for several ("a lantern on a barrel") are drawn one by one and put together.
        guidance_rescale: 0 to 1, how much of what guidance does to brightness and contrast is taken back.
        skip_guidance_scale: 0 to 6, how far views move away from what each would show by itself.
        redraw: 0 to 0.9, the share of the steps that is taken once more, from the finished views noised again.
        max_faces: 500 to 200000. texture_size: 512, 1024, 2048 or 4096. coloring: texture or vertices. origin: feet
        or center. longest_side: 0.01 to 100 metres.
        """
        asked = checked(prompt, num_views, guidance_scale, num_inference_steps, elevation, seed, randomize_seed,
                        consistency, mixers, symmetry, one_by_one, guidance_rescale,
                        skip_guidance_scale, redraw).with_drawn_seed()
        options = checked_asset(max_faces, texture_size, coloring, origin, longest_side)
        name = file_name(asked.prompt, asked.seed)
        for views, update in self._work(request, lambda run, stop: self.studio.generate(asked, run / name, stop,
                                                                                        options)):
            yield views, with_figures(update.status()), update.seed, update.glb and str(update.glb)

    def rebuild(self, files: list[str], elevation: str | None, max_faces: int, texture_size: int, coloring: str,
                origin: str, longest_side: float, num_views: int, request: gr.Request) -> Iterator[tuple]:
        """Views of one's own to 3D: streams (views picture, status, GLB or nothing yet).

        files: pictures of one object all around, in the order of their names, or a zip of them; with a
        transforms.json (NeRF convention) among them, it says where the cameras are. elevation: degrees, -80 to 80, of a
        ring without one; "": the silhouettes tell. num_views: how many pictures there must be, 2 to 200; 0:
        as many as there are. The others as in generate.
        """
        options = checked_asset(max_faces, texture_size, coloring, origin, longest_side)
        if not files:
            raise gr.Error(NO_FILES, print_exception=False)
        try:
            posed = load_views([Path(f) for f in files] if len(files) > 1 else Path(files[0]),
                               num_views=num_views or None, elevation=checked_elevation(elevation))
        except (ValueError, OSError) as error:
            raise told(error) from error
        title = Path(files[0]).stem if len(files) == 1 else "own views"
        for views, update in self._work(request, lambda run, stop: self.studio.rebuild(
                posed, title, run / file_name(title), stop, options)):
            yield views, with_figures(update.status()), update.glb and str(update.glb)

    def refine(self, max_faces: int, texture_size: int, coloring: str, origin: str, longest_side: float,
               request: gr.Request) -> Iterator[tuple]:
        """Other triangles, texture, place or size for the object made last: streams (status, GLB or nothing yet)."""
        options = checked_asset(max_faces, texture_size, coloring, origin, longest_side)
        run_file, asset = self._current(request)
        for _, update in self._work(request, lambda run, stop: self.studio.refine(
                asset, run_file, run / run_file.with_suffix(".glb").name, stop, options)):
            yield with_figures(update.status()), str(update.glb) if update.glb else gr.skip()

    def _work(self, request: gr.Request, start: Callable[[Path, Callable[[], bool]], Iterator[RunUpdate]]
              ) -> Iterator[tuple[str | None, RunUpdate]]:
        """A run in a folder of its own: its updates, each with the file of the views so far; what it made is kept."""
        folder = self.folder(request)
        remove_old_runs(self.root)
        run = run_folder(folder)
        shown, views, pictures = None, None, 0
        try:
            for update in start(run, (folder / STOP).exists):
                if update.picture is not shown:  # a file each: gradio itself would rewrite one that is being fetched
                    shown, views, pictures = update.picture, run / f"views-{pictures:02d}.jpg", pictures + 1
                    shown.save(views, quality=90)
                if update.asset is not None:
                    save_finished(update.asset, run / FINISHED)
                    set_current_run(folder, run)
                yield views and str(views), update
        except ValueError as error:
            raise told(error) from error

    def _current(self, request: gr.Request) -> tuple[Path, FinishedAsset]:
        """The run file and the asset on this visitor's stage."""
        run = current_run(self.folder(request))
        run_file = None if run is None else next(run.glob("*.json"), None)
        if run_file is None:
            raise gr.Error(NO_RUN, print_exception=False)
        return run_file, load_finished(run / FINISHED)

    def export(self, format: str, request: gr.Request) -> str:
        """The object made last in another format, as a file: {formats}."""
        if format not in FORMATS:
            raise gr.Error(f"format must be one of {', '.join(FORMATS)}, got {html.escape(str(format)[:40])}",
                           print_exception=False)
        return str(self._exported(format, request))

    def _exported(self, format: str, request: gr.Request, in_the_middle: bool = False) -> Path:
        """The file of the object made last in a format, written when first asked for.

        in_the_middle: around (0, 0, 0) and SPLATS_SIDE large, for there the viewer of splats looks, from one distance.
        """
        run_file, asset = self._current(request)
        path = run_file.with_name(run_file.stem + "-in-the-middle" * in_the_middle + FORMATS[format].suffix)
        try:
            if not path.exists():
                mesh = place(asset.mesh, "center", SPLATS_SIDE) if in_the_middle else asset.mesh
                export(format, mesh, asset.surface.views, asset.surface.cameras, path,
                       extras=json.loads(run_file.read_text("utf-8")))
        except (ValueError, OSError) as error:
            raise told(error) from error
        if current_run(self.folder(request)) != run_file.parent:
            raise gr.Error(ANOTHER, print_exception=False)
        return path

    def look(self, shown: str, glb: str | None, request: gr.Request) -> gr.Model3D:
        """What the viewer shows of the object on the stage: its mesh, or Gaussian splats seeded from the surface."""
        return on_stage(glb, self._exported(shown, request, in_the_middle=True) if shown == "splat" else None)

    def show(self, chosen: gr.SelectData, request: gr.Request):
        """Put a finished example on the stage and its prompt and settings into their fields; nothing is computed."""
        if request.session_hash in self.line:
            raise gr.Error(ONE_AT_A_TIME, print_exception=False)
        example = self.examples[chosen.index]
        asked = example.request
        set_current_run(self.folder(request), None)
        message = (f"Pre-made example, drawn earlier by the checkpoint “{example.checkpoint}” (seed {asked.seed}). "
                   "Generate draws it now.")
        return (asked.prompt, asked.num_views, asked.guidance_scale, asked.num_inference_steps, asked.elevation,
                asked.seed, False, asked.consistency, list(self.studio.mixers_for(asked)), asked.symmetry,
                asked.one_by_one, asked.guidance_rescale, asked.skip_guidance_scale, asked.redraw,
                status_line("example", message), str(example.views), on_stage(str(example.glb)),
                gr.DownloadButton(value=str(example.glb), interactive=True), nothing_ready(), mesh_shown(False),
                *[gr.Button(interactive=False)] * 2)

    def stop(self, request: gr.Request):
        """Ask the session's run to end after the step it is in."""
        (self.folder(request) / STOP).touch()
        return gr.Button(interactive=False)

    def finish(self, status: dict, glb: str | None, request: gr.Request):
        """After a run, however it ended: the viewer gets its file (as an output of `generate` it would stay blank)."""
        self.line.discard(request.session_hash)
        if status["stage"] not in ("done", "stopped"):
            status = status_line("stopped", "This run ended early; the message says why.")
        made = current_run(self.folder(request)) is not None
        return (status, *[gr.Button(interactive=True)] * 2, *[gr.Button(interactive=made)] * 2,
                gr.Button(interactive=False), on_stage(glb), gr.DownloadButton(interactive=glb is not None),
                mesh_shown(made))

    def leave(self, request: gr.Request):
        """A visitor closed the page: a run of theirs must not keep the others waiting."""
        if request.session_hash in self.line:
            self.line.discard(request.session_hash)
            (self.folder(request) / STOP).touch()


Desk.export.__doc__ = Desk.export.__doc__.format(formats=", ".join(FORMATS))
Desk.generate.__doc__ = Desk.generate.__doc__.format(mixers=", ".join(MODULES), symmetry=", ".join(SYMMETRY))


def something_ready() -> gr.File:
    """The place of a prepared file, in sight."""
    return gr.File(visible=True)


def nothing_ready() -> gr.File:
    """The place of a prepared file, empty and out of sight."""
    return gr.File(value=None, visible=False)


def on_stage(glb: str | None, splats: Path | None = None) -> gr.Model3D:
    """The viewer with a GLB, or with splats of the same object in its place, from where all of it is to be seen."""
    if glb is None:
        return gr.Model3D(value=None)
    return gr.Model3D(value=str(splats or glb), camera_position=(ALPHA, BETA, viewing_distance(glb_vertices(glb))))


def mesh_shown(interactive: bool) -> gr.Radio:
    """The viewer's switch back at the mesh."""
    return gr.Radio(value="glb", interactive=interactive)


def told(error: Exception) -> gr.Error:
    """What went wrong, as a message for the visitor; names of their own files may hold anything."""
    return gr.Error(html.escape(str(error), quote=False), print_exception=False)


def checked(prompt, num_views, guidance_scale, num_inference_steps, elevation, seed, randomize_seed, consistency,
            mixers, symmetry, one_by_one, guidance_rescale, skip_guidance_scale, redraw) -> GenerationRequest:
    """The page's values as a request; what is wrong with them becomes a message for the visitor."""
    if isinstance(prompt, str) and not prompt.strip():
        raise gr.Error("Type what to make first, for example: a red barrel. (prompt must not be empty)",
                       print_exception=False)
    try:
        return GenerationRequest(prompt, num_views, guidance_scale, num_inference_steps, elevation, seed,
                                 randomize_seed, consistency, mixers=mixers, symmetry=symmetry,
                                 one_by_one=one_by_one, guidance_rescale=guidance_rescale,
                                 skip_guidance_scale=skip_guidance_scale, redraw=redraw)
    except ValueError as error:
        raise told(error) from error


def checked_elevation(typed: str | float | None) -> float | None:
    """A ring's elevation in degrees as it was typed; None where nothing was."""
    if typed is None or not str(typed).strip():
        return None
    try:
        elevation = float(str(typed).replace(",", ".").removesuffix("°"))
    except ValueError:
        elevation = math.nan
    if not abs(elevation) <= RING_ELEVATION:
        raise told(ValueError(f"elevation must be a number of degrees from -{RING_ELEVATION} to {RING_ELEVATION}, or "
                              f"empty, got {str(typed)[:40]!r}"))
    return elevation


def checked_asset(*values) -> AssetOptions:
    """The same for the asset's options."""
    try:
        return AssetOptions(*values)
    except ValueError as error:
        raise told(error) from error


def status_line(stage: str, message: str) -> dict:
    """The progress line's value while no step has been made."""
    return with_figures({"stage": stage, "step": 0, "total": 0, "percent": 0, "seconds_left": None, "seed": None,
                         "message": message, "note": ""})


def with_figures(status: dict) -> dict:
    """A status with the words that the line shows on its right."""
    parts = [f"{status['percent']} %"] if status["stage"] in ("denoising", "reconstructing") else []
    if parts and status["seconds_left"] is not None:
        parts.append(f"{status['seconds_left']:.0f} s left")
    return status | {"figures": " · ".join(parts)}
