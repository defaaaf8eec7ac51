"""The predicted times of a GPU session: the committed table is what the program computes."""

from __future__ import annotations

import itertools

import pytest
import torch

from benchmarks.cases import registry
from benchmarks.jobs.session import STAGES
from benchmarks.timing.provenance import RESULTS
from dalle2_fast.ops import _dispatch

TABLES = [
    [line[2:-2].split(" | ") for line in part.splitlines() if line.startswith("| ") and "us |" not in line]
    for part in (RESULTS / "predictions.md").read_text().split("## The model")
]


@pytest.fixture
def predict(kernel_device):
    if kernel_device == "cuda":
        pytest.skip("launches are recorded in Triton's interpreter")
    from benchmarks.timing import predict

    registry.load(predict.MODULES)
    _dispatch.load_kernels(torch.device("cpu"))
    return predict


def test_the_predictions_are_what_the_program_computes(predict):
    """Catches a table that is older than the shapes of its rows, and a column that belongs to other rows.

    The lower bounds do not depend on the kernels; of the jobs the first rows are computed again.
    """
    lines = [*itertools.islice(predict.of_jobs(), 5),
             *predict.of_ops("ops", lambda _: ""), *predict.of_ops("losses", lambda _: "")]  # fmt: skip
    known = {row[0]: row for row in TABLES[0]}
    for line in lines:
        least, expected = (float(known[line.row][column]) for column in (5, 6))
        assert float(known[line.row][3]) == pytest.approx(line.flops / 1e9, rel=0.01, abs=0.5)
        assert least == pytest.approx(line.least, rel=0.05), line.row
        assert least <= 1.01 * expected


def test_every_row_of_the_session_is_predicted():
    """Catches a row that is measured without a prediction to compare it with."""
    found = {row[0].rpartition(" / ")[0] for row in TABLES[0]}
    assert found == {name for names in STAGES.values() for name in names}


def test_the_model_is_held_against_what_was_measured(predict):
    """Catches constants that no longer give the committed errors, and a model without any truth in it."""
    rows = [line for line in predict.calibration() if line.startswith("| ") and "us |" not in line]
    assert [row[2:-2].split(" | ") for row in rows] == TABLES[1]
    errors = [abs(float(row[7].rstrip("%"))) for row in TABLES[1]]
    assert len(errors) == 16 and sorted(errors)[len(errors) // 2] < 15
