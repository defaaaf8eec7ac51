"""What both priors share: captions in, candidates out, the best of them kept."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle2_fast.checkpoints import Pretrained
from dalle2_fast.models.clip.model import CLIP
from dalle2_fast.models.inputs import cat_padded, check_probability, resolve_seeds
from dalle2_fast.models.prior.diffusion_network import Prefix
from dalle2_fast.seeds import derived_seeds

Caption = tuple[Tensor, Tensor | None, Tensor | None]  # embedding, encodings, mask


class CaptionedPrior(Pretrained, nn.Module):
    """A prior over CLIP image embeddings; a subclass adds to `config` what it has besides.

    diffuses: whether `sample` is a diffusion, with steps and a sampler to choose.
    """

    diffuses = True
    part = "prior"

    def __init__(
        self,
        kind: type[nn.Module],  # of net
        net: nn.Module | dict | None,
        clip: CLIP | None,
        image_embed_dim: int | None,
        cond_drop_prob: float,
        embed_scale: float | None,
        unit_norm: bool,
    ):
        super().__init__()
        # In a tuple, so that it is no submodule: a checkpoint holds its weights once, under "clip.".
        self._clip = (None if clip is None else clip.eval(),)
        net = build_net(kind, net, clip, image_embed_dim)
        check_probability("cond_drop_prob", cond_drop_prob)
        if embed_scale is None:
            embed_scale = math.sqrt(net.embed_dim)
        self.config = dict(
            net=net.config, image_embed_dim=net.embed_dim, cond_drop_prob=cond_drop_prob,
            embed_scale=embed_scale, unit_norm=unit_norm,
        )
        self.net = net
        self.image_embed_dim = net.embed_dim
        self.cond_drop_prob = cond_drop_prob
        self.embed_scale, self.unit_norm = float(embed_scale), unit_norm

    @property
    def clip(self) -> CLIP | None:
        return self._clip[0]

    def _scaled(self, embed: Tensor) -> Tensor:
        embed = embed if embed.dtype == torch.float64 else embed.float()
        return (F.normalize(embed, dim=-1) if self.unit_norm else embed) * self.embed_scale

    def _condition(self, caption: Caption, keep: Tensor) -> Caption:
        """What the network is told: scaled embedding, encodings, mask. Where keep [B] is False it is told
        nothing: a zero embedding (the projection's bias speaks for it) and no text positions."""
        text_embed, text_encodings, text_mask = caption
        weights = self.net.text_embed_proj.weight.dtype
        embed = torch.where(keep[:, None], self._scaled(text_embed), 0.0).to(weights)
        if text_encodings is None:
            return embed, None, None
        if text_mask is None:
            text_mask = torch.ones(text_encodings.shape[:2], dtype=torch.bool, device=embed.device)
        return embed, text_encodings.to(weights), text_mask & keep[:, None]

    def _with_and_without(self, caption: Caption, guided: bool, negative: Caption | None = None) -> Caption:
        """The condition of every row, and behind it, for guidance, that of rows that are told nothing, or
        the caption `negative`."""
        keep = torch.ones(len(caption[0]), dtype=torch.bool, device=caption[0].device)
        condition = self._condition(caption, keep)
        if not guided:
            return condition
        without = self._condition(caption, ~keep) if negative is None else self._condition(negative, keep)
        pairs = zip(condition, without, strict=True)
        return tuple(None if a is None else cat_padded(a, b) for a, b in pairs)

    def _negative(self, negative: Caption | None, caption: Caption) -> Caption | None:
        """`negative`, as CLIP.encode_text returns captions, for every row of `caption`."""
        if negative is None:
            return None
        embed, encodings, mask = self._caption(None, *negative)
        batch = len(caption[0])
        if len(embed) not in (1, batch) or (encodings is None) != (caption[1] is None):
            raise ValueError(
                f"negative: expected 1 or {batch} captions, with encodings if the caption has them, got "
                f"{len(embed)}, {'without' if encodings is None else 'with'} encodings"
            )
        return tuple(x if x is None else x.expand(batch, *x.shape[1:]) for x in (embed, encodings, mask))

    def _candidates(
        self,
        caption: Caption,
        negative: Caption | None,
        count: int,
        seeds: Tensor | None,
        generator: torch.Generator | None,
        cond_scale: float | Tensor,
        guidance: float | Tensor | None,
    ) -> tuple[Tensor, float | Tensor | None, Prefix]:
        """For `count` candidates a caption: their seeds [B * count], guidance (= cond_scale; [B * count], a
        number, or None for none) and the captions' part of the network, once for all steps."""
        batch, device = len(caption[0]), caption[0].device
        seeds = candidate_seeds(resolve_seeds(seeds, batch, device, generator), count)
        guidance = cond_scale if guidance is None else guidance
        if isinstance(guidance, Tensor):
            guidance = guidance.to(device).expand(batch).repeat_interleave(count)
        elif guidance == 1.0:
            guidance = None
        condition = self._with_and_without(caption, guidance is not None, self._negative(negative, caption))
        return seeds, guidance, self.net.remember(*condition).repeat_interleave(count)

    def _embed_image(self, image: Tensor | None, image_embed: Tensor | None, batch: int) -> Tensor:
        if (image is None) == (image_embed is None):
            raise ValueError("image, image_embed: expected exactly one of the two")
        if image is not None:
            with torch.no_grad():
                image_embed = self._need_clip("image").encode_image(image, normalize=self.unit_norm)
        self._check_embed("image_embed", image_embed, batch)
        return image_embed

    def _need_clip(self, what: str) -> CLIP:
        if self.clip is None:
            raise ValueError(f"{what}: needs a prior built with clip=...; without one pass {what}_embed")
        return self.clip

    def _caption(
        self,
        text: Tensor | None,
        text_embed: Tensor | None,
        text_encodings: Tensor | None,
        text_mask: Tensor | None,
    ) -> Caption:
        if (text is None) == (text_embed is None):
            raise ValueError("text, text_embed: expected exactly one of the two")
        if text is not None:
            if text_encodings is not None or text_mask is not None:
                raise ValueError("text_encodings, text_mask: expected with text_embed only, not with text")
            with torch.no_grad():
                return self._need_clip("text").encode_text(text, normalize=self.unit_norm)
        self._check_embed("text_embed", text_embed)
        if text_encodings is None:
            if text_mask is not None:
                raise ValueError("text_mask: expected together with text_encodings only")
            return text_embed, None, None
        batch, limit, width = len(text_embed), self.net.context_length, self.net.text_dim
        shape = tuple(text_encodings.shape)
        if len(shape) != 3 or shape[0] != batch or shape[1] > limit or shape[2] != width:
            expected = f"[B, L, D] = ({batch}, L <= {limit}, {width})"
            raise ValueError(f"text_encodings: expected {expected}, got {shape}")
        if text_mask is not None and (text_mask.dtype != torch.bool or text_mask.shape != shape[:2]):
            came = f"{text_mask.dtype} {tuple(text_mask.shape)}"
            raise ValueError(f"text_mask: expected bool [B, L] = {shape[:2]}, got {came}")
        return text_embed, text_encodings, text_mask

    def _check_embed(self, name: str, embed: Tensor, batch: int | None = None) -> None:
        width = self.image_embed_dim
        if not isinstance(embed, Tensor) or not embed.is_floating_point():
            came = embed.dtype if isinstance(embed, Tensor) else type(embed).__name__
            raise TypeError(f"{name}: expected a floating-point tensor [B, {width}], got {came}")
        if embed.ndim != 2 or embed.shape[1] != width or batch not in (None, len(embed)):
            expected = f"({'B' if batch is None else batch}, {width})"
            raise ValueError(f"{name}: expected [B, E] = {expected}, got {tuple(embed.shape)}")


def build_net(
    kind: type[nn.Module], net: nn.Module | dict | None, clip: CLIP | None, image_embed_dim: int | None
) -> nn.Module:
    """`net`, or one of class `kind` from a dict of its arguments; widths that the dict (or None) leaves open
    come from `clip` or `image_embed_dim`. ValueError if it does not fit them."""
    if not isinstance(net, kind):
        widths = {}
        if clip is not None:
            widths = {"embed_dim": clip.dim_latent, "text_dim": clip.config["dim_text"],
                      "context_length": clip.context_length}
        elif image_embed_dim is not None:
            widths = {"embed_dim": image_embed_dim}
        net = kind(**(widths | (net or {})))
    for name, width in (("image_embed_dim", image_embed_dim), ("clip", clip and clip.dim_latent)):
        if width is not None and width != net.embed_dim:
            raise ValueError(f"{name}: expected width net.embed_dim = {net.embed_dim}, got {width}")
    return net


def best_candidate(
    candidates: Tensor,  # [B * count, E], those of one caption side by side
    text_embed: Tensor,  # [B, E]
) -> Tensor:  # [B, E]
    """Of each caption's candidates the one with the largest cosine to its embedding (unCLIP, section 2.2)."""
    candidates = candidates.unflatten(0, (len(text_embed), -1))
    text_unit = F.normalize(text_embed.to(candidates.dtype), dim=-1)
    cosine = (F.normalize(candidates, dim=-1) * text_unit[:, None]).sum(dim=-1)
    return candidates[torch.arange(len(candidates), device=candidates.device), cosine.argmax(dim=1)]


def candidate_seeds(seeds: Tensor, count: int) -> Tensor:
    """[B] -> [B * count], the candidates of one caption next to each other, each with noise of its own.

    None of them keeps the plain seed: a decoder that is given the same one would start from the same numbers
    as the prior.
    """
    return derived_seeds(seeds[:, None], torch.arange(1, count + 1, device=seeds.device)).flatten()
