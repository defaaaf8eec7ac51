"""Progress bars and the seconds of the stages."""

from __future__ import annotations

import pytest
import torch

from tests.support.tiny_pipeline import tiny_pipeline


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def test_progress_one_bar_a_stage(pipe, capsys):
    pipe("a ring", 3, seed=0, batch_size=2, progress=True)
    bars = capsys.readouterr().err.strip().split("\n")  # one line a bar, redrawn behind "\r"
    ends = [bar.split("\r")[-1] for bar in bars]
    assert [end.split()[0] for end in ends] == ["text:", "prior:", "decoder:", "upsampler:"]
    assert "1/1" in ends[0] and all("4/4" in end for end in ends[1:])  # two batches of two steps
    pipe("a ring", 1, seed=0)
    assert capsys.readouterr() == ("", "")


def test_progress_callable(pipe):
    seen = []

    def follow(stage, iterable, total):
        for item in iterable:
            seen.append((stage, total))
            yield item

    pipe("a ring", 1, seed=0, progress=follow)
    assert seen == [("text", 1)] + [
        (stage, 2) for stage in ("prior", "decoder", "upsampler") for _ in range(2)
    ]


def test_seconds_of_every_stage(pipe):
    assert list(pipe.generate("a ring", 1, seed=0).seconds) == ["text", "prior", "decoder", "upsampler"]


def test_callback_sees_x0_of_every_step(pipe):
    """Catches: a stage without its callback, x0 in [-1, 1], and results that it changes."""
    seen = []
    options = dict(seed=0, candidates=2)
    made = pipe.generate("a ring", 1, callback=lambda *step: seen.append(step), **options)
    assert [(stage, step) for stage, step, _ in seen] == [
        (stage, step) for stage in ("decoder", "upsampler") for step in range(2)
    ]
    assert [tuple(x0.shape) for _, _, x0 in seen] == [(2, 3, 16, 16)] * 2 + [(1, 3, 32, 32)] * 2
    torch.testing.assert_close(seen[-1][2], made.images)  # the last step of DPM-Solver++ returns its x0
    assert torch.equal(made.images, pipe.generate("a ring", 1, **options).images)


def test_callback_of_what_begins_with_an_image(pipe):
    """Catches: a method that takes the callback and does not pass it on."""
    image, mask = torch.rand(3, 16, 16), torch.ones(16, 16)
    for edit in (
        lambda **options: pipe.variations(image, 1, **options),
        lambda **options: pipe.interpolate(image, image.flip(1), 2, **options),
        lambda **options: pipe.text_diff(image, "a red ring", "a blue ring", 2, inversion_steps=2, **options),
        lambda **options: pipe.inpaint(image, mask, "a ring", 1, **options),
    ):
        stages = []
        edit(seed=0, callback=lambda stage, step, x0, stages=stages: stages.append(stage))
        assert stages == ["decoder"] * 2 + ["upsampler"] * 2


def test_callback_must_be_callable(pipe):
    with pytest.raises(TypeError, match="callback: expected a callable, got bool"):
        pipe("a ring", 1, seed=0, callback=True)
