"""The tabs of the page: the fields of each, left, and its result, right."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import gradio as gr

from dalle2_fast.demo import rendering
from dalle2_fast.demo.panel import PRIVATE, Jobs, Panel
from dalle2_fast.demo.studio import MAX_GUIDANCE, MAX_NUMBER, MAX_STEPS

if TYPE_CHECKING:
    from dalle2_fast.demo.studio import Studio
    from dalle2_fast.demo.words import Vocabulary

# A click on a word adds it to the caption, one on an example replaces the caption, as if it had been typed.
ADD_WORD = """
element.addEventListener('click', event => {
    const chip = event.target.closest('.d2-word, .d2-example');
    const field = document.querySelector('#draw-caption textarea');
    if (!chip || !field) return;
    const before = chip.classList.contains('d2-word') ? field.value.trimEnd() + ' ' : '';
    field.value = (before + chip.textContent).trimStart();
    field.dispatchEvent(new Event('input', {bubbles: true}));
    field.focus();
});
"""
BRUSH = "#e11d8f"  # a colour that few pictures have
NAMES = {
    "draw": "Draw", "vary": "Variations", "interpolate": "Interpolation", "diff": "Text diff",
    "inpaint": "Inpainting", "invert": "Inversion", "reconstruct": "Reconstruction",
}  # fmt: skip


def draw(studio: Studio, jobs: Jobs, vocabulary: Vocabulary) -> Panel:
    """Caption -> pictures."""
    panel = Panel("draw", again=True)
    with _sides(panel):
        examples = vocabulary.examples
        panel.add("caption", gr.Textbox(
            examples[0] if examples else "", label="Caption", lines=2,
            placeholder="What to draw",
        ))  # fmt: skip
        panel.buttons("Draw")
        if examples:
            gr.HTML(rendering.examples(examples), js_on_load=ADD_WORD, elem_id="examples")
        with gr.Accordion("Known words" if vocabulary.groups else "Captions", open=False):
            gr.HTML(
                rendering.words(vocabulary.groups, vocabulary.rules), js_on_load=ADD_WORD, elem_id="words"
            )
        _settings(panel, studio, "Pictures")
    panel.connect(jobs, studio.draw)
    return panel


def vary(studio: Studio, jobs: Jobs, vocabulary: Vocabulary) -> Panel:
    """Picture -> others of the same content."""
    panel = Panel("vary", again=True)
    with _sides(
        panel, "Other pictures with the content of one: its CLIP embedding, decoded from other noise."
    ):
        _image(panel, "image", "Picture")
        panel.add("eta", gr.Slider(
            0, 1, 1, step=0.05, label="Eta", info="How random each step is", buttons=[],
        ))  # fmt: skip
        panel.buttons("Vary")
        _settings(panel, studio, "Variations")
    panel.connect(jobs, studio.variations)
    return panel


def interpolate(studio: Studio, jobs: Jobs, vocabulary: Vocabulary) -> Panel:
    """Two pictures -> those between them."""
    panel = Panel("interpolate", slider="From the first picture to the second")
    with _sides(panel, "The pictures between two: CLIP's embedding turns from the first to the second."):
        with gr.Row():
            with gr.Column(min_width=140):
                _image(panel, "first", "First picture")
            with gr.Column(min_width=140):
                _image(panel, "second", "Second picture")
        noise = panel.add("noise", gr.Radio(
            [("of the seed, the same for all", "fixed"), ("of the two pictures", "slerp")], value="fixed",
            label="Noise", info="With that of the pictures the first and the last frame are they",
        ))  # fmt: skip
        _inversion_steps(panel)
        panel.buttons("Interpolate")
        _settings(panel, studio, "Frames", low=2, value=6)
    usual = studio.pipe.sampling["guidance"]
    # The noise that an inversion finds leads back to the picture without guidance only.
    guidance = panel.fields["guidance"]
    noise.input(lambda kind: 1.0 if kind == "slerp" else usual, [noise], [guidance], **PRIVATE)
    panel.connect(jobs, studio.interpolate)
    return panel


def diff(studio: Studio, jobs: Jobs, vocabulary: Vocabulary) -> Panel:
    """Picture and two captions -> the changed picture."""
    panel = Panel("diff", slider="From the picture to the change")
    with _sides(panel, "Change a picture by the difference of two captions."):
        _image(panel, "image", "Picture")
        panel.add("source", gr.Textbox(
            label="Caption of the picture", max_lines=1, placeholder="a small red circle",
        ))  # fmt: skip
        panel.add("target", gr.Textbox(
            label="Caption of what it is to be", max_lines=1, placeholder="a large red circle",
        ))  # fmt: skip
        panel.add("theta", gr.Slider(
            0, 1, 0.35, step=0.01, label="Theta", buttons=[],
            info="How far to turn; the paper takes 0.25 to 0.5",
        ))  # fmt: skip
        _inversion_steps(panel)
        panel.buttons("Change")
        _settings(panel, studio, "Frames", low=2, value=5, guidance=1.0)
    panel.connect(jobs, studio.text_diff)
    return panel


def inpaint(studio: Studio, jobs: Jobs, vocabulary: Vocabulary) -> Panel:
    """Picture, brush and caption -> the painted part drawn anew."""
    panel = Panel("inpaint", again=True)
    width = max(4, studio.pipe.sizes[-1] // 6)  # of the brush, in pixels of the pictures that are drawn here
    with _sides(panel, "Paint over what is to be drawn anew; the rest stays as it is, to the bit."):
        panel.add("painting", gr.ImageEditor(
            type="pil", label="Picture", sources=["upload", "clipboard"], transforms=(), layers=False,
            brush=gr.Brush(default_size=width, colors=[BRUSH], default_color=BRUSH, color_mode="fixed"),
            height=420, buttons=["fullscreen"], format="png", canvas_size=(512, 512),
        ))  # fmt: skip
        panel.add("caption", gr.Textbox(
            label="Caption of the whole picture", info="Without one the rest of the picture decides",
            max_lines=1,
        ))  # fmt: skip
        panel.add("resample", gr.Slider(
            1, 10, 1, step=1, label="Passes", info="More passes leave fewer seams and take longer",
            buttons=[],
        ))  # fmt: skip
        panel.buttons("Repaint")
        _settings(panel, studio, "Pictures")
    panel.connect(jobs, studio.inpaint)
    return panel


def invert(studio: Studio, jobs: Jobs, vocabulary: Vocabulary) -> Panel:
    """Picture -> noise -> picture."""
    panel = Panel("invert")
    with _sides(panel, "The noise from which the decoder samples a picture, found by DDIM inversion."):
        _image(panel, "image", "Picture")
        panel.add("caption", gr.Textbox(
            label="Caption", info="Without one the picture's embedding alone decides", max_lines=1,
        ))  # fmt: skip
        with gr.Row():
            panel.add("steps", gr.Slider(2, MAX_STEPS, 50, step=1, label="Steps", buttons=[]))
            panel.add("guidance", gr.Slider(0, MAX_GUIDANCE, 1, step=0.1, label="Guidance", buttons=[]))
        panel.add("refine", gr.Slider(
            0, 5, 0, step=1, label="Refinements", buttons=[],
            info="Repetitions of each step, for a more exact inverse",
        ))  # fmt: skip
        panel.buttons("Invert")
    panel.connect(jobs, studio.invert)
    return panel


def reconstruct(studio: Studio, jobs: Jobs, vocabulary: Vocabulary) -> Panel:
    """Picture -> what the first components of its embedding hold."""
    panel = Panel("reconstruct")
    width = studio.pipe.clip.dim_latent
    dims = [*(4**power for power in range(8) if 4**power < width), width]
    with _sides(panel, "What the first components of a picture's CLIP embedding hold."):
        _image(panel, "image", "Picture")
        panel.add("dims", gr.Textbox(", ".join(map(str, dims)), label="Numbers of components", max_lines=1))
        panel.add("fit", gr.Number(
            512, label="Scenes", info="from which the components are found, once", buttons=[],
        ))  # fmt: skip
        panel.buttons("Reconstruct")
        _settings(panel, studio, None)
    panel.connect(jobs, studio.reconstruct)
    return panel


# --------------------------------------------------------------------------------------- what tabs share


@contextmanager
def _sides(panel: Panel, purpose: str | None = None) -> Iterator[None]:
    """`with _sides(panel):` puts what it makes to the left of the panel's result."""
    with gr.Row():
        with gr.Column(scale=5, min_width=340):
            if purpose is not None:
                gr.HTML(rendering.purpose(purpose))
            yield
        with gr.Column(scale=6, min_width=340):
            panel.result()


