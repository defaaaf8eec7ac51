"""With P = softmax(scale q k^T) and g = d out:  dV = P^T g,  dP = g v^T,  dS = P (dP - delta),
delta = sum_keys(P dP) = sum_columns(out g),  dQ = scale dS k,  dK = scale dS^T q.

Short contexts (at most 128 keys, D <= 64, 16 bits) are in _short_backward.py. For all other cases there is
one kernel for dQ and delta, and one for dK and dV that runs once per pair of keys and values. They recompute
P from the saved log-sum-exp.

A context has few keys, so one program per key block would leave most of the GPU idle. Therefore `parts`
programs share the queries of a (batch, head), each stores its float32 sums, and a last kernel adds them in a
fixed order. There are no atomics: equal calls give equal bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _common
from ._common import VARYING, attended, load_rows, load_tile, locate, store_tile
from ._short_backward import short_backward


@triton.jit
def _store_sums(out, partial, value, part, parts, size, base, key, keys, row_stride, WIDTH: tl.constexpr,
                BLOCK_D: tl.constexpr):  # fmt: skip
    """Store a gradient of keys: in `out` if this program saw all queries, else in its slot of `partial`."""
    if parts == 1:
        store_tile(out + base, value, key, keys, row_stride, WIDTH, BLOCK_D, True)
    else:
        store_tile(partial + part * size + base, value, key, keys, row_stride, WIDTH, BLOCK_D, True)


@triton.jit
def _query_gradient_range(
    dq, q_tile, g_tile, lse, delta, k, v, mask, scale, first, last, keys, k_row, k_column, v_row, v_column,
    mask_key, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, CHECKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dS k over the keys from `first` up to, not including, `last`."""
    for start in range(first, last, BLOCK_S):
        key = start + tl.arange(0, BLOCK_S)
        if CHECKED:  # a masked key may be NaN, and 0 * NaN is NaN
            attend = attended(mask, mask_key, key, keys)
            k_tile = load_rows(k, key, attend, k_row, k_column, WIDTH, BLOCK_D)
            v_tile = load_rows(v, key, attend, v_row, v_column, WIDTH, BLOCK_D)
        else:
            k_tile = load_tile(k, key, keys, k_row, k_column, WIDTH, BLOCK_D, False)
            v_tile = load_tile(v, key, keys, v_row, v_column, WIDTH, BLOCK_D, False)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        s = s * scale - lse[:, None]
        if CHECKED:
            s = tl.where(attend[None, :], s, float("-inf"))
        p = tl.exp2(s)
        dp = tl.dot(g_tile, tl.trans(v_tile), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision=PRECISION)
    return dq


