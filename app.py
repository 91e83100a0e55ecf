"""The web app: layout and wiring in Gradio; what the buttons do is in coser/studio.py."""

from __future__ import annotations

import os

# The app serves a room without network: no telemetry, no look-ups. Both are read when gradio and the hub are imported.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import spaces  # noqa: I001  (before torch: on ZeroGPU it must be the first to touch CUDA)

import argparse
import html
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import gradio as gr

from coser.examples import Example, load_examples
from coser.finishing import load_finished, save_finished
from coser.own_views import load_views
from coser.pipeline import ELEVATIONS, NUM_VIEWS
from coser.reconstruction.exports import FORMATS, export
from coser.request import (COLORING, CONSISTENCY, GUIDANCE_SCALE, LONGEST_SIDE, MAX_FACES, NUM_INFERENCE_STEPS, ORIGINS,
                           SEED, TEXTURE_SIZES, AssetOptions, GenerationRequest)
from coser.sessions import (KEPT_SECONDS, current_run, file_name, remove_old_runs, run_folder, session_folder,
                            set_current_run)
from coser.studio import SMALL, RunUpdate, Studio, log_to_terminal

EXAMPLES = Path(__file__).parent / "examples" / "gallery"
CSS = Path(__file__).with_name("app.css")
DEFAULTS = GenerationRequest(prompt="a red barrel")
ASSET = AssetOptions()
STOP = "stop"  # a file of this name in a session's folder asks its run to end; files reach ZeroGPU's worker process too
FINISHED = "finished.npz"  # in a run's folder: what its asset can be made from again
ONE_AT_A_TIME = "One at a time: press Stop first."
NO_RUN = "Make an object first: press Generate, or Reconstruct with your own views. Pre-made examples are GLB only."
MIXER_NAMES = [("Adjacent attention", "adjacent"), ("Trajectory attention", "trajectory"),
               ("Rapid Glance (Mamba scan)", "glance"), ("Rectification (score attention)", "rectification")]
PICTURES = [".png", ".jpg", ".jpeg", ".webp", ".zip", ".json"]

THEME = gr.themes.Soft(
    primary_hue="orange", neutral_hue="stone", radius_size="lg", font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"]).set(
    body_background_fill="#faf8f5", block_shadow="none", block_border_width="1px",
    button_primary_background_fill="#c2410c", button_primary_background_fill_hover="#9a3412",
    button_primary_text_color="white", block_title_background_fill="none", block_title_text_color="*body_text_color",
    block_title_padding="0", block_title_text_weight="600", slider_color="#c2410c", button_primary_shadow="none",
    button_secondary_shadow="none")
STATUS = """<div class="line ${value.stage}" role="status" aria-live="polite">
<div class="words"><b>${value.message}</b><span>${value.figures}</span></div>
<div class="track"><div class="bar" style="width:${value.percent}%"></div></div>
<div class="note">${value.note}</div></div>"""
OWN_VIEWS = """<p>All around one object, in even steps, the first from the front; on a plain background or cut out
(alpha). In a zip with a <code>transforms.json</code> (NeRF convention) the cameras may be anywhere.</p>"""


