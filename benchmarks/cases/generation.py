"""Rows from a caption to images, in wall-clock time, against diffusers' UnCLIPPipeline.

On a GPU the sizes are Karlo's, on a CPU those of sizes.SMALL. All weights are random. The rival has networks
of the same size and runs as many steps with the same guidance.
"""

from __future__ import annotations

import functools
import types
import weakref

import torch
from torch import Tensor

from benchmarks.cases.registry import (
    CASES,
    Case,
    add,
    compiled_module,
    device_suffix,
    needs,
    op_implementation,
)
from benchmarks.cases.rival_networks import diffusers_prior, diffusers_unet
from benchmarks.cases.sizes import KARLO, SMALL, TINY, Sizes, check_sizes, parameters_of, seeded_network
from dalle2_fast import CLIP, DALLE2, Decoder, DiffusionPrior, Upsampler
from dalle2_fast.data.text.tokenizer import BPETokenizer, WordTokenizer

CAPTION = "a large red circle above a small blue square"
# The defaults of UnCLIPPipeline.
SAMPLING = dict(steps=25, guidance=8.0, prior_steps=25, prior_guidance=4.0, prior_candidates=1,
                upsampler_steps=7, sampler="ddpm")  # fmt: skip
FEW_STEPS = dict(steps=3, prior_steps=3, upsampler_steps=3)


def pipeline(sizes: Sizes, few_steps: bool = False) -> DALLE2:
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
        sampling=SAMPLING | (FEW_STEPS if few_steps else {}),
    )  # fmt: skip


def generate_images(impl: str, pipe: DALLE2, images: int, graphs: bool = True) -> Tensor:
    """graphs: on a GPU, replay the steps as CUDA graphs, except with the reference of the ops."""
    captured = graphs and impl != "reference" and pipe.device.type == "cuda"
    with op_implementation(impl):
        made = pipe.generate(CAPTION, images, seed=0, graphs=captured).images
    return made.double() if pipe.dtype == torch.float64 else made


# -------------------------------------------------------------------------------------------------- the rival


class TransformersTokenizer:
    """Our tokenizer with the interface that UnCLIPPipeline expects of transformers' tokenizers."""

    def __init__(self, tokenizer, end: int):
        self.tokenizer, self.end, self.model_max_length = tokenizer, end, tokenizer.context_length

    def __call__(self, texts, **options) -> types.SimpleNamespace:
        texts = [texts] if isinstance(texts, str) else texts
        rows = torch.cat([self._row(text) for text in texts])
        return types.SimpleNamespace(input_ids=rows, attention_mask=(rows != 0).long())

    def _row(self, text: str) -> Tensor:
        if text:
            row = self.tokenizer.encode(text)
        else:  # WordTokenizer accepts no empty caption
            row = torch.zeros(1, self.model_max_length, dtype=torch.int64)
            row[0, 0] = 1
        row[row == row.max()] = self.end  # transformers reads the embedding at the largest token
        return row


def unclip_pipeline(pipe: DALLE2, compile: bool):
    """UnCLIPPipeline with the sizes of `pipe`, on its device and in its dtype."""
    from diffusers import UnCLIPPipeline, UnCLIPScheduler
    from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    clip, decoder = pipe.clip.config, pipe.decoder
    text = CLIPTextConfig(
        vocab_size=clip["num_text_tokens"], hidden_size=clip["dim_text"], projection_dim=clip["dim_latent"],
        intermediate_size=4 * clip["dim_text"], num_hidden_layers=clip["text_enc_depth"],
        num_attention_heads=clip["text_heads"], max_position_embeddings=clip["text_seq_len"],
        bos_token_id=1, eos_token_id=clip["num_text_tokens"] - 1, pad_token_id=0,
    )  # fmt: skip
    scheduler = dict(num_train_timesteps=1000)
    with torch.random.fork_rng(), torch.device(pipe.device):
        torch.manual_seed(1)
        parts = dict(
            text_encoder=CLIPTextModelWithProjection(text),
            prior=diffusers_prior(pipe.prior.net),
            text_proj=UnCLIPTextProjModel(
                clip_embeddings_dim=clip["dim_latent"], time_embed_dim=decoder.unet.embed_dim,
                cross_attention_dim=decoder.unet.cross_dim,
            ),
            decoder=diffusers_unet(decoder.unet, sample_size=decoder.image_size),
            super_res_first=diffusers_unet(pipe.upsampler.unet, sample_size=pipe.upsampler.image_size),
            super_res_last=diffusers_unet(pipe.upsampler.unet, sample_size=pipe.upsampler.image_size),
        )  # fmt: skip
    like = dict(prior=pipe.prior.net, decoder=decoder.unet, super_res_first=pipe.upsampler.unet)
    check_sizes({name: parts[name] for name in like}, like)
    theirs = UnCLIPPipeline(
        tokenizer=TransformersTokenizer(pipe.tokenizer, clip["num_text_tokens"] - 1),
        prior_scheduler=UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample",
                                        clip_sample_range=5.0, **scheduler),
        decoder_scheduler=UnCLIPScheduler(variance_type="learned_range", **scheduler),
        super_res_scheduler=UnCLIPScheduler(variance_type="fixed_small_log", **scheduler),
        **{name: part.to(pipe.dtype).eval() for name, part in parts.items()},
    )  # fmt: skip
    theirs.to(pipe.device)
    theirs.set_progress_bar_config(disable=True)
    if compile:
        for name in ("prior", "decoder", "super_res_first", "super_res_last"):
            compiled_module(getattr(theirs, name))
    return theirs


