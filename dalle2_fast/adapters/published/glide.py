"""GLIDE: caption -> image, and caption and small image -> large image, by diffusion."""

from __future__ import annotations

from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from dalle2_fast.adapters.published.sampling import (
    check_low_res,
    enlarged_to,
    sampling_inputs,
    to_unit_range,
)
from dalle2_fast.checkpoints import Pretrained
from dalle2_fast.checkpoints.formats.glide import read_glide
from dalle2_fast.checkpoints.weights import build_alone
from dalle2_fast.data.images import check_images
from dalle2_fast.diffusion import GaussianDiffusion, make_schedule
from dalle2_fast.models import UNet
from dalle2_fast.models.transformer import Transformer


class GlideText(nn.Module):
    """GLIDE's text tower: tokens -> an encoding per position, and a vector for the time embedding.

    It is not causal, and it attends to padding, which has an embedding of its own for each position.

    Args:
        num_tokens: size of the vocabulary.
        context_length: the number of positions, which are always all computed.
        dim: width of the tokens.
        depth: the number of blocks.
        heads: the number of attention heads.
        embed_dim: width of the vector.
        padding: whether padding has embeddings.
        final_norm: whether a layer norm follows the blocks.

    Source: Nichol et al., "GLIDE", 2112.10741, section 2.4 and 4.

    Example:
        >>> tower = GlideText(10, 6, 8, 1, 2, embed_dim=12)
        >>> vector, encodings = tower(torch.ones(1, 6, dtype=torch.int64), torch.ones(1, 6, dtype=torch.bool))
        >>> vector.shape, encodings.shape
        (torch.Size([1, 12]), torch.Size([1, 6, 8]))
    """

    def __init__(
        self,
        num_tokens: int,
        context_length: int,
        dim: int,
        depth: int,
        heads: int,
        *,
        embed_dim: int,
        padding: bool = True,
        final_norm: bool = True,
    ):
        super().__init__()
        self.num_tokens, self.context_length = num_tokens, context_length
        self.token_embedding = nn.Embedding(num_tokens, dim)
        self.positional_embedding = nn.Parameter(torch.randn(context_length, dim) * 0.01)
        self.padding_embedding = nn.Parameter(torch.randn(context_length, dim) * 0.01) if padding else None
        self.transformer = Transformer(dim, depth, heads)
        self.ln_final = nn.LayerNorm(dim) if final_norm else nn.Identity()
        self.to_time = nn.Linear(dim, embed_dim)

    def forward(
        self,
        tokens: Tensor,  # int64 [B, context_length]
        mask: Tensor,  # bool [B, context_length], True = a token, False = padding
    ) -> tuple[Tensor, Tensor]:
        """The vector [B, embed_dim], and the encodings [B, context_length, dim]."""
        self._check("tokens", tokens, torch.int64)
        self._check("mask", mask, torch.bool)
        x = self.token_embedding(tokens) + self.positional_embedding
        if self.padding_embedding is not None:
            x = torch.where(mask[..., None], x, self.padding_embedding)
        x = self.ln_final(self.transformer(x))
        return self.to_time(x[:, -1]), x

    def _check(self, name: str, value: Tensor, dtype: torch.dtype) -> None:
        if not isinstance(value, Tensor) or value.dtype != dtype:
            came = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name}: expected a tensor of {dtype}, got {came}")
        if value.ndim != 2 or value.shape[1] != self.context_length:
            raise ValueError(f"{name}: expected [B, {self.context_length}], got {tuple(value.shape)}")


