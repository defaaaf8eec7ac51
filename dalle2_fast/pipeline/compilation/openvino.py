"""Programs of OpenVINO, for CPUs: the network as its intermediate representation, compiled for each shape."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dalle2_fast.pipeline.compilation.inductor import exported
from dalle2_fast.pipeline.compilation.network import FlatCall, Program

FILE = "network.xml"
PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16"}


class OpenVINO:
    """OpenVINO as a Backend. Programs contain the weights.

    Raises:
        ImportError: the package openvino is not installed.
    """

    name, has_weights = "openvino", True

    def __init__(self) -> None:
        if importlib.util.find_spec("openvino") is None:
            raise ImportError("backend: openvino needs the package openvino: pip install openvino")

    def check(self, network: nn.Module) -> None:
        weight = next(network.parameters())
        if weight.device.type != "cpu":
            raise ValueError(f"backend: openvino runs on a CPU, got weights on {weight.device}")
        if weight.dtype not in PRECISIONS:
            raise ValueError(f"backend: openvino takes float32 and bfloat16, got weights of {weight.dtype}")

    def facts(self) -> dict[str, Any]:
        import openvino

        return {"openvino": openvino.__version__, "torch": torch.__version__}

    def build(
        self, call: FlatCall, tensors: list[Tensor], varying: list[dict[int, str]], folder: Path
    ) -> None:
        import openvino

        if call.weight_dtype != torch.float32:  # the plugin itself rounds to the precision it runs in
            call = copy.deepcopy(call).float()
        program = exported(call, [_readable(tensor) for tensor in tensors], varying)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = openvino.convert_model(program)
        openvino.save_model(model, folder / FILE, compress_to_fp16=False)

    def load(self, call: FlatCall, folder: Path) -> Program:
        return _Program(folder / FILE, call)


class _Program:
    """A network of OpenVINO, compiled for each set of shapes: for fixed shapes it is faster."""

    def __init__(self, path: Path, call: FlatCall):
        import openvino

        self.core, self.call = openvino.Core(), call
        self.model = self.core.read_model(path)
        self.requests: dict[tuple, Any] = {}

    def __call__(self, tensors: list[Tensor]) -> Tensor:
        arrays = [_readable(tensor).numpy() for tensor in tensors]
        shapes = tuple(array.shape for array in arrays)
        if shapes not in self.requests:
            self.requests[shapes] = self._compile(shapes)
        (output,) = self.requests[shapes].infer(arrays, share_inputs=True).values()
        return torch.from_numpy(output).to(self.call.output_dtype(tensors))

    def _compile(self, shapes: tuple) -> Any:
        model = self.model.clone()
        model.reshape({port: list(shape) for port, shape in zip(model.inputs, shapes, strict=True)})
        options = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": PRECISIONS[self.call.weight_dtype],
            "PERFORMANCE_HINT": "LATENCY",
        }
        return self.core.compile_model(model, "CPU", options).create_infer_request()


def _readable(tensor: Tensor) -> Tensor:
    """In float32 where it is of floating point: NumPy has no bfloat16."""
    return tensor.float() if tensor.is_floating_point() else tensor
