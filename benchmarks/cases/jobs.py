"""Whole jobs' rows of the registry: a caption to pictures, and training steps; wall clock.

On a GPU the sizes are Karlo's, on a CPU those of cases_networks.SMALL. Weights are random on all sides; the
rivals have networks of the same size (DALLE2-pytorch's within a tenth) and make the same steps with the same
guidance.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.cases import rival_jobs
from benchmarks.cases.networks import KARLO, SMALL, TINY, Sizes, clip, clip_inputs, made
from benchmarks.cases.registry import CASES, Case, add, drawer, needs, running
from benchmarks.timing.provenance import parameters
from dalle2_fast import CLIP, DALLE2, Decoder, DiffusionPrior, Upsampler
from dalle2_fast.data.text.tokenizer import BPETokenizer, WordTokenizer

CAPTION = "a large red circle above a small blue square"
# What a call of UnCLIPPipeline uses when it says nothing.
SAMPLING = dict(steps=25, guidance=8.0, prior_steps=25, prior_guidance=4.0, prior_candidates=1,
                upsampler_steps=7, sampler="ddpm")  # fmt: skip
FEW = dict(steps=3, prior_steps=3, upsampler_steps=3)


# -------------------------------------------------------------------------------------- a caption to pictures


def chain(sizes: Sizes, few_steps: bool = False) -> DALLE2:
    text = CLIP(**sizes.clip)
    width = text.dim_latent
    if sizes is KARLO:
        tokenizer = BPETokenizer()
    else:
        tokenizer = WordTokenizer(sorted(set(CAPTION.split())), context_length=sizes.tokens)
    raw = dict(unit_norm=False, embed_scale=1.0)
    upsampler = dict(in_channels=6, out_channels=3, film=False, cross_dim=None, attention_levels=(),
                     **sizes.upsampler)  # fmt: skip
    return DALLE2(
        text,
        DiffusionPrior(sizes.prior, image_embed_dim=width, sample_clip=5.0, **raw),
        Decoder(sizes.decoder, image_size=sizes.pixels, image_embed_dim=width, text_embed_dim=width,
                text_encoding_dim=text.config["dim_text"], **raw),
        Upsampler(upsampler, last_unet=upsampler, image_size=4 * sizes.pixels, low_res_size=sizes.pixels,
                  resize="bicubic"),
        tokenizer,
        sampling=SAMPLING | (FEW if few_steps else {}),
    )  # fmt: skip


def draw_pictures(impl: str, pipe: DALLE2, images: int) -> Tensor:
    with running(impl):
        pictures = pipe.generate(CAPTION, images, seed=0).images
    return pictures.double() if pipe.dtype == torch.float64 else pictures


class Pipeline:
    """diffusers' pipeline, made anew for each chain of ours."""

    def __init__(self, compile: bool):
        self.compiles = self.network = compile
        self.pipelines = weakref.WeakKeyDictionary()

    def __call__(self, pipe: DALLE2, images: int) -> Tensor:
        if pipe not in self.pipelines:
            self.pipelines[pipe] = rival_jobs.unclip_pipeline(pipe, self.compiles)
        return rival_jobs.draw_pictures(self.pipelines[pipe], CAPTION, images, pipe.sampling)


def add_pictures(sizes: Sizes, images: int) -> None:
    def make(device, dtype, tiny):
        build = functools.partial(chain, few_steps=tiny or sizes.device == "cpu")
        return dict(pipe=made(build, TINY if tiny else sizes, device, dtype), images=images)

    def flops() -> int:
        """Of the U-Nets and the prior: guidance makes two rows of an image."""
        steps = SAMPLING | (FEW if sizes.device == "cpu" else {})
        row = {part: CASES[f"{part} forward, batch {batch}{suffix(sizes)}"].flops() / batch
               for part, batch in (("prior", 2), ("decoder", 2), ("upsampler", 1))}  # fmt: skip
        passes = dict(prior=2 * steps["prior_steps"], decoder=2 * steps["steps"],
                      upsampler=steps["upsampler_steps"])  # fmt: skip
        return int(images * sum(passes[part] * row[part] for part in row))

    side = 4 * sizes.pixels
    rivals = {"diffusers": Pipeline(False), "diffusers, compiled": Pipeline(True)}
    reference = functools.partial(draw_pictures, "reference")
    add(
        Case(
            f"caption to {side} px, {images} images{suffix(sizes)}",
            make,
            draw_pictures,
            {"reference": "on a CPU it is the same" if sizes.device == "cpu" else reference}
            | {name: needs("diffusers", rival) for name, rival in rivals.items()},
            bytes=functools.cache(lambda: 2 * parameters(made(chain, sizes, "meta", torch.bfloat16))),
            flops=functools.cache(flops),
            images=images,
            device=sizes.device,
            own_weights=tuple(rivals),
            same_bits=sizes.device == "cpu",
            wall=True,
            calls=1,
            # In float32: what bfloat16 makes of a sampler's every step is no measure of the ops.
            make_check=lambda device, dtype: make(device, torch.float32, True),
        )
    )


