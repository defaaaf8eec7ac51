"""The gradient of attention to a short context (at most 128 keys, D <= 64, 16 bits): one kernel and a sum.

The formulas are in backward.py. P is recomputed for all keys at once, so delta is a sum over registers: there
are no saved statistics and no pass over out. dQ is stored once, and dK and dV stay in registers while a
program iterates over query tiles. Bytes: q, g and dQ once, 6 T D per head. `parts` programs share the queries
of a (batch, head); each stores its float32 sums, and a last kernel adds them in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _common
from ._common import (
    VARYING,
    inverse,
    load_context,
    load_tile,
    locate,
    softmax,
    store_tile,
)


@triton.jit(do_not_specialize=VARYING)
def _short_backward_kernel(
    dq, sums_k, sums_v, grad, q, k, v, mask, scale, softmax_scale, heads, queries, keys, parts,
    g_batch, g_head, g_row, g_column, q_batch, q_head, q_row, q_column,
    k_batch, k_head, k_row, k_column, v_batch, v_head, v_row, v_column, mask_batch, mask_key,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
    KEYS_0: tl.constexpr, KEYS_1: tl.constexpr, CHECKED_KEYS: tl.constexpr, CHECKED_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Query tiles part, part + parts, ... of one (batch, head). scale = softmax_scale * log2(e).

    Sums of dK / softmax_scale and of dV go to sums_k and sums_v [programs, BLOCK_D, KEYS_0 + KEYS_1]. They
    are stored in the layout of the registers, with padding: a transposition needs more registers than are
    free.
    """
    part, batch, head, pair = locate(tl.program_id(0), parts, heads)
    grad += batch * g_batch + head * g_head
    q += batch * q_batch + head * q_head
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    out_row = heads.to(tl.int64) * WIDTH
    dq += batch * queries * out_row + head * WIDTH
    if mask is not None:
        mask += batch * mask_batch

    k_0, k_1, v_0, v_1, attend_0, attend_1 = load_context(
        k, v, mask, keys, k_row, k_column, v_row, v_column, mask_key, WIDTH, BLOCK_D, KEYS_0, KEYS_1
    )
    # These are transposed: rows are the columns of a head, so that 16 keys still fill a matrix instruction.
    dk_0 = tl.zeros((BLOCK_D, KEYS_0), tl.float32)
    dk_1 = tl.zeros((BLOCK_D, KEYS_1), tl.float32)
    dv_0 = tl.zeros((BLOCK_D, KEYS_0), tl.float32)
    dv_1 = tl.zeros((BLOCK_D, KEYS_1), tl.float32)

    for tile in range(part, tl.cdiv(queries, BLOCK_T), parts):
        row = tile * BLOCK_T + tl.arange(0, BLOCK_T)
        q_tile = load_tile(q, row, queries, q_row, q_column, WIDTH, BLOCK_D, CHECKED_ROWS)
        g_tile = load_tile(grad, row, queries, g_row, g_column, WIDTH, BLOCK_D, CHECKED_ROWS)
        p_0, p_1, total, shift = softmax(
            q_tile, k_0, k_1, attend_0, attend_1, scale, CHECKED_KEYS, PRECISION
        )  # fmt: skip
        factor = inverse(total)
        p_0 *= factor[:, None]
        p_1 *= factor[:, None]
        dv_0 = tl.dot(tl.trans(g_tile), p_0.to(g_tile.dtype), dv_0, input_precision=PRECISION)
        dv_1 = tl.dot(tl.trans(g_tile), p_1.to(g_tile.dtype), dv_1, input_precision=PRECISION)
        dp_0 = tl.dot(g_tile, tl.trans(v_0), input_precision=PRECISION)
        dp_1 = tl.dot(g_tile, tl.trans(v_1), input_precision=PRECISION)
        delta = tl.sum(p_0 * dp_0, 1) + tl.sum(p_1 * dp_1, 1)
        ds_0 = (p_0 * (dp_0 - delta[:, None])).to(q_tile.dtype)
        ds_1 = (p_1 * (dp_1 - delta[:, None])).to(q_tile.dtype)
        dk_0 = tl.dot(tl.trans(q_tile), ds_0, dk_0, input_precision=PRECISION)
        dk_1 = tl.dot(tl.trans(q_tile), ds_1, dk_1, input_precision=PRECISION)
        dq_tile = tl.dot(ds_0, k_0, input_precision=PRECISION)
        dq_tile = tl.dot(ds_1, k_1, dq_tile, input_precision=PRECISION)
        store_tile(dq, dq_tile * softmax_scale, row, queries, out_row, WIDTH, BLOCK_D, CHECKED_ROWS)

    key_0 = tl.arange(0, KEYS_0)
    key_1 = KEYS_0 + tl.arange(0, KEYS_1)
    at = tl.program_id(0).to(tl.int64) * (BLOCK_D * (KEYS_0 + KEYS_1))
    at += tl.arange(0, BLOCK_D)[:, None] * (KEYS_0 + KEYS_1)
    tl.store(sums_k + at + key_0[None, :], dk_0)
    tl.store(sums_k + at + key_1[None, :], dk_1)
    tl.store(sums_v + at + key_0[None, :], dv_0)
    tl.store(sums_v + at + key_1[None, :], dv_1)