class Glide(Pretrained, nn.Module):
    """One network of GLIDE with its text tower. `load_glide` makes it from a file.

    Args:
        unet: the arguments of `UNet`.
        text: the arguments of `GlideText`, except embed_dim.
        image_size: side of the images.
        low_res_size: side of the images that it enlarges; None for a network that does not.
        inpaint: whether it also receives the kept part of an image and where that is.
        schedule: the noise schedule: "cosine", or "linear" for a network that enlarges.
        timesteps: the number of discrete times.
        sample_timesteps: the default number of steps of `sample`.

    Raises:
        ValueError: the input channels of the U-Net do not fit.

    Source: Nichol et al., "GLIDE", 2112.10741.

    Example:
        >>> unet = dict(in_channels=3, out_channels=6, channels=(8, 16), layers_per_block=1, num_groups=4,
        ...             attention_levels=(1,), head_dim=8, cross_dim=12)
        >>> text = dict(num_tokens=10, context_length=6, dim=12, depth=1, heads=2)
        >>> model = Glide(unet, text, image_size=8)
        >>> tokens, mask = torch.ones(1, 6, dtype=torch.int64), torch.ones(1, 6, dtype=torch.bool)
        >>> model.sample(tokens, mask, seeds=torch.tensor([0]), steps=2, guidance=3.0).shape
        torch.Size([1, 3, 8, 8])
    """

    part = "glide"

    def __init__(
        self,
        unet: dict[str, Any],
        text: dict[str, Any],
        *,
        image_size: int = 64,
        low_res_size: int | None = None,
        inpaint: bool = False,
        schedule: str = "cosine",
        timesteps: int = 1000,
        sample_timesteps: int = 100,
    ):
        super().__init__()
        self.unet = UNet(**unet)
        channels = 3 + 4 * inpaint + 3 * (low_res_size is not None)
        if self.unet.in_channels != channels:
            raise ValueError(f"unet: expected in_channels = {channels}, got {self.unet.in_channels}")
        self.text = GlideText(**text, embed_dim=self.unet.embed_dim)
        self.config = dict(
            unet=self.unet.config, text=dict(text), image_size=image_size, low_res_size=low_res_size,
            inpaint=inpaint, schedule=schedule, timesteps=timesteps, sample_timesteps=sample_timesteps,
        )  # fmt: skip
        self.image_size, self.low_res_size, self.inpaint = image_size, low_res_size, inpaint
        self.sample_timesteps = sample_timesteps
        self.diffusion = GaussianDiffusion(make_schedule(schedule, timesteps), variance="learned_range")

    def forward(
        self,
        x: Tensor,  # [B, 3, H, W]
        timestep: Tensor,  # [B], 0..1000
        tokens: Tensor,  # int64 [B, L]
        mask: Tensor,  # bool [B, L]
        *,
        low_res: Tensor | None = None,  # [B, 3, h, w] in [-1, 1]
        kept: Tensor | None = None,  # [B, 4, H, W]
    ) -> Tensor:  # [B, 6, H, W]
        """The prediction of the network, as GLIDE's models return it: epsilon and the learned variance.

        Args:
            x: noisy images.
            timestep: times.
            tokens: ids of GLIDE's tokenizer, padded to the context length.
            mask: which of them are tokens. All False is no caption.
            low_res: small images, for a network that enlarges.
            kept: for a network that repaints, the image where it is kept and 0 elsewhere, then 1 where it is
                kept.
        """
        vector, encodings = self.text(tokens, mask)
        return self.unet(self._input(x, kept, low_res), timestep, encodings, vector)

    @torch.no_grad()
    def sample(
        self,
        tokens: Tensor,  # int64 [B, L]
        mask: Tensor,  # bool [B, L]
        *,
        low_res: Tensor | None = None,  # [B, 3, h, w] in [0, 1]
        image: Tensor | None = None,  # [B, 3, image_size, image_size] in [0, 1]
        repaint: Tensor | None = None,  # bool [B, 1, image_size, image_size]
        seeds: Tensor | None = None,  # int64 [B]
        generator: torch.Generator | None = None,
        steps: int | None = None,
        guidance: float = 1.0,
        sampler: str = "ddpm",
        **sampler_options: Any,
    ) -> Tensor:  # [B, 3, image_size, image_size] in [0, 1]
        """Sample images.

        Args:
            tokens: ids of GLIDE's tokenizer, padded to the context length.
            mask: which of them are tokens. All False is no caption.
            low_res: small images, for a network that enlarges.
            image: images of which a part is kept, for a network that repaints.
            repaint: where `image` is repainted.
            seeds: one per image; the same seed gives the same image in any batch. None draws them.
            generator: source of the seeds; None is torch's default generator.
            steps: the number of steps; None is sample_timesteps.
            guidance: guidance weight; 1 is none. GLIDE's notebook takes 3, and 1 for the upsampler.
            sampler: "ddpm", "ddim" or "dpm++".
            sampler_options: more keywords of `GaussianDiffusion.sample` (eta, spacing, progress, ...).

        Raises:
            TypeError, ValueError: an argument has the wrong dtype, shape or value, or is missing.
        """
        check_low_res(low_res, self.low_res_size)
        if (image is None) != (repaint is None) or (image is not None and not self.inpaint):
            raise ValueError("image, repaint: expected both or neither, and only for a network that repaints")
        batch, weight, size = len(tokens), self.unet.conv_in.weight, self.image_size
        seeds, place = sampling_inputs(weight, batch, seeds, generator)
        tokens, mask = tokens.to(weight.device), mask.to(weight.device)
        vector, encodings = self.text(tokens, mask)
        condition = None if low_res is None else low_res.to(**place) * 2 - 1
        kept = None
        if self.inpaint:
            kept = torch.zeros(batch, 4, size, size, **place)
        if image is not None:
            check_images("image", image, 3, (size, size), batch)
            keep = ~repaint.to(weight.device).expand(batch, 1, size, size)
            known = image.to(**place) * 2 - 1
            kept = torch.cat([known * keep, keep.to(known.dtype)], dim=1)
            sampler_options |= dict(known=known, mask=~keep)

        def conditional(x: Tensor, t: Tensor) -> Tensor:
            return self.unet(self._input(x, kept, condition), t, cache, vector)

        def both(x: Tensor, t: Tensor) -> Tensor:
            doubled = self._input(x, kept, condition).repeat(2, 1, 1, 1)
            return self.unet(doubled, t.repeat(2), cache_both, vectors)

        cache = self.unet.encode_context(encodings)
        if guidance != 1.0:
            empty_vector, empty = self.text(tokens, torch.zeros_like(mask))
            vectors = torch.cat([vector, empty_vector])
            cache_both = self.unet.encode_context(torch.cat([encodings, empty]))
        x = self.diffusion.sample(
            conditional if guidance == 1.0 else both, (batch, 3, size, size), seeds=seeds,
            steps=self.sample_timesteps if steps is None else steps, sampler=sampler,
            guidance=None if guidance == 1.0 else guidance, conditional_net=conditional,
            **place, **sampler_options,
        )  # fmt: skip
        return to_unit_range(x)

    def _input(self, x: Tensor, kept: Tensor | None, low_res: Tensor | None) -> Tensor:
        """[x, kept part and its mask, enlarged image], as the first convolution takes them."""
        parts = [x] if kept is None else [x, kept.to(x.dtype)]
        if low_res is not None:
            parts.append(enlarged_to(low_res, *x.shape[2:]).to(x.dtype))
        return torch.cat(parts, dim=1)


