"""Other packages' U-Nets, patched and as they were: a call, or a loss and its gradient by all parameters.

Full sizes, random weights, bfloat16. "unpatched" is a copy of the same network with the same weights, so what
a row compares is the patch alone; each also compiled.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from benchmarks.cases import foreign_unets
from benchmarks.cases.networks import Foreign, shake, squared
from benchmarks.cases.registry import Case, add, compiled_module, running
from dalle2_fast.adapters.patch import patch, unpatch


def make_patched(name: str, batch: int, device: str, dtype: torch.dtype, tiny: bool = False) -> dict:
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        net = foreign_unets.build(name, small=tiny)
        if device != "meta":
            shake(net)
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
    return squared(call(net, **given), given["sample"] if "sample" in given else given["x"])


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


def nothing(net: nn.Module, other: nn.Module) -> None:
    """A copy has the weights already."""


def add_patched(name: str, batch: int, *, gradient: bool = False) -> None:
    function = loss if gradient else call

    def ours(impl: str, **inputs) -> Tensor:
        with running(impl):
            return function(**inputs)

    def make(device: str, dtype: torch.dtype, tiny: bool) -> dict:
        return make_patched(name, batch, device, dtype, tiny)

    def weights() -> int:
        net = make("meta", torch.bfloat16, False)["net"]
        return sum(2 * parameter.numel() for parameter in net.parameters()) * (3 if gradient else 1)

    compiled = {
        "ours compiled": Foreign(compiled_copy, nothing, function),
        "unpatched compiled": Foreign(unpatched_and_compiled, nothing, function),
    }
    for rival in compiled.values():
        rival.compiles = True
    add(
        Case(
            f"patched {name}, {'loss and gradient' if gradient else 'forward'}, batch {batch}",
            make,
            ours,
            {"unpatched": Foreign(unpatched, nothing, function), **compiled},
            bytes=weights,
            images=batch,
            backward=("net",) if gradient else (),
            with_forward=gradient,
            same_bits=False,
            package=foreign_unets.package(name),
        )
    )


# At batch 2 (one image with guidance) launching is most of the time; the larger ones are bound by the GPU.
for unet, training_batch in (
    ("karlo decoder", 8), ("karlo upsampler", 1), ("kandinsky 2.2", 8), ("stable diffusion 1.5", 8),
    ("dalle2-pytorch", 8),
):  # fmt: skip
    add_patched(unet, 1 if unet == "karlo upsampler" else 2)
    add_patched(unet, training_batch, gradient=True)