def suffix(sizes: Sizes) -> str:
    return " (CPU)" if sizes.device == "cpu" else ""


# --------------------------------------------------------------------------------------------- training steps

OPTIMIZERS = weakref.WeakKeyDictionary()  # one for each network


def step(net: nn.Module, loss: Callable[[], Tensor]) -> Tensor:
    """Loss, gradients, AdamW. Its rate is 0: the same work, and every round is the first."""
    if net not in OPTIMIZERS:
        OPTIMIZERS[net] = torch.optim.AdamW(net.parameters(), lr=0.0, weight_decay=0.0)
    where = next(net.parameters())
    with torch.enable_grad(), torch.autocast(where.device.type, torch.bfloat16, enabled=where.is_cuda
                                             and where.dtype == torch.float32):  # fmt: skip
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
    draw = drawer(device, dtype)
    return dict(image=draw(batch, 3, sizes.pixels, sizes.pixels).sigmoid().bfloat16().to(dtype),
                image_embed=draw(batch, net.image_embed_dim), text_embed=draw(batch, net.text_embed_dim),
                text_encodings=draw(batch, sizes.tokens, net.text_encoding_dim))  # fmt: skip


def decoder_step(impl: str, net: Decoder, **inputs) -> Tensor:
    generator = torch.Generator(inputs["image"].device).manual_seed(0)
    randn = torch.randn

    def the_same(*shape, dtype=None, **options) -> Tensor:  # float64 would draw other numbers
        return randn(*shape, dtype=torch.float32, **options).to(dtype)

    with running(impl), mock.patch.object(torch, "randn", the_same):
        return step(net, lambda: net(**inputs, generator=generator, check_range=False))


def clip_step(impl: str, net: CLIP, **inputs) -> Tensor:
    with running(impl):
        return step(net, lambda: net(**inputs))


class TheirStep:
    """A training step of DALLE2-pytorch's module in the place of ours."""

    def __init__(self, build: Callable, loss: Callable):
        self.build, self.loss = build, loss
        self.modules = weakref.WeakKeyDictionary()

    def __call__(self, net: nn.Module, **inputs) -> Tensor:
        if net not in self.modules:
            self.modules[net] = rival_jobs.on(net, self.build)
        return step(self.modules[net], lambda: self.loss(self.modules[net], **inputs))


def add_step(name, sizes, build, inputs_of, batch, checked, ours, flops, rival) -> None:
    def make(device, dtype, tiny, batch=batch):
        size = TINY if tiny else sizes
        wide = torch.float64 if dtype == torch.float64 else torch.float32  # weights: autocast does the rest
        net = made(build, size, device, wide)
        return dict(net=net, **inputs_of(size, net, 2 if tiny else batch, device, wide))

    add(
        Case(
            f"{name}, batch {batch}{suffix(sizes)}",
            make,
            ours,
            {"reference": "on a CPU it is the same" if sizes.device == "cpu"
                          else functools.partial(ours, "reference"),
             "dalle2_pytorch": needs("dalle2_pytorch", rival)},
            # weights twice read, gradients written and read, weights and two moments read and written
            bytes=functools.cache(lambda: 40 * parameters(made(build, sizes, "meta", torch.bfloat16))),
            flops=flops,
            images=batch,
            device=sizes.device,
            own_weights=("dalle2_pytorch",),
            same_bits=False,
            wall=True,
            calls=1,
            make_check=lambda device, dtype: make(device, dtype, False, batch=checked),
        )
    )  # fmt: skip


def add_steps(sizes: Sizes) -> None:
    end = suffix(sizes)
    for name, build, inputs_of, batch, checked, ours, rival in (
        ("decoder", decoder, decoder_inputs, 8, 1, decoder_step,
         TheirStep(rival_jobs.their_decoder, rival_jobs.their_decoder_loss)),
        ("clip", clip, clip_inputs, 64, 8, clip_step,
         TheirStep(rival_jobs.their_clip, rival_jobs.their_clip_loss)),
    ):  # fmt: skip
        flops = functools.partial(_flops, f"{name} loss and gradient, batch {batch}{end}")
        add_step(f"{name} training step", sizes, build, inputs_of, batch, checked, ours, flops, rival)


def _flops(name: str) -> int:
    return CASES[name].flops()


add_pictures(KARLO, 4)
add_pictures(SMALL, 1)
add_steps(KARLO)
add_steps(SMALL)