def load_glide(
    path: str | PathLike,
    *,
    image_size: int | None = None,
    low_res_size: int | None = None,
    head_dim: int = 64,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Glide:
    """Load a network of GLIDE: base.pt, upsample.pt, base_inpaint.pt or upsample_inpaint.pt.

    Which of them it is follows from the tensors, not from the name. Nothing in the file is run.

    Args:
        path: the file.
        image_size: side of its images; None is 64, and 256 for a file that enlarges.
        low_res_size: side of the images that it enlarges; None is 64.
        head_dim: width of an attention head, of the U-Net and of the text tower.
        device: of the model.
        dtype: of the weights, regardless of that of the file.

    Returns:
        The model, in evaluation mode.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged, or holds another network (GLIDE's noised CLIP). The message
            names tensors that are missing, left over or of another shape.

    Example:
        `small = load_glide("base.pt").sample(tokens, mask, guidance=3.0)`, then
        `load_glide("upsample.pt").sample(tokens, mask, low_res=small, steps=27)`.

        >>> load_glide("missing.pt")
        Traceback (most recent call last):
        FileNotFoundError: missing.pt: no such file
    """
    config, tensors = read_glide(path, image_size=image_size, low_res_size=low_res_size, head_dim=head_dim)
    return build_alone(Glide, config, tensors, path, device, dtype)
