"""The launches of diffusion_step, add_noise and sample_noise that differ as code: what test_aot.py compiles.

The launchers run on meta tensors, with recorders instead of kernels. So each case is what would be launched
on a GPU, and the rules that choose it are not copied here.
"""

from __future__ import annotations

import torch

from tests.support.aot.compile import Case
from tests.support.launches import Launch, as_case, recorded_in

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_VARYING = {"step", "batch", "tiles", "rank", "rank_low", "rank_high"}  # not specialised on

# Images of the decoder and the upsampler (bfloat16, contiguous unless said), as samplers use them; then
# layouts and shapes that are merely legal. Options: see `step_launches`.
_DECODER, _UPSAMPLER = (3, 64, 64), (3, 256, 256)
_STEPS = {
    "decoder ddpm": (_DECODER, {"guided": True, "learned_range": True, "clip": 1.0}),
    "decoder ddpm nhwc": (
        _DECODER,
        {"guided": True, "learned_range": True, "clip": 1.0, "nhwc": True},
    ),
    "decoder dynamic": (_DECODER, {"guided": True, "rescale": True, "quantile": 0.995}),
    "decoder dynamic nhwc": (
        _DECODER,
        {"x": "fp32", "guided": True, "learned_range": True, "quantile": 0.995, "nhwc": True},
    ),
    "decoder dpm++": (
        _DECODER,
        {"x": "fp32", "output": "fp32", "guided": True, "seeds": False, "previous": True, "clip": 1.0},
    ),
    "upsampler ddpm": (_UPSAMPLER, {"prediction": "v_prediction", "learned_range": True, "clip": 1.0}),
    "upsampler nhwc": (_UPSAMPLER, {"x": "fp32", "learned_range": True, "clip": 1.0, "nhwc": True}),
    "upsampler dynamic": (_UPSAMPLER, {"guided": True, "rescale": True, "quantile": 0.995}),
    "upsampler dynamic nhwc": (_UPSAMPLER, {"guided": True, "quantile": 0.995, "nhwc": True}),
    "prior": ((768,), {"x": "fp32", "guided": True, "prediction": "sample"}),
    "odd": (
        (3, 5, 7),
        {"x": "fp32", "output": "fp32", "guided": True, "rescale": True, "quantile": 0.9, "clip": 1.0},
    ),
}  # fmt: skip


def launches(function, *args, **kwargs) -> list[Launch]:
    """Each launch that `function` makes."""
    from dalle2_fast.kernels.diffusion import _statistics
    from dalle2_fast.kernels.diffusion import noise as add_noise
    from dalle2_fast.kernels.diffusion import step as diffusion_step

    with recorded_in(_statistics, diffusion_step, add_noise) as found:
        function(*args, **kwargs)
    return found


def step_launches(
    shape, *, x="bf16", output="bf16", nhwc=False, guided=False, learned_range=False, rescale=False,
    quantile=None, clip=None, seeds=True, previous=False, prediction="epsilon",
) -> list[Launch]:  # fmt: skip
    """The launches of one step. x, output: dtypes; nhwc: the output's layout."""
    from dalle2_fast.kernels.diffusion import step as diffusion_step

    state = torch.empty(2, *shape, dtype=_DTYPES[x], device="meta")
    rows, channels = 4 if guided else 2, shape[0] * (2 if learned_range else 1)
    output = torch.empty(rows, channels, *shape[1:], dtype=_DTYPES[output], device="meta")
    if nhwc:
        output = output.to(memory_format=torch.channels_last)
    return launches(
        diffusion_step._diffusion_step,
        state,
        output,
        torch.empty(5, 8, device="meta"),
        torch.empty((), dtype=torch.int64, device="meta"),
        step_number=0,
        seeds=torch.empty(2, dtype=torch.int64, device="meta") if seeds else None,
        guidance=torch.empty(2, device="meta") if guided else None,
        guidance_number=None,
        guidance_rescale=0.7 if rescale else 0.0,
        prediction=prediction,
        clip=clip,
        dynamic_threshold=quantile,
        learned_range=learned_range,
        previous_x0=state if previous else None,
    )


def aot_cases() -> list[Case]:
    from dalle2_fast.kernels.diffusion import noise as add_noise

    cases = []
    for name, (shape, options) in _STEPS.items():
        cases += [
            as_case(name, launch, _VARYING, hot=name != "odd") for launch in step_launches(shape, **options)
        ]

    ones = torch.empty(2, device="meta")
    seeds = torch.empty(2, dtype=torch.int64, device="meta")
    x0 = torch.empty(2, *_UPSAMPLER, dtype=torch.bfloat16, device="meta")
    nhwc = x0.to(memory_format=torch.channels_last)
    small = torch.empty(2, 768, device="meta")
    for name, found in {
        "given": launches(add_noise._add_noise, x0, ones, ones, x0),
        "drawn": launches(add_noise._add_drawn_noise, x0, ones, ones, seeds, None, 3),
        "drawn nhwc": launches(add_noise._add_drawn_noise, nhwc, ones, ones, seeds, None, 3),
        "drawn small": launches(add_noise._add_drawn_noise, small, ones, ones, seeds, None, 3),
        "alone": launches(add_noise._sample_noise, seeds, None, 3, x0.shape, x0.dtype),
        "alone small": launches(add_noise._sample_noise, seeds, None, 3, small.shape, small.dtype),
    }.items():
        cases += [as_case(name, launch, _VARYING) for launch in found]
    return cases
