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
from collections.abc import Iterator
from pathlib import Path

import gradio as gr

from coser.examples import Example, load_examples
from coser.pipeline import ELEVATIONS, NUM_VIEWS
from coser.request import CONSISTENCY, GUIDANCE_SCALE, NUM_INFERENCE_STEPS, SEED, GenerationRequest
from coser.studio import (KEPT_SECONDS, SMALL, Studio, file_name, log_to_terminal, remove_old_runs, run_folder,
                          session_folder)

EXAMPLES = Path(__file__).parent / "examples" / "gallery"
DEFAULTS = GenerationRequest(prompt="a red barrel")
STOP = "stop"  # a file of this name in a session's folder asks its run to end; files reach ZeroGPU's worker process too

THEME = gr.themes.Soft(
    primary_hue="orange", neutral_hue="stone", radius_size="lg", font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"]).set(
    body_background_fill="#faf8f5", block_shadow="none", block_border_width="1px",
    button_primary_background_fill="#c2410c", button_primary_background_fill_hover="#9a3412",
    button_primary_text_color="white", block_title_background_fill="none", block_title_text_color="*body_text_color",
    block_title_padding="0", block_title_text_weight="600", slider_color="#c2410c", button_primary_shadow="none",
    button_secondary_shadow="none")
CSS = """
.gradio-container main {width: 100%; max-width: 1240px; margin: 0 auto}
.gradio-container .html-container {padding: 0}
#title h1 {margin: 0; font-size: 1.9rem; letter-spacing: -.02em} #title p {margin: 0; opacity: .7}
#ask {gap: 10px; align-items: stretch} #ask textarea, #ask input {font-size: 1.1rem; height: 100%}
#examples {border: 0; background: none; overflow: visible}
#examples .gallery-container, #examples .grid-wrap {height: auto; min-height: 0; max-height: none;
  padding: 0; overflow: visible}
#examples .grid-container {grid-template-columns: repeat(12, minmax(0, 1fr)); gap: 8px; padding: 0; height: auto}
#examples .thumbnail-item {display: block; aspect-ratio: auto; background: white}
#examples .thumbnail-item img {width: 100%; height: auto; aspect-ratio: 1}
#examples .caption-label {position: static; max-width: none; margin: 0; padding: 0 4px 5px; border: 0;
  box-shadow: none; background: none; white-space: normal; text-align: center; font-size: .75rem;
  line-height: 1.15; opacity: 1 !important}
#status .words {display: flex; justify-content: space-between; gap: 12px; font-size: .95rem}
#status .words span {opacity: .75; white-space: nowrap; font-variant-numeric: tabular-nums}
#status .track {height: 6px; margin-top: 8px; border-radius: 3px; background: var(--border-color-primary)}
#status .bar {height: 100%; border-radius: 3px; background: #c2410c; transition: width .25s linear}
#status .note {margin-top: 8px; font-size: .9rem; opacity: .8} #status .note:empty {display: none}
#status .example .track {visibility: hidden}
#status .done .bar {background: #4d7c0f} #status .stopped .bar {background: #a8a29e}
#views img {width: 100%; height: 100%; object-fit: contain; background: white}
.heading {margin-bottom: -6px; font-size: .8rem; font-weight: 600; letter-spacing: .06em; opacity: .6;
  text-transform: uppercase}
footer {opacity: .6}
@media (max-width: 700px) {
  #examples .grid-wrap {overflow-x: auto; scrollbar-width: none}
  #examples .grid-container {grid-template-columns: repeat(12, 84px); width: max-content}
  #ask > * {min-width: 0 !important} #ask #prompt {flex: 1 0 100%} #ask #go {flex: 3} #ask #stop {flex: 1}
  #views, #views > * {height: auto !important} #views .image-container {aspect-ratio: 4 / 3}
  #model {height: 340px !important}
}
"""
STATUS = """<div class="line ${value.stage}" role="status" aria-live="polite">
<div class="words"><b>${value.message}</b><span>${value.figures}</span></div>
<div class="track"><div class="bar" style="width:${value.percent}%"></div></div>
<div class="note">${value.note}</div></div>"""


