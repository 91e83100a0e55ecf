"""The whole way in a browser: type a prompt, watch grids stream in, turn the object, download it and load it again."""

import io
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from drawn_pipeline import box_views, welded
from PIL import Image

from coser.cameras import Cameras
from coser.views import views_to_uint8

CHROMIUM = shutil.which("chromium")
FLAGS = ("--no-sandbox --disable-quic --disable-background-networking --use-gl=angle --use-angle=swiftshader "
         "--enable-unsafe-swiftshader --ignore-gpu-blocklist").split()
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)")

COLLECT_GRIDS = """() => { window.grids = new Set(); setInterval(() => {
    const picture = document.querySelector('#views img'); if (picture && picture.complete) window.grids.add(picture.src)
}, 20) }"""


@pytest.fixture(scope="module")
def address():
    """The app as a person starts it, on the shipped checkpoint, on a port of its own choosing."""
    root = Path(__file__).parent.parent
    with subprocess.Popen([sys.executable, "app.py", "--device", "cpu"], cwd=root, text=True, stderr=subprocess.STDOUT,
                          stdout=subprocess.PIPE, env=os.environ | {"PYTHONUNBUFFERED": "1"}) as process:
        said = []
        for line in process.stdout:
            said.append(line)
            if found := re.search(r"http://[\w.:]+", line):
                break
        else:
            pytest.fail("the app did not start:\n" + "".join(said))
        yield found[0]
        process.terminate()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(address, browser):
    """Opens the app's page as a new visitor sees it, without another's cookies or files."""
    pages = []

    def visit():
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        pages.append(page)
        page.set_default_timeout(120_000)
        page.asked_elsewhere = []
        page.on("request", lambda request: page.asked_elsewhere.append(request.url)
                if not request.url.startswith((address, "data:", "blob:")) else None)
        page.goto(address)
        page.wait_for_selector("#go:enabled")
        return page

    yield visit
    for page in pages:
        page.close()


@pytest.fixture
def page(visit):
    return visit()


def test_a_prompt_becomes_an_object_that_turns_and_downloads(page, tmp_path):
    page.click("#settings button")
    for setting in ("num-views", "steps"):
        page.fill(f"#{setting} input[type=number]", "4")
        page.press(f"#{setting} input[type=number]", "Tab")
    page.uncheck("#randomize-seed input")
    page.evaluate(COLLECT_GRIDS)
    page.fill("#prompt textarea, #prompt input", "a red barrel")
    page.keyboard.press("Enter")
    page.wait_for_selector("#status .done")
    assert len(page.evaluate("[...window.grids]")) >= 3
    page.wait_for_function("document.querySelector('#views img').naturalWidth >= 512")

    canvas = page.wait_for_selector("#model canvas")
    canvas.scroll_into_view_if_needed()
    before = drawn(page, canvas)
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2 + 120, box["y"] + box["height"] / 2, steps=6)
    page.mouse.up()
    page.wait_for_timeout(500)
    assert (np.abs(picture(canvas) - before).max(-1) > 30).mean() > 0.01

    with page.expect_download() as download:
        page.click("#download")
    download.value.save_as(tmp_path / download.value.suggested_filename)
    assert download.value.suggested_filename == "a-red-barrel-0.glb"
    mesh = welded(tmp_path / download.value.suggested_filename)
    assert mesh.is_watertight and len(mesh.faces) > 1000

    page.click("#asset button")
    page.wait_for_timeout(1500)  # opened for the first time: what is typed at once would be lost
    page.fill("#max-faces input[type=number]", "1000")
    page.press("#max-faces input[type=number]", "Tab")
    page.wait_for_function("document.querySelector('#max-faces input[type=range]').value == '1000'")
    page.click("#refine")  # other triangles without drawing again
    page.wait_for_function("/: (9\\d\\d|1,000) triangles/.test(document.querySelector('#status .done')?.innerText)")
    page.wait_for_selector("#prepare:enabled")
    page.click("#prepare")
    with page.expect_download() as download:
        page.locator("#other a").first.click()
    download.value.save_as(tmp_path / download.value.suggested_filename)
    with zipfile.ZipFile(tmp_path / "a-red-barrel-0-obj.zip") as parts:
        assert {Path(name).suffix for name in parts.namelist()} == {".obj", ".mtl", ".png"}
    assert page.asked_elsewhere == []


def test_pictures_of_ones_own_become_an_object_that_turns(page, tmp_path):
    views = box_views("a blue box", Cameras.orbit(6))
    with zipfile.ZipFile(tmp_path / "box.zip", "w") as pictures:
        for i, view in enumerate(views_to_uint8(views)):
            file = io.BytesIO()
            Image.fromarray(view).save(file, "PNG")
            pictures.writestr(f"{i}<img src=x onerror=window.ran=1>.png", file.getvalue())
    page.click("button[role=tab]:has-text('own views')")
    page.set_input_files("#files input[type=file]", tmp_path / "box.zip")
    page.wait_for_selector("#files .file-preview")  # the name with its ending is shown while it is sent alone
    page.click("#rebuild")  # nothing typed: the silhouettes tell from which height the pictures are
    page.wait_for_selector("#status .done")
    note = page.inner_text("#status .note")
    assert "closed ring" in note and "at elevation 20 " in note and "0<img src=x" in note
    assert page.evaluate("window.ran") is None  # names of files are words, whatever they hold
    shown = drawn(page, page.wait_for_selector("#model canvas"))
    object_ = shown[np.abs(shown - shown[0, 0]).max(-1) > 60]
    assert object_.mean(0).argmax() == 2 and page.asked_elsewhere == []


