"""Named tensors -> modules; an error names exactly the tensors that do not fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dalle2_fast.checkpoints.errors import CheckpointError, listed, mismatches
from dalle2_fast.checkpoints.folder import construct


def join_states(parts: Mapping[str, nn.Module | None]) -> dict[str, Tensor]:
    """The state_dicts of several modules as one dict.

    A part that contains another one as a submodule of the same name, such as a prior with a CLIP, does not
    store it a second time.

    Args:
        parts: part -> module; None is left out.

    Returns:
        "<part>.<key>" -> tensor.

    Example:
        >>> sorted(join_states({"clip": nn.Linear(2, 2), "prior": None}))
        ['clip.bias', 'clip.weight']
    """
    tensors = {}
    for name, module in parts.items():
        if module is None:
            continue
        for key, tensor in module.state_dict().items():
            if key.partition(".")[0] not in parts:
                tensors[f"{name}.{key}"] = tensor
    return tensors


def load_state(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    prefix: str,
    source: object,
    *,
    assign: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Copy the tensors called "<prefix>.<key>" into a module.

    Args:
        module: every key of its state_dict must be there, with its shape.
        tensors: name -> tensor; names with another prefix are ignored.
        prefix: the name of the part.
        source: where the tensors were read; the error message begins with it.
        assign: replace the tensors of the module, which may be `unfilled`, by copies on `device`, those of
            floating point in `dtype`. Otherwise copy the values into them.
        device: None keeps that of the tensors.
        dtype: None keeps that of the tensors.

    Raises:
        CheckpointError: names are missing or left over, or shapes differ, or integers came for floating-point
            weights. Nothing has been copied.

    Example:
        >>> module = nn.Linear(2, 1)
        >>> weights = {"net.weight": torch.ones(1, 2), "net.bias": torch.zeros(1)}
        >>> load_state(module, weights, "net", "runs/one")
        >>> module.weight.tolist()
        [[1.0, 1.0]]
    """
    expected = {f"{prefix}.{key}": tensor for key, tensor in module.state_dict().items()}
    given = {key: value for key, value in tensors.items() if key.startswith(prefix + ".")}
    if problems := mismatches(expected, given):
        raise CheckpointError(
            f"{source}: the weights do not fit the {prefix} of the config: " + "; ".join(problems)
        )
    given = {key[len(prefix) + 1 :]: value for key, value in given.items()}
    if assign:
        # Copies, because the tensors may be mapped from the file, which may change after loading.
        given = {
            key: value.to(
                device=device, dtype=dtype if value.is_floating_point() else None, copy=True
            ).contiguous()
            for key, value in given.items()
        }
    module.load_state_dict(given, assign=assign)


