"""CLIP's and SigLIP's losses for training on one process or many, in the place of open_clip's classes.

    loss = 1/(2N) sum over i of (row_lse[i] - L[i, i]) + (column_lse[i] - L[i, i]),   L = scale I T^T

open_clip's distributed modes are gradients of different sizes, and each is reproduced. g is the gradient
that reaches the loss of one process, usually 1; "true" is the gradient of the loss of the whole batch; W
processes:

    local_loss  gather_with_grad  value         gradient of the image and the text features
    False       False             of the batch  g true
    False       True              of the batch  (sum of every g) true, so W true
    True        True              of own pairs  of the sum over processes of g times their losses, so W true
    True        False             of own pairs  g times: images, of the own row terms alone; texts, of the own
                                                column terms alone. Not the gradient of any loss.

DistributedDataParallel and FSDP divide by W. logit_scale's gradient is g true where local_loss=False; where
it is True, every process gets the mean over processes of open_clip's, which is what those wrappers make of
it.

A process that fails does not leave the others waiting for ever: they raise when its connection breaks or
the process group's time-out is over. Wrong arguments on one process, and arguments that differ between
processes, raise on every process.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dalle2_fast import functional
from dalle2_fast.losses import distributed
from dalle2_fast.ops import _checks

__all__ = ["ClipLoss", "SigLipLoss", "SoftClipLoss"]

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_EXCHANGES = ("bidir", "shift", "reduce", "gather")


class _DistributedLoss(nn.Module):
    """Which process of how many this is, and whether all of them agree on what they are about to do."""

    def __init__(self, cache_labels: bool, rank: int, world_size: int, impl: str) -> None:
        super().__init__()
        name = type(self).__name__
        if not isinstance(world_size, int) or world_size < 1:
            raise ValueError(f"{name}: world_size: expected an int >= 1, got {world_size!r}")
        if not isinstance(rank, int) or (world_size > 1 and not 0 <= rank < world_size):
            raise ValueError(f"{name}: rank: expected an int, 0 <= rank < {world_size}, got {rank!r}")
        self.cache_labels = cache_labels  # no labels are made: an own pair is known by its position
        self.rank = rank
        self.world_size = world_size
        self.impl = impl
        self._agreed: tuple | None = None

    def extra_repr(self) -> str:
        return f"rank={self.rank}, world_size={self.world_size}, impl={self.impl!r}"

    def _prepare(
        self, image: Tensor, text: Tensor, scale: Tensor | float, bias: Tensor | float | None, mode: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The arguments, checked here and against the other processes': one dtype, scalars as [] tensors."""
        self._check_group()
        problem = None
        try:
            _checks.contrastive(image, text, scale, bias)
        except (TypeError, ValueError) as error:
            problem = error
        self._check_agreement(image, mode, problem)

        dtype = torch.promote_types(image.dtype, text.dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32

        def scalar(value: Tensor | float) -> Tensor:
            if isinstance(value, Tensor):
                return value.to(image.device, wide).reshape(())
            return torch.full((), value, dtype=wide, device=image.device)  # no copy to wait for

        return image.to(dtype), text.to(dtype), scalar(scale), None if bias is None else scalar(bias)

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
        """Raises on every process where one has a problem or the processes' arguments differ.

        On a GPU reading the answer waits for the device, so it is asked for once per shape and dtype. A
        batch that changes on some processes only is then found by the collectives that do not match, or
        their time-out.
        """
        device = image.device if isinstance(image, Tensor) else torch.device("cpu")
        mine = (-1, 0, 0, mode)
        if problem is None:
            dtype = _DTYPES.index(image.dtype) if image.dtype in _DTYPES else len(_DTYPES)  # float8, ...
            mine = (*image.shape, dtype, mode)
            if device.type == "cuda" and mine == self._agreed:
                return
        theirs = distributed.gather(torch.tensor([mine], dtype=torch.int64, device=device))
        if problem is not None:
            raise problem
        name = type(self).__name__
        rows = theirs.tolist()
        failed = [rank for rank, (n, *_) in enumerate(rows) if n < 0]
        if failed:
            raise RuntimeError(f"{name}: the arguments on rank {failed[0]} are wrong; see its error")
        for rank, (n, width, dtype, its_mode) in enumerate(rows):
            if (n, width) != mine[:2]:
                raise ValueError(
                    f"image_features: expected [n, D] = {mine[:2]} on every rank as on rank {self.rank}, got "
                    f"{(n, width)} on rank {rank}"
                )
            if dtype != mine[2]:
                raise TypeError(f"image_features: expected {image.dtype} on every rank, not so on {rank}")
            if its_mode != mode:
                raise ValueError(f"{name}: rank {rank} was built with other options than rank {self.rank}")
        self._agreed = mine


class ClipLoss(_DistributedLoss):
    """The symmetric contrastive loss with the constructor and the call of open_clip's `ClipLoss`.

    Args:
        local_loss, gather_with_grad: which of open_clip's distributed losses, see the table of this module;
            they change nothing for world_size=1.
        cache_labels: accepted; there are no labels to cache.
        rank, world_size: of torch.distributed's default process group. It need not exist for world_size=1.
        use_horovod: only False.
        impl: "auto", "reference" or "fused", as in `functional.contrastive_loss`.

    The call takes this process's features [n, D], of equal shape on every process, in float32, float64,
    float16 or bfloat16, and returns a float32 scalar (float64 for float64 features). logit_bias cancels: it
    changes neither value nor gradients, its own gradient is zero. The gradients g that reach the loss may
    differ between processes; with local_loss=True only if all have one sign, else gradients are NaN.

    Every process has to take part in the backward pass, in every mode.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        impl: str = "auto",
    ) -> None:
        super().__init__(cache_labels, rank, world_size, impl)
        if use_horovod:
            raise NotImplementedError("ClipLoss: expected use_horovod = False, got True: no horovod support")
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.use_horovod = False

    def forward(
        self,
        image_features: Tensor,  # [n, D]
        text_features: Tensor,  # [n, D]
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        if self.world_size == 1:
            loss = functional.contrastive_loss(
                image_features, text_features, logit_scale, logit_bias, impl=self.impl
            )
        else:
            mode = 2 * bool(self.local_loss) + bool(self.gather_with_grad)
            image, text, scale, bias = self._prepare(
                image_features, text_features, logit_scale, logit_bias, mode
            )
            loss = distributed.ContrastiveLoss.apply(
                image, text, scale, self.local_loss, self.gather_with_grad, self.impl
            )
            loss = loss if bias is None else loss + 0 * bias
        return {"contrastive_loss": loss} if output_dict else loss


class SoftClipLoss(ClipLoss):
    """`ClipLoss` with soft targets, see `functional.soft_contrastive_loss`.

    With several processes each gathers images and texts and computes the loss of the whole batch;
    local_loss has to be False. A logit_bias cancels here too.
    """

    def forward(
        self,
        image_features: Tensor,  # [n, D]
        text_features: Tensor,  # [n, D]
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        if self.world_size > 1:
            if self.local_loss:
                raise NotImplementedError("SoftClipLoss: expected local_loss = False, got True")
            image_features, text_features, logit_scale, logit_bias = self._prepare(
                image_features, text_features, logit_scale, logit_bias, int(self.gather_with_grad)
            )
            image_features = distributed.Gather.apply(image_features, self.gather_with_grad)
            text_features = distributed.Gather.apply(text_features, self.gather_with_grad)
        loss = functional.soft_contrastive_loss(image_features, text_features, logit_scale, impl=self.impl)
        loss = loss if logit_bias is None else loss + 0 * torch.as_tensor(logit_bias).reshape(())
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(_DistributedLoss):
    """The pairwise sigmoid loss with the constructor and the call of open_clip's `SigLipLoss`.

    The value is that of the own images against every text, divided by n; its mean over processes is the
    loss of the batch. The gradients are those of the sum over processes of g times their losses, except
    that of the scale and the bias: g times the own loss's. They are made in the forward pass.

    Args:
        cache_labels: accepted; there are no labels to cache.
        rank, world_size: of torch.distributed's default process group. It need not exist for world_size=1.
        dist_impl: how the texts travel: "bidir" (the default: round the ring both ways, at most two of the
            others' text blocks at a time), "shift" (one way), "reduce" (from one process to all, in turn)
            or "gather" (all at once). Values and gradients are the same.
        impl: "auto", "reference" or "fused", as in `functional.sigmoid_loss`.

    The call takes features as `ClipLoss` does; logit_bias=None is 0. Every process has to take part in the
    backward pass.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        *,
        impl: str = "auto",
    ) -> None:
        super().__init__(cache_labels, rank, world_size, impl)
        self.dist_impl = dist_impl or "bidir"
        if self.dist_impl not in _EXCHANGES:
            names = ", ".join(map(repr, _EXCHANGES))
            raise ValueError(f"SigLipLoss: dist_impl: expected one of {names}, got {dist_impl!r}")

    def forward(
        self,
        image_features: Tensor,  # [n, D]
        text_features: Tensor,  # [n, D]
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        logit_bias = 0.0 if logit_bias is None else logit_bias
        if self.world_size == 1:
            loss = functional.sigmoid_loss(
                image_features, text_features, logit_scale, logit_bias, impl=self.impl
            )
        else:
            mode = _EXCHANGES.index(self.dist_impl)
            arguments = self._prepare(image_features, text_features, logit_scale, logit_bias, mode)
            tracked = torch.is_grad_enabled() and any(value.requires_grad for value in arguments)
            loss = distributed.SigmoidLoss.apply(*arguments, self.dist_impl, tracked, self.impl)
        return {"contrastive_loss": loss} if output_dict else loss
