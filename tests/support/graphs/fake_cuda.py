"""Sampling plans on a CUDA device that does not exist, and what would make the host wait for it."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from dalle2_fast.diffusion.graphs.plan import SamplingPlan

# Each needs a value of the device: how many rows there are, which branch is taken, what a number is.
SYNCHRONISING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2"}


class Synchronisations(TorchDispatchMode):
    """The names of the operations for which the host would wait: reads of a value, copies between devices."""

    def __init__(self):
        super().__init__()
        self.found, self.ours = [], set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if name.split("::")[-1] in SYNCHRONISING:
            self.found.append(name)
        if name.startswith("dalle2_fast::"):
            self.ours.add(name.removeprefix("dalle2_fast::"))
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        devices = {tensor.device.type for tensor in tensors if tensor.dim() > 0 or name.endswith("copy")}
        if len(devices) > 1:
            self.found.append(f"{name} between {' and '.join(sorted(devices))}")
        return result


class WithoutDriver(TorchFunctionMode):
    """x[...] and some methods, on a torch that was built without CUDA and has no driver to ask."""

    METHODS = {
        Tensor.copy_: torch.ops.aten.copy,
        Tensor.contiguous: torch.ops.aten.contiguous,
        Tensor.__invert__: torch.ops.aten.bitwise_not,
        Tensor.nonzero: torch.ops.aten.nonzero,
    }

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in self.METHODS:
            return self.METHODS[function](*args, **(kwargs or {}))
        if function is not Tensor.__getitem__:
            return function(*args, **(kwargs or {}))
        x, index = args
        index = index if isinstance(index, tuple) else (index,)
        if any(part is Ellipsis for part in index):
            at, given = index.index(Ellipsis), sum(part is not None for part in index) - 1
            index = index[:at] + (slice(None),) * (x.dim() - given) + index[at + 1 :]
        dim = 0
        for part in index:
            if part is None:
                x = x.unsqueeze(dim)
            elif isinstance(part, slice):
                x = torch.ops.aten.slice(x, dim, part.start, part.stop, part.step or 1)
            elif isinstance(part, int):
                x, dim = x.select(dim, part), dim - 1
            else:
                return torch.ops.aten.index(args[0], [part])
            dim += 1
        return x


def synchronisations(function, mode: FakeTensorMode) -> tuple[list[str], set[str]]:
    """What would make the host wait in a function of fake tensors, and the project's ops that it calls."""
    with torch.no_grad(), mode, WithoutDriver(), Synchronisations() as seen:
        try:
            function()
        except Exception as error:  # fake tensors have no values: reading one ends the function
            seen.found.append(f"{type(error).__name__}: {error}")
    return seen.found, seen.ours


def on_fake_cuda(plan: SamplingPlan, mode: FakeTensorMode) -> SamplingPlan:
    """The plan with tensors of the same shapes on a CUDA device; its networks' weights are moved, too."""

    def moved(value):
        if not isinstance(value, Tensor):
            return value
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")

    with mode:
        for module in plan.modules():
            for child in module.modules():
                for tensors in (child._parameters, child._buffers):
                    tensors.update({name: moved(tensor) for name, tensor in tensors.items()})
        nets = tuple(
            (dataclasses.replace(net, conditions=pytree.tree_map(moved, net.conditions)), guided)
            for net, guided in plan.nets
        )
        names = ("x", "seeds", "table", "times", "guidance")
        return dataclasses.replace(plan, nets=nets, **{name: moved(getattr(plan, name)) for name in names})