class Desk:
    """What the page's events do, around one studio and finished examples; visitors are told apart by their session."""

    def __init__(self, studio: Studio, root: Path, examples: list[Example]):
        self.studio, self.root, self.examples = studio, root, examples
        self.line: set[str] = set()  # the sessions that work or wait to

    def folder(self, request: gr.Request) -> Path:
        return session_folder(self.root, request.session_hash or "")

    def begin(self, prompt, num_views, guidance_scale, num_inference_steps, elevation, seed, randomize_seed,
              consistency, mixers, max_faces, texture_size, coloring, origin, longest_side, request: gr.Request):
        """Check a prompt's values at once, before any waiting; then clear the stage and turn the buttons round."""
        checked(prompt, num_views, guidance_scale, num_inference_steps, elevation, seed, randomize_seed, consistency,
                mixers)
        checked_asset(max_faces, texture_size, coloring, origin, longest_side)
        return *self._enter(request), None, gr.DownloadButton(value=None, interactive=False), None

    def begin_rebuild(self, files, elevation, max_faces, texture_size, coloring, origin, longest_side,
                      request: gr.Request):
        """The same for views of one's own."""
        if not files:
            raise gr.Error("Choose pictures, or a zip of them, first.", print_exception=False)
        checked_asset(max_faces, texture_size, coloring, origin, longest_side)
        return *self._enter(request), None, gr.DownloadButton(value=None, interactive=False), None

    def begin_refine(self, max_faces, texture_size, coloring, origin, longest_side, request: gr.Request):
        """The same for other triangles and colours of what is on the stage, which stays until there is news."""
        checked_asset(max_faces, texture_size, coloring, origin, longest_side)
        if current_run(self.folder(request)) is None:
            raise gr.Error(NO_RUN, print_exception=False)
        return *self._enter(request), gr.skip(), gr.skip(), None

    def _enter(self, request: gr.Request) -> tuple:
        """Take a place in the line; the progress line and the buttons (Stop last) while one works."""
        if request.session_hash in self.line:
            raise gr.Error(ONE_AT_A_TIME, print_exception=False)
        (self.folder(request) / STOP).unlink(missing_ok=True)
        remove_old_runs(self.root)
        ahead = len(self.line)
        self.line.add(request.session_hash)
        message = f"Waiting for {ahead} other visitor{'s' if ahead > 1 else ''}" if ahead else "Starting"
        return status_line("waiting", message), *[gr.Button(interactive=False)] * 4, gr.Button(interactive=True)

    def generate(self, prompt: str, num_views: int, guidance_scale: float, num_inference_steps: int, elevation: float,
                 seed: int, randomize_seed: bool, consistency: float, mixers: list[str], max_faces: int,
                 texture_size: int, coloring: str, origin: str, longest_side: float,
                 request: gr.Request) -> Iterator[tuple]:
        """Text to 3D: streams (views picture, status, seed, GLB or nothing yet), an item a denoising step.

        prompt: 1 to 300 characters. num_views: 4 to 24. guidance_scale: 1 to 12. num_inference_steps: 1 to 50.
        elevation: 0 to 30 degrees. seed: 0 to 2147483647, drawn anew with randomize_seed and reported back.
        consistency: 0 to 1, how much of the views is replaced by the object they make together, at some steps.
        mixers: which modules between the views work, some of adjacent, trajectory, glance and rectification.
        max_faces: 500 to 200000. texture_size: 512, 1024, 2048 or 4096. coloring: texture or vertices. origin: feet
        or center. longest_side: 0.01 to 100 metres.
        """
        asked = checked(prompt, num_views, guidance_scale, num_inference_steps, elevation, seed, randomize_seed,
                        consistency, mixers).with_drawn_seed()
        options = checked_asset(max_faces, texture_size, coloring, origin, longest_side)
        name = file_name(asked.prompt, asked.seed)
        for views, update in self._work(request, lambda run, stop: self.studio.generate(asked, run / name, stop,
                                                                                        options)):
            yield views, with_figures(update.status()), update.seed, update.glb and str(update.glb)

    def rebuild(self, files: list[str], elevation: float, max_faces: int, texture_size: int, coloring: str, origin: str,
                longest_side: float, request: gr.Request) -> Iterator[tuple]:
        """Views of one's own to 3D: streams (views picture, status, GLB or nothing yet).

        files: pictures of one object all around, in the order of their names, or a zip of them; with a
        transforms.json (NeRF convention) among them, it says where the cameras are. elevation: degrees, of a ring
        without one. The others as in generate.
        """
        options = checked_asset(max_faces, texture_size, coloring, origin, longest_side)
        try:
            posed = load_views([Path(f) for f in files] if len(files) > 1 else Path(files[0]), elevation=elevation)
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
        run = run_folder(folder)
        shown = views = None
        try:
            for update in start(run, (folder / STOP).exists):
                if update.picture is not shown:  # a file each: gradio itself would rewrite one that is being fetched
                    shown, views = update.picture, run / f"views-{update.step:02d}.jpg"
                    shown.save(views, quality=90)
                if update.asset is not None:
                    save_finished(update.asset, run / FINISHED)
                    set_current_run(folder, run)
                yield views and str(views), update
        except ValueError as error:
            raise told(error) from error

    def _current(self, request: gr.Request) -> tuple[Path, object]:
        """The run file and the asset on this visitor's stage."""
        run = current_run(self.folder(request))
        if run is None:
            raise gr.Error(NO_RUN, print_exception=False)
        return next(run.glob("*.json")), load_finished(run / FINISHED)

    def export(self, format: str, request: gr.Request) -> str:
        """The object made last in another format, as a file: {formats}."""
        if format not in FORMATS:
            raise gr.Error(f"format must be one of {', '.join(FORMATS)}, got {html.escape(str(format)[:40])}",
                           print_exception=False)
        run_file, asset = self._current(request)
        path = run_file.with_name(run_file.stem + FORMATS[format].suffix)
        try:
            if not path.exists():
                export(format, asset.mesh, asset.surface.views, asset.surface.cameras, path)
        except (ValueError, OSError) as error:
            raise told(error) from error
        return str(path)

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
                asked.seed, False, asked.consistency, list(asked.mixers), status_line("example", message),
                str(example.views), str(example.glb), gr.DownloadButton(value=str(example.glb), interactive=True), None,
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
        made = gr.Button(interactive=current_run(self.folder(request)) is not None)
        return (status, *[gr.Button(interactive=True)] * 2, made, made, gr.Button(interactive=False), glb,
                gr.DownloadButton(interactive=glb is not None))

    def leave(self, request: gr.Request):
        """A visitor closed the page: a run of theirs must not keep the others waiting."""
        if request.session_hash in self.line:
            self.line.discard(request.session_hash)
            (self.folder(request) / STOP).touch()