def test_an_example_is_shown_at_once_without_drawing(page, tmp_path):
    page.wait_for_function(
        "[...document.querySelectorAll('#examples img')].filter(i => i.naturalWidth > 0).length == 12")
    page.click("#settings button")
    chosen = page.locator("#examples .gallery-item").nth(5)  # a lantern on a barrel, tall
    prompt = chosen.inner_text().strip()
    chosen.locator("button").click()
    page.wait_for_selector("#status .example")
    assert "Pre-made example" in page.inner_text("#status") and "small" in page.inner_text("#status")
    assert page.input_value("#prompt textarea, #prompt input") == prompt
    assert page.input_value("#seed input") == "0" and not page.is_checked("#randomize-seed input")
    page.wait_for_function("document.querySelector('#views img').naturalWidth >= 512")
    shown = drawn(page, page.wait_for_selector("#model canvas"))
    rims = shown[[8, -9]][:, 20:-150]  # between round corners and buttons
    assert (rims > 225).all(), "a tall object is to be seen whole"
    with page.expect_download() as download:
        page.click("#download")
    download.value.save_as(tmp_path / "example.glb")
    assert welded(tmp_path / "example.glb").is_watertight
    assert download.value.suggested_filename == prompt.replace(" ", "-") + "-0.glb"
    assert page.is_enabled("#go") and page.is_disabled("#stop") and page.asked_elsewhere == []

    page.click("#go")  # the same again, drawn now
    page.wait_for_selector("#status .denoising")
    page.click("#stop")
    page.wait_for_selector("#status .stopped")


def test_stop_keeps_the_grid_and_says_where_it_stopped(page):
    page.fill("#prompt textarea, #prompt input", "a green pine tree")
    page.click("#go")
    page.wait_for_selector("#views img")
    page.click("#stop")
    page.wait_for_selector("#status .stopped")
    assert re.search(r"Stopped at step \d+ of 20", page.inner_text("#status"))
    page.wait_for_selector("#go:enabled")
    assert page.is_visible("#views img")


def test_a_run_that_fails_says_why_and_leaves_the_page_as_useful_as_before(page, tmp_path):
    (tmp_path / "broken.zip").write_bytes(b"no zip")
    page.click("button[role=tab]:has-text('own views')")
    page.set_input_files("#files input[type=file]", tmp_path / "broken.zip")
    page.wait_for_selector("#files .file-preview")
    page.click("#rebuild")
    page.wait_for_selector("text=own views must be a folder, a .zip or")
    page.wait_for_selector("#rebuild:enabled")
    assert page.is_enabled("#go") and page.is_disabled("#stop")
    assert "ended early" in page.inner_text("#status")
    page.click("button[role=tab]:has-text('sentence')")
    page.locator("#examples .gallery-item button").first.click()  # which a run still in the line would forbid
    page.wait_for_selector("#status .example")


def test_a_visitor_who_waits_for_another_can_leave_the_line(page, visit):
    page.click("#settings button")
    page.fill("#steps input[type=number]", "50")  # time enough for the second to come and go
    page.press("#steps input[type=number]", "Tab")
    for visitor in (page, second := visit()):
        visitor.fill("#prompt textarea, #prompt input", "a green pine tree")
        visitor.click("#go")
        visitor.wait_for_selector("#status .denoising, #status .waiting b:has-text('1 other')")
    second.click("#stop")
    second.wait_for_selector("#status .stopped")
    second.wait_for_selector("#go:enabled")
    assert page.query_selector("#status .denoising")  # the first goes on
    page.click("#stop")
    page.wait_for_selector("#status .stopped")


def test_an_empty_prompt_is_answered_with_a_message(page):
    page.click("#go")
    page.wait_for_selector("text=Type what to make first")
    assert page.is_enabled("#go")


def picture(canvas) -> np.ndarray:
    """What the canvas shows, [H,W,3] int."""
    return np.asarray(Image.open(io.BytesIO(canvas.screenshot())).convert("RGB")).astype(int)


def drawn(page, canvas) -> np.ndarray:
    """The canvas once it shows an object, not one flat colour, and keeps still; fails when that does not happen.

    A viewer shows a new object from a distance of its own first, for as long as a slow machine takes to be told ours.
    """
    before = None
    for _ in range(60):
        shown = picture(canvas)
        if (np.abs(shown - shown[0, 0]).max(-1) > 30).mean() > 0.02 and np.array_equal(shown, before):
            return shown
        before = shown
        page.wait_for_timeout(250)
    pytest.fail("the viewer stayed blank, or never came to rest")
