"""CUDA graphs on the CPU: a tape of the operations of a function, with every value frozen that is no tensor.

Like a CUDA graph, a replay runs no Python of the function: a number that the host knew while it was captured
stays as it was, tensors that existed before are read and written where they are, and an operation that brings
a value to the host cannot be captured. Capturing changes no tensor that existed before.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

SYNCHRONISING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "item", "_unique2"}


class TapeGraphs:
    """Takes the place of CudaGraphs.

    memory: how many more graphs can be captured before memory is short.
    """

    memory = 10**9

    def __init__(self, device=None):
        self.device = torch.device("cpu") if device is None else device
        self.captured = self.replayed = self.warm_ups = self.released = 0
        self.waited = []

    @staticmethod
    def why_unavailable(device):
        return None

    def warm_up(self, function, times=2):
        for _ in range(times):
            self.warm_ups += 1
            function()

    def capture(self, function, generators=()) -> Callable[[], None]:
        if self.memory <= 0:
            raise torch.OutOfMemoryError("no memory")
        self.memory -= 1
        tape, sources = Tape(), [torch.default_generator, *generators]
        states = [generator.get_state() for generator in sources]
        with tape:
            function()
        tape.restore()
        for generator, state in zip(sources, states, strict=True):
            generator.set_state(state)
        self.captured += 1

        def replay():
            self.replayed += 1
            tape.replay()

        return replay

    def marker(self):
        answers = iter([False, True])  # the device is still busy when it is asked for the first time
        return lambda: self.waited.append(None) or next(answers)

    def release(self):
        self.released += 1


class Tape(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls, self.made, self.before = [], {}, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function._schema.name.split("::")[-1]
        if name in SYNCHRONISING:
            raise RuntimeError(f"{name}: operation not permitted when stream is capturing")
        for index, argument in enumerate(function._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = args[index] if index < len(args) else kwargs.get(argument.name)
                for tensor in pytree.tree_leaves(given):
                    self._keep(tensor)
        result = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, result))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.made.setdefault(id(tensor), tensor)
        return result

    def _keep(self, tensor):
        """The value of a tensor that existed before, to put it back: also of one that a new tensor views."""
        if isinstance(tensor, Tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.before:
                self.before[storage.data_ptr()] = storage, storage.clone()

    def restore(self):
        with torch.no_grad():
            for storage, value in self.before.values():
                storage.copy_(value)

    def replay(self):
        now = {}

        def current(value):
            return now.get(id(value), value) if isinstance(value, Tensor) else value

        with torch.no_grad():
            for function, args, kwargs, result in self.calls:
                given, named = pytree.tree_map(current, (args, kwargs))
                found = function(*given, **named)
                old, new = pytree.tree_leaves(result), pytree.tree_leaves(found)
                now |= {id(a): b for a, b in zip(old, new, strict=True) if isinstance(a, Tensor)}
