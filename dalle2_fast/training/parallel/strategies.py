"""How the processes share model and gradient: alone, ddp (replicas) or fsdp (shards).

Every strategy does the same to the caller: `run` computes something with the model so that a backward pass
leaves the mean gradient over processes in the parameters, and `clip` bounds its norm.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from dalle2_fast.models.unet.blocks import AttentionBlock
from dalle2_fast.training.errors import TrainingError
from dalle2_fast.training.parallel.blocks import prepare_blocks, repeated_blocks
from dalle2_fast.training.parallel.execution import Execution
from dalle2_fast.training.parallel.processes import Processes
from dalle2_fast.training.parallel.shards import local


class Caller(nn.Module):
    """Calls any function within the forward pass of a module that has the model.

    The wrappers of torch.distributed act on the forward pass of the outermost module. The losses of the
    stages are functions of a model, and this makes them a forward pass.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable, *arguments):
        return function(*arguments)


class Alone:
    """One process: the model is called directly.

    Args:
        model: is trained in place.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def run(self, function: Callable, *arguments, last: bool = True):
        """function(*arguments), which uses the model.

        Args:
            last: whether the backward pass of this call is the last of the step, after which the gradient of
                all of them is averaged over processes.
        """
        return function(*arguments)

    def clip(self, largest: float) -> Tensor:
        """Scale the gradient so that its norm is at most `largest`; the norm before, a scalar."""
        return torch.nn.utils.clip_grad_norm_(self.model.parameters(), largest)

    def unscale(self, factor: float) -> None:
        """Multiply the gradient by a factor."""
        torch._foreach_mul_([local(p.grad) for p in self.model.parameters() if p.grad is not None], factor)

    def whole(self, tensors: dict[str, Tensor], *, wanted: bool = True) -> dict[str, Tensor]:
        """The tensors as one process has them. Every process has to take part.

        Args:
            tensors: by name; shards or replicas.
            wanted: whether this process needs the result; another one gets an empty dict.
        """
        return tensors if wanted else {}

    @contextmanager
    def averaged(self, ema, average: dict[str, Tensor], stage) -> Iterator[None]:
        """Within the block `stage.model` has the averaged weights and is in evaluation mode.

        Args:
            ema: the average, whose shards or replicas this process has.
            average: `whole` of it.
            stage: is validated.
        """
        with ema.applied_to(self.model):
            yield


class Replicated(Alone):
    """DDP: every process has the whole model, and gradients are averaged while they are computed.

    Args:
        model: the same on every process.
        device: of the model.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__(model)
        # The gradient of a 1 x 1 convolution has strides of another name for the same order of its numbers.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        has_unused = getattr(model, "last_unet", None) is not None  # the loss of an upsampler leaves it out
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the newer name of broadcast_buffers
            self.caller = nn.parallel.DistributedDataParallel(
                Caller(model),
                device_ids=[device] if device.type == "cuda" else None,
                find_unused_parameters=has_unused,
                broadcast_buffers=False,
                init_sync=False,
            )
        if not has_unused:
            self._order_buckets()

    def _order_buckets(self) -> None:
        """Let DDP form its buckets of gradients now, in the reverse order of the parameters.

        It does that after its first backward pass. Where a gradient is in a bucket decides in which order the
        processes add it: the first step would round otherwise than those after it, and a run that is resumed
        would differ in the last bits from one that is not.
        """
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]

        def nothing() -> Tensor:
            total = parameters[0].new_zeros(())
            for parameter in parameters:  # the backward pass goes from the last one to the first
                total = total + 0.0 * parameter.flatten()[0]
            return total

        self.caller(nothing).backward()
        self.model.zero_grad(set_to_none=True)

    def run(self, function: Callable, *arguments, last: bool = True):
        with nullcontext() if last else self.caller.no_sync():
            return self.caller(function, *arguments)


