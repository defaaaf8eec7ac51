"""The page in a headless Chromium: a caption, its pictures, an error, a repainted half; and no other host."""

from __future__ import annotations

import io
import os
import shutil
import threading
import urllib.request

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the extra demo is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

import uvicorn  # noqa: E402

from dalle2_fast.demo.page import make_page  # noqa: E402
from dalle2_fast.demo.server import create_app  # noqa: E402
from dalle2_fast.demo.worker import Worker  # noqa: E402
from dalle2_fast.serving.run import bind, url_of  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATIENCE = 60_000  # milliseconds; nothing waits so long on an idle machine
if CHROMIUM is None:
    pytest.skip("no Chromium is installed (Debian: apt install chromium)", allow_module_level=True)


@pytest.fixture
def url(studio, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    worker, bound = Worker(), bind("127.0.0.1", 0)
    app = create_app(make_page(studio, worker, ("tiny",)))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    yield url_of(bound)
    worker.stop()
    server.should_exit = True
    thread.join(20)
    bound.close()


@pytest.fixture
def browser_page():
    arguments = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=arguments)
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(PATIENCE)
        yield page
        browser.close()


def test_draw_again_and_repaint(url, browser_page):
    """Catches: whatever keeps a person from a picture, and a page that calls another host."""
    page, requests = browser_page, []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(url)
    caption = page.locator("#draw-caption textarea")
    caption.fill("a red rign")
    page.click("#draw-run")
    error = page.locator("#draw-caption-error .d2-error")
    error.wait_for()
    assert error.inner_text().startswith('Unknown word "rign" (nearest: ring) in the caption')

    caption.fill("a")
    page.click("button:has-text('Known words')")
    for word in ("red", "ring"):
        page.click(f".d2-word:text-is('{word}')")
    assert caption.input_value() == "a red ring"
    page.locator("#draw-seed").locator("input, textarea").fill("7")
    page.click("#draw-run")
    page.wait_for_selector("#draw-gallery img")
    assert page.locator("#draw-caption-error .d2-error").count() == 0
    seeds = page.locator("#draw-gallery .caption-label").all_inner_texts()
    assert seeds == [f"seed {seed}" for seed in range(7, 11)]
    assert "in all" in page.inner_text("#draw-status")

    source = read(page.locator("#draw-gallery img").nth(1).get_attribute("src"))
    page.locator("#draw-gallery .thumbnail-item").nth(1).click()
    page.wait_for_selector("#draw-again:has-text('seed 8')")
    page.click("#draw-to-inpaint-painting")
    page.wait_for_selector("#inpaint-painting button[aria-label='Brush Size']")  # the editor has the image
    paint_upper_half(page)
    page.click("#inpaint-run")
    page.wait_for_selector("#inpaint-gallery img, [id^=inpaint][id$=error] .d2-error")
    assert page.locator("[id^=inpaint][id$=error] .d2-error").all_inner_texts() == []
    repainted = read(page.locator("#inpaint-gallery img").first.get_attribute("src"))
    kept = (repainted == source).all(axis=2)
    assert kept[-8:].all() and kept[4:14].mean() < 0.5  # of 32 rows; some pixels are the same by chance

    page.click("[role=tab]:has-text('Draw')")
    page.click("#draw-again")
    page.wait_for_function("() => document.querySelectorAll('#draw-gallery .caption-label').length === 1")
    assert page.locator("#draw-gallery .caption-label").inner_text() == "seed 8"
    others = [each for each in requests if not each.startswith((url, "data:", "blob:"))]
    assert others == [] and len(requests) > 20


def paint_upper_half(page) -> None:
    """Strokes from left to right over the upper half of the editor's picture."""
    page.wait_for_timeout(1000)  # the editor scales its canvas to the picture
    box = page.locator("#inpaint-painting canvas").first.bounding_box()
    middle, centre = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    reach = box["height"] * 0.36  # the picture is a little higher and wider than twice this
    for part in range(12):
        y = centre - reach * part / 11
        page.mouse.move(middle - reach, y)
        page.mouse.down()
        page.mouse.move(middle + reach, y, steps=5)
        page.mouse.up()
    page.wait_for_timeout(500)


def read(address: str) -> np.ndarray:
    with urllib.request.urlopen(address, timeout=20) as answer:
        return np.array(Image.open(io.BytesIO(answer.read())).convert("RGB"))


def test_a_slider_from_one_picture_to_another(url, browser_page, tmp_path):
    """Catches: a slider that moves no picture, and an upload that the page does not take."""
    page = browser_page
    page.goto(url)
    page.click("[role=tab]:has-text('Interpolation')")
    for field, color in (("first", "red"), ("second", "blue")):
        Image.new("RGB", (40, 32), color).save(tmp_path / f"{field}.png")
        page.locator(f"#interpolate-{field} input[type=file]").set_input_files(tmp_path / f"{field}.png")
        page.wait_for_selector(f"#interpolate-{field} img")
    page.click("#interpolate-run")
    page.wait_for_selector("#interpolate-gallery img")
    shown = page.locator("#interpolate-gallery .thumbnail-item img").all()
    frames = [each.get_attribute("src") for each in shown]
    assert len(frames) == 6
    page.locator("#interpolate-slider input[type=range]").fill("5")
    page.wait_for_function(
        "source => document.querySelector('#interpolate-frame img')?.src === source", arg=frames[-1]
    )