def rival_images(theirs, caption: str, images: int, sampling: dict) -> Tensor:
    """[images, 3, H, W] in [0, 1]."""
    generator = torch.Generator(theirs.device).manual_seed(0)
    made = theirs(
        caption, num_images_per_prompt=images, generator=generator, output_type="np",
        prior_num_inference_steps=sampling["prior_steps"], prior_guidance_scale=sampling["prior_guidance"],
        decoder_num_inference_steps=sampling["steps"], decoder_guidance_scale=sampling["guidance"],
        super_res_num_inference_steps=sampling["upsampler_steps"],
    )  # fmt: skip
    return torch.from_numpy(made.images).permute(0, 3, 1, 2)


class RivalPipeline:
    """diffusers' pipeline with the sizes of ours; one is built for each pipeline of ours."""

    def __init__(self, compile: bool):
        self.compiles = self.network = compile
        self.pipelines = weakref.WeakKeyDictionary()

    def __call__(self, pipe: DALLE2, images: int) -> Tensor:
        if pipe not in self.pipelines:
            self.pipelines[pipe] = unclip_pipeline(pipe, self.compiles)
        return rival_images(self.pipelines[pipe], CAPTION, images, pipe.sampling)


# --------------------------------------------------------------------------------------------------- the rows


def add_generation(sizes: Sizes, images: int) -> None:
    def make(device, dtype, tiny):
        build = functools.partial(pipeline, few_steps=tiny or sizes.device == "cpu")
        return dict(pipe=seeded_network(build, TINY if tiny else sizes, device, dtype), images=images)

    def flops() -> int:
        """FLOPs of the U-Nets and the prior; guidance evaluates two rows per image."""
        steps = SAMPLING | (FEW_STEPS if sizes.device == "cpu" else {})
        row = {part: CASES[f"{part} forward, batch {batch}{device_suffix(sizes.device)}"].flops() / batch
               for part, batch in (("prior", 2), ("decoder", 2), ("upsampler", 1))}  # fmt: skip
        passes = dict(prior=2 * steps["prior_steps"], decoder=2 * steps["steps"],
                      upsampler=steps["upsampler_steps"])  # fmt: skip
        return int(images * sum(passes[part] * row[part] for part in row))

    side = 4 * sizes.pixels
    rivals = {"diffusers": RivalPipeline(False), "diffusers, compiled": RivalPipeline(True)}
    versions = {"reference": functools.partial(generate_images, "reference")}
    if sizes.device == "cuda":
        versions["ours, without graphs"] = functools.partial(generate_images, "fused", graphs=False)
    add(
        Case(
            f"caption to {side} px, {images} images{device_suffix(sizes.device)}",
            make,
            generate_images,
            versions | {name: needs("diffusers", rival) for name, rival in rivals.items()},
            bytes=functools.cache(lambda: 2 * parameters_of(pipeline, sizes)),
            flops=functools.cache(flops),
            images=images,
            device=sizes.device,
            unshared_weights=tuple(rivals),
            same_bits=sizes.device == "cpu",
            wall_clock=True,
            calls=1,
            target_factors={"diffusers": 3.0, "diffusers, compiled": 2.0} if sizes.device == "cuda" else {},
            # In float32: over many sampling steps, errors of bfloat16 grow beyond what the ops add.
            make_check=lambda device, dtype: make(device, torch.float32, True),
        )
    )


add_generation(KARLO, 4)
add_generation(SMALL, 1)
