"""out = softmax(softmax_scale q [context_k; image_k]^T) [context_v; image_v], forward and registration.

q is [B, H, T, D]. Keys and values are [B, H, S, D] of a context, optionally with a mask [B, S], and
optionally [B, H, T2, D] of the image itself. The two pairs are passed as they are, without a concatenation,
with any strides. There are two forms:

- short: a context of at most 128 keys, no image keys, 16 bits (cross-attention). The whole context stays on
  chip, the softmax takes one pass, and up to D = 64 nothing is saved for the backward pass. A program
  iterates over query tiles and loads the context once. Bytes: q and out once. B16 H10 T4096 S77 D64 in
  bfloat16: 168 + 3 MB.
- long: all other cases. An online softmax over the keys of the context, then over those of the image. It
  saves lse = log2(sum exp2) of each row. It is bound by matrix products: 4 T (S + T2) D operations per head.
  Where there are too few tiles of queries for the GPU, several programs share the keys of one (_split.py).

Scores, softmax and sums are float32; probabilities are rounded to the dtype of v for the second product. A
query that may attend to no key gives zeros, and zero gradients. Masked keys and values may be NaN: they are
not read where a product with a probability of 0 follows, and zeros stand in their place.

The op takes float16, bfloat16 or float32 and D <= 128. It runs in the dtype of its inputs, which must be one;
under autocast the public function casts q, k and v to the autocast dtype. Float32 products follow
torch.set_float32_matmul_precision. The memory of the result is that of [B, T, H, D], so that merging the
heads is a view. The gradient is in backward.py.

Source: Vaswani et al., 1706.03762; the online softmax: Milakov and Gimelshein, 1805.02867.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import forward_ad

from .._op import define, differentiate
from . import _common
from ._common import (
    VARYING,
    attended,
    inverse,
    load_context,
    load_rows,
    load_tile,
    locate,
    log_sum,
    softmax,
    store_tile,
)
from ._split import MERGED_ROWS, merge_kernel, plan
from .backward import cross_attention_backward, fake_backward


@triton.jit(do_not_specialize=VARYING)
def _short_forward_kernel(
    out, lse, q, k, v, mask, scale, heads, queries, keys, parts,
    q_batch, q_head, q_row, q_column, k_batch, k_head, k_row, k_column, v_batch, v_head, v_row, v_column,
    mask_batch, mask_key,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
    KEYS_0: tl.constexpr, KEYS_1: tl.constexpr, CHECKED_KEYS: tl.constexpr, CHECKED_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Query tiles part, part + parts, ... of one (batch, head) against a context that stays on chip."""
    part, batch, head, pair = locate(tl.program_id(0), parts, heads)
    q += batch * q_batch + head * q_head
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    out_row = heads.to(tl.int64) * WIDTH
    out += batch * queries * out_row + head * WIDTH
    if mask is not None:
        mask += batch * mask_batch

    k_0, k_1, v_0, v_1, attend_0, attend_1 = load_context(
        k, v, mask, keys, k_row, k_column, v_row, v_column, mask_key, WIDTH, BLOCK_D, KEYS_0, KEYS_1
    )

    for tile in range(part, tl.cdiv(queries, BLOCK_T), parts):
        row = tile * BLOCK_T + tl.arange(0, BLOCK_T)
        q_tile = load_tile(q, row, queries, q_row, q_column, WIDTH, BLOCK_D, CHECKED_ROWS)
        p_0, p_1, total, shift = softmax(
            q_tile, k_0, k_1, attend_0, attend_1, scale, CHECKED_KEYS, PRECISION
        )  # fmt: skip
        result = tl.dot(p_0.to(v_0.dtype), v_0, input_precision=PRECISION)
        result = tl.dot(p_1.to(v_1.dtype), v_1, result, input_precision=PRECISION)
        result *= inverse(total)[:, None]
        store_tile(out, result, row, queries, out_row, WIDTH, BLOCK_D, CHECKED_ROWS)
        if lse is not None:
            tl.store(lse + pair * queries + row, log_sum(shift, total), mask=row < queries)


