"""The formats of an export: how a module is written, and how its file is run for the check."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn


class Runtime(Protocol):
    """A format of other runtimes."""

    packages: tuple[str, ...]
    suffix: str

    def write(
        self, module: nn.Module, inputs: Mapping[str, Tensor], outputs: tuple[str, ...], path: Path
    ) -> None:
        """Write a module as a file that takes any number of rows."""

    def run(self, path: Path, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """The outputs of a file, in order."""


class Onnx:
    """ONNX; the weights lie in a second file next to it. ONNX Runtime runs it for the check."""

    packages, suffix = ("onnx", "onnxscript", "onnxruntime"), ".onnx"

    def write(
        self, module: nn.Module, inputs: Mapping[str, Tensor], outputs: tuple[str, ...], path: Path
    ) -> None:
        with _quiet():
            program = torch.onnx.export(
                _program(module, inputs), dynamo=True, verbose=False, input_names=list(inputs),
                output_names=list(outputs),
            )  # fmt: skip
            program.save(path, external_data=True)

    def run(self, path: Path, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        found = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        return [torch.from_numpy(array) for array in found]


class OpenVINO:
    """OpenVINO's intermediate representation; the weights lie in a second file next to it."""

    packages, suffix = ("openvino",), ".xml"

    def write(
        self, module: nn.Module, inputs: Mapping[str, Tensor], outputs: tuple[str, ...], path: Path
    ) -> None:
        import openvino

        with _quiet():
            model = openvino.convert_model(_program(module, inputs))
        for ports, names in ((model.inputs, inputs), (model.outputs, outputs)):
            for port, name in zip(ports, names, strict=True):
                port.get_tensor().set_names({name})
        openvino.save_model(model, path, compress_to_fp16=False)

    def run(self, path: Path, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        import openvino

        model = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        found = model({name: tensor.numpy() for name, tensor in inputs.items()})
        return [torch.from_numpy(found[port]) for port in model.outputs]


RUNTIMES: dict[str, Runtime] = {"onnx": Onnx(), "openvino": OpenVINO()}


def find_runtime(name: str) -> Runtime:
    """The runtime of a format.

    Raises:
        ValueError: another format.
        ImportError: a package that it needs is not installed.
    """
    if name not in RUNTIMES:
        raise ValueError(f"format: expected {' or '.join(RUNTIMES)}, got {name!r}")
    runtime = RUNTIMES[name]
    if missing := [package for package in runtime.packages if importlib.util.find_spec(package) is None]:
        raise ImportError(f"format: {name} needs {', '.join(missing)}: pip install 'dalle2-fast[export]'")
    return runtime


def _program(module: nn.Module, inputs: Mapping[str, Tensor]) -> torch.export.ExportedProgram:
    """A module as a graph of torch's operations, for any number of rows."""
    rows = torch.export.Dim("batch", min=1)
    shapes = {name: {0: rows} for name in inputs}
    with torch.no_grad():
        return torch.export.export(module, (), dict(inputs), dynamic_shapes=shapes, strict=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch's exporters say about themselves: deprecations, and torchvision that is absent."""
    disabled = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(disabled)
