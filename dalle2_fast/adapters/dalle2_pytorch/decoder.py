"""Our decoder and upsamplers as one DALLE2-pytorch `Decoder`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dalle2_fast import models
from dalle2_fast.adapters.dalle2_pytorch.clip import Adapted, caption_mask, check_class, resize


class AdaptedDecoder(Adapted):
    """`dalle2_fast.Decoder` and any number of `Upsampler`s as one DALLE2-pytorch `Decoder`.

    Args:
        decoder: stage ("unet_number") 1, with its U-Net, text tower and projections.
        upsamplers: stages 2, 3, ..., each of which enlarges the image of the stage before.
        clip: a `dalle2_fast.CLIP`, which computes the embeddings that a call leaves out. None is the
            decoder's.

    Raises:
        TypeError: an argument is of another class.
        ValueError: the low_res_size of an upsampler is not the image size of the stage before.
        ImportError: DALLE2-pytorch is not installed.

    Example::

        from dalle2_pytorch.trainer import DecoderTrainer
        from dalle2_fast.adapters.dalle2_pytorch import Decoder
        trainer = DecoderTrainer(Decoder(decoder, upsampler), lr=3e-4)
        loss = trainer(images, image_embed=embed, text=text, unet_number=1)
    """

    def __init__(
        self, decoder: models.Decoder, *upsamplers: models.Upsampler, clip: models.CLIP | None = None
    ) -> None:
        super().__init__()
        check_class("decoder", decoder, models.Decoder)
        for stage, (before, upsampler) in enumerate(zip((decoder, *upsamplers), upsamplers, strict=False), 2):
            check_class(f"upsampler of stage {stage}", upsampler, models.Upsampler)
            if upsampler.low_res_size != before.image_size:
                raise ValueError(
                    f"upsampler of stage {stage}: expected low_res_size = {before.image_size}, the size of "
                    f"stage {stage - 1}, got {upsampler.low_res_size}"
                )
        self.unets = nn.ModuleList([decoder, *upsamplers])  # what the trainer optimises and averages
        self.clip = self._adapted_clip(decoder.clip if clip is None else clip)
        self.unconditional = False
        self.channels = decoder.channels
        self.image_sizes = tuple(stage.image_size for stage in self.unets)

    @property
    def num_unets(self) -> int:
        return len(self.unets)

    @property
    def condition_on_text_encodings(self) -> bool:
        return self.unets[0].text_cond_drop_prob < 1.0

    def forward(
        self,
        image: Tensor,
        text: Tensor | None = None,
        image_embed: Tensor | None = None,
        text_encodings: Tensor | None = None,
        unet_number: int | None = None,
        return_lowres_cond_image: bool = False,
        *,
        text_embed: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """The training loss of one stage.

        Args:
            image: [B, C, H, W] in [0, 1], at least as large as the images of the stage.
            text: int64 token ids [B, L].
            image_embed: [B, E]; None lets clip compute it.
            text_encodings: [B, L, D]; rows of zeros are padding.
            unet_number: the stage, from 1; None if there is only one.
            return_lowres_cond_image: whether the low-resolution condition, enlarged, is returned as well.
            text_embed: [B, E], in addition to text_encodings.

        Returns:
            A scalar; with return_lowres_cond_image (scalar, [B, C, S, S], or None for stage 1).

        Raises:
            ValueError: there is no such stage, or the image is too small for it.
        """
        if unet_number is None and self.num_unets > 1:
            raise ValueError(f"unet_number: expected 1 ... {self.num_unets}, the stage to train, got None")
        number = self._check_stage("unet_number", 1 if unet_number is None else unet_number)
        stage = self.unets[number - 1]
        if min(image.shape[-2:]) < stage.image_size:
            raise ValueError(
                f"image: expected at least {stage.image_size} pixels a side for stage {number}, got "
                f"{tuple(image.shape)}"
            )
        if number == 1:
            if image_embed is None and self.clip is not None:
                image_embed = self.clip.embed_image(image).image_embed
            caption = self._caption(text, text_encodings, text_embed)
            loss = stage(resize(image, stage.image_size), image_embed=image_embed, **caption)
            return (loss, None) if return_lowres_cond_image else loss
        low_res = resize(image, stage.low_res_size)
        loss = stage(resize(image, stage.image_size), low_res)
        return (loss, resize(low_res, stage.image_size)) if return_lowres_cond_image else loss

    @torch.no_grad()
    def sample(
        self,
        image: Tensor | None = None,
        image_embed: Tensor | None = None,
        text: Tensor | None = None,
        text_encodings: Tensor | None = None,
        batch_size: int = 1,
        cond_scale: float | tuple[float, ...] = 1.0,
        start_at_unet_number: int = 1,
        stop_at_unet_number: int | None = None,
        distributed: bool = False,
        inpaint_image: Tensor | None = None,
        inpaint_mask: Tensor | None = None,
        inpaint_resample_times: int = 5,
        one_unet_in_gpu_at_time: bool = True,
        *,
        text_embed: Tensor | None = None,
        **options,
    ) -> Tensor:
        """Sample images.

        Args:
            image: [B, C, H, W] in [0, 1], the image of the stage before the first; only with
                start_at_unet_number > 1.
            image_embed: [B, E].
            text: int64 token ids [B, L].
            text_encodings: [B, L, D]; rows of zeros are padding.
            batch_size: number of images if neither an embedding nor a caption determines it.
            cond_scale: guidance scale, or a tuple of which the first is used: upsamplers have no guidance.
            start_at_unet_number: first stage.
            stop_at_unet_number: last stage; None is the last one of all.
            distributed: accepted and ignored: every process samples its images.
            inpaint_image, inpaint_mask, inpaint_resample_times: not supported.
            one_unet_in_gpu_at_time: accepted and ignored: stages are not moved between devices.
            text_embed: [B, E], in addition to text_encodings.
            options: for our modules' `sample`: seeds, generator, steps, sampler, ...

        Returns:
            Images of the last stage, [B, C, H, W], float32 in [0, 1].

        Raises:
            ValueError: there is no such stage, the last one precedes the first, or image is missing or not
                needed.
            NotImplementedError: an inpainting argument is passed.
        """
        if inpaint_image is not None or inpaint_mask is not None:
            raise NotImplementedError(
                "inpaint_image, inpaint_mask: this adapter does not inpaint; use dalle2_fast.DALLE2 itself"
            )
        first = self._check_stage("start_at_unet_number", start_at_unet_number)
        last = self._check_stage("stop_at_unet_number", stop_at_unet_number or self.num_unets)
        if last < first:
            raise ValueError(f"stop_at_unet_number: expected at least {first}, got {last}")
        if (image is None) != (first == 1):
            raise ValueError("image: expected exactly where start_at_unet_number is greater than 1")
        if first == 1:
            caption = self._caption(text, text_encodings, text_embed)
            if image_embed is None and not caption:
                caption["batch_size"] = batch_size
            scale = cond_scale[0] if isinstance(cond_scale, tuple) else cond_scale
            image = self.unets[0].sample(image_embed, cond_scale=scale, **caption, **options)
        else:
            image = resize(image, self.unets[first - 1].low_res_size)
        for stage in self.unets[max(1, first - 1) : last]:
            image = stage.sample(image, **options)
        return image

    def _caption(self, text: Tensor | None, encodings: Tensor | None, embed: Tensor | None) -> dict:
        """The caption as our decoder takes it: as tokens if it can encode them, otherwise encoded."""
        decoder = self.unets[0]
        if text is not None and encodings is None:
            if decoder.text_encoder is not None or self.clip is None:
                return dict(text=text)
            embed, encodings = self.clip.embed_text(text)
        if encodings is None:
            return {}
        return dict(text_encodings=encodings, text_mask=caption_mask(encodings), text_embed=embed)

    def _check_stage(self, name: str, number: int) -> int:
        if not 1 <= number <= self.num_unets:
            raise ValueError(f"{name}: expected 1 ... {self.num_unets}, got {number!r}")
        return number
