"""Progress bars and the seconds of the stages."""

from __future__ import annotations

import pytest

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
