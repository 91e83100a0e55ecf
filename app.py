"""The web app: layout and wiring in Gradio; what the buttons do is in desk.py and coser/studio.py."""

from __future__ import annotations

import os

# The app serves a room without network: no telemetry, no look-ups. Both are read when gradio and the hub are imported.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
OFFLINE_UNASKED = "HF_HUB_OFFLINE" not in os.environ
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import spaces  # noqa: I001  (before torch: on ZeroGPU it must be the first to touch CUDA)

import argparse
import inspect
import tempfile
from pathlib import Path

import gradio as gr
import huggingface_hub

from coser.examples import load_examples
from coser.own_views import MOST
from coser.pipeline import ELEVATIONS, NUM_VIEWS
from coser.reconstruction.exports import FORMATS
from coser.request import (COLORING, CONSISTENCY, GUIDANCE_RESCALE, GUIDANCE_SCALE, LONGEST_SIDE, MAX_FACES,
                           NUM_INFERENCE_STEPS, ORIGINS, REDRAW, SEED, SKIP_GUIDANCE_SCALE, SYMMETRY, TEXTURE_SIZES,
                           AssetOptions, GenerationRequest)
from coser.scene_prompts import scene_plan
from coser.sessions import KEPT_SECONDS
from coser.stage import ALPHA, BETA
from coser.studio import SMALL, Studio, is_hub_id, log_to_terminal
from desk import Desk, something_ready, status_line

EXAMPLES = Path(__file__).parent / "examples" / "gallery"
CSS = Path(__file__).with_name("app.css")
DEFAULTS = GenerationRequest(prompt="a red barrel")
INPUTS = tuple(inspect.signature(Desk.generate).parameters)[1:]
ASSET = AssetOptions()
ASK = "What shall it be? For example: a red barrel, or a lantern on a barrel"
MIXER_NAMES = {"adjacent": "Adjacent attention", "trajectory": "Trajectory attention",
               "glance": "Rapid Glance (Mamba scan)", "rectification": "Rectification (score attention)",
               "dense": "Dense attention", "temporal": "Same-place attention"}
SYMMETRY_NAMES = {"none": "None", "auto": "As its kind usually is", "mirror": "Left and right alike",
                  "back": "Front and back alike", "both": "Both of these", "quarter": "Four sides alike",
                  "round": "Round"}
