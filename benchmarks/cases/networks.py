"""Rows of whole networks: a forward pass, or a loss and its gradient by all parameters; random weights.

On a GPU the sizes are Karlo's; the rows of a CPU have the same parts with a tenth of the widths. "reference"
is our network with the reference of every op. The networks of diffusers and open_clip have the same weights
as ours and are checked against the same float64 truth.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor, nn

from benchmarks.cases.registry import (
    CASES,
    Case,
    add,
    compiled,
    device_suffix,
    op_implementation,
)
from benchmarks.cases.rival_networks import (
    DIFFUSERS_PRIOR,
    DIFFUSERS_UNET,
    DIFFUSERS_UNET_LOSS,
    OPEN_CLIP,
    noise_loss,
)
from benchmarks.cases.sizes import (
    KARLO,
    SMALL,
    TINY,
    Sizes,
    clip,
    clip_inputs,
    decoder,
    parameters_of,
    prior,
    prior_inputs,
    seeded_network,
    unet_inputs,
    upsampler,
)
from dalle2_fast import UNet


def forward(impl: str, net: nn.Module, **inputs) -> Tensor:
    with op_implementation(impl):
        return net(**inputs)


def unet_loss(impl: str, net: UNet, **inputs) -> Tensor:
    with op_implementation(impl):
        return noise_loss(net(**inputs), inputs["sample"])


def flops_of(case: Case) -> int:
    """FLOPs of the matrix products and convolutions, counted on tensors without storage."""
    from torch.utils.flop_counter import FlopCounterMode

    inputs = case.make("meta", torch.bfloat16, False)
    with FlopCounterMode(display=False) as counter:
        case.ours("reference", **inputs)
    return counter.get_total_flops() * (3 if case.backward else 1)  # a product has two gradients


def add_network(name, sizes, build, inputs_of, batch, call, rivals, *, gradient=False, checked=1):
    """checked: batch size of the check before timing; the float64 truth of a training batch would not fit."""

    def make(device, dtype, tiny):
        size = TINY if tiny else sizes
        net = seeded_network(build, size, device, dtype)
        return dict(net=net, **inputs_of(size, net, 2 if tiny else batch, device, dtype))

    def make_check(device, dtype):
        net = seeded_network(build, sizes, device, dtype)
        # Convolutions on 256 x 256 pixels are slow in float64.
        size = replace(sizes, pixels=sizes.pixels // 4) if build is upsampler else sizes
        return dict(net=net, **inputs_of(size, net, checked, device, dtype))

    def reference(**inputs):
        return call("reference", **inputs)

    references = {"reference": reference,
                  "compile": compiled(reference, network=True)}  # fmt: skip
    title = f"{name}, batch {batch}{device_suffix(sizes.device)}"

    @functools.cache
    def weight_bytes() -> int:
        return parameters_of(build, sizes) * (2 if sizes.device == "cuda" else 4)

    add(
        Case(
            title,
            make,
            call,
            references | rivals,
            bytes=lambda: weight_bytes() * (3 if gradient else 1),
            flops=functools.cache(lambda: flops_of(CASES[title])),
            images=batch,
            device=sizes.device,
            backward=("net",) if gradient else (),
            with_forward=gradient,
            same_bits=False,
            make_check=make_check,
        )
    )


def add_networks(sizes: Sizes) -> None:
    diffusers_unet, diffusers_loss = {"diffusers": DIFFUSERS_UNET}, {"diffusers": DIFFUSERS_UNET_LOSS}
    add_network("decoder forward", sizes, decoder, unet_inputs, 2, forward, diffusers_unet)
    if sizes.device == "cuda":
        add_network("decoder forward", sizes, decoder, unet_inputs, 16, forward, diffusers_unet)
    add_network("upsampler forward", sizes, upsampler, unet_inputs, 1, forward, diffusers_unet)
    add_network("prior forward", sizes, prior, prior_inputs, 2, forward, {"diffusers": DIFFUSERS_PRIOR})
    add_network("decoder loss and gradient", sizes, decoder, unet_inputs, 8, unet_loss, diffusers_loss,
                gradient=True)  # fmt: skip
    add_network("upsampler loss and gradient", sizes, upsampler, unet_inputs, 1, unet_loss, diffusers_loss,
                gradient=True)  # fmt: skip
    add_network("clip loss and gradient", sizes, clip, clip_inputs, 64, forward, {"open_clip": OPEN_CLIP},
                gradient=True, checked=8)  # fmt: skip


add_networks(KARLO)
add_networks(SMALL)