class Sharded(Alone):
    """FSDP2: every process has a part of each weight, and the blocks gather theirs while they compute.

    Scalars are not sharded; each process has them all.

    Args:
        model: the same on every process; its parameters become DTensors.
        plain: a copy that is not sharded, for validation by the first process.
        device: of the model.
        processes: of the training.
        shard_size: number of processes that share one copy; see `Execution`.
    """

    def __init__(
        self,
        model: nn.Module,
        plain: nn.Module,
        device: torch.device,
        processes: Processes,
        shard_size: int | None,
    ) -> None:
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        super().__init__(model)
        self.plain, self.device, self.processes = plain, device, processes
        world, size = processes.world_size, shard_size or processes.world_size
        # One copy needs a mesh of one dimension; with two, fsdp keeps replicas of the shards (HSDP).
        shape = (size,) if size == world else (world // size, size)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replica", "shard")[-len(shape) :])
        self.shards = mesh["shard"].get_group()
        self.scalars = [parameter for parameter in model.parameters() if parameter.ndim == 0]
        for block in repeated_blocks(model):
            fully_shard(block, mesh=mesh)
            if isinstance(block, AttentionBlock):
                register_fsdp_forward_method(block, "encode_context")
        self.caller = fully_shard(Caller(model), mesh=mesh, ignored_params=set(self.scalars))

    def run(self, function: Callable, *arguments, last: bool = True):
        self.caller.set_requires_gradient_sync(last)
        with warnings.catch_warnings():
            # The keys and values that a block of a Transformer returns are views; nothing changes them.
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
            return self.caller(function, *arguments)

    def clip(self, largest: float) -> Tensor:
        for scalar in self.scalars:
            if scalar.grad is not None:
                scalar.grad.copy_(self.processes.mean(scalar.grad))
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        shards = [local(gradient) for gradient in gradients if isinstance(gradient, DTensor)]
        others = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
        total = squared_norm(shards, self.device)
        dist.all_reduce(total, group=self.shards)
        norm = (total + squared_norm(others, self.device)).sqrt()
        torch._foreach_mul_(shards + others, (largest / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def whole(self, tensors: dict[str, Tensor], *, wanted: bool = True) -> dict[str, Tensor]:
        found = {}
        for name, value in tensors.items():  # one at a time: only those that are wanted stay
            full = value.full_tensor() if isinstance(value, DTensor) else value
            if wanted:
                found[name] = full
        return found

    @contextmanager
    def averaged(self, ema, average: dict[str, Tensor], stage) -> Iterator[None]:
        model, plain = stage.model, self.plain.to(self.device)
        plain.load_state_dict(average)
        stage.model = plain.eval()
        try:
            yield
        finally:
            stage.model = model
            plain.cpu()


def check_strategy(model: nn.Module, execution: Execution, processes: Processes) -> None:
    """Raise unless `make_strategy` can divide this model so.

    Raises:
        ValueError: fsdp with one process.
        TrainingError: the model or the number of processes does not fit it.
    """
    parts = processes.world_size * execution.accumulate
    if parts > 1 and any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        raise TrainingError(
            "the model has batch norms, whose statistics are those of the whole batch: expected one process "
            f"and no --accumulate, got {processes.world_size} processes and {execution.accumulate}"
        )
    if processes.world_size == 1 and execution.parallel != "ddp":
        raise ValueError(f"--parallel {execution.parallel}: expected several processes (torchrun), got one")
    world, size = processes.world_size, execution.shard_size or processes.world_size
    if world % size:
        raise TrainingError(
            f"--shard-size: expected a divisor of the number of processes = {world}, got {size}"
        )


def make_strategy(
    model: nn.Module, execution: Execution, processes: Processes, device: torch.device
) -> Alone:
    """The strategy of an execution. It changes the model in place, before its optimiser is made.

    Raises:
        ValueError: fsdp with one process.
        TrainingError: the model or the number of processes does not fit it.
    """
    check_strategy(model, execution, processes)
    processes.share(model)
    is_sharded = execution.parallel == "fsdp"
    plain = copy.deepcopy(model).cpu() if is_sharded and processes.is_first else None
    prepare_blocks(
        model, checkpoint_activations=execution.checkpoint_activations, compile=execution.compile
    )
    if processes.world_size == 1:
        return Alone(model)
    if is_sharded:
        return Sharded(model, plain, device, processes, execution.shard_size)
    return Replicated(model, device)


def squared_norm(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """The sum of all squares, a float32 scalar."""
    tensors = list(tensors)
    if not tensors:
        return torch.zeros((), device=device)
    return torch.stack(torch._foreach_norm(tensors)).float().square().sum()
