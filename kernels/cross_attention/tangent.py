"""out of cross_attention and its tangent out' in one pass over the keys. With s = softmax_scale q k^T,

    s' = softmax_scale (q' k^T + q k'^T),  m = sum softmax(s) s',  out' = sum softmax(s) ((s' - m) v + v')

An online softmax as in forward.py, with a second accumulator. m is a running mean: where a tile of keys moves
it by d, d times the result so far is subtracted from the tangent so far. So no large sums cancel at the end,
as in sum p s' v - m out. Without tangents of the keys of a source, three products become two or less.

The op has the outputs and the gradient of cross_attention. Its third output, the tangent, has no gradient:
a backward pass goes through out, with the tangent detached, as in consistency and mean-flow training.

Source: the tangent of flash attention: Lu and Song, 2410.11081, section 4 (sCM).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import forward_ad

from .._op import define, differentiate, forward_mode
from . import _common
from ._common import VARYING, attended, inverse, load_rows, load_tile, locate, log_sum, store_tile
from .forward import KEYS, cross_attention, differentiate_attention, fake_forward, save_attention


@triton.jit
def _attend_range(
    out, tangent, mean, top, total, q, dq, k, v, dk, dv, mask, scale, softmax_scale, first, last, keys,
    k_row, k_column, v_row, v_column, dk_row, dk_column, dv_row, dv_column, mask_key,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, CHECKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Both sums over the keys from `first` up to, not including, `last`; dq, dk and dv are tangents."""
    for start in range(first, last, BLOCK_S):
        key = start + tl.arange(0, BLOCK_S)
        k_tile = load_tile(k, key, keys, k_row, k_column, WIDTH, BLOCK_D, CHECKED)
        s = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION)
        ds = tl.dot(dq, tl.trans(k_tile), input_precision=PRECISION)
        if dk is not None:
            dk_tile = load_tile(dk, key, keys, dk_row, dk_column, WIDTH, BLOCK_D, CHECKED)
            ds = tl.dot(q, tl.trans(dk_tile), ds, input_precision=PRECISION)
        if CHECKED:
            attend = attended(mask, mask_key, key, keys)
            s = tl.where(attend[None, :], s, float("-inf"))
            ds = tl.where(attend[None, :], ds, 0.0)  # a masked key may be NaN
            v_tile = load_rows(v, key, attend, v_row, v_column, WIDTH, BLOCK_D)
        else:
            v_tile = load_tile(v, key, keys, v_row, v_column, WIDTH, BLOCK_D, False)
        new_top = tl.maximum(top, tl.max(s, 1))
        finite_top = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(s * scale - (finite_top * scale)[:, None])
        shrink = tl.exp2((top - finite_top) * scale)
        total = total * shrink + tl.sum(p, 1)
        ds = ds * softmax_scale - mean[:, None]
        move = tl.sum(p * ds, 1) * inverse(total)
        out *= shrink[:, None]
        tangent = tangent * shrink[:, None] - move[:, None] * out
        weight = (p * (ds - move[:, None])).to(v_tile.dtype)
        tangent = tl.dot(weight, v_tile, tangent, input_precision=PRECISION)
        out = tl.dot(p.to(v_tile.dtype), v_tile, out, input_precision=PRECISION)
        if dv is not None:
            if CHECKED:
                dv_tile = load_rows(dv, key, attend, dv_row, dv_column, WIDTH, BLOCK_D)
            else:
                dv_tile = load_tile(dv, key, keys, dv_row, dv_column, WIDTH, BLOCK_D, False)
            tangent = tl.dot(p.to(dv_tile.dtype), dv_tile, tangent, input_precision=PRECISION)
        mean += move
        top = new_top
    return out, tangent, mean, top, total