Desk.export.__doc__ = Desk.export.__doc__.format(formats=", ".join(FORMATS))


def told(error: Exception) -> gr.Error:
    """What went wrong, as a message for the visitor; names of their own files may hold anything."""
    return gr.Error(html.escape(str(error), quote=False), print_exception=False)


def checked(prompt, num_views, guidance_scale, num_inference_steps, elevation, seed, randomize_seed, consistency,
            mixers) -> GenerationRequest:
    """The page's values as a request; what is wrong with them becomes a message for the visitor."""
    if isinstance(prompt, str) and not prompt.strip():
        raise gr.Error("Type what to make first, for example: a red barrel. (prompt must not be empty)",
                       print_exception=False)
    try:
        return GenerationRequest(prompt, num_views, guidance_scale, num_inference_steps, elevation, seed,
                                 randomize_seed, consistency, mixers=mixers)
    except ValueError as error:
        raise told(error) from error


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


def gpu_seconds(prompt, num_views, guidance_scale, num_inference_steps, *_) -> int:
    """What a run may take of ZeroGPU's time, in seconds; wrong values get the least, for they end at once."""
    if not isinstance(num_views, (int, float)) or not isinstance(num_inference_steps, (int, float)):
        return 10
    return int(max(10, min(60, 10 + 0.02 * num_views * num_inference_steps)))


def setting_inputs() -> list[gr.components.Component]:
    """The sliders, in the order of GenerationRequest's fields after the prompt."""
    num_views = gr.Slider(*NUM_VIEWS, DEFAULTS.num_views, step=1, label="Views", info="a ring around it",
                          elem_id="num-views")
    guidance_scale = gr.Slider(*GUIDANCE_SCALE, DEFAULTS.guidance_scale, step=0.5, label="Guidance",
                               info="by the prompt", elem_id="guidance-scale")
    steps = gr.Slider(*NUM_INFERENCE_STEPS, DEFAULTS.num_inference_steps, step=1, label="Steps",
                      info="finer, slower", elem_id="steps")
    elevation = gr.Slider(*ELEVATIONS, DEFAULTS.elevation, step=1, label="Elevation", info="degrees up",
                          elem_id="elevation")
    with gr.Column(min_width=200):
        seed = gr.Number(DEFAULTS.seed, precision=0, minimum=SEED[0], maximum=SEED[1], label="Seed",
                         info="same seed, same object", elem_id="seed")
        randomize = gr.Checkbox(True, label="New seed every time", container=False, elem_id="randomize-seed")
    consistency = gr.Slider(*CONSISTENCY, DEFAULTS.consistency, step=0.1, label="Consistency",
                            info="fuse views while drawing", elem_id="consistency")
    mixers = gr.CheckboxGroup(MIXER_NAMES, value=list(DEFAULTS.mixers), label="Modules between views",
                              info="switch one off to see what it does", elem_id="mixers")
    return [num_views, guidance_scale, steps, elevation, seed, randomize, consistency, mixers]