@triton.jit
def _query_gradient(
    dq, q_tile, g_tile, lse, delta, k, v, mask, scale, keys, k_row, k_column, v_row, v_column, mask_key,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    checked_from = 0
    if mask is None:
        checked_from = keys // BLOCK_S * BLOCK_S
        dq = _query_gradient_range(
            dq, q_tile, g_tile, lse, delta, k, v, mask, scale, 0, checked_from, keys,
            k_row, k_column, v_row, v_column, mask_key, WIDTH, BLOCK_D, BLOCK_S, False, PRECISION,
        )  # fmt: skip
    return _query_gradient_range(
        dq, q_tile, g_tile, lse, delta, k, v, mask, scale, checked_from, keys, keys,
        k_row, k_column, v_row, v_column, mask_key, WIDTH, BLOCK_D, BLOCK_S, True, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def _queries_kernel(
    dq, delta, grad, out, lse, q, k, v, mask, image_k, image_v, scale, softmax_scale,
    heads, queries, keys, image_keys,
    g_batch, g_head, g_row, g_column, o_batch, o_head, o_row, o_column, q_batch, q_head, q_row, q_column,
    k_batch, k_head, k_row, k_column, v_batch, v_head, v_row, v_column, mask_batch, mask_key,
    ik_batch, ik_head, ik_row, ik_column, iv_batch, iv_head, iv_row, iv_column,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ and delta of one tile of queries."""
    tile, batch, head, pair = locate(tl.program_id(0), tl.cdiv(queries, BLOCK_T), heads)
    row = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    q_tile = load_tile(
        q + batch * q_batch + head * q_head, row, queries, q_row, q_column, WIDTH, BLOCK_D, True
    )
    g_tile = load_tile(
        grad + batch * g_batch + head * g_head, row, queries, g_row, g_column, WIDTH, BLOCK_D, True
    )
    out_tile = load_tile(
        out + batch * o_batch + head * o_head, row, queries, o_row, o_column, WIDTH, BLOCK_D, True
    )
    row_delta = tl.sum(out_tile.to(tl.float32) * g_tile.to(tl.float32), 1)
    tl.store(delta + pair * queries + row, row_delta, mask=row < queries)
    row_lse = tl.load(lse + pair * queries + row, mask=row < queries, other=float("inf"))

    result = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    if mask is not None:
        mask += batch * mask_batch
    result = _query_gradient(
        result, q_tile, g_tile, row_lse, row_delta, k + batch * k_batch + head * k_head,
        v + batch * v_batch + head * v_head, mask, scale, keys, k_row, k_column, v_row, v_column, mask_key,
        WIDTH, BLOCK_D, BLOCK_S, PRECISION,
    )  # fmt: skip
    if image_k is not None:
        result = _query_gradient(
            result, q_tile, g_tile, row_lse, row_delta, image_k + batch * ik_batch + head * ik_head,
            image_v + batch * iv_batch + head * iv_head, None, scale, image_keys,
            ik_row, ik_column, iv_row, iv_column, 0, WIDTH, BLOCK_D, BLOCK_S, PRECISION,
        )  # fmt: skip
    out_row = heads.to(tl.int64) * WIDTH
    dq += batch * queries * out_row + head * WIDTH
    store_tile(dq, result * softmax_scale, row, queries, out_row, WIDTH, BLOCK_D, True)


@triton.jit(do_not_specialize=VARYING)
def _keys_kernel(
    dk, dv, partial_k, partial_v, grad, lse, delta, q, k, v, mask, scale, softmax_scale,
    heads, queries, keys, parts, size,
    g_batch, g_head, g_row, g_column, q_batch, q_head, q_row, q_column,
    k_batch, k_head, k_row, k_column, v_batch, v_head, v_row, v_column, mask_batch, mask_key,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of one block of keys from query tiles part, part + parts, ... (scores transposed)."""
    blocks = tl.cdiv(keys, BLOCK_S)
    program, batch, head, pair = locate(tl.program_id(0), blocks * parts, heads)
    part = program // blocks
    key = program % blocks * BLOCK_S + tl.arange(0, BLOCK_S)
    grad += batch * g_batch + head * g_head
    q += batch * q_batch + head * q_head
    lse += pair * queries
    delta += pair * queries
    if mask is not None:
        mask += batch * mask_batch
    attend = attended(mask, mask_key, key, keys)
    k_tile = load_rows(k + batch * k_batch + head * k_head, key, attend, k_row, k_column, WIDTH, BLOCK_D)
    v_tile = load_rows(v + batch * v_batch + head * v_head, key, attend, v_row, v_column, WIDTH, BLOCK_D)
    dk_tile = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    dv_tile = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)

    for tile in range(part, tl.cdiv(queries, BLOCK_T), parts):
        row = tile * BLOCK_T + tl.arange(0, BLOCK_T)
        q_tile = load_tile(q, row, queries, q_row, q_column, WIDTH, BLOCK_D, True)
        row_lse = tl.load(lse + row, mask=row < queries, other=float("inf"))
        s = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
        # Keys past the end have s = 0, which may exceed lse if all true scores are low. Hence tl.where.
        p = tl.exp2(tl.where(attend[:, None], s * scale - row_lse[None, :], float("-inf")))
        g_tile = load_tile(grad, row, queries, g_row, g_column, WIDTH, BLOCK_D, True)
        dv_tile = tl.dot(p.to(g_tile.dtype), g_tile, dv_tile, input_precision=PRECISION)
        row_delta = tl.load(delta + row, mask=row < queries, other=0.0)
        dp = tl.dot(v_tile, tl.trans(g_tile), input_precision=PRECISION)
        ds = p * (dp - row_delta[None, :])
        dk_tile = tl.dot(ds.to(q_tile.dtype), q_tile, dk_tile, input_precision=PRECISION)

    out_row = heads.to(tl.int64) * WIDTH
    base = batch * keys * out_row + head * WIDTH
    _store_sums(dk, partial_k, dk_tile * softmax_scale, part, parts, size, base, key, keys, out_row,
                WIDTH, BLOCK_D)  # fmt: skip
    _store_sums(dv, partial_v, dv_tile, part, parts, size, base, key, keys, out_row, WIDTH, BLOCK_D)


@triton.jit(do_not_specialize=VARYING)
def _sum_parts_kernel(dk, dv, partial_k, partial_v, parts, size, BLOCK: tl.constexpr):
    """dk = sum over parts of partial_k, in order; dv likewise."""
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = element < size
    sum_k = tl.zeros((BLOCK,), tl.float32)
    sum_v = tl.zeros((BLOCK,), tl.float32)
    offset = element
    for _ in range(parts):
        sum_k += tl.load(partial_k + offset, mask=inside, other=0.0)
        sum_v += tl.load(partial_v + offset, mask=inside, other=0.0)
        offset += size
    tl.store(dk + element, sum_k.to(dk.dtype.element_ty), mask=inside)
    tl.store(dv + element, sum_v.to(dv.dtype.element_ty), mask=inside)


def _launch_config(kernel: str, width: int, itemsize: int, capability: tuple[int, int]) -> dict[str, int]:
    """Configuration of the kernels "queries" and "keys", chosen by the registers of the compiled kernels."""
    block_d = _common.padded(width)
    large_head = block_d > 64
    config = {"WIDTH": width, "BLOCK_D": block_d, "num_stages": 2}
    if itemsize == 4:  # tf32x3: three products instead of one, with three times the operands
        rows, keys_of_tile = (64, 32) if kernel == "queries" else (32, 64)
        if large_head:
            rows, keys_of_tile = rows // 2, keys_of_tile // 2
            config["num_stages"] = 1
        return config | {"BLOCK_T": rows, "BLOCK_S": keys_of_tile, "num_warps": 2 if large_head else 4}
    if kernel == "queries":
        keys_of_tile = 32 if capability[0] == 12 and not large_head else 64  # 64 spill there with a mask
        return config | {"BLOCK_T": 64, "BLOCK_S": keys_of_tile, "num_warps": 4}
    # dK and dV of 64 keys with D = 128 fill the registers of 8 warps. With 64 queries of D <= 64 sm_120
    # spills; the other GPUs use at most 255 registers.
    rows = 32 if capability[0] == 12 and not large_head else 64
    return config | {"BLOCK_T": rows, "BLOCK_S": 64, "num_warps": 8 if large_head else 4}


def _key_gradients(k: Tensor, parts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised dk and dv, and the float32 sums of `parts` programs, which one part does not need."""
    b, h, s, d = k.shape
    shape = (parts, b, s, h, d) if parts > 1 else (0,)
    return (
        _common.empty_heads(b, h, s, d, k),
        _common.empty_heads(b, h, s, d, k),
        k.new_empty(shape, dtype=torch.float32),
        k.new_empty(shape, dtype=torch.float32),
    )


def _sum_parts(dk: Tensor, dv: Tensor, partial_k: Tensor, partial_v: Tensor, parts: int) -> None:
    if parts > 1 and dk.numel() > 0:
        block = 512  # 4 float32 numbers (16 bytes) per thread of 4 warps; 1024 spill
        _sum_parts_kernel[(triton.cdiv(dk.numel(), block),)](
            dk, dv, partial_k, partial_v, parts, dk.numel(), BLOCK=block, **_common.COMPILE
        )


def cross_attention_backward(
    grad: Tensor,  # [B, H, T, D]
    q: Tensor,  # [B, H, T, D]
    context_k: Tensor,  # [B, H, S, D]
    context_v: Tensor,  # [B, H, S, D]
    context_mask: Tensor | None,  # bool [B, S]
    image_k: Tensor | None,  # [B, H, T2, D]
    image_v: Tensor | None,  # [B, H, T2, D]
    out: Tensor | None,  # [B, H, T, D]; None in the short form
    lse: Tensor,  # float32 [B, H, T]; empty in the short form
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, context_k, context_v, image_k, image_v. Those of absent image keys have no elements."""
    if q.numel() == 0 or context_k.shape[2] == 0 and (image_k is None or image_k.numel() == 0):
        gradients = fake_backward(
            grad, q, context_k, context_v, context_mask, image_k, image_v, out, lse, softmax_scale
        )
        return tuple(gradient.zero_() for gradient in gradients)
    q, scale, sign = _common.positive_scale(q, softmax_scale)
    with torch.cuda.device_of(q):
        if out is None:
            dq, dk, dv = short_backward(grad, q, context_k, context_v, context_mask, scale)
            gradients = (dq, dk, dv, *_empty_gradients(q, image_k, image_v))  # no image keys: length 0
        else:
            gradients = _long(grad, q, context_k, context_v, context_mask, image_k, image_v, out, lse, scale)
    if sign != 1.0:
        gradients[0].mul_(sign)
    return gradients


def _long(grad, q, context_k, context_v, context_mask, image_k, image_v, out, lse, softmax_scale):
    b, h, t, d = q.shape
    s, t2 = context_k.shape[2], 0 if image_k is None else image_k.shape[2]
    scale = softmax_scale * _common.LOG2_E
    precision = _common.precision(q.dtype)
    capability = _common.capability(q)
    q_strides, g_strides = _common.strides(q), _common.strides(grad)
    dq = _common.empty_heads(b, h, t, d, q)
    delta = torch.empty_like(lse)

    config = _launch_config("queries", d, q.itemsize, capability)
    image = (None, None, (0,) * 8)
    if t2:
        image = (image_k, image_v, (*_common.strides(image_k), *_common.strides(image_v)))
    _queries_kernel[(b * h * triton.cdiv(t, config["BLOCK_T"]),)](
        dq, delta, grad, out, lse, q, context_k, context_v, context_mask, image[0], image[1],
        scale, softmax_scale, h, t, s, t2, *g_strides, *_common.strides(out), *q_strides,
        *_common.strides(context_k), *_common.strides(context_v),
        *_common.mask_strides(context_mask), *image[2],
        **config, PRECISION=precision, **_common.COMPILE,
    )  # fmt: skip

    gradients = []
    config = _launch_config("keys", d, q.itemsize, capability)
    for k, v, mask in ((context_k, context_v, context_mask), (image_k, image_v, None)):
        if k is None:
            gradients += _empty_gradients(q, k, v)
            continue
        keys = k.shape[2]
        blocks = triton.cdiv(keys, config["BLOCK_S"])
        tiles = triton.cdiv(t, config["BLOCK_T"])
        parts = _common.split(b * h * blocks, tiles, capability, resident=2, overhead=1.5)
        dk, dv, partial_k, partial_v = _key_gradients(k, parts)
        gradients += [dk, dv]
        if keys == 0:
            continue
        _keys_kernel[(b * h * blocks * parts,)](
            dk, dv, partial_k, partial_v, grad, lse, delta, q, k, v, mask, scale, softmax_scale,
            h, t, keys, parts, dk.numel(), *g_strides, *q_strides, *_common.strides(k),
            *_common.strides(v), *_common.mask_strides(mask), **config, PRECISION=precision,
            **_common.COMPILE,
        )  # fmt: skip
        _sum_parts(dk, dv, partial_k, partial_v, parts)
    return dq, *gradients


def fake_backward(grad, q, context_k, context_v, context_mask, image_k, image_v, out, lse, softmax_scale):
    return _empty_gradients(q, q, context_k, context_v, image_k, image_v)


def _empty_gradients(q: Tensor, *inputs: Tensor | None) -> tuple[Tensor, ...]:
    """An uninitialised gradient per input; an absent input has an empty one."""
    return tuple(q.new_empty(0) if x is None else _common.empty_heads(*x.shape, x) for x in inputs)