def build(
    make: Callable[..., nn.Module],
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    name: str,
    source: object,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """Build one part of a checkpoint with its weights, in evaluation mode.

    No initial weights are sampled: for Karlo's 3.4 billion that would take longer than reading them.

    Args:
        make: the class of the part, or what else makes it from keyword arguments.
        config: part -> its arguments.
        tensors: the weights, called "<name>.<key>".
        name: of the part.
        source: where the checkpoint was read; error messages begin with it.
        device: of the module.
        dtype: of the floating-point weights.

    Raises:
        CheckpointError: the arguments are not accepted, or the weights do not fit.
    """
    with unfilled(tensors):
        module = construct(lambda options: make(**options), config, name, source)
    load_state(module, tensors, name, source, assign=True, device=device, dtype=dtype)
    return module.eval()


def build_alone(
    make: type[nn.Module],
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    source: object,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """`build` of a network that is all of its file: `config` are its arguments, and `tensors` its state_dict.

    Errors call it by its class's `part`.
    """
    name = make.part
    named = {f"{name}.{key}": tensor for key, tensor in tensors.items()}
    return build(make, {name: config}, named, name, source, device, dtype)


@contextmanager
def unfilled(weights: Mapping[str, Tensor] | None = None) -> Iterator[None]:
    """Within this context, modules are made on the CPU without initialising their parameters.

    The parameters take no memory until they are written, because torch.nn.init does nothing to them. Buffers
    are filled as usual. No random number is drawn, and nothing that other threads see is set: to restore the
    random state afterwards would give a thread that draws in the meantime the same numbers again.

    The "meta" device would save as much, but its operations import torch's compiler, which takes 1.6 s at
    every start.

    Args:
        weights: those that the modules will get. ValueError is raised while modules are made that need far
            more tensors or memory: a config may ask for 10^9 layers.

    Example:
        >>> with unfilled():
        ...     layer = nn.Linear(1000, 1000)
        >>> layer.weight.shape
        torch.Size([1000, 1000])
    """
    with _NoInitialisation(weights):
        yield


_FILLS = {Tensor.zero_, Tensor.fill_, Tensor.normal_, Tensor.uniform_}  # what torch.nn.init calls at its end
_RANDOM = {torch.rand, torch.randn}  # what constructors fill parameters with
_FACTORIES = {
    torch.arange, torch.as_tensor, torch.empty, torch.eye, torch.full, torch.linspace, torch.ones,
    torch.scalar_tensor, torch.tensor, torch.zeros,
}  # fmt: skip


# Modules make about two tensors for each that is stored: buffers, tables and temporary ones.
TENSORS_MADE, MORE_TENSORS = 8, 2000
NUMBERS_MADE, MORE_NUMBERS = 4, 1 << 26


class _NoInitialisation(TorchFunctionMode):
    """A mode of the current thread alone; `with torch.device("cpu")` would also set a global variable."""

    def __init__(self, weights: Mapping[str, Tensor] | None) -> None:
        super().__init__()
        self.held = weights and (len(weights), sum(tensor.numel() for tensor in weights.values()))
        self.tensors = self.numbers = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init" or func in _FILLS:
            tensor = kwargs["tensor"] if "tensor" in kwargs else args[0]
            if isinstance(tensor, nn.Parameter):
                return tensor
        if func in _RANDOM:
            func, kwargs = torch.zeros, {key: kwargs[key] for key in kwargs if key != "generator"}
        if func in _FACTORIES:
            self._count(func, args, kwargs)
            if kwargs.get("device") is None:  # the default device may be a GPU
                kwargs = kwargs | {"device": "cpu"}
        return func(*args, **kwargs)

    def _count(self, func, args, kwargs) -> None:
        """Raise ValueError if the modules need far more than the weights hold."""
        if self.held is None:
            return
        self.tensors, self.numbers = self.tensors + 1, self.numbers + _size(func, args, kwargs)
        held, numbers = self.held
        if self.tensors > TENSORS_MADE * held + MORE_TENSORS:
            raise ValueError(f"it asks for many more tensors than the {held:,} of the weights")
        if self.numbers > NUMBERS_MADE * numbers + MORE_NUMBERS:
            raise ValueError(f"it asks for far more than the {numbers:,} numbers of the weights")


def _size(func: Callable, args: tuple, kwargs: Mapping[str, Any]) -> int:
    """How many numbers a tensor that `func` makes has; 0 for those that are made from data."""
    if func in (torch.empty, torch.zeros, torch.ones, torch.full):
        sizes = kwargs.get("size", args[0] if args and isinstance(args[0], Sequence) else args)
    elif func is torch.eye:
        sizes = (args[0], args[-1])
    elif func is torch.arange:
        sizes = (max(0, args[-1] if len(args) < 3 else args[1]),) if args else (kwargs["end"],)
    elif func is torch.linspace:
        sizes = (kwargs["steps"] if "steps" in kwargs else args[2],)
    else:
        sizes = (0,)
    return math.prod(size for size in sizes if isinstance(size, int | float))


def reject_leftovers(tensors: Mapping[str, Tensor], prefixes: Iterable[str], source: object) -> None:
    """Raise CheckpointError if a tensor belongs to none of the parts.

    Args:
        tensors: names "<part>.<key>" -> tensors.
        prefixes: the parts.
        source: where the tensors were read; the error message begins with it.

    Raises:
        CheckpointError: a ValueError; it lists the first of these tensors.

    Example:
        >>> reject_leftovers({"clip.weight": torch.zeros(1)}, ["clip"], "model.safetensors")
    """
    known = set(prefixes)
    if leftover := [key for key in tensors if key.partition(".")[0] not in known]:
        raise CheckpointError(
            f"{source}: tensors that belong to no part of the config: {listed(leftover)}; "
            f"expected names that begin with {', '.join(f'{name}.' for name in sorted(known))}"
        )
