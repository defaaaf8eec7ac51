"""The launches of group_norm_silu and its derivatives for shapes of real models, as test_aot.py compiles.

The launchers run on meta tensors, with recorders instead of kernels. So each case is what would be launched
on a GPU, and the rules that choose it are not copied here.
"""

from __future__ import annotations

import torch

from tests.support.aot.compile import CAPABILITIES, Case
from tests.support.launches import Launch, as_case, recorded_in

_LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}

_EVERY, _TWO = CAPABILITIES, (80, 90)

# (C, H, W), groups, layout, dtype, hot, compiled for. Karlo's levels (320 to 1280 channels at 64x64, 320 at
# 256x256 in its upsampler), Kandinsky's and GLIDE's widths, then shapes that are merely legal.
_SHAPES = [
    ((320, 64, 64), 32, "nchw", "bf16", True, _EVERY),
    ((640, 32, 32), 32, "nchw", "bf16", True, _EVERY),
    ((960, 16, 16), 32, "nchw", "bf16", True, _EVERY),
    ((1280, 8, 8), 32, "nchw", "bf16", True, _EVERY),
    ((320, 256, 256), 32, "nchw", "bf16", True, _EVERY),
    ((320, 64, 64), 32, "nhwc", "bf16", True, _EVERY),
    ((640, 32, 32), 32, "nhwc", "bf16", True, _EVERY),
    ((1280, 8, 8), 32, "nhwc", "bf16", True, _EVERY),
    ((320, 32, 32), 32, "nhwc", "bf16", True, _TWO),
    ((1280, 32, 32), 32, "nhwc", "bf16", True, _TWO),
    ((960, 16, 16), 32, "nhwc", "bf16", True, _TWO),
    ((2240, 16, 16), 32, "nhwc", "bf16", True, _TWO),
    ((320, 64, 64), 32, "nchw", "fp32", True, _TWO),
    ((1280, 32, 32), 32, "nhwc", "fp32", True, _TWO),
    ((1152, 32, 32), 32, "nchw", "fp16", True, _TWO),
    ((576, 64, 64), 32, "nhwc", "fp16", True, _TWO),
    ((96, 31, 17), 32, "nchw", "bf16", False, _TWO),
    ((1600, 12, 12), 32, "nhwc", "fp16", False, _TWO),
    ((21, 65, 65), 7, "nhwc", "fp32", False, _TWO),
    ((512, 1, 1), 32, "nchw", "bf16", False, _TWO),
    ((512, 64, 64), 1, "nchw", "bf16", False, _TWO),
    ((512, 64, 64), 1, "nhwc", "bf16", False, _TWO),
]
# Consistency and mean-flow training also computes tangents.
_TANGENTS = [
    ((320, 64, 64), "nchw", "bf16"), ((320, 64, 64), "nhwc", "bf16"), ((640, 32, 32), "nhwc", "bf16"),
    ((1280, 8, 8), "nhwc", "bf16"), ((320, 256, 256), "nchw", "bf16"),
]  # fmt: skip
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def launches(function, *args) -> list[Launch]:
    """Each launch that `function` makes."""
    from dalle2_fast.kernels.group_norm_silu import backward as group_norm_silu_backward
    from dalle2_fast.kernels.group_norm_silu import forward as group_norm_silu
    from dalle2_fast.kernels.group_norm_silu import tangent as group_norm_silu_tangent

    with recorded_in(group_norm_silu, group_norm_silu_backward, group_norm_silu_tangent) as found:
        function(*args)
    return found


def _cases(
    name: str, found: list[Launch], hot: bool = True, capabilities: tuple[int, ...] = _EVERY
) -> list[Case]:
    from dalle2_fast.kernels.group_norm_silu._plan import VARYING

    return [as_case(name, launch, VARYING, hot=hot, capabilities=capabilities) for launch in found]


def aot_cases() -> list[Case]:
    from dalle2_fast.kernels.group_norm_silu import backward as group_norm_silu_backward
    from dalle2_fast.kernels.group_norm_silu import forward as group_norm_silu
    from dalle2_fast.kernels.group_norm_silu import tangent as group_norm_silu_tangent

    forward, backward = group_norm_silu._forward, group_norm_silu_backward._backward
    tangent = group_norm_silu_tangent._tangent
    cases = []
    for shape, groups, layout, dtype, hot, capabilities in _SHAPES:
        x = torch.empty(2, *shape, dtype=_DTYPES[dtype], device="meta").to(memory_format=_LAYOUTS[layout])
        weight, statistics = torch.empty(shape[0], device="meta"), torch.empty(2, groups, device="meta")
        film = torch.empty(2, 2 * shape[0], dtype=x.dtype, device="meta").chunk(2, 1)
        # The most that can be asked for: weight, bias, scale, shift and SiLU.
        found = launches(forward, x, groups, weight, weight, 1e-5, *film, True)
        found += launches(backward, x, x, statistics, statistics, weight, weight, *film, True, True)
        name = f"{'x'.join(map(str, shape))} {layout} {dtype}"
        cases += _cases(name if groups == 32 else f"{name} in {groups}", found, hot, capabilities)
        if (shape, layout, dtype) in _TANGENTS:
            rates = torch.empty(2, shape[0], device="meta")
            found = launches(
                tangent, x, x, statistics, statistics, weight, weight, *film, rates, rates, True
            )
            cases += _cases(f"{name} tangent", found, hot, capabilities)

    # A plain norm; a gradient that lies in the other layout, or with its rows and columns exchanged.
    x = torch.empty(2, 320, 64, 64, dtype=torch.bfloat16, device="meta")
    statistics, nothing = torch.empty(2, 32, device="meta"), (None,) * 4
    cases += _cases("320x64x64 plain", launches(forward, x, 32, None, None, 1e-5, None, None, False))
    dy = {"nhwc": x.to(memory_format=torch.channels_last), "transposed": x.transpose(2, 3)}
    for name, value in dy.items():
        found = launches(backward, value, x, statistics, statistics, *nothing, False, False)
        cases += _cases(f"320x64x64 dy {name}", found, hot=False, capabilities=_TWO)

    unlike = {}  # the same kernel of another shape may be the same code
    for case in cases:
        content = repr(
            (case.kernel.__name__, case.signature, case.constexprs, case.num_warps, case.capabilities)
        )
        unlike.setdefault(content, case)
    return list(unlike.values())
