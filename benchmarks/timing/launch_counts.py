"""Launches counted without a GPU, in the launchers of our kernels and in the dispatch of PyTorch's ops."""

from __future__ import annotations

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class CountLaunches(TorchDispatchMode):
    """Counts PyTorch's ops and, separately, the calls of our ops.

    ops: PyTorch's ops that make or change data, by name. Plain PyTorch launches about as many kernels: views
        launch none, and a few ops launch several (native_group_norm).
    ours: calls of our ops, by op and description of the arguments.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops, self.ours = Counter(), Counter()

    @property
    def op_count(self) -> int:
        return sum(self.ops.values())

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op._schema.name
        if name.startswith("dalle2_fast::"):
            self.ours[op, tuple(map(described, args))] += 1
        elif name.startswith("aten::"):
            view = any(value.alias_info is not None for value in op._schema.returns)
            if not (view and not op._schema.is_mutable) and "empty" not in name and "view" not in name:
                self.ops[name] += 1
        return op(*args, **(kwargs or {}))


def described(value: object) -> object:
    """A tensor as its shape, strides and dtype: the same for all calls that launch the same kernels."""
    if isinstance(value, torch.Tensor):
        return ("tensor", tuple(value.shape), value.stride(), value.dtype)
    return value


def allocated(value: object) -> object:
    """The argument again; a described tensor becomes one whose memory is never touched."""
    if isinstance(value, tuple) and value[:1] == ("tensor",):
        return torch.empty_strided(value[1], value[2], dtype=value[3])
    return value
