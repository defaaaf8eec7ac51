"""conv3x3 on the CPU: in float32 dalle2_fast._C (csrc/cpu/convolution.cpp), Winograd's F(2x2, 3x3).

In bfloat16 it is oneDNN's convolution, which processors have instructions for, with the residual added to its
float32 sums before they are rounded: 1.2 times as fast as a convolution and an addition, with three quarters
of the error.

The transformed filters are kept as long as the weights live; they are 16 / 9 times as large. A fingerprint of
the weights (1 % of the time of a convolution) tells whether they are still valid. torch's counter of changes
does not count those through `weight.data`.
"""

from __future__ import annotations

import threading

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from dalle2_fast import _C

from .._op import implement_on_cpu
from .op import conv3x3, empty_output

WHY_NO_BFLOAT16 = None
if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
    WHY_NO_BFLOAT16 = "oneDNN has no convolution in bfloat16 for this processor"
_filters = WeakTensorKeyDictionary()  # weight -> (fingerprint, transformed filters)
_lock = threading.Lock()


def _transformed(weight: Tensor) -> Tensor:
    values = weight.contiguous()
    out_channels, in_channels = weight.shape[:2]
    fingerprint = _C.cpu.fingerprint(values.data_ptr(), values.numel())
    with _lock:
        kept = _filters.get(weight)
    if kept is not None and kept[0] == fingerprint:
        return kept[1]
    filters = torch.empty(_C.cpu.convolution_filter_size(in_channels, out_channels))
    _C.cpu.transform_filters(
        values.data_ptr(), in_channels, out_channels, filters.data_ptr(), torch.get_num_threads()
    )
    with _lock:
        _filters[weight] = fingerprint, filters
    return filters


def _conv3x3(
    x: Tensor,  # [N, C_in, H, W], or half of H and W with upsample
    weight: Tensor,  # [C_out, C_in, 3, 3]
    bias: Tensor | None,  # [C_out]
    residual: Tensor | None,  # [N, C_out, H, W]
    upsample: bool,
) -> Tensor:  # [N, C_out, H, W], channels_last
    if x.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"x: expected float32 or bfloat16, got {x.dtype}")
    for name, value in (("weight", weight), ("bias", bias), ("residual", residual)):
        if value is not None and value.dtype != x.dtype:
            raise TypeError(f"{name}: expected {x.dtype} (that of x), got {value.dtype}")
    y = empty_output(x, weight, upsample)
    if y.numel() == 0:
        return y
    if x.shape[1] == 0:
        raise ValueError("x: expected C_in >= 1, got 0")
    x = x.contiguous(memory_format=torch.channels_last)
    if x.dtype == torch.bfloat16:
        return _in_bfloat16(x, weight, bias, residual, upsample)
    filters = _transformed(weight)
    bias = None if bias is None else bias.contiguous()
    residual = None if residual is None else residual.contiguous(memory_format=torch.channels_last)
    samples, out_channels, height, width = y.shape
    _C.cpu.convolution3x3(
        samples, height, width, x.shape[1], out_channels, upsample, x.data_ptr(), filters.data_ptr(),
        0 if bias is None else bias.data_ptr(), 0 if residual is None else residual.data_ptr(), y.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return y


def _in_bfloat16(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, upsample: bool
) -> Tensor:
    if upsample:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
    if residual is None:
        return F.conv2d(x, weight, bias, padding=1)
    one = [1, 1]
    return torch.ops.mkldnn._convolution_pointwise.binary(
        x, residual.contiguous(memory_format=torch.channels_last), weight, bias, one, one, one, 1, "add",
        None, None, [], None,
    )  # fmt: skip


implement_on_cpu(conv3x3, _conv3x3)
