"""The CPU's part of the native module under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Not optimised: the code is as right or as wrong, and the compiler takes half the time.
FLAGS = ["-std=c++17", "-O0", "-w", "-Icsrc", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def test_no_access_outside_and_no_undefined_behaviour(tmp_path):
    """Catches: a vector that reads or writes past the end of a row, an overflow that C++ leaves open."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        pytest.skip("needs a C++ compiler")

    def run(*command):
        done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
        if "cannot find" in done.stderr and "san" in done.stderr:
            pytest.skip("the compiler has no sanitizers")
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    def compile_one(source: Path) -> str:
        output = str(tmp_path / f"{source.stem}.o")
        run(*compiler, *FLAGS, "-c", str(source), "-o", output)
        return output

    sources = [*sorted((ROOT / "csrc" / "cpu").glob("*.cpp")), ROOT / "tests/csrc/sanitized/driver.cpp"]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    program = str(tmp_path / "driver")
    run(*compiler, *FLAGS, *objects, "-o", program, "-ldl", "-lpthread")
    assert "instruction set 0" in run(program)
