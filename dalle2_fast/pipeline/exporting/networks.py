"""The networks of a pipeline as modules whose arguments and results are tensors with names.

Together they compute what the pipeline computes, but for the samplers' updates between their calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle2_fast.models.clip.model import CLIP
from dalle2_fast.models.decoder.encoding import encode_captions
from dalle2_fast.models.decoder.guidance import condition
from dalle2_fast.models.decoder.model import Decoder
from dalle2_fast.models.prior.autoregressive import ARPrior
from dalle2_fast.models.prior.base import EmbeddingPrior
from dalle2_fast.models.prior.diffusion import DiffusionPrior
from dalle2_fast.models.unet.model import UNet
from dalle2_fast.models.upsampler.model import Upsampler

if TYPE_CHECKING:
    from dalle2_fast.pipeline.dalle2 import DALLE2


@dataclass(frozen=True)
class ExportedNetwork:
    """A module, how to call it, and what it returns.

    Args:
        name: of its file.
        module: called with the inputs by keyword.
        inputs: rows -> random inputs for as many rows; their first dimension is the batch.
        outputs: names of what the module returns.
    """

    name: str
    module: nn.Module
    inputs: Callable[[int], dict[str, Tensor]]
    outputs: tuple[str, ...]


class _ClipText(nn.Module):
    def __init__(self, clip: CLIP, unit_norm: bool):
        super().__init__()
        self.clip, self.unit_norm = clip, unit_norm

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.clip.encode_text(tokens, normalize=self.unit_norm)


class _ClipImage(nn.Module):
    def __init__(self, clip: CLIP, unit_norm: bool):
        super().__init__()
        self.clip, self.unit_norm = clip, unit_norm

    def forward(self, images: Tensor) -> Tensor:
        return self.clip.encode_image(images, normalize=self.unit_norm)


class _Prior(nn.Module):
    """The prediction at x, the noised embedding as the prior standardises it."""

    def __init__(self, prior: DiffusionPrior):
        super().__init__()
        self.prior = prior

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        text_embed: Tensor,
        text_encodings: Tensor,
        text_mask: Tensor,
        keep_text: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        embed, mask = _condition(self.prior, text_embed, text_mask, keep_text)
        net, offset = self.prior.net, None if guidance is None else self.prior.guidance_input(guidance)
        return net.denoise(x, time, net.encode_prefix(embed, text_encodings, mask), offset)


class _PriorEmbedding(nn.Module):
    """What a prior samples -> an image embedding."""

    def __init__(self, prior: DiffusionPrior | ARPrior):
        super().__init__()
        self.prior = prior

    def forward(self, x: Tensor) -> Tensor:
        return self.prior.restore(x)


class _AutoregressivePrior(nn.Module):
    """The logits of every dimension, given the buckets of those before it."""

    def __init__(self, prior: ARPrior):
        super().__init__()
        self.prior = prior

    def forward(
        self,
        codes: Tensor,
        dot_codes: Tensor,
        text_embed: Tensor,
        text_encodings: Tensor,
        text_mask: Tensor,
        keep_text: Tensor,
    ) -> Tensor:
        embed, mask = _condition(self.prior, text_embed, text_mask, keep_text)
        return self.prior.net(codes, dot_codes, embed, text_encodings, mask)


def _condition(
    prior: EmbeddingPrior, text_embed: Tensor, text_mask: Tensor, keep_text: Tensor
) -> tuple[Tensor, Tensor]:
    embed = torch.where(keep_text[:, None], prior.scale_embedding(text_embed), 0.0)
    return embed, text_mask & keep_text[:, None]


class _DecoderCondition(nn.Module):
    """What conditions the U-Net in every step, of captions as tokens or as CLIP encodes them."""

    def __init__(self, decoder: Decoder):
        super().__init__()
        self.decoder = decoder

    def forward(
        self,
        image_embed: Tensor,
        keep_image: Tensor,
        keep_text: Tensor,
        tokens: Tensor | None = None,
        text_embed: Tensor | None = None,
        text_encodings: Tensor | None = None,
        text_mask: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch = image_embed.shape[0]
        caption = encode_captions(self.decoder, batch, tokens, text_encodings, text_mask, text_embed)
        context, mask, classes = condition(self.decoder, batch, image_embed, caption, keep_image, keep_text)
        if guidance is not None:
            classes = classes + self.decoder.guidance_input(guidance)
        return context, mask, classes


class _Decoder(nn.Module):
    def __init__(self, unet: UNet):
        super().__init__()
        self.unet = unet

    def forward(
        self, x: Tensor, time: Tensor, context: Tensor, context_mask: Tensor, classes: Tensor
    ) -> Tensor:
        return self.unet(x, time, context, classes, context_mask)


class _Upsampler(nn.Module):
    def __init__(self, upsampler: Upsampler, unet: UNet):
        super().__init__()
        self.upsampler, self.unet = upsampler, unet

    def forward(
        self, x: Tensor, time: Tensor, condition: Tensor, noise_level: Tensor | None = None
    ) -> Tensor:
        return self.upsampler.predict(self.unet, x, time, condition, noise_level)


def networks_of(pipe: DALLE2) -> Iterator[ExportedNetwork]:
    """What is exported of a pipeline, in the order in which it runs."""
    clip, prior, decoder = pipe.clip, pipe.prior, pipe.decoder
    unit_norm = all(net.unit_norm for net in (prior, decoder) if net is not None)
    embed, width, length = clip.dim_latent, clip.config["dim_text"], pipe.tokenizer.context_length

    def tokens(rows: int) -> dict[str, Tensor]:
        ids = torch.randint(1, clip.config["num_text_tokens"], (rows, length))
        return {"tokens": torch.where(_lengths(rows, length), ids, 0)}

    def caption(rows: int) -> dict[str, Tensor]:
        encodings = torch.randn(rows, length, width)
        embedding = F.normalize(torch.randn(rows, embed), dim=-1)
        return {"text_embed": embedding, "text_encodings": encodings, "text_mask": _lengths(rows, length)}

    def keep(rows: int, *names: str) -> dict[str, Tensor]:
        return {name: torch.rand(rows) < 0.7 for name in names}

    def weights(rows: int, network: DiffusionPrior | Decoder) -> dict[str, Tensor]:
        if (guidance := network.guidance_input) is None:
            return {}
        return {"guidance": guidance.low + (guidance.high - guidance.low) * torch.rand(rows)}

    if clip.config["text_enc_depth"] is not None:
        outputs = ("text_embed", "text_encodings", "text_mask")
        yield ExportedNetwork("clip_text", _ClipText(clip, unit_norm), tokens, outputs)
    if clip.visual is not None:
        yield ExportedNetwork(
            "clip_image", _ClipImage(clip, unit_norm),
            lambda rows: {"images": torch.rand(rows, 3, clip.image_size, clip.image_size)}, ("image_embed",),
        )  # fmt: skip
    if isinstance(prior, DiffusionPrior):
        def noised(rows: int) -> dict[str, Tensor]:
            return {"x": torch.randn(rows, embed)}

        yield ExportedNetwork(
            "prior", _Prior(prior),
            lambda rows: noised(rows) | _times(rows) | caption(rows) | keep(rows, "keep_text")
            | weights(rows, prior), ("prediction",),
        )  # fmt: skip
        yield ExportedNetwork("prior_embedding", _PriorEmbedding(prior), noised, ("image_embed",))
    elif isinstance(prior, ARPrior):
        net = prior.net

        def buckets(rows: int) -> Tensor:
            return torch.randint(net.num_buckets, (rows, net.num_components))

        yield ExportedNetwork(
            "prior", _AutoregressivePrior(prior),
            lambda rows: {"codes": buckets(rows), "dot_codes": torch.randint(net.num_dot_buckets, (rows,))}
            | caption(rows) | keep(rows, "keep_text"), ("logits",),
        )  # fmt: skip
        yield ExportedNetwork(
            "prior_embedding", _PriorEmbedding(prior), lambda rows: {"x": buckets(rows)}, ("image_embed",)
        )

    def conditions(rows: int) -> dict[str, Tensor]:
        given = tokens(rows) if decoder.text_encoder is not None else caption(rows)
        image_embed = F.normalize(torch.randn(rows, embed), dim=-1)
        kept = keep(rows, "keep_image", "keep_text")
        return {"image_embed": image_embed} | kept | given | weights(rows, decoder)

    unet = decoder.unet
    positions = length + decoder.config["num_image_tokens"]
    yield ExportedNetwork(
        "decoder_condition", _DecoderCondition(decoder), conditions, ("context", "context_mask", "classes")
    )
    yield ExportedNetwork(
        "decoder", _Decoder(unet),
        lambda rows: {"x": torch.randn(rows, unet.in_channels, decoder.image_size, decoder.image_size)}
        | _times(rows) | {
            "context": torch.randn(rows, positions, unet.cross_dim),
            "context_mask": _lengths(rows, positions),
            "classes": torch.randn(rows, unet.embed_dim),
        }, ("prediction",),
    )  # fmt: skip
    for name in ("upsampler", "upsampler2"):
        if (upsampler := getattr(pipe, name)) is None:
            continue
        yield _upsampler(name, upsampler, upsampler.unet)
        if upsampler.last_unet is not None:
            yield _upsampler(f"{name}_last", upsampler, upsampler.last_unet)


def _upsampler(name: str, upsampler: Upsampler, unet: UNet) -> ExportedNetwork:
    shape = (upsampler.channels, upsampler.image_size, upsampler.image_size)

    def inputs(rows: int) -> dict[str, Tensor]:
        given = {"x": torch.randn(rows, *shape)} | _times(rows)
        given["condition"] = torch.rand(rows, *shape) * 2 - 1
        if upsampler.max_noise_level > 0:
            given["noise_level"] = torch.rand(rows) * upsampler.max_noise_level
        return given

    return ExportedNetwork(name, _Upsampler(upsampler, unet), inputs, ("prediction",))


def _times(rows: int) -> dict[str, Tensor]:
    return {"time": torch.rand(rows) * 1000}


def _lengths(rows: int, length: int) -> Tensor:
    """A mask of random captions: bool [rows, length]."""
    lengths = torch.randint(1, length + 1, (rows, 1))
    lengths[0] = length  # on a CPU, networks cut off the positions that no caption of a batch uses
    return torch.arange(length) < lengths
