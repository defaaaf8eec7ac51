"""The whole jobs of other packages, with the sizes of ours and random weights: diffusers' UnCLIPPipeline,
DALLE2-pytorch's decoder and CLIP in training. Nothing is downloaded."""

from __future__ import annotations

import types
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.cases.networks import diffusers_prior, diffusers_unet
from benchmarks.cases.registry import compiled_module
from benchmarks.timing.provenance import nearest, parameters
from dalle2_fast import CLIP, DALLE2, Decoder


class Tokens:
    """What UnCLIPPipeline asks a tokenizer for; of the tokenizer that ours has."""

    def __init__(self, tokenizer, end: int):
        self.tokenizer, self.end, self.model_max_length = tokenizer, end, tokenizer.context_length

    def __call__(self, texts, **options) -> types.SimpleNamespace:
        texts = [texts] if isinstance(texts, str) else texts
        rows = torch.cat([self._row(text) for text in texts])
        return types.SimpleNamespace(input_ids=rows, attention_mask=(rows != 0).long())

    def _row(self, text: str) -> Tensor:
        if text:
            row = self.tokenizer.encode(text)
        else:  # a tokenizer of words has no empty caption
            row = torch.zeros(1, self.model_max_length, dtype=torch.int64)
            row[0, 0] = 1
        row[row == row.max()] = self.end  # transformers reads the embedding at the largest
        return row


def unclip_pipeline(pipe: DALLE2, compile: bool):
    """UnCLIPPipeline of the sizes of `pipe`, on its device and in its dtype."""
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
    same_size({name: parts[name] for name in like}, like)
    theirs = UnCLIPPipeline(
        tokenizer=Tokens(pipe.tokenizer, clip["num_text_tokens"] - 1),
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


def draw_pictures(theirs, caption: str, images: int, sampling: dict) -> Tensor:
    """[images, 3, H, W] in [0, 1]."""
    generator = torch.Generator(theirs.device).manual_seed(0)
    made = theirs(
        caption, num_images_per_prompt=images, generator=generator, output_type="np",
        prior_num_inference_steps=sampling["prior_steps"], prior_guidance_scale=sampling["prior_guidance"],
        decoder_num_inference_steps=sampling["steps"], decoder_guidance_scale=sampling["guidance"],
        super_res_num_inference_steps=sampling["upsampler_steps"],
    )  # fmt: skip
    return torch.from_numpy(made.images).permute(0, 3, 1, 2)


def same_size(theirs: dict[str, nn.Module], ours: dict[str, nn.Module], tolerance: float = 0.01) -> None:
    for name, module in theirs.items():
        wanted, got = parameters(ours[name]), parameters(module)
        if abs(got - wanted) > tolerance * wanted > 1e5:  # a tiny one of a test has no near neighbour
            raise RuntimeError(f"{name}: expected about {wanted} parameters, got {got}: not the same job")


# --------------------------------------------------------------------------------------------- DALLE2-pytorch


def their_decoder(ours: Decoder) -> nn.Module:
    """Its U-Net with our levels, attention at the same ones, and the width nearest to our size."""
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

    made = nearest(build, range(base // 2, 2 * base + 1, max(4, base // 20 // 4 * 4)), parameters(ours))
    same_size(dict(decoder=made), dict(decoder=ours), tolerance=0.1)
    return made


def their_decoder_loss(module: nn.Module, image, image_embed, text_encodings, **unused) -> Tensor:
    return module(image, image_embed=image_embed, text_encodings=text_encodings, unet_number=1)


def their_clip(ours: CLIP) -> nn.Module:
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

    made = nearest(build, range(1, 2 * config["visual_enc_depth"] + 1), parameters(ours))
    same_size(dict(clip=made), dict(clip=ours), tolerance=0.1)
    return made


def their_clip_loss(module: nn.Module, text, images) -> Tensor:
    return module(text, images, return_loss=True)


def on(net: nn.Module, build: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Built where `net` is, in its dtype."""
    where = next(net.parameters())
    with torch.random.fork_rng(), torch.device(where.device):
        torch.manual_seed(1)
        return build(net).to(where.dtype).train()
