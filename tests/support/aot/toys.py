"""Kernels with known resources and faults, which test_aot.py must see."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_kernel(x, y, out, n, scale, BLOCK: tl.constexpr):
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = position < n
    left = tl.load(x + position, mask=inside).to(tl.float32)
    right = tl.load(y + position, mask=inside).to(tl.float32)
    tl.store(out + position, left + right * scale, mask=inside)


@triton.jit
def matmul_kernel(x, y, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    row, column, inner = tl.arange(0, M)[:, None], tl.arange(0, N)[None], tl.arange(0, K)
    a = tl.load(x + row * K + inner[None])
    b = tl.load(y + inner[:, None] * N + column)
    tl.store(out + row * N + column, tl.dot(a, b))


@triton.jit
def float64_kernel(x, out, BLOCK: tl.constexpr):
    position = tl.arange(0, BLOCK)
    tl.store(out + position, tl.sqrt(tl.load(x + position).to(tl.float64)).to(tl.float32))


@triton.jit
def bfloat16_sum_kernel(x, out, BLOCK: tl.constexpr):
    position = tl.arange(0, BLOCK)
    value = tl.load(x + position)
    tl.store(out + position, value + value)
