"""Programs of torch's compiler: AOTInductor, which writes C++ (on a GPU also Triton) and compiles it.

The package that it writes loads in a fraction of a second, where torch.compile would trace the network again
in every process.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dalle2_fast.models.implementation import implementation
from dalle2_fast.pipeline.compilation import store
from dalle2_fast.pipeline.compilation.network import FlatCall, Program

MODES = {"default": {}, "max-autotune": {"max_autotune": True}}
FILE = "network.pt2"


class Inductor:
    """AOTInductor as a Backend.

    Args:
        mode: "default", or "max-autotune", which tries several programs for each matrix product.
        freezing: whether the program contains the weights, folded and in the memory layout that it reads
            fastest; otherwise it reads the network's.

    Raises:
        ValueError: another mode.
        RuntimeError: a torch that is too old.
    """

    name = "inductor"

    def __init__(self, mode: str, freezing: bool):
        if mode not in MODES:
            raise ValueError(f"mode: expected {' or '.join(map(repr, MODES))}, got {mode!r}")
        if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 8):
            raise RuntimeError(f"backend: inductor needs torch 2.8 or newer, got {torch.__version__}")
        self.mode, self.has_weights = mode, freezing

    def check(self, network: nn.Module) -> None:
        """It compiles for every device and dtype."""

    def facts(self) -> dict[str, Any]:
        return {
            "torch": torch.__version__,
            "mode": self.mode,
            "freezing": self.has_weights,
            "processor": store.processor(),
            "threads": torch.get_num_threads(),  # loops are divided among them when they are compiled
        }

    def build(
        self, call: FlatCall, tensors: list[Tensor], varying: list[dict[int, str]], folder: Path
    ) -> None:
        from torch._inductor import aoti_compile_and_package
        from torch._inductor.exc import InvalidCxxCompiler

        options = MODES[self.mode] | {
            "freezing": self.has_weights,
            "aot_inductor.package_constants_in_so": self.has_weights,
        }
        try:
            program = exported(call, tensors, varying)
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                aoti_compile_and_package(
                    program, package_path=str(folder / FILE), inductor_configs=options
                )
        except InvalidCxxCompiler as error:
            raise RuntimeError("backend: inductor needs a C++ compiler such as g++, found none") from error

    def load(self, call: FlatCall, folder: Path) -> Program:
        from torch._inductor import aoti_load_package

        program = aoti_load_package(str(folder / FILE))
        if not self.has_weights:
            weights = dict(call.named_parameters()) | dict(call.named_buffers())
            used = {name: weights[name].detach() for name in program.get_constant_fqns()}
            program.load_constants(used, check_full_update=True, user_managed=True)
        return program


def exported(
    call: FlatCall, tensors: list[Tensor], varying: list[dict[int, str]]
) -> torch.export.ExportedProgram:
    """A network's method as a graph of torch's operations.

    On a CPU, compilers fuse the references with what surrounds them; on a GPU the kernels stay.
    """
    dims = {name: torch.export.Dim(name, min=1) for name in ("batch", "positions")}
    shapes = [{dim: dims[name] for dim, name in some.items()} for some in varying]
    impl = "reference" if tensors[0].device.type == "cpu" else "auto"
    with torch.no_grad(), implementation(call, impl), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(call, (tensors,), dynamic_shapes=(shapes,), strict=False)
