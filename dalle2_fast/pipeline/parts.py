"""The networks of a pipeline: their names, and whether they fit each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dalle2_fast.data.text.tokenizer import Tokenizer
    from dalle2_fast.models.clip.model import CLIP
    from dalle2_fast.models.decoder.model import Decoder
    from dalle2_fast.models.prior.autoregressive import ARPrior
    from dalle2_fast.models.prior.diffusion import DiffusionPrior
    from dalle2_fast.models.upsampler.model import Upsampler

UPSAMPLERS = ("upsampler", "upsampler2")
PARTS = ("clip", "prior", "decoder", *UPSAMPLERS)


def check_parts(
    clip: CLIP,
    prior: DiffusionPrior | ARPrior | None,
    decoder: Decoder,
    upsampler: Upsampler | None,
    upsampler2: Upsampler | None,
    tokenizer: Tokenizer,
) -> None:
    """ValueError for parts that were not made for each other: later they would fail, or sample noise."""
    tokens, width = clip.config["num_text_tokens"], clip.config["dim_text"]
    if tokenizer.vocab_size > tokens:
        raise ValueError(f"tokenizer: expected at most CLIP's {tokens} tokens, got {tokenizer.vocab_size}")
    if tokenizer.context_length > clip.context_length:
        raise ValueError(
            f"tokenizer: expected a context_length of at most CLIP's {clip.context_length}, got "
            f"{tokenizer.context_length}"
        )
    equal = [("decoder: image_embed_dim", clip.dim_latent, decoder.image_embed_dim, "CLIP's dim_latent")]
    if prior is not None:
        equal += [
            ("prior: image_embed_dim", clip.dim_latent, prior.image_embed_dim, "CLIP's dim_latent"),
            ("prior: text_dim", width, prior.net.text_dim, "CLIP's dim_text"),
        ]
    if upsampler is not None:
        why = "the decoder's size"
        equal.append(("upsampler: low_res_size", decoder.image_size, upsampler.low_res_size, why))
    if upsampler2 is not None:
        if upsampler is None:
            raise ValueError("upsampler2: expected an upsampler before it, got None")
        why = "the first upsampler's size"
        equal.append(("upsampler2: low_res_size", upsampler.image_size, upsampler2.low_res_size, why))
    for name, expected, came, why in equal:
        if came != expected:
            raise ValueError(f"{name}: expected {expected} ({why}), got {came}")
