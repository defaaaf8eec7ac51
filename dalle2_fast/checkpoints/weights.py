"""Putting named tensors into modules, and saying exactly which ones do not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dalle2_fast.checkpoints.errors import CheckpointError, listed, mismatches
from dalle2_fast.checkpoints.folder import construct


def join_states(parts: Mapping[str, nn.Module | None]) -> dict[str, Tensor]:
    """{"clip": module, ...} -> {"clip.<key>": tensor, ...}; parts that are None are left out.

    A part that holds another one as a submodule of that name (a prior built around a CLIP, say) does not
    store it a second time.
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
    """Copy `tensors["<prefix>.<key>"]` into `module`, which must find every key, each of its own shape.

    `source` (a path) begins the message of the CheckpointError that names missing keys, leftover keys and
    wrong shapes. On an error nothing has been copied. assign: put copies of the tensors, on `device` and, if
    floating-point, in `dtype`, in the place of the module's own, which may be `unfilled`.
    """
    expected = {f"{prefix}.{key}": tensor.shape for key, tensor in module.state_dict().items()}
    given = {key: value for key, value in tensors.items() if key.startswith(prefix + ".")}
    if problems := mismatches(expected, given):
        raise CheckpointError(
            f"{source}: the weights do not fit the {prefix} of the config: " + "; ".join(problems)
        )
    given = {key[len(prefix) + 1 :]: value for key, value in given.items()}
    if assign:
        # Copies, because what is read may be mapped from the file, which must not be needed any more.
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
    """`make(**config[name])` with the tensors called "<name>.<key>" as its weights, in evaluation mode.

    No initial weights are drawn: for Karlo's 3.4 billion that would take longer than reading them.
    """
    with unfilled():
        module = construct(lambda options: make(**options), config, name, source)
    load_state(module, tensors, name, source, assign=True, device=device, dtype=dtype)
    return module.eval()


@contextmanager
def unfilled() -> Iterator[None]:
    """Inside, modules are made with room for their weights on the CPU, which nobody fills: torch.nn.init does
    nothing to a parameter. The room takes no memory until it is used; torch's random state is left alone.

    The "meta" device would do the same, but its operations import torch's compiler: 1.6 s at every start.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), _NoInitialisation():
        yield


_FILLS = {Tensor.zero_, Tensor.fill_, Tensor.normal_, Tensor.uniform_}  # with which torch.nn.init ends


class _NoInitialisation(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init" or func in _FILLS:
            tensor = kwargs["tensor"] if "tensor" in kwargs else args[0]
            if isinstance(tensor, nn.Parameter):
                return tensor
        return func(*args, **kwargs)


def reject_leftovers(tensors: Mapping[str, Tensor], prefixes: Iterable[str], source: object) -> None:
    """Raise CheckpointError if a tensor belongs to none of the parts called `prefixes`."""
    known = set(prefixes)
    if leftover := [key for key in tensors if key.partition(".")[0] not in known]:
        raise CheckpointError(
            f"{source}: tensors that belong to no part of the config: {listed(leftover)}; "
            f"expected names that begin with {', '.join(f'{name}.' for name in sorted(known))}"
        )
