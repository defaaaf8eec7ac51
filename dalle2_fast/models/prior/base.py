"""What both priors share: they take captions, sample candidates, and keep the best of them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle2_fast.models.captions import Caption, check_encodings
from dalle2_fast.models.clip_conditioned import ClipConditioned
from dalle2_fast.models.inputs import check_features, check_probability, resolve_seeds
from dalle2_fast.models.prior.caption_prefix import PrefixCache
from dalle2_fast.seeds import derived_seeds

if TYPE_CHECKING:
    from dalle2_fast.models.clip.model import CLIP

EncodedText = tuple[Tensor, Tensor | None, Tensor | None]  # embedding, encodings, mask of CLIP.encode_text


class EmbeddingPrior(ClipConditioned):
    """A network that samples CLIP image embeddings for captions. A subclass adds its options to `config`.

    Args:
        kind: the class of `net`.
        net: the network, or a dict of its arguments. Widths that the dict (or None) does not contain come
            from `clip` or `image_embed_dim`.
        clip: a frozen CLIP that computes embeddings, see `ClipConditioned`; None for none.
        image_embed_dim: width E of the image embeddings; None takes it from `net` or `clip`.
        cond_drop_prob: probability with which training drops a caption, for guidance.
        embed_scale: factor on embeddings; None is sqrt(E).
        unit_norm: whether embeddings are L2-normalised when they enter and leave.

    Attributes:
        diffuses: whether `sample` is a diffusion, with steps and a sampler to choose.

    Raises:
        ValueError: the widths do not fit each other, or a probability is not one.
    """

    diffuses = True
    part = "prior"

    def __init__(
        self,
        kind: type[nn.Module],
        net: nn.Module | dict | None,
        clip: CLIP | None,
        image_embed_dim: int | None,
        cond_drop_prob: float,
        embed_scale: float | None,
        unit_norm: bool,
    ):
        super().__init__(clip, unit_norm, embed_scale)
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
        self.embed_scale = float(embed_scale)

    # ------------------------------------------------------------------------------------- what users hand in

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
            self._check_clip("text")
            return self.encode_with_clip(text)
        self._check_embed("text_embed", text_embed)
        if text_encodings is not None:
            check_encodings(
                text_encodings, text_mask, len(text_embed), self.net.text_dim, self.net.context_length
            )
        elif text_mask is not None:
            raise ValueError("text_mask: expected together with text_encodings only")
        return Caption(text_embed, text_encodings, text_mask)

    def _embed_image(self, image: Tensor | None, image_embed: Tensor | None, batch: int) -> Tensor:
        if (image is None) == (image_embed is None):
            raise ValueError("image, image_embed: expected exactly one of the two")
        if image is not None:
            self._check_clip("image")
            image_embed = self.embed_with_clip(image)
        self._check_embed("image_embed", image_embed, batch)
        return image_embed

    def _negative(self, negative: EncodedText | None, caption: Caption) -> Caption | None:
        """The captions that guidance leads away from, one per row of `caption`."""
        if negative is None:
            return None
        negative = self._caption(None, *negative)
        rows, batch = len(negative.embed), len(caption.embed)
        if rows not in (1, batch) or (negative.encodings is None) != (caption.encodings is None):
            raise ValueError(
                f"negative: expected 1 or {batch} captions, with encodings if the caption has them, got "
                f"{rows}, {'without' if negative.encodings is None else 'with'} encodings"
            )
        return negative.expand(batch)

    def _check_clip(self, what: str) -> None:
        if self.clip is None:
            raise ValueError(f"{what}: needs a prior built with clip=...; without one pass {what}_embed")

    def _check_embed(self, name: str, embed: Tensor, batch: int | None = None) -> None:
        check_features(name, embed, "B, E", ("B" if batch is None else batch, self.image_embed_dim))

    # ------------------------------------------------------------------------------ what the network receives

    def condition(self, caption: Caption, keep: Tensor) -> Caption:
        """The conditioning of the network: scaled embedding, encodings and mask.

        Where keep [B] is False the caption is dropped: its embedding is zero, so that the projection returns
        its bias, and it has no text positions.
        """
        weights = self.net.text_embed_proj.weight.dtype
        embed = torch.where(keep[:, None], self.scale_embedding(caption.embed), 0.0).to(weights)
        if caption.encodings is None:
            return Caption(embed)
        mask = caption.mask
        if mask is None:
            mask = torch.ones(caption.encodings.shape[:2], dtype=torch.bool, device=embed.device)
        return Caption(embed, caption.encodings.to(weights), mask & keep[:, None])

    def _encode_prefix(
        self, caption: Caption, guided: bool = False, negative: Caption | None = None
    ) -> PrefixCache:
        """The cached prefix of the captions; with guidance also of B unconditional rows after them.

        The unconditional rows have no caption, or the caption `negative`.
        """
        keep = torch.ones(len(caption.embed), dtype=torch.bool, device=caption.embed.device)
        condition = self.condition(caption, keep)
        if guided:
            without = self.condition(caption, ~keep) if negative is None else self.condition(negative, keep)
            condition = condition.followed_by(without)
        return self.net.encode_prefix(condition.embed, condition.encodings, condition.mask)

    def _candidates(
        self,
        caption: Caption,
        negative: EncodedText | None,
        count: int,
        seeds: Tensor | None,
        generator: torch.Generator | None,
        guidance: float | Tensor,
    ) -> tuple[Tensor, float | Tensor | None, PrefixCache]:
        """Prepare sampling of `count` candidates per caption.

        Returns:
            The seeds of the candidates [B * count], their guidance ([B * count], a number, or None for none)
            and the cached prefix of their captions.
        """
        if count < 1:
            raise ValueError(f"num_samples_per_batch: expected at least 1, got {count}")
        batch, device = len(caption.embed), caption.embed.device
        seeds = candidate_seeds(resolve_seeds(seeds, batch, device, generator), count)
        if isinstance(guidance, Tensor):
            guidance = guidance.to(device).expand(batch).repeat_interleave(count)
        elif guidance == 1.0:
            guidance = None
        prefix = self._encode_prefix(caption, guidance is not None, self._negative(negative, caption))
        return seeds, guidance, prefix.repeat_interleave(count)


def build_net(
    kind: type[nn.Module], net: nn.Module | dict | None, clip: CLIP | None, image_embed_dim: int | None
) -> nn.Module:
    """Return `net`, or build one of class `kind` from a dict of its arguments.

    Widths that the dict (or None) does not contain come from `clip` or `image_embed_dim`.

    Raises:
        ValueError: the network has another width than `clip` or `image_embed_dim`.
    """
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
    candidates: Tensor,  # [B * count, E], those of one caption next to each other
    text_embed: Tensor,  # [B, E]
) -> Tensor:  # [B, E]
    """Choose the candidate of each caption that has the largest cosine to the text embedding.

    Source: Ramesh et al., "unCLIP", 2204.06125, section 2.2.

    Example:
        >>> best_candidate(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.1, 0.9]]))
        tensor([[0., 1.]])
    """
    candidates = candidates.unflatten(0, (len(text_embed), -1))
    text_unit = F.normalize(text_embed.to(candidates.dtype), dim=-1)
    cosine = (F.normalize(candidates, dim=-1) * text_unit[:, None]).sum(dim=-1)
    return candidates[torch.arange(len(candidates), device=candidates.device), cosine.argmax(dim=1)]


def candidate_seeds(seeds: Tensor, count: int) -> Tensor:
    """Derive the seeds of the candidates: [B] -> [B * count], those of one caption next to each other.

    No candidate has the seed of its caption, because a decoder with the same seed would start from the same
    random numbers as the prior.

    Example:
        >>> candidate_seeds(torch.tensor([7, 8]), 3).shape
        torch.Size([6])
    """
    return derived_seeds(seeds[:, None], torch.arange(1, count + 1, device=seeds.device)).flatten()
