"""What every benchmark here shares: the check before a time counts, and results that say their origin."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def check_images(images: torch.Tensor, shape: tuple[int, ...]) -> None:
    """No time is reported for a job that did not do its work."""
    if tuple(images.shape) != shape:
        raise RuntimeError(f"images: expected {shape}, got {tuple(images.shape)}")
    if not (torch.isfinite(images).all() and images.min() >= 0 and images.max() <= 1):
        raise RuntimeError(f"images: expected values in [0, 1], got {images.min():.3g} .. {images.max():.3g}")


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {stage: round(statistics.median(run[stage] for run in runs), 3) for stage in runs[0]}


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def nearest(build: Callable[..., torch.nn.Module], sizes: Iterable, target: int) -> torch.nn.Module:
    """The module whose size comes nearest to `target` parameters; the others are never allocated."""

    def distance(size) -> float:
        with torch.device("meta"):
            return abs(math.log(parameters(build(size)) / target))

    return build(min(sizes, key=distance))


def machine() -> dict:
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),  # far from 0: something else was running
    }


def versions(*packages: str) -> dict:
    found = {"python": platform.python_version()}
    for package in ("torch", *packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def commit() -> str:
    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    sources = ("dalle2_fast", "kernels", "benchmarks/*.py")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", *sources)
    return git("rev-parse", "--short", "HEAD") + (" with local changes" if changed else "")


def save(name: str, result: dict) -> Path:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    whole = {"date": time.strftime("%Y-%m-%d"), "commit": commit(), **result}
    write(path, json.dumps(whole, indent=2) + "\n")
    return path


def write(path: Path, text: str) -> None:
    """Beside, then renamed: whoever reads it finds the old file or the new one."""
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(text)
    beside.replace(path)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), platform.machine())
