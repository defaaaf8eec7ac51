"""Panel: the fields of one tab, its result, and what happens from the click to the pictures."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import gradio as gr

from dalle2_fast.demo import rendering
from dalle2_fast.demo.fields import FieldError, attribute
from dalle2_fast.demo.worker import Stopped

if TYPE_CHECKING:
    from dalle2_fast.demo.studio import Drawing
    from dalle2_fast.demo.worker import Job, Worker

# Where a picture can go: (label, tab, field).
TARGETS = (
    ("Vary", "vary", "image"),
    ("Interpolate from", "interpolate", "first"),
    ("Interpolate to", "interpolate", "second"),
    ("Change by text", "diff", "image"),
    ("Repaint", "inpaint", "painting"),
    ("Invert", "invert", "image"),
    ("Reconstruct", "reconstruct", "image"),
)
# The slider moves in the browser alone: the pictures are there.
SHOW_FRAME = "(gallery, index) => [gallery[index].image, gallery[index].caption]"
PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}  # of every event


class Jobs:
    """The job that each open page draws, to stop it.

    Args:
        worker: draws them.
    """

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self._of_page: dict[str, Job] = {}

    def start(self, page: str, draw: Callable[[Job], Drawing]) -> Job:
        """Start a job of a page, and stop the one that the page has started before."""
        self.stop(page)
        self._of_page[page] = job = self.worker.start(draw)
        return job

    def stop(self, page: str) -> None:
        """Stop the job of a page, if it has one."""
        if (job := self._of_page.pop(page, None)) is not None:
            job.stop()


class Panel:
    """The fields of a tab, with a place for an error below each, and its result.

    Args:
        again: whether a picture can be drawn again with its seed.
        slider: the label of a slider from the first picture to the last; None for no slider.
    """

    def __init__(self, name: str, *, again: bool = False, slider: str | None = None) -> None:
        self.name = name
        self.fields: dict[str, gr.components.Component] = {}
        self.errors: dict[str, gr.HTML] = {}
        self.has_again, self.slider_label = again, slider

    def add(self, name: str, component: gr.components.Component) -> gr.components.Component:
        """A field, whose id on the page is that of the tab and its name; below it its errors are shown."""
        component.elem_id = f"{self.name}-{name}"
        self.fields[name] = component
        self.errors[name] = gr.HTML(visible=False, elem_id=f"{self.name}-{name}-error")
        return component

    def buttons(self, label: str) -> None:
        """The button that draws, and the one that stops."""
        with gr.Row():
            self.run = gr.Button(label, variant="primary", scale=3, elem_id=f"{self.name}-run")
            self.halt = gr.Button("Stop", visible=False, scale=1, elem_id=f"{self.name}-stop")
        self.errors["run"] = gr.HTML(visible=False, elem_id=f"{self.name}-run-error")

    def result(self) -> None:
        """Where the pictures appear."""
        self.preview = gr.HTML(rendering.NOTHING_YET, elem_id=f"{self.name}-preview")
        if self.slider_label is not None:
            self._make_viewer()
        self.gallery = gr.Gallery(
            visible=False, show_label=False, format="png", columns=2, object_fit="contain", height="auto",
            elem_id=f"{self.name}-gallery", buttons=["download", "fullscreen"], interactive=False,
        )  # fmt: skip
        if self.slider_label is not None:
            self.slider.input(
                None, [self.gallery, self.slider], [self.frame, self.frame_caption], js=SHOW_FRAME, **PRIVATE
            )
        self.seeds, self.chosen = gr.State([]), gr.State(0)
        if self.has_again:
            with gr.Column(visible=False) as self.use:
                gr.HTML(rendering.CHOOSE)
                with gr.Row(elem_classes="d2-use"):
                    self.again = gr.Button(
                        "Again with this seed", size="sm", variant="primary", elem_id=f"{self.name}-again"
                    )
                    self.targets = [
                        gr.Button(label, size="sm", elem_id=f"{self.name}-to-{tab}-{field}")
                        for label, tab, field in TARGETS
                    ]
        self.status = gr.HTML(elem_id=f"{self.name}-status")

    def _make_viewer(self) -> None:
        with gr.Column(visible=False) as self.viewer:
            self.frame = gr.Image(
                show_label=False, interactive=False, format="png", type="filepath", buttons=[], height=384,
                elem_id=f"{self.name}-frame",
            )  # fmt: skip
            self.slider = gr.Slider(
                0, 1, 0, step=1, label=self.slider_label, elem_id=f"{self.name}-slider", buttons=[]
            )
            self.frame_caption = gr.HTML(elem_classes="d2-note")

    def connect(self, jobs: Jobs, method: Callable[..., Callable[[Job], Drawing]]) -> None:
        """Let the button draw with `method` of a Studio, which gets the fields by their names."""
        names = list(self.fields)

        def draw(request: gr.Request, *values: Any) -> Iterator[dict]:
            begin = time.perf_counter()
            yield self._starting()
            try:
                given = dict(zip(names, values, strict=True))
                job = jobs.start(request.session_hash, method(**given))
                for state in job.states():
                    yield self._drawing(state, given.get("number"))
                yield self._done(job.result(), time.perf_counter() - begin)
            except Stopped:
                yield self._idle() | {self.status: "<p class='d2-note'>Stopped.</p>"}
            except Exception as error:
                yield self._failed(error)

        texts = [field for field in self.fields.values() if isinstance(field, gr.Textbox)]
        events = [self.run.click, *(text.submit for text in texts)]
        outputs = [self.run, self.halt, self.preview, self.gallery, self.status, self.seeds, self.chosen,
                   *self.errors.values()]  # fmt: skip
        outputs += [self.use, self.again] if self.has_again else []
        if self.slider_label is not None:
            outputs += [self.viewer, self.frame, self.slider, self.frame_caption]
        gr.on(events, draw, list(self.fields.values()), outputs, concurrency_limit=None, **PRIVATE)

        def stop(request: gr.Request) -> None:
            jobs.stop(request.session_hash)

        self.halt.click(stop, queue=False, **PRIVATE)
        if self.has_again:
            self._connect_again(draw, outputs)

    def _connect_again(self, draw: Callable[..., Iterator[dict]], outputs: list) -> None:
        def choose(event: gr.SelectData, seeds: list[int]) -> tuple[int, Any]:
            return event.index, gr.update(value=again_label(seeds[event.index]))

        self.gallery.select(choose, [self.seeds], [self.chosen, self.again], queue=False, **PRIVATE)

        def fill_in(seeds: list[int], chosen: int) -> tuple[int, str]:
            return 1, str(seeds[chosen])

        self.again.click(
            fill_in, [self.seeds, self.chosen], [self.fields["number"], self.fields["seed"]], queue=False,
            **PRIVATE,
        ).then(draw, list(self.fields.values()), outputs, concurrency_limit=None, **PRIVATE)  # fmt: skip

    # ------------------------------------------------------------------- what changes on the page, and when

    def _starting(self) -> dict:
        gone = {slot: gr.update(value="", visible=False) for slot in self.errors.values()}
        return gone | {self.run: gr.update(interactive=False), self.halt: gr.update(visible=True),
                       self.status: ""}  # fmt: skip

    def _drawing(self, state: Any, pictures: int | None) -> dict:
        candidates = rendering.candidates_of(state.images, pictures)
        shown: dict = {self.status: rendering.progress(state, candidates)}
        if state.images is not None:
            shown[self.preview] = gr.update(
                value=rendering.preview(state.images, candidates), visible=True
            )
            shown[self.gallery] = gr.update(visible=False)
            if self.slider_label is not None:
                shown[self.viewer] = gr.update(visible=False)
            if self.has_again:
                shown[self.use] = gr.update(visible=False)
        return shown

    def _done(self, drawing: Drawing, in_all: float) -> dict:
        pictures = list(zip(drawing.pictures, drawing.captions, strict=True))
        shown = self._idle() | {
            self.preview: gr.update(visible=False),
            self.gallery: gr.update(
                value=pictures, visible=True, columns=rendering.columns(len(pictures)), selected_index=None
            ),
            self.status: rendering.seconds(drawing.seconds, in_all, drawing.note),
            self.seeds: drawing.seeds,
            self.chosen: 0,
        }
        if self.has_again:
            shown |= {self.again: again_label(drawing.seeds[0]), self.use: gr.update(visible=True)}
        if self.slider_label is not None:
            shown |= {
                self.viewer: gr.update(visible=True), self.frame: drawing.pictures[0],
                self.slider: gr.update(value=0, maximum=len(pictures) - 1),
                self.frame_caption: drawing.captions[0],
                self.gallery: gr.update(value=pictures, visible=True, columns=min(8, len(pictures))),
            }  # fmt: skip
        return shown

    def _idle(self) -> dict:
        return {self.run: gr.update(interactive=True), self.halt: gr.update(visible=False)}

    def _failed(self, error: Exception) -> dict:
        if not isinstance(error, FieldError):
            error = attribute(error, self.errors, "run")
        slot = self.errors.get(error.field, self.errors["run"])
        shown = gr.update(value=rendering.error(str(error)), visible=True)
        return self._idle() | {slot: shown, self.status: ""}


def again_label(seed: int) -> str:
    """What the button that draws a picture again says."""
    return f"Again with seed {seed}"
