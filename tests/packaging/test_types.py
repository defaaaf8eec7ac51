"""Type checkers see the signatures of an installed dalle2_fast: mypy on a user's program, wheel and editable.

An editable install by an import hook would be invisible to them; setup.py makes it a plain path.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support.installs import attempt, build, copy_checkout, make_environment, pip_install

pytest.importorskip("mypy", reason="mypy is not installed")

PROGRAM = """
from dalle2_fast import DALLE2, Decoder
from dalle2_fast.functional import group_norm_silu

pipe = DALLE2.from_pretrained()
reveal_type(pipe("a red circle", num_images=1))
reveal_type(pipe("a red circle", output_type="pil"))
reveal_type(pipe.generate("a red circle").images)
pipe("a red circle", num_image=1)
Decoder(image_sizes=64)
group_norm_silu("not a tensor", 4)
"""
SEEN = [
    (6, "torch._tensor.Tensor"),
    (7, "list[PIL.Image.Image]"),
    (8, "torch._tensor.Tensor"),
    (9, 'Unexpected keyword argument "num_image"'),
    (10, 'Unexpected keyword argument "image_sizes" for "Decoder"'),
    (11, 'Argument 1 to "group_norm_silu" has incompatible type "str"; expected "Tensor"'),
]


@pytest.fixture(scope="module")
def pythons(tmp_path_factory) -> dict[str, Path]:
    """The interpreters of two environments, by how the package was installed there."""
    folder = tmp_path_factory.mktemp("types")
    tree = copy_checkout(folder / "tree")
    installed = {"wheel": [build("wheel", tree, folder / "dist")], "editable": ["-e", tree]}
    made = {kind: make_environment(folder / kind) for kind in installed}
    for kind, what in installed.items():
        pip_install(made[kind], *what)
    return made


def test_mypy_sees_signatures_and_a_misspelt_argument(pythons, tmp_path):
    """Catches: a package without py.typed, lazy names of type Any, a signature that swallows any keyword."""
    (tmp_path / "program.py").write_text(PROGRAM)
    for kind, python in pythons.items():
        # What mypy found out about torch, which takes it most of the time, serves both.
        options = ["--python-executable", python, "--cache-dir", tmp_path / "cache"]
        done = attempt([sys.executable, "-m", "mypy", *options, "program.py"], cwd=tmp_path)
        lines = [line for line in done.stdout.splitlines() if line.startswith("program.py:")]
        for number, text in SEEN:
            found = [line for line in lines if line.startswith(f"program.py:{number}:") and text in line]
            assert found, f"{kind}: {done.stdout}"
        assert not [line for line in lines if int(line.split(":")[1]) < 6], f"{kind}: {done.stdout}"
