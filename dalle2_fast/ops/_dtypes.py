"""What references share: the dtype to compute in, a number per sample next to tensors of any rank, whether
autograd transforms the computation.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch.autograd import forward_ad


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for every other floating-point dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def per_sample(value: Tensor, like: Tensor) -> Tensor:
    """[B, ...] -> [B, ..., 1, 1], which broadcasts over the trailing dimensions of `like`."""
    return value.reshape(value.shape + (1,) * (like.dim() - value.dim()))


def is_transformed() -> bool:
    """Whether a forward-mode level (torch.autograd.forward_ad) or a transform of torch.func is active.

    The ops of torch.library have a rule for reverse mode only: forward mode would silently give tangents of
    0. Both levels belong to the process's current thread, so this looks at no tensor; it takes 0.1 us.
    """
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


# torch.compile evaluates it while tracing, where the transforms of the traced code are active. The public
# torch.compiler.assume_constant_result sets the same attribute, but imports torch._dynamo.
is_transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_forward_mode_alone() -> bool:
    """Whether the active transform is one level of forward mode: a jvp of torch.func, or forward_ad."""
    stack = torch._C._functorch.get_interpreter_stack()
    if stack:
        return len(stack) == 1 and stack[0].key() == TransformType.Jvp
    return forward_ad._current_level >= 0
