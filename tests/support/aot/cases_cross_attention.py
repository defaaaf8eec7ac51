"""The launches of cross_attention, forward and backward, on every GPU: what test_aot.py compiles.

The launchers run on meta tensors, with recorders instead of kernels. So each case is what would be launched
on a GPU, and the rules that choose it are not copied here.
"""

from __future__ import annotations

from unittest import mock

import torch

from tests.support.aot.compile import CAPABILITIES, Case
from tests.support.launches import Launch, as_case, recorded_in

# name: (B, T, S, T2, D), masked, dtype, hot. B and T matter where they choose a configuration; float16 is as
# bfloat16.
_SHAPES = {
    "cross S77 D64": ((2, 4096, 77, 0, 64), False, torch.bfloat16, True),
    "cross S77 D64, odd": ((2, 1001, 77, 0, 64), False, torch.bfloat16, True),
    "cross S81 D64 masked": ((2, 1024, 81, 0, 64), True, torch.bfloat16, True),
    "cross S128 D64": ((2, 1024, 128, 0, 64), False, torch.bfloat16, True),
    "cross S78 D32": ((2, 1024, 78, 0, 32), True, torch.bfloat16, True),
    "cross S77 D80": ((2, 1024, 77, 0, 80), False, torch.bfloat16, False),
    "cross S128 D128": ((2, 1024, 128, 0, 128), True, torch.bfloat16, False),
    "cross S77 D64 float32": ((2, 1024, 77, 0, 64), True, torch.float32, False),
    "unCLIP D64": ((2, 1024, 81, 1024, 64), True, torch.bfloat16, True),
    "unCLIP D64, batch 1": ((1, 1024, 81, 1024, 64), True, torch.bfloat16, True),
    "unCLIP D64, batch 64": ((64, 1024, 81, 1024, 64), True, torch.bfloat16, True),
    "unCLIP D64 8x8": ((2, 64, 81, 64, 64), True, torch.bfloat16, True),
    "unCLIP D32": ((2, 1024, 81, 1024, 32), True, torch.bfloat16, True),
    "unCLIP D128": ((2, 1024, 81, 1024, 128), True, torch.bfloat16, False),
    "self D64": ((2, 4096, 4096, 0, 64), False, torch.bfloat16, True),
    "unCLIP D64 float32": ((2, 1024, 81, 1024, 64), True, torch.float32, False),
    "unCLIP D128 float32": ((2, 1024, 81, 1024, 128), True, torch.float32, False),
}


def _launches(shape, masked: bool, dtype: torch.dtype, capability: tuple[int, int]) -> list[Launch]:
    from dalle2_fast.kernels.cross_attention import _common, _short_backward
    from dalle2_fast.kernels.cross_attention import backward as cross_attention_backward
    from dalle2_fast.kernels.cross_attention import forward as cross_attention
    from dalle2_fast.kernels.cross_attention import tangent as forward_mode

    b, t, s, t2, d = shape
    h = 10

    def rows(n: int) -> torch.Tensor:  # a view of [B, n, 3, H, D], as a fused projection gives it
        return torch.empty(b, n, 3, h, d, dtype=dtype, device="meta").permute(2, 0, 3, 1, 4)[0]

    mask = torch.empty(b, s, dtype=torch.bool, device="meta") if masked else None
    image = (rows(t2), rows(t2)) if t2 else (None, None)
    inputs = (rows(t), rows(s), rows(s), mask, *image)
    # A network that is differentiated by its time and its image: the context is constant.
    tangents = (rows(t), None, None, *image)
    patched = mock.patch.object(_common, "capability", lambda x: capability)
    modules = (cross_attention, cross_attention_backward, _short_backward, forward_mode)
    with patched, recorded_in(*modules) as found:
        out, lse = cross_attention._forward(*inputs, 0.125)
        saved = None if lse.numel() == 0 else out
        cross_attention_backward.cross_attention_backward(rows(t), *inputs, saved, lse, 0.125)
        forward_mode._run(*inputs, *tangents, 0.125)
    return found


def _case(name: str, launch: Launch, hot: bool) -> Case:
    from dalle2_fast.kernels.cross_attention._common import VARYING

    case = as_case(name, launch, VARYING)
    adds = launch.name.startswith(("_sum_", "merge_"))
    low = any(kind in ("*fp16", "*bf16") for kind in case.signature.values())
    hgmma = low and not adds and case.constexprs["BLOCK_D"] >= 64
    return case._replace(hot=hot or adds, hgmma=hgmma)


def aot_cases() -> list[Case]:
    # Equal launches are compiled once: one case for all GPUs with the same configuration.
    cases: dict[tuple, Case] = {}
    for name, (shape, masked, dtype, hot) in _SHAPES.items():
        for capability in CAPABILITIES:
            for launch in _launches(shape, masked, dtype, divmod(capability, 10)):
                case = _case(name, launch, hot)
                key = (case.kernel, *(tuple(sorted(part.items(), key=str)) for part in case[2:4]), *case[4:6])
                known = cases.get(key)
                if known is None:
                    number = sum(other.name.split(" #")[0] == case.name for other in cases.values())
                    suffix = f" #{number + 1}" if number else ""
                    cases[key] = case._replace(name=case.name + suffix, capabilities=(capability,))
                elif capability not in known.capabilities:
                    cases[key] = known._replace(capabilities=(*known.capabilities, capability))
    return list(cases.values())