@triton.jit
def _attend(
    out, tangent, mean, top, total, q, dq, k, v, dk, dv, mask, scale, softmax_scale, batch, head, keys,
    k_batch, k_head, k_row, k_column, v_batch, v_head, v_row, v_column,
    dk_batch, dk_head, dk_row, dk_column, dv_batch, dv_head, dv_row, dv_column, mask_key,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All keys of one pair. Without a mask only the last, partial tile needs checks."""
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    if dk is not None:
        dk += batch * dk_batch + head * dk_head
        dv += batch * dv_batch + head * dv_head
    checked_from = 0
    if mask is None:
        checked_from = keys // BLOCK_S * BLOCK_S
        out, tangent, mean, top, total = _attend_range(
            out, tangent, mean, top, total, q, dq, k, v, dk, dv, mask, scale, softmax_scale, 0, checked_from,
            keys, k_row, k_column, v_row, v_column, dk_row, dk_column, dv_row, dv_column, mask_key,
            WIDTH, BLOCK_D, BLOCK_S, False, PRECISION,
        )  # fmt: skip
    return _attend_range(
        out, tangent, mean, top, total, q, dq, k, v, dk, dv, mask, scale, softmax_scale, checked_from, keys,
        keys, k_row, k_column, v_row, v_column, dk_row, dk_column, dv_row, dv_column, mask_key,
        WIDTH, BLOCK_D, BLOCK_S, True, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def _tangent_kernel(
    out, tangent, lse, q, dq, k, v, dk, dv, mask, image_k, image_v, image_dk, image_dv, scale, softmax_scale,
    heads, queries, keys, image_keys,
    q_batch, q_head, q_row, q_column, dq_batch, dq_head, dq_row, dq_column,
    k_batch, k_head, k_row, k_column, v_batch, v_head, v_row, v_column,
    dk_batch, dk_head, dk_row, dk_column, dv_batch, dv_head, dv_row, dv_column, mask_batch, mask_key,
    ik_batch, ik_head, ik_row, ik_column, iv_batch, iv_head, iv_row, iv_column,
    idk_batch, idk_head, idk_row, idk_column, idv_batch, idv_head, idv_row, idv_column,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries against all keys. scale = softmax_scale * log2(e)."""
    tile, batch, head, pair = locate(tl.program_id(0), tl.cdiv(queries, BLOCK_T), heads)
    row = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    q_tile = load_tile(
        q + batch * q_batch + head * q_head, row, queries, q_row, q_column, WIDTH, BLOCK_D, True
    )
    dq_tile = load_tile(
        dq + batch * dq_batch + head * dq_head, row, queries, dq_row, dq_column, WIDTH, BLOCK_D, True
    )
    result = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    change = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    mean = tl.zeros((BLOCK_T,), tl.float32)
    top = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    if mask is not None:
        mask += batch * mask_batch
    result, change, mean, top, total = _attend(
        result, change, mean, top, total, q_tile, dq_tile, k, v, dk, dv, mask, scale, softmax_scale,
        batch, head, keys, k_batch, k_head, k_row, k_column, v_batch, v_head, v_row, v_column,
        dk_batch, dk_head, dk_row, dk_column, dv_batch, dv_head, dv_row, dv_column, mask_key,
        WIDTH, BLOCK_D, BLOCK_S, PRECISION,
    )  # fmt: skip
    if image_k is not None:
        result, change, mean, top, total = _attend(
            result, change, mean, top, total, q_tile, dq_tile, image_k, image_v, image_dk, image_dv, None,
            scale, softmax_scale, batch, head, image_keys,
            ik_batch, ik_head, ik_row, ik_column, iv_batch, iv_head, iv_row, iv_column,
            idk_batch, idk_head, idk_row, idk_column, idv_batch, idv_head, idv_row, idv_column, 0,
            WIDTH, BLOCK_D, BLOCK_S, PRECISION,
        )  # fmt: skip
    factor = inverse(total)[:, None]
    out_row = heads.to(tl.int64) * WIDTH
    base = batch * queries * out_row + head * WIDTH
    store_tile(out + base, result * factor, row, queries, out_row, WIDTH, BLOCK_D, True)
    store_tile(tangent + base, change * factor, row, queries, out_row, WIDTH, BLOCK_D, True)
    if lse is not None:
        tl.store(lse + pair * queries + row, log_sum(top * scale, total), mask=row < queries)


def _launch_config(width: int, itemsize: int) -> dict[str, int]:
    """Tile sizes, warps and pipeline stages, chosen by the registers of the compiled kernels.

    A thread holds two accumulators and two tiles of scores, twice those of the forward kernel. Hence few keys
    for wide heads. With 32 keys D = 32 spills on sm_80, and D = 128 with all tangents on sm_90.
    """
    block_d = _common.padded(width)
    large_head = block_d > 64
    config = {"WIDTH": width, "BLOCK_D": block_d}
    if itemsize == 4:  # tf32x3: three products instead of one, with three times the operands
        rows, warps = (16, 2) if large_head else (64, 4)
        return config | {"BLOCK_T": rows, "BLOCK_S": 16, "num_warps": warps, "num_stages": 1}
    config |= {"BLOCK_T": 64, "BLOCK_S": min(64, 2048 // block_d), "num_stages": 2}
    return config | {"num_warps": 8 if large_head else 4}


def _tangents(k: Tensor | None, v: Tensor | None, dk: Tensor | None, dv: Tensor | None) -> tuple:
    """dk and dv, with zeros in place of one that is absent; None if both are."""
    if dk is None and dv is None:
        return None, None
    return _or_zeros(dk, k), _or_zeros(dv, v)


def _or_zeros(tangent: Tensor | None, like: Tensor) -> Tensor:
    return like.new_zeros(()).expand_as(like) if tangent is None else tangent


def _strides(*tensors: Tensor | None) -> list[int]:
    return [stride for x in tensors for stride in ((0,) * 4 if x is None else _common.strides(x))]


def _run(
    q: Tensor,  # [B, H, T, D]
    context_k: Tensor,  # [B, H, S, D]
    context_v: Tensor,  # [B, H, S, D]
    context_mask: Tensor | None,  # bool [B, S]
    image_k: Tensor | None,  # [B, H, T2, D]
    image_v: Tensor | None,  # [B, H, T2, D]
    dq: Tensor | None,  # the tangents: shapes and dtype of q, context_k, context_v, image_k and image_v
    dk: Tensor | None,
    dv: Tensor | None,
    image_dk: Tensor | None,
    image_dv: Tensor | None,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse as in forward.py, and the tangent of out."""
    b, h, t, d = q.shape
    out, lse, tangent = _fake(q, context_k, context_v, context_mask, image_k, image_v)
    if out.numel() == 0:
        return out, lse, tangent
    dq, scale, sign = _common.positive_scale(_or_zeros(dq, q), softmax_scale)
    if sign != 1.0:
        q = q * sign
    if image_k is not None and image_k.shape[2] == 0:
        image_k = image_v = image_dk = image_dv = None
    dk, dv = _tangents(context_k, context_v, dk, dv)
    image_dk, image_dv = _tangents(image_k, image_v, image_dk, image_dv)
    config = _launch_config(d, q.itemsize)
    with torch.cuda.device_of(q):
        _tangent_kernel[(b * h * triton.cdiv(t, config["BLOCK_T"]),)](
            out, tangent, lse if lse.numel() > 0 else None, q, dq, context_k, context_v, dk, dv, context_mask,
            image_k, image_v, image_dk, image_dv, scale * _common.LOG2_E, scale,
            h, t, context_k.shape[2], 0 if image_k is None else image_k.shape[2],
            *_strides(q, dq, context_k, context_v, dk, dv), *_common.mask_strides(context_mask),
            *_strides(image_k, image_v, image_dk, image_dv),
            **config, PRECISION=_common.precision(q.dtype), **_common.COMPILE,
        )  # fmt: skip
    return out, lse, tangent


def _fake(q, context_k, context_v, context_mask, image_k, image_v, *_):
    out, lse = fake_forward(q, context_k, context_v, context_mask, image_k, image_v, 1.0)
    return out, lse, _common.empty_heads(*out.shape, q)


_TANGENTS = "Tensor? dq, Tensor? dk, Tensor? dv, Tensor? image_dk, Tensor? image_dv"
cross_attention_jvp = define(
    f"cross_attention_jvp(Tensor q, {KEYS}, {_TANGENTS}, float softmax_scale) -> (Tensor, Tensor, Tensor)",
    run=_run,
    fake=_fake,
)


def _save(ctx, inputs, output) -> None:
    save_attention(ctx, (*inputs[:6], inputs[-1]), output[:2])


def _differentiate(ctx, grad, grad_lse, grad_tangent):
    if grad_tangent is not None:
        raise NotImplementedError(
            "cross_attention: the kernel has no derivative of its tangent (reverse over forward mode); "
            'detach the tangent, or use impl="reference"'
        )
    *gradients, _ = differentiate_attention(ctx, grad, grad_lse)
    return *gradients, *(None,) * 6


differentiate(cross_attention_jvp, save=_save, backward=_differentiate)


def cross_attention_forward_mode(
    q: Tensor,
    context_k: Tensor,
    context_v: Tensor,
    context_mask: Tensor | None,
    image_k: Tensor | None,
    image_v: Tensor | None,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    """The outputs of cross_attention, where out carries its tangent, at the active level of forward mode."""
    inputs = (q, context_k, context_v, image_k, image_v)
    duals = [(None, None) if x is None else forward_ad.unpack_dual(x) for x in inputs]
    (q, k, v, image_k, image_v), tangents = zip(*duals, strict=True)
    primals = (q, k, v, context_mask, image_k, image_v)
    if all(tangent is None for tangent in tangents):
        return cross_attention(*primals, softmax_scale)
    out, lse, tangent = cross_attention_jvp(*primals, *tangents, softmax_scale)
    return forward_ad.make_dual(out, tangent), lse


forward_mode["cross_attention"] = cross_attention_forward_mode
