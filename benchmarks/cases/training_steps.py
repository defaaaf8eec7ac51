"""Rows of training steps, in wall-clock time, against DALLE2-pytorch's decoder and CLIP.

On a GPU the sizes are Karlo's, on a CPU those of sizes.SMALL. All weights are random. The sizes of the
rivals differ from ours by less than a tenth.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.cases.registry import (
    CASES,
    Case,
    add,
    device_suffix,
    needs,
    op_implementation,
    rounded_randn,
)
from benchmarks.cases.rival_networks import built_like
from benchmarks.cases.sizes import (
    KARLO,
    SMALL,
    TINY,
    Sizes,
    check_sizes,
    clip,
    clip_inputs,
    nearest_in_size,
    parameter_count,
    parameters_of,
    seeded_network,
)
from dalle2_fast import CLIP, Decoder
from dalle2_fast.ops._dtypes import compute_dtype

OPTIMIZERS = weakref.WeakKeyDictionary()  # network -> its optimiser


def step(net: nn.Module, loss: Callable[[], Tensor]) -> Tensor:
    """Loss, gradients, AdamW. The learning rate is 0: every round does the same work on the same weights."""
    if net not in OPTIMIZERS:
        OPTIMIZERS[net] = torch.optim.AdamW(net.parameters(), lr=0.0, weight_decay=0.0)
    like = next(net.parameters())
    with torch.enable_grad(), torch.autocast(like.device.type, torch.bfloat16, enabled=like.is_cuda
                                             and like.dtype == torch.float32):  # fmt: skip
        value = loss()
    value.backward()
    OPTIMIZERS[net].step()
    OPTIMIZERS[net].zero_grad(set_to_none=True)
    return value.detach()


def decoder(sizes: Sizes) -> Decoder:
    text = CLIP(**sizes.clip).config
    return Decoder(sizes.decoder, image_size=sizes.pixels, image_embed_dim=text["dim_latent"],
                   text_embed_dim=text["dim_latent"], text_encoding_dim=text["dim_text"])  # fmt: skip


def decoder_inputs(sizes: Sizes, net: Decoder, batch: int, device: str, dtype: torch.dtype) -> dict:
    randn = rounded_randn(device, dtype)
    return dict(image=randn(batch, 3, sizes.pixels, sizes.pixels).sigmoid().bfloat16().to(dtype),
                image_embed=randn(batch, net.image_embed_dim), text_embed=randn(batch, net.text_embed_dim),
                text_encodings=randn(batch, sizes.tokens, net.text_encoding_dim))  # fmt: skip


def decoder_step(impl: str, net: Decoder, **inputs) -> Tensor:
    generator = torch.Generator(inputs["image"].device).manual_seed(0)
    randn = torch.randn

    def float32_randn(*shape, dtype=None, **options) -> Tensor:  # float64 would give other random numbers
        return randn(*shape, dtype=torch.float32, **options).to(dtype)

    with op_implementation(impl), mock.patch.object(torch, "randn", float32_randn):
        return step(net, lambda: net(**inputs, generator=generator, check_range=False))


def clip_step(impl: str, net: CLIP, **inputs) -> Tensor:
    with op_implementation(impl):
        return step(net, lambda: net(**inputs))


# ------------------------------------------------------------------------------------------------- the rivals


def their_decoder(ours: Decoder) -> nn.Module:
    """DALLE2-pytorch's decoder with our levels and attention levels, and the width nearest to our size."""
    import dalle2_pytorch as theirs

    config = ours.unet.config
    base = config["channels"][0]
    heads = config["head_dim"][0]

    def build(width: int) -> nn.Module:
        unet = theirs.Unet(
            dim=width, dim_mults=tuple(channels // base for channels in config["channels"]),
            num_resnet_blocks=config["layers_per_block"][0], resnet_groups=4, attn_dim_head=heads,
            attn_heads=max(1, config["channels"][-1] // heads), cond_dim=ours.unet.cross_dim,
            image_embed_dim=ours.image_embed_dim, text_embed_dim=ours.text_encoding_dim,
            cond_on_image_embeds=True, cond_on_text_encodings=True,
            self_attn=tuple(level in config["attention_levels"] for level in range(len(config["channels"]))),
        )  # fmt: skip
        return theirs.Decoder((unet,), image_sizes=(ours.image_size,), learned_variance=True)

    widths = range(base // 2, 2 * base + 1, max(4, base // 20 // 4 * 4))
    made = nearest_in_size(build, widths, parameter_count(ours))
    check_sizes(dict(decoder=made), dict(decoder=ours), tolerance=0.1)
    return made


def their_decoder_loss(module: nn.Module, image, image_embed, text_encodings, **unused) -> Tensor:
    return module(image, image_embed=image_embed, text_encodings=text_encodings, unet_number=1)


def their_clip(ours: CLIP) -> nn.Module:
    """DALLE2-pytorch's CLIP with our widths and the depth nearest to our size."""
    import dalle2_pytorch as theirs

    config = ours.config

    def build(depth: int) -> nn.Module:
        return theirs.CLIP(
            dim_text=config["dim_text"], dim_image=config["dim_image"], dim_latent=config["dim_latent"],
            num_text_tokens=config["num_text_tokens"], text_seq_len=config["text_seq_len"],
            text_enc_depth=max(1, round(depth * config["text_enc_depth"] / config["visual_enc_depth"])),
            text_heads=config["text_heads"], text_dim_head=config["dim_text"] // config["text_heads"],
            visual_enc_depth=depth, visual_heads=config["visual_heads"], visual_patch_dropout=0.0,
            visual_dim_head=config["dim_image"] // config["visual_heads"],
            visual_image_size=config["visual_image_size"], visual_patch_size=config["visual_patch_size"],
        )  # fmt: skip

    made = nearest_in_size(build, range(1, 2 * config["visual_enc_depth"] + 1), parameter_count(ours))
    check_sizes(dict(clip=made), dict(clip=ours), tolerance=0.1)
    return made


def their_clip_loss(module: nn.Module, text, images) -> Tensor:
    return module(text, images, return_loss=True)


class RivalStep:
    """A training step of DALLE2-pytorch's module of the same size; one module is built for each of ours."""

    def __init__(self, build: Callable, loss: Callable):
        self.build, self.loss = build, loss
        self.modules = weakref.WeakKeyDictionary()

    def __call__(self, net: nn.Module, **inputs) -> Tensor:
        if net not in self.modules:
            self.modules[net] = built_like(net, self.build)
        return step(self.modules[net], lambda: self.loss(self.modules[net], **inputs))


# --------------------------------------------------------------------------------------------------- the rows


def add_step(name, sizes, build, inputs_of, batch, checked, ours, flops, rival) -> None:
    """checked: batch size of the check before timing."""

    def make(device, dtype, tiny, batch=batch):
        size = TINY if tiny else sizes
        weight_dtype = compute_dtype(dtype)  # the forward pass runs under autocast
        net = seeded_network(build, size, device, weight_dtype)
        return dict(net=net, **inputs_of(size, net, 2 if tiny else batch, device, weight_dtype))

    add(
        Case(
            f"{name}, batch {batch}{device_suffix(sizes.device)}",
            make,
            ours,
            {"reference": functools.partial(ours, "reference"),
             "dalle2_pytorch": needs("dalle2_pytorch", rival)},
            # Weights are read twice, gradients written and read, weights and two moments read and written.
            bytes=functools.cache(lambda: 40 * parameters_of(build, sizes)),
            flops=flops,
            images=batch,
            device=sizes.device,
            unshared_weights=("dalle2_pytorch",),
            same_bits=False,
            wall_clock=True,
            calls=1,
            make_check=lambda device, dtype: make(device, dtype, False, batch=checked),
        )
    )  # fmt: skip


def add_steps(sizes: Sizes) -> None:
    suffix = device_suffix(sizes.device)
    for name, build, inputs_of, batch, checked, ours, rival in (
        ("decoder", decoder, decoder_inputs, 8, 1, decoder_step,
         RivalStep(their_decoder, their_decoder_loss)),
        ("clip", clip, clip_inputs, 64, 8, clip_step,
         RivalStep(their_clip, their_clip_loss)),
    ):  # fmt: skip
        flops = functools.partial(_flops_of_row, f"{name} loss and gradient, batch {batch}{suffix}")
        add_step(f"{name} training step", sizes, build, inputs_of, batch, checked, ours, flops, rival)


def _flops_of_row(name: str) -> int:
    return CASES[name].flops()


add_steps(KARLO)
add_steps(SMALL)