@triton.jit(do_not_specialize=VARYING)
def _sum_short_kernel(
    dk, dv, sums_k, sums_v, softmax_scale, heads, keys, parts,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dK and dV of BLOCK keys of one (batch, head): the sums of its programs, added in their order."""
    block, batch, head, pair = locate(tl.program_id(0), tl.cdiv(keys, BLOCK), heads)
    key = block * BLOCK + tl.arange(0, BLOCK)
    at = pair * parts * (BLOCK_D * KEYS) + tl.arange(0, BLOCK_D)[:, None] * KEYS + key[None, :]
    dk_tile = tl.zeros((BLOCK_D, BLOCK), tl.float32)
    dv_tile = tl.zeros((BLOCK_D, BLOCK), tl.float32)
    for _ in range(parts):
        dk_tile += tl.load(sums_k + at)
        dv_tile += tl.load(sums_v + at)
        at += BLOCK_D * KEYS
    out_row = heads.to(tl.int64) * WIDTH
    base = batch * keys * out_row + head * WIDTH
    store_tile(dk + base, tl.trans(dk_tile) * softmax_scale, key, keys, out_row, WIDTH, BLOCK_D, True)
    store_tile(dv + base, tl.trans(dv_tile), key, keys, out_row, WIDTH, BLOCK_D, True)


def _launch_config(keys: int, width: int, capability: tuple[int, int]) -> dict[str, int]:
    """Tile sizes, warps and pipeline stages, chosen by the registers of the compiled kernels."""
    block_d = _common.padded(width)
    keys_0, keys_1 = _common.key_parts(keys)
    # One program of 8 warps uses all registers of a multiprocessor. wgmma needs 16 queries per warp, for
    # which 216 registers (64 + 16 keys) or 255 (64 + 32, masked) are enough, also with a third pipeline stage
    # to prefetch q and g. With 128 keys, and with mma.sync, more than 32 queries spill. With D = 32, whose
    # products divide badly among warps, more than 16 spill; with a mask on sm_86 and 89 also 8 warps do. On
    # sm_100, where the sums are not in registers, 128 queries spill and 64 do not. On sm_120 with a mask 32
    # queries and 64 + 32 keys spill.
    rows, keys = 16, keys_0 + keys_1
    warps = 4 if block_d < 64 and capability in ((8, 6), (8, 9)) else 8
    if block_d == 64:
        chosen = {9: 128 if keys <= 96 else 32, 10: 64, 12: 32 if keys <= 80 else 16}
        rows = chosen.get(capability[0], 32)
    return {"WIDTH": width, "BLOCK_D": block_d, "KEYS_0": keys_0, "KEYS_1": keys_1, "BLOCK_T": rows,
            "num_warps": warps, "num_stages": 3 if rows == 128 else 2}  # fmt: skip


def short_backward(
    grad: Tensor,  # [B, H, T, D]
    q: Tensor,  # [B, H, T, D]
    k: Tensor,  # [B, H, S, D]
    v: Tensor,  # [B, H, S, D]
    mask: Tensor | None,  # bool [B, S]
    softmax_scale: float,  # > 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    b, h, t, d = q.shape
    s = k.shape[2]
    capability = _common.capability(q)
    config = _launch_config(s, d, capability)
    checks = _common.short_checks(t, config["BLOCK_T"], s, mask is not None)
    checks["CHECKED_ROWS"] |= mask is not None  # otherwise 64 + 32 masked keys spill (sm_90, Triton 3.9)
    parts = _common.split(b * h, triton.cdiv(t, config["BLOCK_T"]), capability, resident=1, overhead=1.0)
    keys = config["KEYS_0"] + config["KEYS_1"]
    dq = _common.empty_heads(b, h, t, d, q)
    dk, dv = _common.empty_heads(b, h, s, d, k), _common.empty_heads(b, h, s, d, k)
    sums_k, sums_v = q.new_empty((2, b * h * parts, config["BLOCK_D"], keys), dtype=torch.float32)
    _short_backward_kernel[(b * h * parts,)](
        dq, sums_k, sums_v, grad, q, k, v, mask, softmax_scale * _common.LOG2_E, softmax_scale,
        h, t, s, parts, *_common.strides(grad), *_common.strides(q), *_common.strides(k),
        *_common.strides(v), *_common.mask_strides(mask), **config, **checks,
        PRECISION=_common.precision(q.dtype), **_common.COMPILE,
    )  # fmt: skip
    block = 16  # divides the number of keys of every slot; 77 keys then have 3 keys of padding
    _sum_short_kernel[(b * h * triton.cdiv(s, block),)](
        dk, dv, sums_k, sums_v, softmax_scale, h, s, parts,
        WIDTH=d, BLOCK_D=config["BLOCK_D"], KEYS=keys, BLOCK=block, **_common.COMPILE,
    )  # fmt: skip
    return dq, dk, dv
