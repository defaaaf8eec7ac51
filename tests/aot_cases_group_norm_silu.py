"""The launches of group_norm_silu, forward and backward, for shapes of real models, as test_aot.py compiles.

The launchers run on meta tensors with recorders in the place of their kernels, so that a case is what a GPU
would be asked to run, and not a second copy of the rules.
"""

from __future__ import annotations

import inspect
from unittest import mock

import torch
from aot import Case

_TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
_LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}

# name: (C, H, W), groups, layouts, dtypes, hot. Karlo's levels (320 to 1280 channels at 64x64, its upsampler
# at 256x256), widths of GLIDE and Kandinsky 2.2 (384 to 1536), then shapes that are merely legal.
_SHAPES = {
    "320x64x64": ((320, 64, 64), 32, ("nchw", "nhwc"), ("bf16", "fp32"), True),
    "640x32x32": ((640, 32, 32), 32, ("nchw", "nhwc"), ("bf16", "fp32"), True),
    "960x16x16": ((960, 16, 16), 32, ("nchw", "nhwc"), ("bf16",), True),
    "1280x8x8": ((1280, 8, 8), 32, ("nchw", "nhwc"), ("bf16",), True),
    "2560x8x8": ((2560, 8, 8), 32, ("nchw",), ("bf16",), True),
    "384x64x64": ((384, 64, 64), 32, ("nchw", "nhwc"), ("bf16",), True),
    "1152x32x32": ((1152, 32, 32), 32, ("nchw", "nhwc"), ("fp16",), True),
    "320x256x256": ((320, 256, 256), 32, ("nchw", "nhwc"), ("bf16", "fp32"), True),
    "1280x32x32": ((1280, 32, 32), 32, ("nchw", "nhwc"), ("bf16",), True),
    "96x31x17": ((96, 31, 17), 32, ("nchw", "nhwc"), ("bf16",), False),
    "1600x12x12": ((1600, 12, 12), 32, ("nchw", "nhwc"), ("fp16",), False),
    "21x65x65": ((21, 65, 65), 7, ("nchw", "nhwc"), ("fp32",), False),
    "512x1x1": ((512, 1, 1), 32, ("nchw",), ("bf16",), False),
    "512x64x64 in one group": ((512, 64, 64), 1, ("nchw", "nhwc"), ("bf16",), False),
}
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class _Recorder:
    """Stands in for a kernel: keeps how it was launched."""

    def __init__(self, kernel, launches: list) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append((self.kernel, args, kwargs))


def launches(function, *args) -> list[tuple]:
    """(kernel, arguments, constants) of each launch that `function` makes."""
    from dalle2_fast.kernels import group_norm_silu, group_norm_silu_backward

    found: list[tuple] = []
    with (
        mock.patch.multiple(group_norm_silu, **_recorders(group_norm_silu, found)),
        mock.patch.multiple(group_norm_silu_backward, **_recorders(group_norm_silu_backward, found)),
    ):
        function(*args)
    return found


def _recorders(module, found: list) -> dict:
    names = [name for name in vars(module) if name.startswith("_") and name.endswith("_kernel")]
    return {name: _Recorder(getattr(module, name), found) for name in names}


def _case(name: str, launch: tuple, hot: bool) -> Case:
    from dalle2_fast.kernels import _norm_plan as plan

    kernel, args, kwargs = launch
    function = kernel
    while hasattr(function, "fn"):
        function = function.fn
    warps = kwargs.pop("num_warps")
    values = dict(zip(inspect.signature(function).parameters, args, strict=False)) | kwargs
    signature, constants = {}, {}
    for argument, value in values.items():
        if isinstance(value, torch.Tensor):
            signature[argument] = _TYPES[value.dtype]
        elif isinstance(value, float):
            signature[argument] = "fp32"
        elif value is None or argument in kwargs:
            constants[argument] = value
        elif argument in plan.VARYING:
            signature[argument] = "i32"
        elif value == 1:
            constants[argument] = 1
        else:
            kind = "i32" if value < 2**31 else "i64"
            signature[argument] = f"{kind}:16" if value % 16 == 0 else kind
    return Case(f"{name} {function.__name__}", kernel, signature, constants, warps, 3, hot=hot)


def aot_cases() -> list[Case]:
    from dalle2_fast.kernels import group_norm_silu, group_norm_silu_backward

    cases = []
    for shape_name, (shape, groups, layouts, dtypes, hot) in _SHAPES.items():
        for layout in layouts:
            for dtype in dtypes:
                name = f"{shape_name} {layout} {dtype}"
                x = torch.empty(2, *shape, dtype=_DTYPES[dtype], device="meta").to(
                    memory_format=_LAYOUTS[layout]
                )
                weight = torch.empty(shape[0], device="meta")
                film = torch.empty(2, 2 * shape[0], dtype=x.dtype, device="meta").chunk(2, 1)
                statistics = torch.empty(2, groups, device="meta")
                # The most that can be asked for: weight, bias, scale, shift and SiLU.
                found = launches(group_norm_silu._forward, x, groups, weight, weight, 1e-5, *film, True)
                found += launches(
                    group_norm_silu_backward._backward,
                    torch.empty_like(x), x, statistics, statistics, weight, weight, *film, True, True,
                )  # fmt: skip
                cases += [_case(name, launch, hot) for launch in found]
    # A gradient that lies in the other layout, and a plain norm.
    x = torch.empty(2, 320, 64, 64, dtype=torch.bfloat16, device="meta")
    statistics, nothing = torch.empty(2, 32, device="meta"), (None,) * 4
    for name, dy in {
        "dy nhwc": torch.empty_like(x, memory_format=torch.channels_last),
        "dy transposed": torch.empty_like(x).transpose(2, 3),
    }.items():
        found = launches(
            group_norm_silu_backward._backward, dy, x, statistics, statistics, *nothing, False, False
        )
        cases += [_case(f"320x64x64 {name}", launch, False) for launch in found]
    found = launches(group_norm_silu._forward, x, 32, None, None, 1e-5, None, None, False)
    return cases + [_case("320x64x64 plain", launch, True) for launch in found]
