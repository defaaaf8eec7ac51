"""The part of a loss that knows the process group: its rank in it, and whether all processes agree.

A process that fails does not block the others indefinitely: they raise when its connection breaks or when the
process group's timeout expires. Wrong arguments on one process, and arguments that differ between processes,
raise on every process.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dalle2_fast.losses.collectives import gather
from dalle2_fast.ops import _checks, _dispatch
from dalle2_fast.ops._dtypes import compute_dtype

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class DistributedLoss(nn.Module):
    """Base of the losses: the constructor arguments that they share, and the checks of a distributed call."""

    def __init__(self, cache_labels: bool, rank: int, world_size: int, impl: str) -> None:
        super().__init__()
        name = type(self).__name__
        if not isinstance(world_size, int) or world_size < 1:
            raise ValueError(f"{name}: world_size: expected an int >= 1, got {world_size!r}")
        if not isinstance(rank, int) or (world_size > 1 and not 0 <= rank < world_size):
            raise ValueError(f"{name}: rank: expected an int, 0 <= rank < {world_size}, got {rank!r}")
        self.cache_labels = cache_labels  # without effect: a positive pair is known by its position
        self.rank = rank
        self.world_size = world_size
        self.impl = impl
        self._agreed: tuple | None = None  # what all processes had in common at the last check

    def extra_repr(self) -> str:
        return f"rank={self.rank}, world_size={self.world_size}, impl={self.impl!r}"

    def prepare(
        self, image: Tensor, text: Tensor, scale: Tensor | float, bias: Tensor | float | None, mode: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Check the arguments, here and against the other processes.

        Args:
            mode: a number that stands for the options of this loss; it has to be equal on all processes.

        Returns:
            The features in one dtype, and the scalars as tensors of shape [].
        """
        self._check_group()
        problem = None
        try:
            _checks.contrastive(image, text, scale, bias)
        except (TypeError, ValueError) as error:
            problem = error
        if problem is None and _dispatch.is_transformed():
            name = type(self).__name__
            problem = RuntimeError(
                f"{name}: with world_size > 1 it has only the gradients of torch.autograd (reverse mode): no "
                "forward mode and no torch.func"
            )
        self._check_agreement(image, mode, problem)

        dtype = torch.promote_types(image.dtype, text.dtype)

        def as_tensor(value: Tensor | float) -> Tensor:
            if isinstance(value, Tensor):
                return value.to(image.device, compute_dtype(dtype)).reshape(())
            # Filled on the device, so there is no copy to wait for.
            return torch.full((), value, dtype=compute_dtype(dtype), device=image.device)

        bias = None if bias is None else as_tensor(bias)
        return image.to(dtype), text.to(dtype), as_tensor(scale), bias

    def _check_group(self) -> None:
        name = type(self).__name__
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                f"{name}(world_size={self.world_size}) needs torch.distributed's default process group, and "
                "there is none: call torch.distributed.init_process_group first"
            )
        here = (dist.get_rank(), dist.get_world_size())
        if here != (self.rank, self.world_size):
            raise ValueError(
                f"{name}: expected the process group's rank = {here[0]} and world_size = {here[1]}, "
                f"got {self.rank} and {self.world_size}"
            )

    def _check_agreement(self, image: object, mode: int, problem: Exception | None) -> None:
        """Raise on every process if one has a problem or if the processes' arguments differ.

        On a GPU, reading the answer waits for the device, so the processes compare only once per shape and
        dtype. A batch that then changes on some processes only is found by the collectives that do not match,
        or by their timeout.
        """
        device = image.device if isinstance(image, Tensor) else torch.device("cpu")
        here = (-1, 0, 0, mode)
        if problem is None:
            dtype = _DTYPES.index(image.dtype) if image.dtype in _DTYPES else len(_DTYPES)  # float8, ...
            here = (*image.shape, dtype, mode)
            if device.type == "cuda" and here == self._agreed:
                return
        everywhere = gather(torch.tensor([here], dtype=torch.int64, device=device))
        if problem is not None:
            raise problem
        name = type(self).__name__
        rows = everywhere.tolist()
        failed = [rank for rank, (n, *_) in enumerate(rows) if n < 0]
        if failed:
            raise RuntimeError(f"{name}: the arguments on rank {failed[0]} are wrong; see its error")
        for rank, (n, width, dtype, other_mode) in enumerate(rows):
            if (n, width) != here[:2]:
                raise ValueError(
                    f"image_features: expected [n, D] = {here[:2]} on every rank as on rank {self.rank}, got "
                    f"{(n, width)} on rank {rank}"
                )
            if dtype != here[2]:
                other = _DTYPES[dtype] if dtype < len(_DTYPES) else "another dtype"
                raise TypeError(
                    f"image_features: expected {image.dtype} on every rank as on rank {self.rank}, "
                    f"got {other} on rank {rank}"
                )
            if other_mode != mode:
                raise ValueError(f"{name}: rank {rank} was built with other options than rank {self.rank}")
        self._agreed = here
