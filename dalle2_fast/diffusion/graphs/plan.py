"""What the steps of one sampling run need, prepared before the first of them: tensors and constants."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dalle2_fast import functional
from dalle2_fast.diffusion.inpainting import Inpainting

Net = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class ConditionedNet:
    """A network with its conditions, called as net(x, time).

    Its conditions are arguments, unlike those of a closure, so that a graph can read them from buffers.

    Args:
        function: called as function(*modules, x, time, *conditions); it reads no other tensor than these and
            the weights of the modules. It is defined at the level of a module, so that it is the same object
            in every run.
        modules: networks.
        conditions: tensors, None, or tuples and lists of them.

    Example:
        >>> net = ConditionedNet(lambda module, x, time, bias: module(x) + bias, (nn.Identity(),), (1.0,))
        >>> net(torch.zeros(2), torch.zeros(2))
        tensor([1., 1.])
    """

    function: Callable[..., Tensor]
    modules: tuple[nn.Module, ...]
    conditions: tuple[Any, ...]

    def __call__(self, x: Tensor, time: Tensor) -> Tensor:
        return self.function(*self.modules, x, time, *self.conditions)

    def tensors(self) -> list[Tensor]:
        """The tensors among the conditions, in a fixed order."""
        return [leaf for leaf in pytree.tree_leaves(self.conditions) if isinstance(leaf, Tensor)]

    def on_buffers(self) -> ConditionedNet:
        """The same network with uninitialised conditions of the same shapes and dtypes."""
        buffers = pytree.tree_map(
            lambda leaf: torch.empty_like(leaf) if isinstance(leaf, Tensor) else leaf, self.conditions
        )
        return ConditionedNet(self.function, self.modules, buffers)

    def form(self) -> tuple:
        """What two runs must share so that one graph serves both; it can be hashed."""
        leaves, structure = pytree.tree_flatten(self.conditions)
        shapes = [(tuple(x.shape), x.dtype) if isinstance(x, Tensor) else x for x in leaves]
        return self.function, self.modules, str(structure), tuple(shapes)


@dataclass(frozen=True)
class StepOptions:
    """The constants of a step; see `functional.diffusion_step` for those of the same name.

    Args:
        drop_variance: whether the second half of the output's channels, a learned variance, is not used.
        noisy: whether any step adds noise.
        multistep: whether a step uses the x0 of the step before it.
    """

    prediction: str
    clip: float | None
    dynamic_threshold: float | None
    guidance_rescale: float
    learned_range: bool
    drop_variance: bool
    noisy: bool
    multistep: bool


@dataclass(frozen=True, eq=False)
class SamplingPlan:
    """Everything that the steps of one run need. Tensors are on the device of x.

    Args:
        x: the state before the first step, [B, C, *].
        seeds: int64 [B].
        table: coefficients [steps, 8], see `functional.diffusion_step`.
        times: the times with which the network is called, [steps, B].
        nets: the networks of the run, each with whether its steps have guidance.
        choice: the position in `nets` of the network of each step, [steps].
        guidance: guidance weight, a number or [B]; None if no step has guidance.
        options: the constants of a step.
        start: the first step.
        inpainting: the known data; None for none.
        scales: factors of the networks' input, [steps]; None if they are 1.
    """

    x: Tensor
    seeds: Tensor
    table: Tensor
    times: Tensor
    nets: tuple[tuple[Net, bool], ...]
    choice: tuple[int, ...]
    guidance: float | Tensor | None
    options: StepOptions
    start: int = 0
    inpainting: Inpainting | None = None
    scales: Tensor | None = None

    @property
    def steps(self) -> int:
        return len(self.choice)

    def modules(self) -> Iterator[nn.Module]:
        """The networks, each once."""
        found = (module for net, _ in self.nets for module in net.modules)
        return iter({id(module): module for module in found}.values())

    def describe(self) -> str:
        """The sizes, for messages."""
        batch, *sizes = self.x.shape
        conditions = [tensor for net, _ in self.nets for tensor in net.tensors()]
        megabytes = sum(tensor.numel() * tensor.element_size() for tensor in conditions) / 2**20
        weights = next((p for module in self.modules() for p in module.parameters()), self.x)
        shape, dtype = " x ".join(map(str, sizes)), str(weights.dtype).removeprefix("torch.")
        guided = "" if self.guidance is None else ", with guidance"
        return f"{batch} sample(s) of {shape}{guided}, conditions of {megabytes:.1f} MiB, weights in {dtype}"


def make_step(
    net: Net,
    x: Tensor,  # [B, C, *]
    time: Tensor,  # [B]
    table: Tensor,  # [steps, 8]
    row: Tensor,  # int64 scalar
    options: StepOptions,
    *,
    seeds: Tensor,  # int64 [B]
    guidance: float | Tensor | None,
    previous_x0: Tensor | None,  # [B, C, *]
    scale: Tensor | None = None,  # of the network's input, scalar
) -> tuple[Tensor, Tensor]:
    """One step: the network, guidance, and the update.

    Returns:
        The next state and x0, [B, C, *] each.
    """
    output = net(x if scale is None else x * scale, time)
    if options.drop_variance:
        output = output[:, : x.shape[1]]
    return functional.diffusion_step(
        x, output, table, row, seeds=seeds if options.noisy else None, guidance=guidance,
        guidance_rescale=options.guidance_rescale if guidance is not None else 0.0,
        prediction=options.prediction, clip=options.clip, dynamic_threshold=options.dynamic_threshold,
        learned_range=options.learned_range, previous_x0=previous_x0,
    )  # fmt: skip
