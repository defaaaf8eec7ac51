"""What attention's forward and backward have in common: strided tiles, the one-pass softmax, splitting work.

A tile holds rows (queries or keys) of one (batch, head). Rows past the end and columns past the head width
are read as zeros, so they add nothing to a product. The scores of keys that must not be attended to become
-inf.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

# Streaming multiprocessors of the largest common GPU of each capability (A100, A10, RTX 4090, H100 and H200,
# B200, RTX 5090). A wrong number costs a part of a wave of programs, and does not change results.
MULTIPROCESSORS = {(8, 0): 108, (8, 6): 84, (8, 9): 128, (9, 0): 132, (10, 0): 148, (12, 0): 170}

SMALL = ((8, 6), (8, 9), (12, 0))  # a program has 99 KiB of shared memory; on the others 163 or more

# Arguments that Triton does not specialise on. It would compile one kernel for multiples of 16, one for 1 and
# one for all others. A mask's batch stride is its number of keys, or 0 for a batch of 1.
VARYING = ["heads", "queries", "keys", "image_keys", "parts", "whole", "size", "mask_batch"]


@triton.jit
def locate(program, parts, heads):
    """program -> (part, batch, head, batch * heads + head). Parts of one (batch, head) are adjacent."""
    pair = program // parts
    return program % parts, (pair // heads).to(tl.int64), (pair % heads).to(tl.int64), pair.to(tl.int64)


@triton.jit
def load_tile(
    base, row, rows, stride_row, stride_column,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, CHECKED: tl.constexpr,
):  # fmt: skip
    """Rows `row` of one (batch, head), [rows, BLOCK_D]. CHECKED: some rows may lie past the end."""
    if CHECKED:
        return load_rows(base, row, row < rows, stride_row, stride_column, WIDTH, BLOCK_D)
    else:
        column = tl.arange(0, BLOCK_D).to(tl.int64)
        address = base + row.to(tl.int64)[:, None] * stride_row + column[None, :] * stride_column
        if WIDTH < BLOCK_D:
            return tl.load(address, mask=column[None, :] < WIDTH, other=0.0)
        else:
            return tl.load(address)


@triton.jit
def load_rows(base, row, wanted, stride_row, stride_column, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows `row` of one (batch, head), [rows, BLOCK_D], with zeros in place of rows that are not `wanted`."""
    column = tl.arange(0, BLOCK_D)
    address = base + row.to(tl.int64)[:, None] * stride_row + column.to(tl.int64)[None, :] * stride_column
    inside = wanted[:, None]
    if WIDTH < BLOCK_D:
        inside = inside & (column[None, :] < WIDTH)
    return tl.load(address, mask=inside, other=0.0)


@triton.jit
def store_tile(
    base, value, row, rows, stride_row, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, CHECKED: tl.constexpr
):  # fmt: skip
    """Store rows of a tensor whose columns are adjacent, rounded once."""
    column = tl.arange(0, BLOCK_D)
    address = base + row.to(tl.int64)[:, None] * stride_row + column[None, :]
    value = value.to(base.dtype.element_ty)
    if CHECKED:
        tl.store(address, value, mask=(row[:, None] < rows) & (column[None, :] < WIDTH))
    elif WIDTH < BLOCK_D:
        tl.store(address, value, mask=column[None, :] < WIDTH)
    else:
        tl.store(address, value)


@triton.jit
def attended(mask, stride_mask, key, keys):
    """Which of `key` exist and, with a mask, may be attended to."""
    inside = key < keys
    if mask is not None:
        inside = inside & (tl.load(mask + key.to(tl.int64) * stride_mask, mask=inside, other=0) != 0)
    return inside


@triton.jit
def load_context(
    k, v, mask, keys, k_row, k_column, v_row, v_column, mask_key,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, KEYS_0: tl.constexpr, KEYS_1: tl.constexpr,
):  # fmt: skip
    """k_0, k_1, v_0, v_1 of the two parts of a short context, and which of their keys may be attended to."""
    key_0 = tl.arange(0, KEYS_0)
    key_1 = KEYS_0 + tl.arange(0, KEYS_1)
    attend_0 = attended(mask, mask_key, key_0, keys)
    attend_1 = attended(mask, mask_key, key_1, keys)
    k_0 = load_rows(k, key_0, attend_0, k_row, k_column, WIDTH, BLOCK_D)
    k_1 = load_rows(k, key_1, attend_1, k_row, k_column, WIDTH, BLOCK_D)
    v_0 = load_rows(v, key_0, attend_0, v_row, v_column, WIDTH, BLOCK_D)
    v_1 = load_rows(v, key_1, attend_1, v_row, v_column, WIDTH, BLOCK_D)
    return k_0, k_1, v_0, v_1, attend_0, attend_1


@triton.jit
def softmax(q, k_0, k_1, attend_0, attend_1, scale, CHECKED_KEYS: tl.constexpr, PRECISION: tl.constexpr):
    """p_0, p_1 = exp2(scale (s - max s)) of both parts of the keys, their sum, and scale max s."""
    s_0 = tl.dot(q, tl.trans(k_0), input_precision=PRECISION)
    s_1 = tl.dot(q, tl.trans(k_1), input_precision=PRECISION)
    if CHECKED_KEYS:
        s_0 = tl.where(attend_0[None, :], s_0, float("-inf"))
    s_1 = tl.where(attend_1[None, :], s_1, float("-inf"))
    top = tl.maximum(tl.max(s_0, 1), tl.max(s_1, 1))
    shift = tl.where(top == float("-inf"), 0.0, top) * scale
    p_0 = tl.exp2(s_0 * scale - shift[:, None])
    p_1 = tl.exp2(s_1 * scale - shift[:, None])
    return p_0, p_1, tl.sum(p_0, 1) + tl.sum(p_1, 1), shift