class Desk:
    """What the page's events do, around one studio and finished examples; visitors are told apart by their session."""

    def __init__(self, studio: Studio, root: Path, examples: list[Example]):
        self.studio, self.root, self.examples = studio, root, examples
        self.line: set[str] = set()  # the sessions that draw or wait to draw

    def folder(self, request: gr.Request) -> Path:
        return session_folder(self.root, request.session_hash or "")

    def begin(self, prompt, num_views, guidance_scale, num_inference_steps, elevation, seed, randomize_seed,
              consistency, request: gr.Request):
        """Check the values at once, before any waiting; then clear the stage and turn the buttons round."""
        checked(prompt, num_views, guidance_scale, num_inference_steps, elevation, seed, randomize_seed, consistency)
        if request.session_hash in self.line:
            raise gr.Error("One at a time: press Stop first.", print_exception=False)
        (self.folder(request) / STOP).unlink(missing_ok=True)
        remove_old_runs(self.root)
        ahead = len(self.line)
        self.line.add(request.session_hash)
        message = f"Waiting for {ahead} other visitor{'s' if ahead > 1 else ''}" if ahead else "Starting"
        return (status_line("waiting", message), gr.Button(interactive=False), gr.Button(interactive=True), None,
                gr.DownloadButton(value=None, interactive=False))

    def generate(self, prompt: str, num_views: int, guidance_scale: float, num_inference_steps: int, elevation: float,
                 seed: int, randomize_seed: bool, consistency: float, request: gr.Request) -> Iterator[tuple]:
        """Text to 3D: streams (views picture, status, seed, GLB or nothing yet), an item a denoising step.

        prompt: 1 to 300 characters. num_views: 4 to 24. guidance_scale: 1 to 12. num_inference_steps: 1 to 50.
        elevation: 0 to 30 degrees. seed: 0 to 2147483647, drawn anew with randomize_seed and reported back.
        consistency: 0 to 1, how much of the views is replaced by the object they make together, at some steps.
        """
        asked = checked(prompt, num_views, guidance_scale, num_inference_steps, elevation, seed, randomize_seed,
                        consistency)
        asked = asked.with_drawn_seed()
        folder = self.folder(request)
        run = run_folder(folder)
        shown = views = None
        try:
            glb = run / file_name(asked.prompt, asked.seed)
            for update in self.studio.generate(asked, glb, (folder / STOP).exists):
                if update.picture is not shown:  # a file each: gradio itself would rewrite one that is being fetched
                    shown, views = update.picture, run / f"views-{update.step:02d}.jpg"
                    shown.save(views, quality=90)
                yield views and str(views), with_figures(update.status()), update.seed, update.glb and str(update.glb)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error

    def show(self, chosen: gr.SelectData, request: gr.Request):
        """Put a finished example on the stage and its prompt and settings into their fields; nothing is computed."""
        if request.session_hash in self.line:
            raise gr.Error("One at a time: press Stop first.", print_exception=False)
        example = self.examples[chosen.index]
        asked = example.request
        message = (f"Pre-made example, drawn earlier by the checkpoint “{example.checkpoint}” (seed {asked.seed}). "
                   "Generate draws it now.")
        return (asked.prompt, asked.num_views, asked.guidance_scale, asked.num_inference_steps, asked.elevation,
                asked.seed, False, asked.consistency, status_line("example", message), str(example.views),
                str(example.glb), gr.DownloadButton(value=str(example.glb), interactive=True))

    def stop(self, request: gr.Request):
        """Ask the session's run to end after the step it is in."""
        (self.folder(request) / STOP).touch()
        return gr.Button(interactive=False)

    def finish(self, status: dict, glb: str | None, request: gr.Request):
        """After a run, however it ended: the viewer gets its file (as an output of `generate` it would stay blank)."""
        self.line.discard(request.session_hash)
        if status["stage"] not in ("done", "stopped"):
            status = status_line("stopped", "This run ended early; the message says why.")
        return (status, gr.Button(interactive=True), gr.Button(interactive=False), glb,
                gr.DownloadButton(interactive=glb is not None))

    def leave(self, request: gr.Request):
        """A visitor closed the page: a run of theirs must not keep the others waiting."""
        if request.session_hash in self.line:
            self.line.discard(request.session_hash)
            (self.folder(request) / STOP).touch()


def checked(prompt, *settings) -> GenerationRequest:
    """The page's values as a request; what is wrong with them becomes a message for the visitor."""
    if isinstance(prompt, str) and not prompt.strip():
        raise gr.Error("Type what to make first, for example: a red barrel. (prompt must not be empty)",
                       print_exception=False)
    try:
        return GenerationRequest(prompt, *settings)
    except ValueError as error:
        raise gr.Error(html.escape(str(error), quote=False), print_exception=False) from error


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
    return [num_views, guidance_scale, steps, elevation, seed, randomize, consistency]


def build_app(studio: Studio, root: Path) -> gr.Blocks:
    """The page around a loaded studio, visitors' files under `root`; nothing starts until `launch`."""
    examples = load_examples(EXAMPLES)
    desk = Desk(studio, root, examples)
    with gr.Blocks(title="CoSER · a sentence becomes a 3D asset", delete_cache=(600, KEPT_SECONDS)) as demo:
        gr.HTML("<h1>CoSER</h1><p>Type a sentence, watch its views appear, turn the object, take it home.</p>",
                elem_id="title")
        with gr.Row(elem_id="ask"):
            prompt = gr.Textbox(placeholder="What shall it be? For example: a red barrel", label="Prompt", max_lines=1,
                                show_label=False, container=False, scale=6, autofocus=True, elem_id="prompt")
            go = gr.Button("Generate", variant="primary", scale=1, min_width=110, elem_id="go")
            stop = gr.Button("Stop", scale=1, min_width=80, interactive=False, elem_id="stop")
        gr.HTML("Pre-made examples, drawn earlier by the checkpoint: choose one to look at it", elem_classes="heading",
                visible=bool(examples))
        gallery = gr.Gallery([(e.thumbnail(), e.request.prompt) for e in examples], show_label=False, columns=12,
                             allow_preview=False, object_fit="contain", interactive=False, container=False, buttons=[],
                             visible=bool(examples), elem_id="examples")
        with gr.Accordion("Settings", open=False, elem_id="settings"), gr.Row():
            settings = setting_inputs()
        status = gr.HTML(status_line("idle", "Ready"), html_template=STATUS, elem_id="status")
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

        gallery.select(desk.show, None, [prompt, *settings, status, views, model, download], queue=False,
                       show_progress="hidden", api_visibility="private")
        seed = settings[4]
        quiet = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}
        started = gr.on([prompt.submit, go.click], desk.begin, [prompt, *settings],
                        [status, go, stop, model, download], preprocess=False, **quiet)
        drawn = started.success(spaces.GPU(duration=gpu_seconds)(desk.generate), [prompt, *settings],
                                [views, status, seed, download], preprocess=False, show_progress="hidden",
                                concurrency_limit=1, concurrency_id="gpu", api_name="generate")
        drawn.then(desk.finish, [status, download], [status, go, stop, model, download], **quiet)
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
    _, url, _ = demo.launch(theme=THEME, css=CSS, footer_links=["api"], run_history=False, ssr_mode=False,
                             allowed_paths=[str(EXAMPLES)], **options)
    return url


if __name__ == "__main__":
    main()
