"""Muon: momentum, orthogonalised per weight matrix, then applied.

    m <- mu m + (1 - mu) g,   u = (1 - mu) g + mu m,
    W <- (1 - lr wd) W - 0.2 lr sqrt(max(rows, columns)) polar(u)

Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon. The factor 0.2 sqrt(max) gives updates the size
of AdamW's (Liu et al. 2025, arXiv 2502.16982), so one learning rate serves both. `torch.optim.Muon` iterates
in bfloat16 (50 times slower than float32 on CPUs without bf16 units) and takes no convolution kernels, which
a UNet is made of; here a kernel [out, in, kh, kw] counts as the matrix [out, in * kh * kw].
"""

from __future__ import annotations

import torch
from torch import Tensor

# p(s) = a s + b s^3 + c s^5: five rounds take singular values in (0.01, 1) to about (0.7, 1.2).
QUINTIC = (3.4445, -4.7750, 2.0315)


def polar_factor(matrix: Tensor, rounds: int = 5) -> Tensor:
    """About U V^T of matrix = U S V^T, [rows, columns], float32.

    The iteration runs on the small Gram matrix: with X_k = M_k X_0 and G_k = X_k X_k^T every M_k is a
    polynomial in G_0, so only the first and the last product touch the long side.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return polar_factor(matrix.T, rounds).T
    a, b, c = QUINTIC
    start = matrix / matrix.norm().clamp_min(1e-12)
    gram = start @ start.T
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    product = None
    for left in reversed(range(rounds)):
        step = torch.addmm(gram, gram, gram, beta=b, alpha=c).add_(identity, alpha=a)
        product = step if product is None else step @ product
        if left:
            gram = step @ gram @ step
    return product @ start


class Muon(torch.optim.Optimizer):
    """Parameters with two or more dimensions (hidden weights; leave embeddings and heads to AdamW).

    lr, weight_decay: as for AdamW; momentum in [0, 1).
    """

    def __init__(self, params, lr: float = 1e-3, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
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
            mu = group["momentum"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                average = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                average.lerp_(parameter.grad, 1 - mu)
                update = polar_factor(parameter.grad.lerp(average, mu).flatten(1))
                size = 0.2 * max(update.shape) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.view_as(parameter), alpha=-group["lr"] * size)