IN_THE_LANE = 24  # runs at work and waiting: each takes one of gradio's 40 threads; the rest wait in its queue
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
<div class="words"><b>${value.message.replace(/[&<>]/g, c => "&#" + c.charCodeAt(0) + ";")}</b>
<span>${value.figures}</span></div>
<div class="track"><div class="bar" style="width:${value.percent}%"></div></div>
<div class="note">${value.note.replace(/[&<>]/g, c => "&#" + c.charCodeAt(0) + ";")}</div></div>"""
OWN_VIEWS = """<p>All around one object, in even steps, the first from the front; on a plain background or cut out
(alpha). In a zip with a <code>transforms.json</code> (NeRF convention) the cameras may be anywhere.</p>"""


def gpu_seconds(*inputs) -> int:
    """What a run may take of ZeroGPU's time, in seconds; wrong values get the least, for they end at once.

    inputs: the first so many of what `Desk.generate` takes.
    """
    asked = {"redraw": DEFAULTS.redraw} | dict(zip(INPUTS, inputs))
    prompt, *numbers = (asked.get(name) for name in ("prompt", "num_views", "num_inference_steps", "redraw"))
    if not all(isinstance(number, (int, float)) for number in numbers):
        return 10
    num_views, steps, redraw = numbers
    plan = scene_plan(prompt) if isinstance(prompt, str) else None
    drawings = len(plan.objects) if plan else 1
    # a texture of 4096 pixels keeps the processor busy for 17 s of a core where one of 1024 takes 2
    pixels = asked.get("texture_size")
    texture = 18 * (pixels / max(TEXTURE_SIZES))**2 if pixels in TEXTURE_SIZES else 1
    return int(max(10, min(60, 9 + texture + 0.03 * num_views * steps * (1 + redraw) * drawings)))


def setting_inputs(mixers: tuple[str, ...]) -> list[gr.components.Component]:
    """The sliders, in the order of GenerationRequest's fields after the prompt. mixers: what the checkpoint has."""
    with gr.Row():
        num_views = gr.Slider(*NUM_VIEWS, DEFAULTS.num_views, step=1, label="Views", info="a ring around it",
                              elem_id="num-views")
        guidance_scale = gr.Slider(*GUIDANCE_SCALE, DEFAULTS.guidance_scale, step=0.5, label="Guidance",
                                   info="by the prompt", elem_id="guidance-scale")
        steps = gr.Slider(*NUM_INFERENCE_STEPS, DEFAULTS.num_inference_steps, step=1, label="Steps",
                          info="finer, slower", elem_id="steps")
        elevation = gr.Slider(*ELEVATIONS, DEFAULTS.elevation, step=1, label="Elevation", info="degrees up",
                              elem_id="elevation")
    with gr.Row():
        consistency = gr.Slider(*CONSISTENCY, DEFAULTS.consistency, step=0.1, label="Consistency", info="views fused",
                                elem_id="consistency")
        guidance_rescale = gr.Slider(*GUIDANCE_RESCALE, DEFAULTS.guidance_rescale, step=0.1, label="Guidance rescale",
                                     info="true colours", elem_id="guidance-rescale")
        skip_guidance_scale = gr.Slider(*SKIP_GUIDANCE_SCALE, DEFAULTS.skip_guidance_scale, step=0.5,
                                        label="Skip guidance", info="views heed others",
                                        elem_id="skip-guidance-scale")
        redraw = gr.Slider(*REDRAW, DEFAULTS.redraw, step=0.05, label="Redraw", info="tidier, slower",
                           elem_id="redraw")
    with gr.Row():
        modules = gr.CheckboxGroup([(MIXER_NAMES[name], name) for name in mixers], value=list(mixers), scale=2,
                                   label="Modules between views", info="switch one off to see what it does",
                                   elem_id="mixers")
        with gr.Column(min_width=200):
            symmetry = gr.Dropdown([(SYMMETRY_NAMES[name], name) for name in SYMMETRY], value=DEFAULTS.symmetry,
                                   label="Symmetry", info="sides that shall be alike", elem_id="symmetry")
            one_by_one = gr.Checkbox(DEFAULTS.one_by_one, label="Several objects one by one", elem_id="one-by-one",
                                     info="then put together: a lantern on a barrel")
        with gr.Column(min_width=200):
            seed = gr.Number(DEFAULTS.seed, precision=0, minimum=SEED[0], maximum=SEED[1], label="Seed",
                             info="same seed, same object", elem_id="seed")
            randomize = gr.Checkbox(True, label="New seed every time", container=False, elem_id="randomize-seed")
    return [num_views, guidance_scale, steps, elevation, seed, randomize, consistency, modules, symmetry, one_by_one,
            guidance_rescale, skip_guidance_scale, redraw]


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
                    prompt = gr.Textbox(placeholder=ASK, label="Prompt", max_lines=1, show_label=False, container=False,
                                        scale=6, autofocus=True, elem_id="prompt")
                    go = gr.Button("Generate", variant="primary", scale=1, min_width=110, elem_id="go")
                gr.HTML("Pre-made examples, drawn earlier by the checkpoint: choose one to look at it",
                        elem_classes="heading", visible=bool(examples))
                gallery = gr.Gallery([(e.thumbnail(), e.request.prompt) for e in examples], show_label=False,
                                     columns=12, allow_preview=False, object_fit="contain", interactive=False,
                                     container=False, buttons=[], visible=bool(examples), elem_id="examples")
                with gr.Accordion("Settings", open=False, elem_id="settings"):
                    settings = setting_inputs(studio.mixers)
            with gr.Tab("From your own views", elem_id="own"):
                with gr.Row():
                    files = gr.File(label="Pictures of one object from all around, or a zip of them", scale=3,
                                    file_count="multiple", file_types=PICTURES, height=150, elem_id="files")
                    with gr.Column(scale=2):
                        gr.HTML(OWN_VIEWS)
                        with gr.Row():
                            # a text: an empty number would come back from the page as 0 (gradio 6.31)
                            ring = gr.Textbox("", max_lines=1, label="Elevation of the ring", elem_id="ring",
                                              info="degrees; left empty, the silhouettes tell")
                            count = gr.Number(0, precision=0, minimum=0, maximum=MOST, label="Views in it",
                                              elem_id="count", info="0: as many as there are pictures")
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
                                   clear_color=(1.0, 1.0, 1.0, 1.0), camera_position=(ALPHA, BETA, None),
                                   elem_id="model")
                with gr.Row(elem_id="take"):
                    shown = gr.Radio([("Mesh", "glb"), ("Splats", "splat")], value="glb", show_label=False,
                                     container=False, scale=1, interactive=False, elem_id="shown")
                    download = gr.DownloadButton("Download GLB", interactive=False, scale=2, elem_id="download")
        with gr.Accordion("Asset: triangles, texture, size, other formats", open=False, elem_id="asset"):
            options = asset_inputs()
            with gr.Row():
                refine = gr.Button("Make it again from the same views", interactive=False, elem_id="refine")
                format = gr.Dropdown([(f.label, name) for name, f in FORMATS.items()], value="obj", label="Format",
                                     show_label=False, container=False, elem_id="format")
                prepare = gr.Button("Prepare file", interactive=False, elem_id="prepare")
            other = gr.File(label="Ready to download", interactive=False, visible=False, elem_id="other")

        buttons = [go, rebuild, refine, prepare, stop]
        seed = settings[4]
        quiet = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}
        # Runs take turns in the studio's lane, where one that waits can be stopped. On ZeroGPU they work in a process
        # of its own, which knows nothing of that lane here: there gradio's queue lets in one at a time.
        lane = {"show_progress": "hidden", "concurrency_id": "gpu",
                "concurrency_limit": 1 if spaces.config.Config.zero_gpu else IN_THE_LANE}

        def wire(triggers, begin, work, inputs, outputs, **named):
            """A kind of run: check and clear at once, then work in the lane, then put the result on the stage."""
            started = gr.on(triggers, begin, inputs, [status, *buttons, model, download, other],
                            **quiet | {"preprocess": named.get("preprocess", True)})
            worked = started.success(work, inputs, outputs, **lane, **named)
            for ended in (worked.success, worked.failure):  # `then` alone is not called after an error
                ended(desk.finish, [status, download], [status, *buttons, model, download, shown], **quiet)

        wire([prompt.submit, go.click], desk.begin, spaces.GPU(duration=gpu_seconds)(desk.generate),
             [prompt, *settings, *options], [views, status, seed, download], preprocess=False, api_name="generate")
        wire([rebuild.click], desk.begin_rebuild, spaces.GPU(duration=60)(desk.rebuild),
             [files, ring, *options, count], [views, status, download], api_name="reconstruct")
        wire([refine.click], desk.begin_refine, desk.refine, options, [status, download], preprocess=False,
             api_name="refine")
        prepared = prepare.click(desk.export, format, other, concurrency_limit=2, api_name="export")
        prepared.success(something_ready, None, other, **quiet)
        shown.input(desk.look, [shown, download], model, concurrency_limit=2, api_visibility="private")
        gallery.select(desk.show, None,
                       [prompt, *settings, status, views, model, download, other, shown, refine, prepare],
                       queue=False, show_progress="hidden", api_visibility="private")
        stop.click(desk.stop, None, stop, **quiet)
        demo.unload(desk.leave)
    return demo.queue(max_size=32)


def main(argv: list[str] | None = None) -> None:
    """Load the checkpoint, then serve the page until interrupted."""
    parser = argparse.ArgumentParser(description="The CoSER web app.")
    parser.add_argument("--checkpoint", default=SMALL, help="a folder in diffusers layout, or the hub id of one, which "
                        "is downloaded (default: the shipped one)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--host", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, help="port to listen on (default: the first free one from 7860)")
    args = parser.parse_args(argv)
    log_to_terminal()
    if OFFLINE_UNASKED and is_hub_id(str(args.checkpoint)):
        huggingface_hub.constants.HF_HUB_OFFLINE = False  # whoever names one asks for the network
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
