"""Inputs of diffusion_step, and the comparison of its kernels with the reference in float64."""

from __future__ import annotations

import torch

from dalle2_fast import functional
from tests.support.truth import assert_close_to_truth

SEEDS = [3, -4, 2**40 + 5]
TABLE = torch.tensor(  # alpha, sigma, a, b, c, std, log_var_min, log_var_max; the last row adds no noise
    [
        [0.9, 0.436, 0.3, 0.6, 0.1, 0.2, -4.0, -1.0],
        [0.5, 0.866, 0.4, 0.5, -0.2, 0.3, -4.0, -1.0],
        [0.5, 0.866, 0.4, 0.5, -0.2, 0.0, -4.0, -1.0],
    ]
)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def step_inputs(
    shape, device, *, dtype=torch.float32, output_dtype=None, guidance=None, learned_range=False, seeds=True,
    previous=False, nhwc="", step=1, **options,
) -> dict:  # fmt: skip
    """Arguments of functional.diffusion_step. nhwc: which of x, o(utput), p(revious) are channels_last."""
    rows, channels = shape[0] * (1 if guidance is None else 2), shape[1] * (2 if learned_range else 1)
    tensors = {"x": draw(*shape), "model_output": draw(rows, channels, *shape[2:], seed=1)}
    if previous:
        tensors["previous_x0"] = draw(*shape, seed=2)
    for name in tensors:
        wanted = output_dtype or dtype if name == "model_output" else dtype
        value = tensors[name].to(device, wanted)
        if {"x": "x", "model_output": "o", "previous_x0": "p"}[name] in nhwc:
            value = value.contiguous(memory_format=torch.channels_last)
        tensors[name] = value
    return {
        **tensors, "table": TABLE.to(device), "step": torch.tensor(step, device=device), "guidance": guidance,
        "seeds": torch.tensor(SEEDS, device=device)[: shape[0]] if seeds else None,
        "learned_range": learned_range, **options,
    }  # fmt: skip


def double(arguments: dict) -> dict:
    return {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }


def check_step(arguments: dict) -> None:
    """The fused step against the reference in float64."""
    on_cpu = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    actual = functional.diffusion_step(**arguments, impl="fused")
    plain = functional.diffusion_step(**on_cpu, impl="reference")
    truth = functional.diffusion_step(**double(on_cpu), impl="reference")
    for name, *values in zip(("x_next", "x0"), actual, plain, truth, strict=True):
        assert values[0].dtype == arguments["x"].dtype and values[0].stride() == arguments["x"].stride()
        assert_close_to_truth(*({name: value} for value in values))


CASES = {
    "plain": {},
    "deterministic": {"seeds": False, "prediction": "sample"},
    "no noise in the last step": {"step": 2, "learned_range": True, "clip": 0.8},
    "guided": {"guidance": 3.0, "prediction": "v_prediction", "clip": 0.8},
    "guided per sample": {"guidance": torch.tensor([3.0, 1.0]), "previous": True},
    "one guidance tensor": {"guidance": torch.tensor(2.0), "learned_range": True},
    "rescaled": {"guidance": 4.0, "guidance_rescale": 0.7, "prediction": "v_prediction"},
    "dynamic": {"dynamic_threshold": 0.9},
    "dynamic median": {"dynamic_threshold": 0.5, "clip": 0.1, "prediction": "sample"},
    "dynamic largest": {"dynamic_threshold": 1.0, "clip": 0.1},
    "everything": {
        "guidance": 3.0, "guidance_rescale": 0.5, "dynamic_threshold": 0.95, "clip": 0.5,
        "learned_range": True, "previous": True, "prediction": "v_prediction",
    },
    "float16": {"dtype": torch.float16, "guidance": 2.0, "dynamic_threshold": 0.9, "learned_range": True},
    "bfloat16": {"dtype": torch.bfloat16, "guidance": 2.0, "clip": 1.0, "learned_range": True},
    "other dtype of the output": {"output_dtype": torch.float16, "guidance": 2.0},
    "output nhwc": {"nhwc": "o", "guidance": 2.0, "guidance_rescale": 0.5, "learned_range": True,
                    "dynamic_threshold": 0.9},
    "x nhwc": {"nhwc": "xop", "previous": True, "learned_range": True},
}  # fmt: skip


def on(device: str, options: dict) -> dict:
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}


def viewed(value: torch.Tensor, view: str) -> torch.Tensor:
    """The same numbers in another layout."""
    if view == "transposed":  # laid out backwards
        backwards = tuple(range(value.dim() - 1, -1, -1))
        return value.permute(backwards).contiguous().permute(backwards)
    if view == "strided":
        return value.repeat_interleave(2, dim=-1)[..., ::2]
    if view == "more channels":
        return torch.cat((value, value), 1)[:, : value.shape[1]]
    return value.contiguous()


def op_calls(device: str) -> dict:
    """{op: (it, arguments, options)}, for torch.library.opcheck."""
    ops, seeds = torch.ops.dalle2_fast, torch.tensor(SEEDS[:2], device=device)
    x, ones = draw(2, 2, 3, 3).to(device), torch.full((2,), 0.5, device=device)
    nhwc = x.contiguous(memory_format=torch.channels_last)
    step = torch.tensor(1, device=device)
    options = dict(
        step_number=0, seeds=seeds, guidance=None, guidance_number=None, guidance_rescale=0.0,
        prediction="epsilon", clip=1.0, dynamic_threshold=None, learned_range=False, previous_x0=None,
    )  # fmt: skip
    return {
        "sample_noise": (ops.sample_noise, (seeds, step, 0, (2, 5), torch.float16), {}),
        "add_noise": (
            ops.add_noise, (x.clone().requires_grad_(), ones, ones.clone().requires_grad_(), x), {},
        ),
        "add_drawn_noise": (
            ops.add_drawn_noise, (nhwc.clone().requires_grad_(), ones, ones, seeds, None, 3), {},
        ),
        "diffusion_step": (ops.diffusion_step, (nhwc, x, TABLE.to(device), step), options),
    }  # fmt: skip
