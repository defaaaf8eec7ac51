"""examples/tour.ipynb: its cells run from top to bottom, and what they say about their results is true.

The cells are plain Python, so that they run here without Jupyter: no magics, no shell commands.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).resolve().parents[2] / "examples" / "tour.ipynb"
if not PATH.exists():
    pytest.skip("the examples are in a checkout only", allow_module_level=True)
NOTEBOOK = json.loads(PATH.read_text())


def cells(kind: str) -> list[str]:
    return ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == kind]


def run(code: str, names: dict) -> object:
    """Execute a cell and return the value of its last line, which Jupyter would show."""
    tree = ast.parse(code)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, PATH.name, "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), PATH.name, "eval"), names)


def test_the_tour_runs():
    """Catches: a call that the library no longer has, an empty picture, a loss that does not fall."""
    names: dict = {"__name__": "tour"}
    with torch.random.fork_rng(devices=[]):
        results = [run(code, names) for code in cells("code")]
    pictures = [result for result in results if hasattr(result, "getcolors")]
    assert len(pictures) == 3 and all(picture.width == 2 * picture.height for picture in pictures)
    assert all(len(picture.getcolors(2**16)) > 100 for picture in pictures)
    source, repainted = names["source"], names["repainted"][0]
    kept = (0, 36, 64, 64)
    assert source.crop(kept).tobytes() == repainted.crop(kept).tobytes()
    assert source.tobytes() != repainted.tobytes()
    assert max(names["errors"].values()) < 1e-5
    assert names["losses"][-1] < 0.7 * names["losses"][0]


def test_the_file_is_a_small_notebook_without_outputs():
    """Catches: a notebook that was saved after a run, with pictures, counters and paths of a machine."""
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5) and PATH.stat().st_size < 20_000
    assert len({cell["id"] for cell in NOTEBOOK["cells"]}) == len(NOTEBOOK["cells"])
    for cell in NOTEBOOK["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None


def test_its_links_lead_to_files():
    """Catches: a guide that was moved."""
    links = re.findall(r"\]\(([^)#\s]+)\)", "\n".join(cells("markdown")))
    assert links and all((PATH.parent / link).exists() for link in links)