def _image(panel: Panel, name: str, label: str) -> None:
    panel.add(name, gr.Image(
        label=label, type="filepath", image_mode=None, sources=["upload", "clipboard"], height=240,
        buttons=[], format="png",
    ))  # fmt: skip


def _inversion_steps(panel: Panel) -> None:
    panel.add("inversion_steps", gr.Slider(
        2, MAX_STEPS, 50, step=1, label="Inversion steps", info="that find the noise of a picture",
        buttons=[],
    ))  # fmt: skip


def _settings(
    panel: Panel,
    studio: Studio,
    number: str | None,
    *,
    low: int = 1,
    value: int = 4,
    guidance: float | None = None,
) -> None:
    """Number, seed, steps, guidance and size; number is its label, None leaves it out."""
    pipe = studio.pipe
    with gr.Row():
        if number is not None:
            with gr.Column(min_width=140):
                panel.add("number", gr.Slider(low, MAX_NUMBER, value, step=1, label=number, buttons=[]))
        with gr.Column(min_width=140):
            panel.add("seed", gr.Textbox(label="Seed", placeholder="random", max_lines=1))
    with gr.Row():
        with gr.Column(min_width=140):
            panel.add("steps", gr.Slider(
                1, MAX_STEPS, pipe.sampling["steps"], step=1, label="Steps", buttons=[],
            ))  # fmt: skip
        with gr.Column(min_width=140):
            usual = pipe.sampling["guidance"] if guidance is None else guidance
            panel.add("guidance", gr.Slider(0, MAX_GUIDANCE, usual, step=0.1, label="Guidance", buttons=[]))
    if len(pipe.sizes) > 1:
        sizes = [(f"{side} x {side}", side) for side in pipe.sizes]
        panel.add("size", gr.Radio(sizes, value=pipe.sizes[-1], label="Size"))
