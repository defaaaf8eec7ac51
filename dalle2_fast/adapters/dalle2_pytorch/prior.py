"""Our diffusion prior as a DALLE2-pytorch `DiffusionPrior`."""

from __future__ import annotations

import torch
from torch import Tensor

from dalle2_fast import models
from dalle2_fast.adapters.dalle2_pytorch.clip import Adapted, caption_mask, check_class


class AdaptedPrior(Adapted):
    """A `dalle2_fast.DiffusionPrior` as a DALLE2-pytorch `DiffusionPrior`.

    Args:
        prior: the module that is trained.
        clip: a `dalle2_fast.CLIP`, which computes embeddings from `text` and `image`. None is the prior's.

    Raises:
        TypeError: an argument is of another class.
        ImportError: DALLE2-pytorch is not installed.

    Example::

        from dalle2_pytorch.trainer import DiffusionPriorTrainer
        from dalle2_fast.adapters.dalle2_pytorch import DiffusionPrior
        trainer = DiffusionPriorTrainer(DiffusionPrior(prior, clip=clip), lr=3e-4)
        loss = trainer(text, images)
    """

    def __init__(self, prior: models.DiffusionPrior, *, clip: models.CLIP | None = None) -> None:
        super().__init__()
        check_class("prior", prior, models.DiffusionPrior)
        self.net = prior
        self.clip = self._adapted_clip(prior.clip if clip is None else clip)
        self.image_embed_dim = prior.image_embed_dim
        self.sample_timesteps = prior.sample_timesteps
        self.condition_on_text_encodings = True

    def forward(
        self,
        text: Tensor | None = None,
        image: Tensor | None = None,
        text_embed: Tensor | None = None,
        image_embed: Tensor | None = None,
        text_encodings: Tensor | None = None,
    ) -> Tensor:
        """The training loss, a scalar. It leaves the tensors that are passed unchanged.

        Args:
            text: int64 token ids [B, L]; needs clip.
            image: [B, 3, H, W] in [0, 1]; needs clip.
            text_embed: [B, E], instead of text.
            image_embed: [B, E], instead of image.
            text_encodings: [B, L, D]; rows of zeros are padding.

        Raises:
            ValueError: not exactly one of text and text_embed, or of image and image_embed; or there is no
                clip.
        """
        if (image is None) == (image_embed is None):
            raise ValueError("image, image_embed: expected exactly one of the two")
        if image is not None:
            image_embed = self._need_clip("image").embed_image(image).image_embed
        return self.net(image_embed=image_embed, **self._caption(text, text_embed, text_encodings))

    @torch.no_grad()
    def sample(
        self,
        text: Tensor,
        num_samples_per_batch: int = 2,
        cond_scale: float = 1.0,
        timesteps: int | None = None,
        **options,
    ) -> Tensor:
        """An image embedding per caption: of num_samples_per_batch, the one nearest to the caption's.

        Args:
            text: int64 token ids [B, L]; needs clip.
            num_samples_per_batch: number of candidates per caption.
            cond_scale: guidance scale.
            timesteps: number of steps; None is the prior's.
            options: for our prior's `sample`: seeds, generator, sampler, ...

        Returns:
            [B, E].

        Raises:
            ValueError: there is no clip.
        """
        return self.net.sample(
            **self._caption(text, None, None), num_samples_per_batch=num_samples_per_batch,
            cond_scale=cond_scale, steps=timesteps, **options,
        )  # fmt: skip

    @torch.no_grad()
    def p_sample_loop(
        self,
        shape: tuple[int, int],
        text_cond: dict[str, Tensor],
        cond_scale: float = 1.0,
        timesteps: int | None = None,
        **options,
    ) -> Tensor:
        """One image embedding per row of text_cond.

        Args:
            shape: (B, E).
            text_cond: text_embed [B, E], and optionally text_encodings [B, L, D].
            cond_scale: guidance scale.
            timesteps: number of steps; None is the prior's.
            options: for our prior's `sample`.

        Returns:
            [B, E].

        Raises:
            ValueError: shape does not fit text_cond or the prior.
        """
        embed, encodings = text_cond["text_embed"], text_cond.get("text_encodings")
        if tuple(shape) != (len(embed), self.image_embed_dim):
            raise ValueError(
                f"shape: expected [B, E] = {(len(embed), self.image_embed_dim)}, got {tuple(shape)}"
            )
        return self.net.sample(
            **self._caption(None, embed, encodings), num_samples_per_batch=1, cond_scale=cond_scale,
            steps=timesteps, **options,
        )  # fmt: skip

    def sample_batch_size(
        self, batch_size: int, text_cond: dict[str, Tensor], cond_scale: float = 1.0
    ) -> Tensor:
        """`p_sample_loop` for the shape (batch_size, E)."""
        return self.p_sample_loop((batch_size, self.image_embed_dim), text_cond, cond_scale)

    def _caption(self, text: Tensor | None, embed: Tensor | None, encodings: Tensor | None) -> dict:
        if (text is None) == (embed is None):
            raise ValueError("text, text_embed: expected exactly one of the two")
        if text is not None:
            embed, encodings = self._need_clip("text").embed_text(text)
        return dict(text_embed=embed, text_encodings=encodings, text_mask=caption_mask(encodings))

    def _need_clip(self, what: str):
        if self.clip is None:
            raise ValueError(f"{what}: needs a prior built with clip=...; without one pass {what}_embed")
        return self.clip
