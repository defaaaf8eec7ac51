"""The machine code of a .cu file in csrc/, and the tools that compile and read it. Needs no GPU."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def find_cuobjdump() -> str | None:
    """On PATH, in the usual folder of the CUDA toolkit, or in Triton's package, which ships it."""
    folders = [None, "/usr/local/cuda/bin"]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin:
        folders.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    return next(filter(None, (shutil.which("cuobjdump", path=folder) for folder in folders)), None)


def dump(machine_code: Path, *options: str) -> str:
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        pytest.skip("needs cuobjdump: of the CUDA toolkit, or of Triton")
    command = [cuobjdump, *options, str(machine_code)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def find_built_object(source: str) -> Path | None:
    """The object that the last build made of csrc/`source`, if nothing that it includes has changed since."""
    inputs = [*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc" / source).parent.iterdir()]
    changed = max(path.stat().st_mtime for path in inputs)
    built = ROOT.glob(f"build/native-*/{source}.o")
    return next((path for path in built if path.stat().st_mtime > changed), None)


def compile_cubin(source: str, target: str, folder: Path) -> Path:
    if NVCC is None:
        pytest.skip("needs nvcc")
    cubin = folder / f"sm_{target}.cubin"
    flags = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", f"-arch=sm_{target}", "-cubin"]
    command = [NVCC, *flags, f"-I{ROOT / 'csrc'}", ROOT / "csrc" / source, "-o", cubin]
    subprocess.run(command, check=True)
    return cubin
