"""Every program in examples/ runs as its user starts it, in a process of its own, at a small size.

Catches: an example that fails, that does not train, or whose own comparison with the other package is off.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CASES = {
    "plain_loop": (["--out", "tuned"], ()),
    "lightning_decoder": (["--out", "runs"], ("lightning",)),
    "accelerate_decoder": (["--state", "state"], ("accelerate",)),
    "diffusers_unet": (["--sampling-steps", "2", "--out", "pipe"], ("diffusers",)),
    "diffusers_karlo": (["a red fox", "--steps", "2"], ("diffusers", "transformers")),
    "dalle2_pytorch_trainer": (["--theirs"], ("dalle2_pytorch",)),
    "open_clip_training": (["--batch-size", "8"], ("open_clip",)),
}


def run(name: str, *arguments: str, folder: Path, needs: tuple[str, ...]) -> str:
    for package in needs:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)  # an example runs as for a user, not in the tests' interpreter
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def differences(printed: str) -> list[float]:
    return [float(number) for number in re.findall(r"(?:differs .* by|at most) (\S+)", printed)]


@pytest.mark.parametrize("name", sorted(set(CASES) - {"diffusers_karlo"}))
def test_example(name, tmp_path):
    arguments, needs = CASES[name]
    printed = run(name, "--steps", "2", *arguments, folder=tmp_path, needs=needs)
    assert "step " in printed and all(float(loss) < 100 for loss in re.findall(r"loss (\S+)", printed))
    assert re.findall(r"loss (\S+)", printed)
    assert all(difference < 1e-4 for difference in differences(printed))
    assert bool(differences(printed)) == (name in ("diffusers_unet", "open_clip_training"))
    for written in arguments[1::2] if "--out" in arguments or "--state" in arguments else ():
        assert not written.isalpha() or any((tmp_path / written).rglob("*"))


def test_karlo(karlo_folder, tmp_path):
    arguments, needs = CASES["diffusers_karlo"]
    printed = run("diffusers_karlo", *arguments, "--model", str(karlo_folder), folder=tmp_path, needs=needs)
    assert "swapped" in printed and re.search(r"drew 1 images of \(\d+, \d+\)", printed)


def test_every_example_is_run():
    """Catches: a new example that nobody runs."""
    assert sorted(path.stem for path in (ROOT / "examples").glob("*.py")) == sorted(CASES)
