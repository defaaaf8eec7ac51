"""The parts of the page that are plain HTML. What people type is escaped."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from dalle2_fast.demo.fields import sentence

if TYPE_CHECKING:
    from torch import Tensor

    from dalle2_fast.demo.worker import State

CHOOSE = '<p class="d2-note">A click on a picture chooses it for what follows.</p>'
NOTHING_YET = '<div class="d2-empty">Pictures appear here.</div>'


def error(message: str) -> str:
    """An error as a sentence below its field.

    Example:
        >>> error("expected <words>")
        '<p class="d2-error" role="alert">Expected &lt;words&gt;.</p>'
    """
    return f'<p class="d2-error" role="alert">{escape(sentence(message))}</p>'


def progress(state: State, candidates: int = 1) -> str:
    """How far a drawing is: a line and a bar.

    Args:
        state: of the job.
        candidates: pictures that are drawn for each one that is kept.

    Example:
        >>> from dalle2_fast.demo.worker import State
        >>> "decoder, step 3 of 12" in progress(State(stage="decoder", step=3, steps=12))
        True
    """
    if state.stage is None:
        others = f"{state.waiting} drawing{'s' if state.waiting > 1 else ''} of others"
        line, part = (f"Waiting for {others}" if state.waiting else "Starting"), 0.0
    elif state.steps > 1:
        line, part = f"{state.stage}, step {state.step} of {state.steps}", state.step / state.steps
    else:
        line, part = state.stage, 1.0
    bar = f'<div class="d2-bar"><i style="width:{part:.0%}"></i></div>'
    note = ""
    if candidates > 1 and state.stage == "decoder":
        note = f'<p class="d2-note">{candidates} candidates for each picture; CLIP keeps the nearest.</p>'
    return f'<div class="d2-progress"><span>{escape(line)}</span>{bar}</div>{note}'


def seconds(stages: Mapping[str, float], in_all: float, note: str = "") -> str:
    """The seconds of each stage, as a bar and as numbers.

    Example:
        >>> print(seconds({"prior": 1.0, "decoder": 3.0}, 4.5).count("<i "))
        3
    """
    named = dict(stages) | {"rest": max(0.0, in_all - sum(stages.values()))}
    whole = sum(named.values()) or 1.0
    colours = [f"d2-stage{index}" for index in range(len(stages))] + ["d2-rest"]
    bar, legend = "", f"<li><span>{_seconds(in_all)}</span> in all</li>"
    for colour, (name, spent) in zip(colours, named.items(), strict=True):
        bar += f'<i class="{colour}" style="width:{spent / whole:.2%}"></i>'
        legend += f'<li><b class="{colour}"></b>{escape(name)} <span>{_seconds(spent)}</span></li>'
    note = f'<p class="d2-note">{escape(note)}</p>' if note else ""
    return f'<div class="d2-seconds"><div class="d2-stack">{bar}</div><ul>{legend}</ul>{note}</div>'


def candidates_of(images: Tensor | None, pictures: int | None) -> int:
    """The candidates of each picture among the rows of a preview.

    Args:
        images: [B, 3, S, S], of which the upsamplers have one row for each picture, the chosen one.
        pictures: how many are drawn; None if every row is one.

    Example:
        >>> import torch
        >>> candidates_of(torch.rand(6, 3, 8, 8), 3)
        2
    """
    if images is None or not pictures or len(images) % pictures:
        return 1
    return len(images) // int(pictures)


def preview(images: Tensor, candidates: int) -> str:
    """What the pictures would be if the step were the last; candidates of one picture share its place.

    Args:
        images: float32 [B, 3, S, S] in [0, 1].
        candidates: rows of each picture, see `candidates_of`.
    """
    from dalle2_fast.data.images import to_pil

    files = [_data_url(image) for image in to_pil(images)]
    cells = [files[start : start + candidates] for start in range(0, len(files), candidates)]
    inner = math.ceil(math.sqrt(candidates))
    html = "".join(
        f'<div style="grid-template-columns:repeat({inner},1fr)">'
        + "".join(f'<img alt="preview" src="{file}">' for file in cell) + "</div>"
        for cell in cells
    )
    style = f"grid-template-columns:repeat({columns(len(cells))},1fr)"
    return f'<div class="d2-preview" style="{style}">{html}</div>'


def columns(count: int) -> int:
    """The columns in which so many pictures are shown.

    Example:
        >>> [columns(count) for count in (1, 2, 4, 6, 16)]
        [1, 2, 2, 3, 4]
    """
    return min(4, math.ceil(math.sqrt(count)))


def examples(captions: Sequence[str]) -> str:
    """Captions to begin with, each a button that writes it into the field."""
    chips = "".join(f'<button type="button" class="d2-example">{escape(text)}</button>' for text in captions)
    return f'<div class="d2-examples"><span>Examples</span>{chips}</div>'


def words(groups: Mapping[str, Sequence[str]], rules: Sequence[str]) -> str:
    """Known words by group, each a button that the page adds to the caption, and the rules of captions.

    Example:
        >>> print(words({"sizes": ["small"]}, ["A rule."]).count("<button"))
        1
    """
    rows = ""
    for name, group in groups.items():
        chips = "".join(f'<button type="button" class="d2-word">{escape(word)}</button>' for word in group)
        rows += f"<dt>{escape(name)}</dt><dd>{chips}</dd>"
    listed = "".join(f"<li>{escape(rule)}</li>" for rule in rules)
    return f'<dl class="d2-words">{rows}</dl><ul class="d2-rules">{listed}</ul>'


def purpose(text: str) -> str:
    """What a tab does."""
    return f'<p class="d2-purpose">{escape(text)}</p>'


def header(facts: Sequence[str]) -> str:
    """The head of the page."""
    listed = "".join(f"<li>{escape(fact)}</li>" for fact in facts)
    return f'<header class="d2-header"><h1>dalle2_fast</h1><ul>{listed}</ul></header>'


def _data_url(image) -> str:
    file = io.BytesIO()
    image.save(file, "WEBP", lossless=False, quality=90, method=0)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value < 10 else f"{value:.1f} s"
