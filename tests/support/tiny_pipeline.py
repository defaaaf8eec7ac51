"""A whole pipeline with random weights, small enough to sample in a fraction of a second."""

from __future__ import annotations

from pathlib import Path

import torch

from dalle2_fast import CLIP, DALLE2, Decoder, DiffusionPrior, Upsampler
from dalle2_fast.data.text.tokenizer import WordTokenizer

WORDS = ("a", "red", "blue", "ring", "square", "above")


def tiny_pipeline(seed: int = 0, upsampler: bool = True, own_text_encoder: bool = True) -> DALLE2:
    tokenizer = WordTokenizer(WORDS, context_length=8)
    text = dict(num_text_tokens=tokenizer.vocab_size, text_seq_len=8)
    encoder = dict(num_tokens=tokenizer.vocab_size, context_length=8, dim=16, depth=1, heads=2)
    unet = dict(out_channels=3, patch_size=2, channels=(16, 16), layers_per_block=1, num_groups=4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DALLE2(
            CLIP(
                dim_text=16,
                dim_image=16,
                dim_latent=16,
                text_enc_depth=1,
                text_heads=2,
                visual_enc_depth=1,
                visual_heads=2,
                visual_image_size=16,
                visual_patch_size=8,
                **text,
            ),
            DiffusionPrior(
                dict(dim=16, depth=1, heads=2, dim_head=8, text_dim=16, context_length=8), image_embed_dim=16
            ),
            Decoder(
                dict(in_channels=3, attention_levels=(1,), head_dim=8, cross_dim=16, **unet),
                image_size=16,
                image_embed_dim=16,
                text_embed_dim=16,
                text_encoding_dim=16,
                num_image_tokens=2,
                prediction="v_prediction",
                variance="fixed_small",
                text_encoder=encoder if own_text_encoder else None,
            ),
            Upsampler(dict(in_channels=6, attention_levels=(), **unet), image_size=32, low_res_size=16)
            if upsampler
            else None,
            tokenizer,
            sampling=dict(steps=2, prior_steps=2, upsampler_steps=2, guidance=2.0),
            metadata={"world": {"shapes": ["ring", "square"]}},
        )


def shaken_pipeline() -> DALLE2:
    """The same, shaken so that its images depend on every input: an untrained U-Net answers zero."""
    pipe = tiny_pipeline().eval()
    with torch.no_grad():
        for name, parameter in pipe.named_parameters():
            if name.startswith(("decoder", "upsampler")):
                generator = torch.Generator().manual_seed(len(name) * 1000 + parameter.numel())
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return pipe


def load_on_cpu(path: str | Path) -> DALLE2:
    """DALLE2.from_pretrained in float32 on the CPU, where its defaults may choose a GPU or bfloat16."""
    return DALLE2.from_pretrained(path, device="cpu", dtype=torch.float32)
