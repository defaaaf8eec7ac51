"""Muon: the momentum of each weight matrix is orthogonalised and then applied.

    m <- mu m + (1 - mu) g,   u = (1 - mu) g + mu m,
    W <- (1 - lr wd) W - 0.2 lr sqrt(max(rows, columns)) polar(u)

Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon. The factor 0.2 sqrt(max) gives updates the size
of AdamW's (Liu et al. 2025, arXiv 2502.16982), so that both use one learning rate. `torch.optim.Muon`
iterates in bfloat16 (50 times slower than float32 on CPUs without bf16 units) and does not accept convolution
kernels, of which a UNet is made; here a kernel [out, in, kh, kw] is the matrix [out, in * kh * kw].
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dalle2_fast.training.parallel.shards import like_shard, local, whole

# p(s) = a s + b s^3 + c s^5: five rounds take singular values in (0.01, 1) to about (0.7, 1.2).
QUINTIC = (3.4445, -4.7750, 2.0315)


def polar_factor(matrix: Tensor, rounds: int = 5) -> Tensor:
    """Approximately U V^T of matrix = U S V^T.

    The iteration runs on the small Gram matrix: with X_k = M_k X_0 and G_k = X_k X_k^T every M_k is a
    polynomial in G_0, so that only the first and the last product involve the long side.

    Args:
        matrix: float32 [rows, columns] or [batch, rows, columns].
        rounds: of the iteration.

    Example:
        >>> values = torch.linalg.svdvals(polar_factor(torch.diag(torch.tensor([3.0, 1.0, 0.5]))))
        >>> bool(((values > 0.6) & (values < 1.3)).all())
        True
    """
    if matrix.shape[-2] > matrix.shape[-1]:
        return polar_factor(matrix.mT, rounds).mT
    a, b, c = QUINTIC
    add_product = torch.addmm if matrix.ndim == 2 else torch.baddbmm
    start = matrix / matrix.flatten(-2).norm(dim=-1)[..., None, None].clamp_min(1e-12)
    gram = start @ start.mT
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    product = None
    for left in reversed(range(rounds)):
        step = add_product(gram, gram, gram, beta=b, alpha=c).add_(identity, alpha=a)
        product = step if product is None else step @ product
        if left:
            gram = step @ gram @ step
    return product @ start


class Muon(torch.optim.Optimizer):
    """Optimiser of hidden weights; embeddings and heads are better left to AdamW.

    Of sharded weights (FSDP) every process has a part of the momentum. The matrix of an update is gathered,
    and every process orthogonalises all of it: each element of the factor depends on the whole matrix.

    Args:
        params: parameters, each with two or more dimensions, or groups of them.
        lr: learning rate, of AdamW's size; a number, or a scalar tensor on the device of the parameters.
        momentum: in [0, 1).
        weight_decay: decoupled, as in AdamW.

    Raises:
        ValueError: a parameter has fewer than two dimensions.
    """

    def __init__(
        self, params, lr: float | Tensor = 1e-3, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim < 2:
                    came = tuple(parameter.shape)
                    raise ValueError(f"params: expected two or more dimensions, got shape {came}")

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One update of every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("closure: Muon takes none")
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for stack in stacked_by_shape(parameters):
                self._update(stack, **{name: group[name] for name in ("lr", "momentum", "weight_decay")})

    def _update(
        self, parameters: list[Tensor], lr: float | Tensor, momentum: float, weight_decay: float
    ) -> None:
        """One update of parameters whose matrices have one shape or its transpose."""
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        averages = [local(self.state[parameter]["momentum"]) for parameter in parameters]
        gradients = [local(parameter.grad) for parameter in parameters]
        torch._foreach_lerp_(averages, gradients, 1 - momentum)
        matrices = torch._foreach_lerp(gradients, averages, momentum)
        matrices = [whole(part, p).flatten(1) for part, p in zip(matrices, parameters, strict=True)]
        updates = polar_factors(matrices)
        size = 0.2 * max(matrices[0].shape) ** 0.5
        updates = [
            local(like_shard(update.view(p.shape), p)) for update, p in zip(updates, parameters, strict=True)
        ]
        parameters = [local(parameter) for parameter in parameters]
        torch._foreach_mul_(parameters, 1 - lr * weight_decay)
        if isinstance(lr, Tensor):  # alpha has to be a number, for which the host would wait
            torch._foreach_mul_(updates, lr * size)
            torch._foreach_sub_(parameters, updates)
        else:
            torch._foreach_add_(parameters, updates, alpha=-lr * size)


def stacked_by_shape(parameters: Sequence[Tensor]) -> list[list[Tensor]]:
    """Lists of parameters that are updated together: their matrices have one shape or its transpose."""
    together: dict[tuple, list[Tensor]] = {}
    for index, parameter in enumerate(parameters):
        rows, columns = len(parameter), math.prod(parameter.shape[1:])
        sides = min(rows, columns), max(rows, columns)
        key = index if updated_alone(parameter) else -1, parameter.device, parameter.dtype, *sides
        together.setdefault(key, []).append(parameter)
    return list(together.values())


def updated_alone(parameter: Tensor) -> bool:
    """On a GPU stacks save launches; on a CPU one matrix at a time is faster."""
    return parameter.device.type == "cpu"


def polar_factors(matrices: list[Tensor]) -> list[Tensor]:
    """`polar_factor` of each matrix, contiguous; all have one shape or its transpose and are stacked."""
    if len(matrices) == 1:
        return [polar_factor(matrices[0]).contiguous()]
    tall = [len(matrix) > matrix.shape[1] for matrix in matrices]
    turned = [matrix.T if turn else matrix for matrix, turn in zip(matrices, tall, strict=True)]
    factors = polar_factor(torch.stack(turned))
    return [(each.T if turn else each).contiguous() for each, turn in zip(factors, tall, strict=True)]
