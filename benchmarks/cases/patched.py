"""Rows of other packages' U-Nets, patched and unpatched: a forward pass, or a loss and all its gradients.

They have their full size, random weights and bfloat16. "unpatched" is a copy of the same network with the
same weights, so a row compares the patch alone. Both are also timed compiled.
"""

from __future__ import annotations

import copy
import functools

import torch
from torch import Tensor, nn

from benchmarks.cases import foreign_unets
from benchmarks.cases.registry import Case, add, compiled_module, op_implementation
from benchmarks.cases.rival_networks import RivalNetwork, noise_loss
from benchmarks.cases.sizes import fill_zeros, parameter_count
from dalle2_fast.adapters.patch import patch, unpatch


def make_patched(name: str, batch: int, device: str, dtype: torch.dtype, tiny: bool = False) -> dict:
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        net = foreign_unets.build(name, small=tiny)
        if device != "meta":
            fill_zeros(net)
    net = net.to(dtype).eval()
    patch(net)
    generator = None if device == "meta" else torch.Generator(device=device).manual_seed(0)
    given = foreign_unets.inputs(name, net, 2 if tiny else batch, generator, device=device, dtype=dtype)
    given |= given.pop("added_cond_kwargs", {})
    return dict(net=net, **given)


def call(net: nn.Module, image_embeds: Tensor | None = None, **given) -> Tensor:
    if image_embeds is not None:
        given["added_cond_kwargs"] = dict(image_embeds=image_embeds)
    return foreign_unets.run(net, given)


def loss(net: nn.Module, **given) -> Tensor:
    return noise_loss(call(net, **given), given["sample"] if "sample" in given else given["x"])


def unpatched(net: nn.Module) -> nn.Module:
    other = copy.deepcopy(net)
    unpatch(other)
    return other


def compiled_copy(net: nn.Module) -> nn.Module:
    other = copy.deepcopy(net)
    compiled_module(other)
    return other


def unpatched_and_compiled(net: nn.Module) -> nn.Module:
    other = unpatched(net)
    compiled_module(other)
    return other


def no_copy(net: nn.Module, other: nn.Module) -> None:
    """`other` is a copy of `net`, with its weights."""


def add_patched(name: str, batch: int, *, gradient: bool = False) -> None:
    function = loss if gradient else call

    def ours(impl: str, **inputs) -> Tensor:
        with op_implementation(impl):
            return function(**inputs)

    def make(device: str, dtype: torch.dtype, tiny: bool) -> dict:
        return make_patched(name, batch, device, dtype, tiny)

    @functools.cache
    def weight_bytes() -> int:
        net = make("meta", torch.bfloat16, False)["net"]
        return 2 * parameter_count(net) * (3 if gradient else 1)

    compiled = {
        "ours compiled": RivalNetwork(compiled_copy, no_copy, function),
        "unpatched compiled": RivalNetwork(unpatched_and_compiled, no_copy, function),
    }
    for rival in compiled.values():
        rival.compiles = True
    add(
        Case(
            f"patched {name}, {'loss and gradient' if gradient else 'forward'}, batch {batch}",
            make,
            ours,
            {"unpatched": RivalNetwork(unpatched, no_copy, function), **compiled},
            bytes=weight_bytes,
            images=batch,
            backward=("net",) if gradient else (),
            with_forward=gradient,
            same_bits=False,
            package=foreign_unets.package(name),
            # In float64 the attention of a training batch would not fit into memory.
            make_check=functools.partial(make_patched, name, 1) if gradient else None,
            target_factors={} if gradient or name != "stable diffusion 1.5" else {"unpatched": 1.3},
        )
    )


# At batch 2 (one image with guidance) most of the time is launch overhead; larger batches are GPU-bound.
for unet, training_batch in (
    ("karlo decoder", 8), ("karlo upsampler", 1), ("kandinsky 2.2", 8), ("stable diffusion 1.5", 8),
    ("dalle2-pytorch", 8),
):  # fmt: skip
    add_patched(unet, 1 if unet == "karlo upsampler" else 2)
    add_patched(unet, training_batch, gradient=True)
