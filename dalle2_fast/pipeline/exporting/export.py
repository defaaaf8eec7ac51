"""A pipeline as a folder of files for another runtime, each compared with the network that it came from."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dalle2_fast.diffusion.preconditioning import for_steps
from dalle2_fast.diffusion.sampler_tables import sampler_table, spacing_of
from dalle2_fast.models.implementation import implementation
from dalle2_fast.pipeline.exporting.networks import ExportedNetwork, networks_of
from dalle2_fast.pipeline.exporting.runtimes import Runtime, find_runtime
from dalle2_fast.pipeline.settings import SamplingSettings

if TYPE_CHECKING:
    from dalle2_fast.pipeline.dalle2 import DALLE2

INDEX = "export.json"
LARGEST_ERROR = 1e-3  # of a file, relative to the largest output: float32 stays far below it
COLUMNS = ("alpha", "sigma", "a", "b", "c", "std", "log_var_min", "log_var_max")


def check_folder(path: str | os.PathLike) -> Path:
    """The folder to write; ValueError unless it is new or empty."""
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: expected a new or an empty folder")
    return folder


def export_networks(
    pipe: DALLE2, path: str | os.PathLike, format: str
) -> Iterator[tuple[str, float]]:
    """Write a pipeline's networks and export.json into a folder, which appears when it is complete.

    export.json names the files, their inputs and outputs with shapes, and for each diffusion the times and
    the coefficients of its steps.

    Args:
        pipe: a pipeline in float32 on the CPU.
        path: a folder that does not exist or is empty.
        format: "onnx" or "openvino".

    Returns:
        An iterator that exports one network per step: its name, and the largest difference between its file
        and the network on random inputs.

    Raises:
        ValueError: another format, a folder that is not empty, or weights of another device or dtype.
        ImportError: a package of the format is not installed.
        RuntimeError: a file computes something else than its network.
        OSError: the folder cannot be written.
    """
    runtime, folder = find_runtime(format), check_folder(path)
    if pipe.device.type != "cpu" or pipe.dtype != torch.float32:
        raise ValueError(f"pipe: expected float32 on the CPU, got {pipe.dtype} on {pipe.device}")
    return _export(pipe, folder, format, runtime)


def _export(pipe: DALLE2, folder: Path, format: str, runtime: Runtime) -> Iterator[tuple[str, float]]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    partial.mkdir()
    training = pipe.training
    try:
        pipe.eval()
        described = {}
        for network in networks_of(pipe):
            path = partial / f"{network.name}{runtime.suffix}"
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                example, rows = network.inputs(2), network.inputs(3)
            with implementation(network.module, "reference"):
                runtime.write(network.module, example, network.outputs, path)
                with torch.no_grad():
                    expected = network.module(**rows)
            expected = (expected,) if isinstance(expected, Tensor) else expected
            difference = _compare(network, runtime.run(path, rows), expected)
            described[network.name] = {
                "file": path.name,
                "inputs": {name: _described(tensor) for name, tensor in example.items()},
                "outputs": {
                    name: _described(tensor) for name, tensor in zip(network.outputs, expected, strict=True)
                },
                "largest_difference": difference,
            }
            yield network.name, difference
        index = {"format": format, "networks": described, **_about(pipe)}
        (partial / INDEX).write_text(json.dumps(index, indent=1) + "\n")
        os.replace(partial, folder)
    finally:
        pipe.train(training)
        shutil.rmtree(partial, ignore_errors=True)


def _compare(network: ExportedNetwork, found: list[Tensor], expected: tuple[Tensor, ...]) -> float:
    """The largest difference. RuntimeError if it is more than rounding."""
    largest = 0.0
    for name, theirs, ours in zip(network.outputs, found, expected, strict=True):
        ours, theirs = ours.double(), theirs.double()
        difference = (ours - theirs).abs().max().item() if ours.shape == theirs.shape else float("inf")
        if not difference <= LARGEST_ERROR * max(1.0, ours.abs().max().item()):
            raise RuntimeError(f"{network.name}: {name} differs by {difference:.3g} from the network's")
        largest = max(largest, difference)
    return largest


def _described(tensor: Tensor) -> dict[str, Any]:
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": ["batch", *tensor.shape[1:]]}


def _about(pipe: DALLE2) -> dict[str, Any]:
    """The tokenizer, the settings, and the steps of each diffusion."""
    settings, chosen = pipe.sampling, SamplingSettings.from_dict(pipe.sampling)
    diffusions = {"decoder": (pipe.decoder, settings["steps"])}
    if pipe.prior is not None and pipe.prior.diffuses:
        diffusions["prior"] = (pipe.prior, settings["prior_steps"])
    for name in ("upsampler", "upsampler2"):
        if (part := getattr(pipe, name)) is not None:
            diffusions[name] = (part, settings[f"{name}_steps"])
    return {
        "sampling": settings,
        "tokenizer": pipe.tokenizer.to_config(),
        "unit_norm": pipe.decoder.unit_norm,
        "diffusions": {
            name: _steps(part, steps, chosen.sampler_of(name)) for name, (part, steps) in diffusions.items()
        },
    }


def _steps(part: Any, steps: int, sampler: str) -> dict[str, Any]:
    """One row of coefficients per step, see `sampler_table`, and the time that the network is given."""
    diffusion = part.diffusion
    times = diffusion.times(steps, spacing_of(sampler))
    error = {}
    if sampler == "ddpm" and getattr(part, "analytic_variance", False):
        error["x0_error"] = part.x0_error.cpu()[times]
    table = sampler_table(diffusion.schedule, times, sampler, variance=diffusion.variance, **error)
    changed, _, scales = for_steps(diffusion, table, times)
    preconditioned = {}
    if scales is not None:
        preconditioned = {
            "x0": "x0 = skip x + gain network(scale x)",
            "scale": scales.tolist(), "skip": changed[:, 0].tolist(), "gain": (-changed[:, 1]).tolist(),
        }  # fmt: skip
    return {
        "schedule": part.config["schedule"],
        "prediction": diffusion.prediction,
        **preconditioned,
        "variance": diffusion.variance,
        "sampler": sampler,
        "step": "x = a x + b x0 + c previous_x0 + std noise; x_t = alpha x0 + sigma epsilon",
        "times": diffusion.schedule.net_time(times).tolist(),
        "columns": COLUMNS,
        "table": table.tolist(),
    }