@triton.jit
def inverse(total):
    """1 / total, but 0 for a row without keys."""
    return tl.where(total == 0, 0.0, 1.0 / tl.where(total == 0, 1.0, total))


@triton.jit
def log_sum(shift, total):
    """log2(sum exp2(scale s)); +inf for a row without keys, whose recomputed probabilities are then 0."""
    return tl.where(total == 0, float("inf"), shift + tl.log2(tl.where(total == 0, 1.0, total)))


# ---------------------------------------------------------------------------------------------- host

LOG2_E = 1.4426950408889634  # exp(x) = exp2(LOG2_E x), and GPUs have an instruction for exp2
# scale * s - shift must be one fused operation; Triton 3.10 changes the default.
COMPILE = {"enable_fp_fusion": True}


KEY_PARTS = ((16, 16), (32, 16), (32, 32), (64, 16), (64, 32), (64, 64))


def padded(width: int) -> int:
    """Columns of a tile for this head width: a power of two, at least the 16 that a matrix product needs."""
    return max(16, triton.next_power_of_2(width))


def key_parts(keys: int) -> tuple[int, int]:
    """Sizes of the two parts of a short context.

    Tiles are powers of two: as one part, 77 keys (CLIP) or 81 (unCLIP) would cost as much as 128. As two
    parts they cost as much as 64 + 16 and 64 + 32.
    """
    return next(parts for parts in KEY_PARTS if keys <= sum(parts))


def short_checks(queries: int, rows: int, keys: int, masked: bool) -> dict[str, bool]:
    """What the short form checks in every tile. Without both checks it has 449 instructions, not 536 (sm_90).

    CHECKED_KEYS: not all of the first part of the keys may be attended to.
    CHECKED_ROWS: the last tile reaches past the last query.
    """
    return {"CHECKED_KEYS": masked or keys < key_parts(keys)[0], "CHECKED_ROWS": queries % rows != 0}


def is_resident(keys: int, image_keys: int | None, width: int, itemsize: int) -> bool:
    """Whether the forward kernel holds all keys on chip at once (the short form).

    128 keys and values of D = 128 take 64 of the 99 KiB of shared memory of smaller GPUs. With more keys the
    scores of 64 queries exceed the registers. Float32 operands, which tf32x3 splits into parts, do not fit.
    """
    return not image_keys and keys <= 128 and itemsize == 2


def is_recomputed(keys: int, image_keys: int | None, width: int, itemsize: int) -> bool:
    """Whether one backward kernel computes all gradients and needs no saved statistics.

    dK and dV stay in registers: 2 x 128 x 64 float32 numbers are a quarter of a multiprocessor's registers.
    """
    return is_resident(keys, image_keys, width, itemsize) and padded(width) <= 64


def capability(x: torch.Tensor) -> tuple[int, int]:
    """Compute capability of the device of x. The CPU of the interpreter counts as an H100."""
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else (9, 0)


def strides(x: torch.Tensor) -> tuple[int, ...]:
    """Strides of x, but 0 where the size is 1.

    The stride of such a dimension has no meaning, and 0 needs the same compiled kernel as the aligned stride
    of a larger size: one kernel serves all batch sizes.
    """
    *outer, last = (stride if size > 1 else 0 for size, stride in zip(x.shape, x.stride(), strict=True))
    return *outer, last if x.shape[-1] > 1 else 1


def mask_strides(mask: torch.Tensor | None) -> tuple[int, int]:
    return (0, 0) if mask is None else strides(mask)


def precision(dtype: torch.dtype) -> str:
    """input_precision of matrix products. float32 follows torch.set_float32_matmul_precision, as in torch.

    "highest" means three tf32 products on the tensor cores, which keep 22 bits of a factor. Triton's plain
    float32 product (ieee) spills: 7 KB of stack per thread for 64 queries and 80 keys.
    """
    if dtype != torch.float32:
        return "ieee"  # without effect for 16 bits
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def empty_heads(b: int, h: int, t: int, d: int, like: torch.Tensor) -> torch.Tensor:
    """[B, H, T, D] with the memory of [B, T, H, D], because a linear layer over H * D follows attention."""
    return like.new_empty((b, t, h, d)).transpose(1, 2)


def positive_scale(q: torch.Tensor, scale: float) -> tuple[torch.Tensor, float, float]:
    """(q, scale, sign) with scale > 0 and equal scores: kernels take the maximum of unscaled scores."""
    if scale > 0:
        return q, scale, 1.0
    sign = -1.0 if scale < 0 else 0.0
    return q * sign, abs(scale) or 1.0, sign


@functools.lru_cache(maxsize=1024)
def split(pairs: int, tiles: int, capability: tuple[int, int], resident: int, overhead: float) -> int:
    """Number of programs that share the tiles of one (batch, head).

    Programs run in waves of multiprocessors * resident. The choice minimises waves * (tiles per program +
    overhead). overhead is the other work of a program (load the keys, store its sums), measured in tiles.
    """
    slots = MULTIPROCESSORS.get(capability, 108) * resident
    cost = {}
    for parts in range(1, min(tiles, 64) + 1):
        waves = triton.cdiv(pairs * parts, slots)
        cost[parts] = waves * (triton.cdiv(tiles, parts) + overhead)
    return min(cost, key=cost.__getitem__, default=1)
