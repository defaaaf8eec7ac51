"""The page as Gradio builds it, without a browser."""

from __future__ import annotations

import re

import pytest

gr = pytest.importorskip("gradio", reason="the extra demo is not installed")

from starlette.testclient import TestClient  # noqa: E402

from dalle2_fast.demo.page import make_page  # noqa: E402
from dalle2_fast.demo.panel import TARGETS, Jobs, Panel  # noqa: E402
from dalle2_fast.demo.server import create_app  # noqa: E402
from dalle2_fast.demo.tabs import NAMES  # noqa: E402
from dalle2_fast.demo.worker import Worker  # noqa: E402


@pytest.fixture
def worker():
    worker = Worker()
    yield worker
    worker.stop()


@pytest.fixture
def page(studio, worker):
    return make_page(studio, worker, ("a checkpoint",))


def test_every_field_has_a_place_for_its_error(page):
    """Catches: a field whose error appears nowhere, and a tab that is missing."""
    ids = {block.elem_id for block in page.blocks.values()}
    for name in NAMES:
        assert {f"{name}-run", f"{name}-stop", f"{name}-gallery", f"{name}-run-error"} <= ids
    for _, tab, field in TARGETS:
        assert f"{tab}-{field}-error" in ids
    assert {"draw-caption-error", "draw-seed-error", "diff-target-error", "reconstruct-dims-error"} <= ids


def test_no_event_is_offered_to_programs(page):
    """Catches: a second, undocumented server beside `dalle2-fast serve`."""
    assert page.get_api_info()["named_endpoints"] == {}


def test_every_answer_forbids_other_hosts(page):
    """Catches: an answer without the policy, and fonts or scripts that other hosts would serve."""
    client = TestClient(create_app(page))
    html = client.get("/")
    assert html.status_code == 200
    assert not re.findall(r"""(?:src|href)=["']?(?:https?:)?//""", html.text)
    parts = [path for path in re.findall(r"""(?:src|href)=["'](\./[^"']+)""", html.text)] + ["theme.css"]
    for path in ("/", *parts):
        answer = client.get(path)
        assert answer.status_code == 200, path
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        assert not path.endswith(".css") or "//fonts.g" not in answer.text


def test_a_page_has_one_drawing_at_a_time(worker):
    """Catches: clicks that pile up, and a closed page that draws on."""
    jobs = Jobs(worker)
    first = jobs.start("page", lambda job: list(job.progress("decoder", iter(int, 1))))
    second = jobs.start("page", lambda job: "drawn")
    assert second.result() == "drawn"  # the first would never end
    assert first._stop.is_set()
    jobs.stop("page")
    jobs.stop("another page")


def test_errors_appear_below_their_field_and_the_button_works_again(studio, worker):
    """Catches: a traceback on the page, and a button that stays grey after an error."""
    with gr.Blocks():
        panel = Panel("draw")
        panel.add("caption", gr.Textbox())
        panel.buttons("Draw")
        panel.result()
    for error, field in (
        (studio_error(lambda: studio.draw("a star", number=1)), "caption"),
        (ValueError("caption: expected text, got none"), "caption"),
        (RuntimeError("CUDA error <b>"), "run"),
    ):
        shown = panel._failed(error)
        update = shown[panel.errors[field]]
        assert update["visible"] and "d2-error" in update["value"] and "<b>" not in update["value"]
        assert shown[panel.run]["interactive"] and not shown[panel.halt]["visible"]


def studio_error(call) -> Exception:
    try:
        call()
    except ValueError as error:
        return error
    raise AssertionError("no error")
