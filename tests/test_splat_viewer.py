"""Splats open in the app's own viewer, gsplat.js in a browser: upright, seen from the front, not mirrored."""

import io

import numpy as np
import pytest
from arms import COLORS, arms
from PIL import Image
from test_browser import CHROMIUM, FLAGS

from coser.reconstruction.splat import save_splat

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)")


def middles(picture: np.ndarray) -> np.ndarray | None:
    """Where (x, y) the three arms are in a picture, in pixels; None while one of them is not to be seen."""
    hue = picture / np.maximum(picture.max(-1, keepdims=True), 1)
    near = np.abs(hue[:, :, None] - COLORS / COLORS.max(-1, keepdims=True)).sum(-1) < 0.25
    near &= picture.max(-1)[..., None] > 120
    rows, columns, _ = np.indices(near.shape)
    if near.sum((0, 1)).min() < 100:
        return None
    return np.stack([(columns * near).sum((0, 1)), (rows * near).sum((0, 1))], -1) / near.sum((0, 1))[:, None]


def test_splats_are_upright_and_unmirrored_in_the_viewer(tmp_path):
    import gradio as gr
    from playwright.sync_api import sync_playwright

    path = save_splat(arms(), tmp_path / "arms-splat.ply", 2000)
    with gr.Blocks() as demo:
        gr.Model3D(str(path), height=300, elem_id="model")
    _, address, _ = demo.launch(prevent_thread_lock=True, quiet=True, ssr_mode=False, allowed_paths=[str(tmp_path)])
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
            page = browser.new_page(viewport={"width": 400, "height": 400})
            page.set_default_timeout(60_000)
            page.goto(address)
            canvas = page.wait_for_selector("#model canvas")
            for _ in range(60):  # the viewer lets splats grow from nothing
                shown = Image.open(io.BytesIO(canvas.screenshot())).convert("RGB")
                found = middles(np.asarray(shown).astype(int))
                if found is not None:
                    break
                page.wait_for_timeout(250)
            browser.close()
    finally:
        demo.close()
    assert found is not None, "the viewer stayed blank"
    red, green, blue = found  # from the front, a little from the right and above: +x right, +y up, +z to the left
    assert red[0] > green[0] + 20 > blue[0] and green[1] < min(red[1], blue[1]) - 20
