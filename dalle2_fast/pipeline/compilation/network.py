"""A network's method as compiled programs, one for each set of shapes and dtypes of its arguments."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dalle2_fast.models.prior.caption_prefix import PrefixCache
from dalle2_fast.models.unet.context import ContextCache
from dalle2_fast.models.unet.model import UNet
from dalle2_fast.pipeline.compilation import store

Program = Callable[[list[Tensor]], Tensor]


class Backend(Protocol):
    """A compiler."""

    name: str
    has_weights: bool  # whether a program contains the weights

    def check(self, network: nn.Module) -> None:
        """ValueError if it cannot compile for the device or dtype of these weights."""

    def facts(self) -> dict[str, Any]:
        """The versions and options on which its programs depend."""

    def build(
        self, call: FlatCall, tensors: list[Tensor], varying: list[dict[int, str]], folder: Path
    ) -> None:
        """Write the program of `call` into an empty folder.

        varying: for each tensor, the names of the dimensions that may differ from call to call.
        """

    def load(self, call: FlatCall, folder: Path) -> Program:
        """The program in a folder, with the weights of `call`."""


class FlatCall(nn.Module):
    """A network's method as a function of a list of tensors, the form that exporters take.

    Args:
        network: whose method it is.
        method: the method, as a function of the network.
        arguments: one set of arguments; each of their tensors is an element of the list, in order.
    """

    def __init__(self, network: nn.Module, method: Callable[..., Tensor], arguments: Sequence[Any]):
        super().__init__()
        self.network, self.method = network, method
        leaves, self.structure = pytree.tree_flatten(tuple(arguments))
        self.leaves = [... if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def forward(self, tensors: list[Tensor]) -> Tensor:
        given = iter(tensors)
        leaves = [next(given) if leaf is ... else leaf for leaf in self.leaves]
        return self.method(self.network, *pytree.tree_unflatten(leaves, self.structure))

    @property
    def weight_dtype(self) -> torch.dtype:
        return next(self.network.parameters()).dtype

    def output_dtype(self, tensors: list[Tensor]) -> torch.dtype:
        """A U-Net returns the dtype of its sample, the other networks that of their weights."""
        return tensors[0].dtype if isinstance(self.network, UNet) else self.weight_dtype


class CompiledNetwork:
    """Takes the place of a method of a network: `network.forward = CompiledNetwork(network, "forward", ...)`.

    A program is found in the folder, or built, when shapes or dtypes are seen for the first time. A call that
    records gradients, trains, runs under autocast or is itself compiled runs the plain method.

    Args:
        network: the network.
        name: the name of the method.
        config: what the network was built from.
        backend: the compiler.
        folder: of the programs, see `store`.
    """

    def __init__(
        self, network: nn.Module, name: str, config: dict[str, Any], backend: Backend, folder: Path
    ):
        _register_dataclasses()
        self.network, self.name, self.config = network, name, config
        self.backend, self.folder = backend, folder
        self.programs: dict[tuple, Program] = {}
        self.weights: tuple = ()

    def __getstate__(self) -> dict[str, Any]:
        """Without the programs, which can be neither copied nor pickled; a copy loads them again."""
        return self.__dict__ | {"programs": {}, "weights": ()}

    @property
    def method(self) -> Callable[..., Tensor]:
        return getattr(type(self.network), self.name)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        network = self.network
        device = next(network.parameters()).device.type
        plain = torch.is_grad_enabled() or network.training or torch.is_autocast_enabled(device)
        if plain or torch.compiler.is_compiling():
            return self.method(network, *args, **kwargs)
        bound = _signature(self.method).bind(network, *args, **kwargs)
        bound.apply_defaults()
        arguments = bound.args[1:]
        tensors = [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor)]
        if not len(tensors[0]):  # exporters take no empty batch
            return self.method(network, *args, **kwargs)
        tensors = [tensor.contiguous() for tensor in tensors]  # programs expect one memory format
        weights = _versions(network)
        if weights != self.weights:
            self.programs, self.weights = {}, weights
        varying = varying_dimensions(arguments)
        call = FlatCall(network, self.method, arguments)
        form = _shapes(tensors, varying), str(call.structure)
        key = *form, torch.get_num_threads()
        if key not in self.programs:
            self.programs[key] = self._load(call, tensors, varying, form)
        return self.programs[key](tensors)

    def _load(
        self, call: FlatCall, tensors: list[Tensor], varying: list[dict[int, str]], form: tuple
    ) -> Program:
        backend, network = self.backend, self.network
        backend.check(network)
        facts = {
            "backend": backend.name,
            **backend.facts(),
            "sources": store.digest_of_sources(),
            "network": f"{type(network).__qualname__}.{self.name}",
            "config": self.config,
            "weights": store.digest_of_weights(network) if backend.has_weights else str(call.weight_dtype),
            "device": str(tensors[0].device),
            "arguments": form,
        }

        def build(folder: Path) -> None:
            # Exporters take a dimension of size 1 for a constant.
            enough = [_at_least_two(tensor, dims) for tensor, dims in zip(tensors, varying, strict=True)]
            backend.build(call, enough, varying, folder)

        return backend.load(call, store.find_or_build(self.folder, facts, build))


def varying_dimensions(arguments: Iterable[Any]) -> list[dict[int, str]]:
    """For each tensor of the arguments of a network, the dimensions that differ from call to call.

    They are the rows of the batch and, in a cache of keys and values, the positions of the caption.

    Example:
        >>> cache = ContextCache((torch.zeros(2, 1, 5, 4),), (torch.zeros(2, 1, 5, 4),), torch.ones(2, 5) > 0)
        >>> _register_dataclasses()
        >>> varying_dimensions([torch.zeros(2, 3, 8, 8), cache])[::3]
        [{0: 'batch'}, {0: 'batch', 1: 'positions'}]
    """
    found = []
    for argument in arguments:
        cached = isinstance(argument, (ContextCache, PrefixCache))
        for leaf in pytree.tree_leaves(argument):
            if isinstance(leaf, Tensor):
                positions = {1 if leaf.ndim == 2 else 2: "positions"} if cached else {}
                found.append({0: "batch"} | positions)
    return found


def _at_least_two(tensor: Tensor, dims: Iterable[int]) -> Tensor:
    for dim in dims:
        if tensor.shape[dim] == 1:
            tensor = torch.cat([tensor, tensor], dim=dim)
    return tensor


def _shapes(tensors: list[Tensor], varying: list[dict[int, str]]) -> tuple:
    """Dtypes and shapes, with a name in place of each dimension that varies."""
    return tuple(
        (str(tensor.dtype), *(dims.get(dim, size) for dim, size in enumerate(tensor.shape)))
        for tensor, dims in zip(tensors, varying, strict=True)
    )


def _versions(network: nn.Module) -> tuple:
    """Changes when a weight is replaced or written to."""
    return tuple(
        (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)
        for tensor in (*network.parameters(), *network.buffers())
    )


_signature = functools.cache(inspect.signature)


@functools.cache
def _register_dataclasses() -> None:
    """Let torch find the tensors in caches of keys and values."""
    from torch.export import register_dataclass

    for kind in (ContextCache, PrefixCache):
        register_dataclass(kind)
