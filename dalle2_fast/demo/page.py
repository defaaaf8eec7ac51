"""The page: its head, its tabs, and how a picture goes from one tab to another."""

from __future__ import annotations

from typing import TYPE_CHECKING

import gradio as gr

from dalle2_fast.demo import rendering, tabs
from dalle2_fast.demo.panel import PRIVATE, TARGETS, Jobs, Panel
from dalle2_fast.demo.studio import Studio
from dalle2_fast.demo.words import vocabulary_of

if TYPE_CHECKING:
    from dalle2_fast.demo.worker import Worker

SHOW_TAB = """
() => [...document.querySelectorAll('#tabs [role=tab]')].find(tab => tab.textContent.trim() === '%s')?.click()
"""
KEPT_SECONDS = 3600  # how long Gradio keeps the files of pictures


def make_page(studio: Studio, worker: Worker, facts: tuple[str, ...] = ()) -> gr.Blocks:
    """The page of a studio.

    Args:
        studio: draws.
        worker: the thread in which it draws.
        facts: about the pipeline, for the head of the page.

    Returns:
        Blocks that are not launched.
    """
    jobs, vocabulary = Jobs(worker), vocabulary_of(studio.pipe.tokenizer)
    with gr.Blocks(
        title="dalle2_fast", analytics_enabled=False, fill_width=True,
        delete_cache=(KEPT_SECONDS, KEPT_SECONDS),
    ) as page:  # fmt: skip
        gr.HTML(rendering.header(facts))
        panels: dict[str, Panel] = {}
        with gr.Tabs(elem_id="tabs"):
            for name, label in tabs.NAMES.items():
                with gr.Tab(label, id=name):
                    make = getattr(tabs, name)
                    panels[name] = make(studio, jobs, vocabulary)
        for panel in panels.values():
            if panel.has_again:
                _connect_targets(panel, panels)

        def leave(request: gr.Request) -> None:
            jobs.stop(request.session_hash)

        page.unload(leave)
    return page


def _connect_targets(panel: Panel, panels: dict[str, Panel]) -> None:
    for (_, tab, field), button in zip(TARGETS, panel.targets, strict=True):

        def send(gallery: list[tuple[str, str]], chosen: int) -> str:
            return gallery[chosen][0]

        # The tab first: an editor takes no image while its tab has never been shown. And by the tab's own
        # button: Gradio shows no tab whose name is the one that it was last told.
        button.click(None, js=SHOW_TAB % tabs.NAMES[tab], **PRIVATE).then(
            send, [panel.gallery, panel.chosen], panels[tab].fields[field], queue=False, **PRIVATE
        )
