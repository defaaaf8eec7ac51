"""A copy of the checkout, its wheel or sdist, and environments to install them in.

Nothing uses the network, and the native module is built only if DALLE2_FAST_NATIVE asks for it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DATA = "dalle2_fast/pretrained/scenes/config.json"
UNWANTED = ("PYTHONPATH", "PYTHONHOME", "CUDA_HOME", "CUDA_PATH")


def run(command, cwd: Path, **environment: str) -> str:
    """Run a command, show its output if it fails, and return what it printed."""
    done = attempt(command, cwd, **environment)
    assert done.returncode == 0, f"{command} in {cwd}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def attempt(command, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    clean = {key: value for key, value in os.environ.items()
             if key not in UNWANTED and not key.startswith("DALLE2_FAST_")}
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # ninja
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, text=True, capture_output=True,
        env=clean | {"DALLE2_FAST_NATIVE": "none", "PATH": tools} | environment,
    )  # fmt: skip


def build(kind: str, tree: Path, into: Path, **environment: str) -> Path:
    """Build a wheel or sdist of `tree` with the installed setuptools (no build isolation, so no network)."""
    into.mkdir(exist_ok=True)
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(into)!r})"
    run([sys.executable, "-c", code], cwd=tree, **environment)
    (built,) = into.iterdir()
    return built


def make_environment(folder: Path) -> Path:
    """A virtual environment that sees torch and setuptools of this one, but not its dalle2_fast.

    A folder that a .pth file names is added to the path, but the .pth files in it are not read, and an
    editable install consists of such files.
    """
    venv.create(folder, with_pip=False)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "python"


def pip_install(python: Path, *what: str | Path, **environment: str) -> None:
    command = [sys.executable, "-m", "pip", "--python", python, "install"]
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    run([*command, *options, *what], cwd=python.parent, PIP_DISABLE_PIP_VERSION_CHECK="1", **environment)


def copy_checkout(tree: Path) -> Path:
    """The sources, including the symlink, with a stand-in for the (large) checkpoint."""
    tree.mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    unwanted = shutil.ignore_patterns("__pycache__", "pretrained", "*.so")
    for name in ("dalle2_fast", "kernels", "csrc"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=unwanted)
    (tree / DATA).parent.mkdir(parents=True)
    (tree / DATA).write_text("{}")
    return tree


def contents(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
