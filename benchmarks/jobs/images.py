"""What the jobs that generate images share: their options, the check of the images, the medians of stages."""

from __future__ import annotations

import argparse
import statistics

import torch

CAPTION = "a large red circle above a small blue square on a navy background"


def options(job: str, docstring: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.jobs.{job}", description=docstring.splitlines()[0]
    )
    parser.add_argument("--num-images", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3, help="timed runs, after one that warms up")
    parser.add_argument("--checkpoint", help="a folder; default: the checkpoint in the package")
    return parser


def check_images(images: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Raise RuntimeError unless the images have this shape and lie in [0, 1]: no time is reported then."""
    if tuple(images.shape) != shape:
        raise RuntimeError(f"images: expected {shape}, got {tuple(images.shape)}")
    if not (torch.isfinite(images).all() and images.min() >= 0 and images.max() <= 1):
        raise RuntimeError(f"images: expected values in [0, 1], got {images.min():.3g} .. {images.max():.3g}")


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    """{stage: median seconds} of runs that have the same stages."""
    return {stage: round(statistics.median(run[stage] for run in runs), 3) for stage in runs[0]}
