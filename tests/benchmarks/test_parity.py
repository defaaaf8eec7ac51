"""The parity report: the committed differences are within their bounds, and a larger one is never written."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from benchmarks.parity import report as parity
from benchmarks.parity.rows import Row
from benchmarks.timing.provenance import RESULTS


def row(network: str, difference: float, needs: tuple[str, ...] = ("torch",), bound: float = 1e-5):
    def measure():
        theirs = torch.linspace(-1, 1, 5)
        yield theirs * (1 + difference / 2), theirs
        yield theirs * (1 + difference), theirs

    return Row(network, "a source", needs, 1234, measure, bound)


@pytest.fixture
def report(monkeypatch, tmp_path):
    """main() with other rows, which writes to an empty folder."""
    monkeypatch.setattr(parity, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["parity.py"])
    monkeypatch.setattr(parity, "clip_rows", lambda: [])

    def run(*rows) -> int:
        monkeypatch.setattr(parity, "karlo_rows", lambda: list(rows))
        return parity.main()

    run.folder = tmp_path
    return run


def test_the_largest_difference_counts(report):
    assert report(row("net", 4e-6)) == 0
    (made,) = json.loads((report.folder / "parity.json").read_text())["rows"]
    assert made["relative_difference"] == pytest.approx(4e-6, rel=0.1)
    assert made["parameters"] == 1234 and torch.__version__.startswith(made["versions"]["torch"])
    text = (report.folder / "parity.md").read_text()
    assert f"| net | a source | 1,234 | {made['relative_difference']:.1e} |" in text


def test_a_difference_beyond_its_bound_is_not_written(report):
    assert report(row("good", 0.0), row("bad", 2e-5)) == 1
    assert not list(report.folder.iterdir())


NAN, INF, ONE = (torch.full((3,), value) for value in (float("nan"), float("inf"), 1.0))


@pytest.mark.parametrize(("ours", "theirs"), [(NAN, ONE), (ONE, NAN), (INF, ONE), (ONE, INF), (ONE, 0 * ONE)])
def test_outputs_that_say_nothing_are_not_written(report, ours, theirs):
    """Catches an infinite output, whose relative difference is NaN, and max(0, NaN), which is 0."""
    with pytest.raises(RuntimeError, match="bad"):
        report(Row("bad", "a source", ("torch",), 1, lambda: iter([(ours, theirs)])))
    assert not list(report.folder.iterdir())


def test_rows_of_an_absent_source_stay(report, capsys):
    report(row("one", 1e-6), row("two", 1e-6))
    assert report(row("one", 3e-6), row("two", 3e-6, needs=("no_such_package",))) == 0
    one, two = json.loads((report.folder / "parity.json").read_text())["rows"]
    assert (one["relative_difference"], two["relative_difference"]) == (
        pytest.approx(3e-6, rel=0.1), pytest.approx(1e-6, rel=0.1))  # fmt: skip
    assert "two, a source: no_such_package not installed, kept from" in capsys.readouterr().out


def test_what_is_committed():
    rows = json.loads((RESULTS / "parity.json").read_text())["rows"]
    assert all(row["relative_difference"] <= row["bound"] for row in rows)
    assert parity.table(rows) == (RESULTS / "parity.md").read_text()
    counts = {row["network"]: row["parameters"] for row in rows}
    published = {
        "Karlo prior": 1_022_030_080, "Karlo decoder": 885_439_686, "Karlo text_proj": 7_878_400,
        "Karlo upsampler, first steps": 691_579_523, "Karlo upsampler, last step": 691_579_523,
        "CLIP ViT-L-14": 427_616_513,
    }  # fmt: skip
    assert {name: counts[name] for name in published} == published