@triton.jit
def _attend_range(
    result, top, total, q_tile, k, v, mask, scale, first, last, keys,
    k_row, k_column, v_row, v_column, mask_key,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, CHECKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The online softmax over the keys from `first` up to, not including, `last`."""
    for start in range(first, last, BLOCK_S):
        key = start + tl.arange(0, BLOCK_S)
        k_tile = load_tile(k, key, keys, k_row, k_column, WIDTH, BLOCK_D, CHECKED)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        if CHECKED:
            attend = attended(mask, mask_key, key, keys)
            s = tl.where(attend[None, :], s, float("-inf"))
            v_tile = load_rows(v, key, attend, v_row, v_column, WIDTH, BLOCK_D)
        else:
            v_tile = load_tile(v, key, keys, v_row, v_column, WIDTH, BLOCK_D, False)
        new_top = tl.maximum(top, tl.max(s, 1))
        finite_top = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(s * scale - (finite_top * scale)[:, None])
        # top * scale - shift would be fused, and give half an ulp of a large score where it should give 0.
        shrink = tl.exp2((top - finite_top) * scale)
        total = total * shrink + tl.sum(p, 1)
        result = tl.dot(p.to(v_tile.dtype), v_tile, result * shrink[:, None], input_precision=PRECISION)
        top = new_top
    return result, top, total


@triton.jit
def _attend(
    result, top, total, q_tile, k, v, mask, scale, first, last, keys, k_row, k_column, v_row, v_column,
    mask_key, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """The keys of one pair from `first`, a multiple of BLOCK_S, up to, not including, `last`.

    Without a mask only the last, partial tile needs checks. Without SPLIT the range is all keys; to compute
    it at run time took 157 registers in place of 128 (sm_90, 64 queries, D = 64).
    """
    checked_from = first
    if mask is None:
        checked_from = keys // BLOCK_S * BLOCK_S
        if SPLIT:
            checked_from = tl.maximum(first, tl.minimum(last, checked_from))
        result, top, total = _attend_range(
            result, top, total, q_tile, k, v, mask, scale, first, checked_from, keys,
            k_row, k_column, v_row, v_column, mask_key, WIDTH, BLOCK_D, BLOCK_S, False, PRECISION,
        )  # fmt: skip
    return _attend_range(
        result, top, total, q_tile, k, v, mask, scale, checked_from, last, keys,
        k_row, k_column, v_row, v_column, mask_key, WIDTH, BLOCK_D, BLOCK_S, True, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def _long_forward_kernel(
    out, lse, sums, statistics, q, k, v, mask, image_k, image_v, scale, heads, queries, keys, image_keys,
    whole, parts,
    q_batch, q_head, q_row, q_column, k_batch, k_head, k_row, k_column, v_batch, v_head, v_row, v_column,
    mask_batch, mask_key,
    ik_batch, ik_head, ik_row, ik_column, iv_batch, iv_head, iv_row, iv_column,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries against any number of keys or, from tile `whole` on, against a part of them."""
    program = tl.program_id(0)
    context_first = 0
    context_last = keys
    image_first = 0
    image_last = image_keys
    slot = program - whole  # of the results of a part of the keys
    if sums is not None:
        if slot >= 0:
            program = whole + slot // parts
            part = slot % parts
            context_blocks = tl.cdiv(keys, BLOCK_S)
            blocks = context_blocks + tl.cdiv(image_keys, BLOCK_S)
            first = part * blocks // parts
            last = (part + 1) * blocks // parts
            context_first = tl.minimum(first, context_blocks) * BLOCK_S
            context_last = tl.minimum(last * BLOCK_S, keys)
            image_first = tl.maximum(first - context_blocks, 0) * BLOCK_S
            image_last = tl.minimum(tl.maximum(last - context_blocks, 0) * BLOCK_S, image_keys)
    tile, batch, head, pair = locate(program, tl.cdiv(queries, BLOCK_T), heads)
    row = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    q += batch * q_batch + head * q_head
    q_tile = load_tile(q, row, queries, q_row, q_column, WIDTH, BLOCK_D, True)

    result = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    top = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    if mask is not None:
        mask += batch * mask_batch
    result, top, total = _attend(
        result, top, total, q_tile, k, v, mask, scale, context_first, context_last, keys,
        k_row, k_column, v_row, v_column, mask_key, WIDTH, BLOCK_D, BLOCK_S, PRECISION, sums is not None,
    )  # fmt: skip
    if image_k is not None:
        image_k += batch * ik_batch + head * ik_head
        image_v += batch * iv_batch + head * iv_head
        result, top, total = _attend(
            result, top, total, q_tile, image_k, image_v, None, scale, image_first, image_last, image_keys,
            ik_row, ik_column, iv_row, iv_column, 0, WIDTH, BLOCK_D, BLOCK_S, PRECISION, sums is not None,
        )  # fmt: skip

    if sums is not None and slot >= 0:
        within = tl.arange(0, BLOCK_T)
        here = statistics + slot.to(tl.int64) * (2 * BLOCK_T) + within
        tl.store(here, top * scale)
        tl.store(here + BLOCK_T, total)
        there = sums + slot.to(tl.int64) * (BLOCK_T * BLOCK_D)
        tl.store(there + within[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :], result)
    else:
        out_row = heads.to(tl.int64) * WIDTH
        out += batch * queries * out_row + head * WIDTH
        store_tile(out, result * inverse(total)[:, None], row, queries, out_row, WIDTH, BLOCK_D, True)
        tl.store(lse + pair * queries + row, log_sum(top * scale, total), mask=row < queries)


def _short_config(keys: int, width: int, capability: tuple[int, int]) -> dict[str, int]:
    """Tile sizes, warps and pipeline stages, chosen by registers and shared memory of the compiled kernels.

    Each warp takes 16 queries: more than BLOCK_T / 16 warps would repeat work.
    """
    block_d = _common.padded(width)
    keys_0, keys_1 = _common.key_parts(keys)
    # Bound by memory, so programs are small: four run on a multiprocessor (94 registers, 52 KiB for 64 + 16
    # keys). Two pipeline stages leave no time to prefetch: 69 us; three take 56, four 67, and three with 128
    # queries and 8 warps 65 (H200, B16 H10 T4096 S77 D64, with all checks). D > 64 needs the registers of 8
    # warps, and 99 KiB of shared memory do not hold 128 of its queries.
    rows, warps = (64, 4) if block_d <= 64 else (64 if capability in _common.SMALL else 128, 8)
    stages = 3 if capability[0] == 9 and block_d <= 64 else 2
    return {"WIDTH": width, "BLOCK_D": block_d, "KEYS_0": keys_0, "KEYS_1": keys_1, "BLOCK_T": rows,
            "num_warps": warps, "num_stages": stages}  # fmt: skip


def _long_tiles(queries: int, width: int, itemsize: int, capability: tuple[int, int]) -> tuple:
    """Possible (queries of a tile, time of one tile of keys relative to 64 queries), for `plan`.

    Each program reads all keys: large tiles halve that traffic, small tiles fill the GPU for small images. On
    sm_90 `plan` chooses by the number of tiles, but for more than 16x16 tokens only: one compiled kernel
    serves all batches of smaller images.
    """
    large_head = _common.padded(width) > 64
    if itemsize == 4:  # tf32x3: three products instead of one, with three times the operands
        return ((32 if large_head else 64, 1.0),)
    if large_head or queries > 256 and capability[0] != 9:
        return ((128, 2.0),)
    return ((64, 1.0), (128, 1.75)) if queries > 256 else ((64, 1.0),)


def _long_config(rows: int, width: int, itemsize: int, capability: tuple[int, int]) -> dict[str, int]:
    """Keys of a tile, warps and pipeline stages for tiles of `rows` queries.

    On sm_90 a multiprocessor runs two programs of 128 queries and 4 warps (255 registers), but one of 8 warps
    (180 registers). A third pipeline stage makes prefetching possible.
    """
    block_d = _common.padded(width)
    large_head = block_d > 64
    config = {"WIDTH": width, "BLOCK_D": block_d, "BLOCK_T": rows, "num_stages": 2}
    if itemsize == 4:
        return config | {"BLOCK_S": 16 if large_head else 32, "num_warps": 2 if large_head else 4}
    config |= {"BLOCK_S": 64, "num_warps": 8 if rows == 128 else 4}
    if capability[0] == 9 and not large_head:
        config |= {"num_warps": 4, "num_stages": 3}
    elif capability == (8, 0) and block_d <= 32:
        config["num_stages"] = 3  # two stages make ptxas choose 128 registers, and spill
    return config


def _forward(
    q: Tensor,
    context_k: Tensor,
    context_v: Tensor,
    context_mask: Tensor | None,
    image_k: Tensor | None,
    image_v: Tensor | None,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    b, h, t, d = q.shape
    s, t2 = context_k.shape[2], 0 if image_k is None else image_k.shape[2]
    out, lse = fake_forward(q, context_k, context_v, context_mask, image_k, image_v, softmax_scale)
    if out.numel() == 0:
        return out, lse
    q, scale, _ = _common.positive_scale(q, softmax_scale)
    scale *= _common.LOG2_E
    capability = _common.capability(q)
    common = (
        *_common.strides(q), *_common.strides(context_k), *_common.strides(context_v),
        *_common.mask_strides(context_mask),
    )  # fmt: skip
    options = {"PRECISION": _common.precision(q.dtype), **_common.COMPILE}
    with torch.cuda.device_of(q):
        if _common.is_resident(s, t2, d, q.itemsize):
            config = _short_config(s, d, capability)
            # Four programs run on a multiprocessor. With resident=2 in the model of `split` they end closer
            # together: 56.3 us against 57.0 (H200, B16 H10 T4096 S77 D64).
            tiles = triton.cdiv(t, config["BLOCK_T"])
            parts = _common.split(b * h, tiles, capability, resident=2, overhead=1.0)
            checks = _common.short_checks(t, config["BLOCK_T"], s, context_mask is not None)
            _short_forward_kernel[(b * h * parts,)](
                out, lse if lse.numel() > 0 else None, q, context_k, context_v, context_mask, scale,
                h, t, s, parts, *common, **config, **checks, **options,
            )  # fmt: skip
        else:
            image = (image_k, image_v) if t2 else (None, None)
            keys = (context_k, context_v, context_mask, *image)
            _launch_long(out, lse, q, *keys, scale, capability, common, options)
    return out, lse


def _launch_long(out, lse, q, k, v, mask, image_k, image_v, scale, capability, strides, options) -> None:
    """The long form, in one launch or, if `plan` splits the keys of some tiles, in two."""
    b, h, t, d = q.shape
    s, t2, image_strides = k.shape[2], 0, (0,) * 8
    if image_k is not None:
        t2, image_strides = image_k.shape[2], (*_common.strides(image_k), *_common.strides(image_v))
    tiles = _long_tiles(t, d, q.itemsize, capability)
    block_s = _long_config(tiles[0][0], d, q.itemsize, capability)["BLOCK_S"]
    blocks = triton.cdiv(s, block_s) + triton.cdiv(t2, block_s)
    rows, whole, parts = plan(b * h, t, blocks, tiles, capability)
    config = _long_config(rows, d, q.itemsize, capability)
    shared = b * h * triton.cdiv(t, rows) - whole  # tiles whose keys are split
    sums = statistics = None
    if shared:
        sums = q.new_empty((shared * parts, rows, config["BLOCK_D"]), dtype=torch.float32)
        statistics = q.new_empty((shared * parts, 2, rows), dtype=torch.float32)
    _long_forward_kernel[(whole + shared * parts,)](
        out, lse, sums, statistics, q, k, v, mask, image_k, image_v, scale, h, t, s, t2, whole, parts,
        *strides, *image_strides, **config, **options,
    )  # fmt: skip
    if shared:
        merge_kernel[(shared * rows // MERGED_ROWS,)](
            out, lse, sums, statistics, h, t, whole, parts, WIDTH=d, BLOCK_D=config["BLOCK_D"], BLOCK_T=rows,
            ROWS=MERGED_ROWS, **_common.COMPILE,
        )  # fmt: skip


def _is_recomputed(q: Tensor, context_k: Tensor, image_k: Tensor | None) -> bool:
    image_keys = None if image_k is None else image_k.shape[2]
    return _common.is_recomputed(context_k.shape[2], image_keys, q.shape[3], q.itemsize)


def fake_forward(q, context_k, context_v, context_mask, image_k, image_v, softmax_scale):
    b, h, t, d = q.shape
    rows = 0 if _is_recomputed(q, context_k, image_k) else t
    return _common.empty_heads(b, h, t, d, q), q.new_empty((b, h, rows), dtype=torch.float32)


KEYS = "Tensor context_k, Tensor context_v, Tensor? context_mask, Tensor? image_k, Tensor? image_v"
cross_attention = define(
    f"cross_attention(Tensor q, {KEYS}, float softmax_scale) -> (Tensor, Tensor)",
    run=_forward,
    fake=fake_forward,
)
_backward = define(
    f"cross_attention_backward(Tensor grad, Tensor q, {KEYS}, Tensor? out, Tensor lse, float softmax_scale)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    run=cross_attention_backward,
    fake=fake_backward,
)


def save_attention(ctx, inputs, output) -> None:
    q, context_k, context_v, context_mask, image_k, image_v, ctx.softmax_scale = inputs
    out, lse = output
    ctx.set_materialize_grads(False)  # lse has no gradient
    out = None if _is_recomputed(q, context_k, image_k) else out
    ctx.save_for_backward(q, context_k, context_v, context_mask, image_k, image_v, out, lse)


def differentiate_attention(ctx, grad, grad_lse):
    if grad is None:
        return (None,) * 7
    if forward_ad._current_level >= 0:  # the gradient would lose its tangent
        raise NotImplementedError(
            "cross_attention: the kernel has no derivative of its gradient (forward over reverse mode); run "
            'the backward pass after the forward-mode level, or use impl="reference"'
        )
    saved = ctx.saved_tensors  # once: checkpointing recomputes them, and then refuses another access
    dq, dk, dv, d_image_k, d_image_v = _backward(grad, *saved, ctx.softmax_scale)
    if saved[4] is None:
        d_image_k = d_image_v = None
    return dq, dk, dv, None, d_image_k, d_image_v, None


differentiate(cross_attention, save=save_attention, backward=differentiate_attention)


def _no_second_derivative(ctx, *grads):
    # torch's fast attention on CPU and GPU has none either, hence sdpa_kernel.
    raise NotImplementedError(
        'cross_attention: the kernel has no second derivative; use impl="reference" under '
        "torch.nn.attention.sdpa_kernel(SDPBackend.MATH), or torch.func"
    )


differentiate(_backward, save=lambda ctx, inputs, output: None, backward=_no_second_derivative)