def asset_inputs() -> list[gr.components.Component]:
    """The asset's options, in the order of AssetOptions' fields."""
    with gr.Row():
        max_faces = gr.Slider(*MAX_FACES, ASSET.max_faces, step=500, label="Triangles", info="at most",
                              elem_id="max-faces")
        texture_size = gr.Radio(list(TEXTURE_SIZES), value=ASSET.texture_size, label="Texture", info="pixels a side",
                                elem_id="texture-size")
        coloring = gr.Radio([("In a texture", COLORING[0]), ("At the vertices", COLORING[1])], value=ASSET.coloring,
                            label="Colours", elem_id="coloring")
        origin = gr.Radio([("Under its feet", ORIGINS[0]), ("In its middle", ORIGINS[1])], value=ASSET.origin,
                          label="Origin", elem_id="origin")
        longest_side = gr.Number(ASSET.longest_side, minimum=LONGEST_SIDE[0], maximum=LONGEST_SIDE[1],
                                 label="Longest side", info="metres", elem_id="longest-side")
    return [max_faces, texture_size, coloring, origin, longest_side]


def build_app(studio: Studio, root: Path) -> gr.Blocks:
    """The page around a loaded studio, visitors' files under `root`; nothing starts until `launch`."""
    examples = load_examples(EXAMPLES)
    desk = Desk(studio, root, examples)
    with gr.Blocks(title="CoSER · a sentence becomes a 3D asset", delete_cache=(600, KEPT_SECONDS)) as demo:
        gr.HTML("<h1>CoSER</h1><p>Type a sentence, watch its views appear, turn the object, take it home.</p>",
                elem_id="title")
        with gr.Tabs(elem_id="ways"):
            with gr.Tab("From a sentence"):
                with gr.Row(elem_id="ask"):
                    prompt = gr.Textbox(placeholder="What shall it be? For example: a red barrel", label="Prompt",
                                        max_lines=1, show_label=False, container=False, scale=6, autofocus=True,
                                        elem_id="prompt")
                    go = gr.Button("Generate", variant="primary", scale=1, min_width=110, elem_id="go")
                gr.HTML("Pre-made examples, drawn earlier by the checkpoint: choose one to look at it",
                        elem_classes="heading", visible=bool(examples))
                gallery = gr.Gallery([(e.thumbnail(), e.request.prompt) for e in examples], show_label=False,
                                     columns=12, allow_preview=False, object_fit="contain", interactive=False,
                                     container=False, buttons=[], visible=bool(examples), elem_id="examples")
                with gr.Accordion("Settings", open=False, elem_id="settings"), gr.Row():
                    settings = setting_inputs()
            with gr.Tab("From your own views", elem_id="own"):
                with gr.Row():
                    files = gr.File(label="Pictures of one object from all around, or a zip of them", scale=3,
                                    file_count="multiple", file_types=PICTURES, height=150, elem_id="files")
                    with gr.Column(scale=2):
                        gr.HTML(OWN_VIEWS)
                        ring = gr.Number(DEFAULTS.elevation, minimum=-80, maximum=80, label="Elevation of the ring",
                                         info="degrees; not asked where a transforms.json says it", elem_id="ring")
                        rebuild = gr.Button("Reconstruct", variant="primary", elem_id="rebuild")
        with gr.Row(elem_id="work"):
            status = gr.HTML(status_line("idle", "Ready"), html_template=STATUS, elem_id="status")
            stop = gr.Button("Stop", scale=0, min_width=110, interactive=False, elem_id="stop")
        with gr.Row(elem_id="stage"):
            with gr.Column(min_width=320):
                gr.HTML("Views, all around", elem_classes="heading")
                views = gr.Image(label="Views", show_label=False, interactive=False, height=480,
                                 buttons=["download", "fullscreen"], elem_id="views")
            with gr.Column(min_width=320):
                gr.HTML("3D model, drag to turn", elem_classes="heading")
                model = gr.Model3D(label="3D model", show_label=False, height=426, interactive=False,
                                   clear_color=(1.0, 1.0, 1.0, 1.0), camera_position=(60, 75, None), elem_id="model")
                download = gr.DownloadButton("Download GLB", interactive=False, elem_id="download")
        with gr.Accordion("Asset: triangles, texture, size, other formats", open=False, elem_id="asset"):
            options = asset_inputs()
            with gr.Row():
                refine = gr.Button("Make it again from the same views", interactive=False, elem_id="refine")
                format = gr.Dropdown([(f.label, name) for name, f in FORMATS.items()], value="obj", label="Format",
                                     show_label=False, container=False, elem_id="format")
                prepare = gr.Button("Prepare file", interactive=False, elem_id="prepare")
            other = gr.File(label="Ready to download", interactive=False, elem_id="other")

        buttons = [go, rebuild, refine, prepare, stop]
        seed = settings[4]
        quiet = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}
        lane = {"show_progress": "hidden", "concurrency_limit": 1, "concurrency_id": "gpu"}

        def wire(triggers, begin, work, inputs, outputs, **named):
            """A kind of run: check and clear at once, then work in the lane, then put the result on the stage."""
            started = gr.on(triggers, begin, inputs, [status, *buttons, model, download, other],
                            **quiet | {"preprocess": named.get("preprocess", True)})
            worked = started.success(work, inputs, outputs, **lane, **named)
            worked.then(desk.finish, [status, download], [status, *buttons, model, download], **quiet)

        wire([prompt.submit, go.click], desk.begin, spaces.GPU(duration=gpu_seconds)(desk.generate),
             [prompt, *settings, *options], [views, status, seed, download], preprocess=False, api_name="generate")
        wire([rebuild.click], desk.begin_rebuild, spaces.GPU(duration=60)(desk.rebuild), [files, ring, *options],
             [views, status, download], api_name="reconstruct")
        wire([refine.click], desk.begin_refine, desk.refine, options, [status, download], preprocess=False,
             api_name="refine")
        prepare.click(desk.export, format, other, concurrency_limit=2, api_name="export")
        gallery.select(desk.show, None, [prompt, *settings, status, views, model, download, other, refine, prepare],
                       queue=False, show_progress="hidden", api_visibility="private")
        stop.click(desk.stop, None, stop, **quiet)
        demo.unload(desk.leave)
    return demo.queue(max_size=32)


def main(argv: list[str] | None = None) -> None:
    """Load the checkpoint, then serve the page until interrupted."""
    parser = argparse.ArgumentParser(description="The CoSER web app.")
    parser.add_argument("--checkpoint", default=SMALL, help="a folder in diffusers layout (default: the shipped one)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--host", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, help="port to listen on (default: the first free one from 7860)")
    args = parser.parse_args(argv)
    log_to_terminal()
    try:
        studio = Studio(args.checkpoint, args.device)
    except (ValueError, OSError) as error:
        parser.exit(1, f"coser: {error}\n")
    with tempfile.TemporaryDirectory(prefix="coser-") as root:
        launch(build_app(studio, Path(root)), server_name=args.host, server_port=args.port)


def launch(demo: gr.Blocks, **options) -> str:
    """Serve the page with its looks; returns its address (at once, with prevent_thread_lock)."""
    _, url, _ = demo.launch(theme=THEME, css_paths=[CSS], footer_links=["api"], run_history=False, ssr_mode=False,
                             allowed_paths=[str(EXAMPLES)], **options)
    return url


if __name__ == "__main__":
    main()
