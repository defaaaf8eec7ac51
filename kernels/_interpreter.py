"""Whether Triton's interpreter computes with bfloat16, which it holds as bit patterns (Triton 3.6 to 3.9).

It multiplies and adds those patterns: an attention over bfloat16 is off by 8e8, without an error.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _product(out, a, b):
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at).to(tl.bfloat16), tl.load(b + at)).to(tl.bfloat16))


_is_right = False  # once bfloat16 was found to be right; the tests correct the interpreter after its import


def has_bfloat16() -> bool:
    """Whether conversions and products of bfloat16 are right, in a process that interprets kernels."""
    global _is_right
    _is_right = _is_right or _try_product()
    return _is_right


def _try_product() -> bool:
    with torch._C._DisableFuncTorch():  # Triton cannot read the tensors of a level of torch.func
        a, identity = torch.linspace(-1, 1, 256).reshape(16, 16), torch.eye(16, dtype=torch.bfloat16)
        out = torch.empty_like(identity)
        _product[(1,)](out, a, identity)
        return torch.equal(out, a.bfloat16())
