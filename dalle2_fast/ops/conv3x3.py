"""y = conv3x3(upsample(x)) + bias + residual"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle2_fast.ops import _checks, _dispatch
from dalle2_fast.ops._dtypes import is_transformed

# With fewer channels the transforms take more time than they save in multiplications (measured with 12).
# The tiles of 2x2 outputs of a tiny image are mostly border.
_MIN_CHANNELS, _MIN_SIDE = 32, 4


def conv3x3(
    x: Tensor,  # [N, C_in, H, W]
    weight: Tensor,  # [C_out, C_in, 3, 3]
    bias: Tensor | None = None,  # [C_out]
    residual: Tensor | None = None,  # [N, C_out, H, W]
    upsample: bool = False,
    impl: str = "auto",
) -> Tensor:  # [N, C_out, H, W]
    """A 3x3 convolution with padding 1, of the image or of the doubled image, plus a residual.

    The fused form is for the CPU. In float32 it is Winograd's filtering with 4 multiplications per output and
    channel where the definition has 9, an upsampling that copies nothing, and the residual added where the
    result is written. In bfloat16 it is oneDNN's convolution with the residual added before the result is
    rounded; it needs a processor with instructions for bfloat16. Its errors are not larger than those of
    torch's convolution.

    Args:
        x: images [N, C_in, H, W], floating point. The fused form copies x if it is not channels_last.
        weight: filters [C_out, C_in, 3, 3].
        bias: offset of each output channel [C_out]. None means 0.
        residual: is added to the result, of its shape. None means 0.
        upsample: whether every pixel of x is first repeated in two rows and two columns. H and W of the
            result are then twice those of x.
        impl: "auto", "reference" or "fused". "auto" is fused for channels_last on the CPU: in float32 from 32
            channels and 4x4 pixels on, in bfloat16 with a residual and without gradients.

    Returns:
        [N, C_out, H, W] in the dtype of x; under autocast in the autocast dtype.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, value or device.
        RuntimeError: impl="fused" and no kernel can run here.

    Source: Lavin and Gray, "Fast algorithms for convolutional neural networks", 1509.09308, section 4.1.

    Example:
        >>> from dalle2_fast import functional
        >>> x, weight, residual = torch.randn(1, 3, 4, 4), torch.randn(5, 3, 3, 3), torch.randn(1, 5, 8, 8)
        >>> functional.conv3x3(x, weight, residual=residual, upsample=True).shape
        torch.Size([1, 5, 8, 8])
    """
    _check_arguments(x, weight, bias, residual, upsample)
    if _uses_reference(impl, x, weight, bias, residual):
        return conv3x3_reference(x, weight, bias, residual, upsample)
    return torch.ops.dalle2_fast.conv3x3.default(x, weight, bias, residual, upsample)


def _uses_reference(
    impl: str, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None
) -> bool:
    if impl == "auto":
        if x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return True
        if x.dtype == torch.bfloat16:
            if residual is None or _dispatch.needs_gradient(x, weight, bias, residual):
                return True
        elif min(weight.shape[:2]) < _MIN_CHANNELS or min(x.shape[2:]) < _MIN_SIDE:
            return True
        if not x.is_contiguous(memory_format=torch.channels_last):
            return True
    return _dispatch.use_reference_of_cpu_op(impl, x, weight, bias, residual)


def _check_arguments(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, upsample: bool
) -> None:
    _checks.floating("x", x)
    if x.dim() != 4:
        raise ValueError(f"x: expected [N, C_in, H, W], got {tuple(x.shape)}")
    _checks.floating("weight", weight)
    if weight.dim() != 4 or weight.shape[1:] != (x.shape[1], 3, 3):
        raise ValueError(f"weight: expected [C_out, {x.shape[1]}, 3, 3], got {tuple(weight.shape)}")
    _checks.same_device("weight", weight, "x", x)
    _checks.flag("upsample", upsample)
    if bias is not None:
        _checks.floating("bias", bias)
        _checks.shape("bias", bias, "C_out", weight.shape[:1])
        _checks.same_device("bias", bias, "x", x)
    if residual is not None:
        _checks.floating("residual", residual)
        factor = 2 if upsample else 1
        expected = (x.shape[0], weight.shape[0], factor * x.shape[2], factor * x.shape[3])
        _checks.shape("residual", residual, "N, C_out, H, W", expected)
        _checks.same_device("residual", residual, "x", x)
    if not (x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)):
        for name, value in (("weight", weight), ("bias", bias), ("residual", residual)):
            if value is not None and value.dtype != x.dtype:
                raise TypeError(f"{name}: expected {x.dtype} (that of x), got {value.dtype}")


def conv3x3_reference(
    x: Tensor,  # [N, C_in, H, W]
    weight: Tensor,  # [C_out, C_in, 3, 3]
    bias: Tensor | None = None,  # [C_out]
    residual: Tensor | None = None,  # [N, C_out, H, W]
    upsample: bool = False,
) -> Tensor:  # [N, C_out, H, W]
    """y = conv3x3(upsample(x)) + bias + residual"""
    if upsample:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
    y = F.conv2d(x, weight, bias, padding=1)
    if residual is None:
        return y
    if torch.is_grad_enabled() or is_transformed():
        return residual + y
    return y.add_(residual)  # new memory for a sum costs more time than the sum
