"""Our CLIP, prior and decoder in DALLE2-pytorch: its trainers, its DALLE2, its classes that take a CLIP.

    from dalle2_fast.adapters.dalle2_pytorch import ClipAdapter, Decoder, DiffusionPrior

    trainer = DecoderTrainer(Decoder(decoder, upsampler), lr=3e-4)         # of dalle2_pytorch.trainer
    loss = trainer(images, image_embed=z, text_encodings=t, unet_number=1)
    trainer.update(unet_number=1)

The three classes are subclasses of DALLE2-pytorch's, which its trainers ask for, and are made when they are
first named: without the package installed that is an ImportError. They hold our module and pass on what they
are called with; the numbers are those of our modules. Written for and tested with dalle2-pytorch 1.15.6.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle2_fast import models

_NAMES = ("ClipAdapter", "Decoder", "DiffusionPrior")


def __getattr__(name: str) -> type:
    if name in _NAMES:
        return _classes()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_NAMES])


@functools.cache
def _classes() -> dict[str, type]:
    try:
        import dalle2_pytorch.dalle2_pytorch as theirs
    except ImportError as error:
        raise ImportError(
            "dalle2_fast.adapters.dalle2_pytorch needs the package dalle2-pytorch (pip install "
            f"dalle2-pytorch), which cannot be imported: {error}"
        ) from error
    bases = {"ClipAdapter": theirs.BaseClipAdapter, "Decoder": theirs.Decoder,
             "DiffusionPrior": theirs.DiffusionPrior}  # fmt: skip
    mixins = {"ClipAdapter": _ClipAdapter, "Decoder": _Decoder, "DiffusionPrior": _DiffusionPrior}
    made = {}
    for name, base in bases.items():
        # __module__ and __qualname__ are what pickle looks a class up by; it meets __getattr__ above.
        names = dict(__module__=__name__, __qualname__=name, __doc__=mixins[name].__doc__)
        made[name] = type(name, (mixins[name], base), names)
    made["ClipAdapter"].replies = (theirs.EmbeddedText, theirs.EmbeddedImage)
    return made


class _Foreign:
    """Sets up nn.Module only: the base's own __init__ would build its networks."""

    def __init__(self) -> None:
        nn.Module.__init__(self)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


class _ClipAdapter(_Foreign):
    """A `dalle2_fast.CLIP` where DALLE2-pytorch's `Decoder`, `DiffusionPrior` and trainers expect a `clip`.

    clip: it is used without gradients; text is int64 token ids [B, L] of its tokenizer.
    """

    def __init__(self, clip: models.CLIP) -> None:
        super().__init__()
        _expect("clip", clip, models.CLIP)
        self.clip, self.overrides = clip, {}

    @property
    def dim_latent(self) -> int:
        return self.clip.dim_latent

    @property
    def image_size(self) -> int:
        return self.clip.image_size

    @property
    def image_channels(self) -> int:
        return 3

    @property
    def max_text_len(self) -> int:
        return self.clip.context_length

    @torch.no_grad()
    def embed_text(self, text: Tensor):  # int64 [B, L] -> ([B, E] of unit norm, [B, L, D])
        """Padding has encodings of zeros, by which DALLE2-pytorch knows it."""
        embed, encodings, mask = self.clip.encode_text(text[:, : self.max_text_len])
        return self.replies[0](embed.float(), encodings.float() * mask[..., None])

    @torch.no_grad()
    def embed_image(self, image: Tensor):  # [B, 3, H, W] in [0, 1] -> ([B, E] of unit norm, None)
        return self.replies[1](self.clip.encode_image(_resize(image, self.image_size)).float(), None)


class _Decoder(_Foreign):
    """`dalle2_fast.Decoder` and any number of `Upsampler`s as one DALLE2-pytorch `Decoder`.

    decoder: stage ("unet_number") 1, with its U-Net, text tower and projections; upsamplers: stages 2, 3,
        ..., each from the size of the stage before it.
    clip: makes embeddings that a call leaves out, a `dalle2_fast.CLIP`; by default the decoder's own.
    """

    def __init__(
        self, decoder: models.Decoder, *upsamplers: models.Upsampler, clip: models.CLIP | None = None
    ) -> None:
        super().__init__()
        _expect("decoder", decoder, models.Decoder)
        for stage, (before, upsampler) in enumerate(zip((decoder, *upsamplers), upsamplers, strict=False), 2):
            _expect(f"upsampler of stage {stage}", upsampler, models.Upsampler)
            if upsampler.low_res_size != before.image_size:
                raise ValueError(
                    f"upsampler of stage {stage}: expected low_res_size = {before.image_size}, the size of "
                    f"stage {stage - 1}, got {upsampler.low_res_size}"
                )
        self.unets = nn.ModuleList([decoder, *upsamplers])  # what the trainer optimises, averages, swaps
        clip = decoder.clip if clip is None else clip
        self.clip = None if clip is None else __getattr__("ClipAdapter")(clip).requires_grad_(False)
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
        image: Tensor,  # [B, C, H, W] in [0, 1], at least as large as the stage's
        text: Tensor | None = None,  # int64 [B, L]
        image_embed: Tensor | None = None,  # [B, E]
        text_encodings: Tensor | None = None,  # [B, L, D]; rows of zeros are padding
        unet_number: int | None = None,
        return_lowres_cond_image: bool = False,
        *,
        text_embed: Tensor | None = None,  # [B, E], beside text_encodings
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """The training loss of one stage, a scalar; with return_lowres_cond_image the (degraded) condition,
        enlarged, comes with it."""
        if unet_number is None and self.num_unets > 1:
            raise ValueError(f"unet_number: expected 1 ... {self.num_unets}, the stage to train, got None")
        number = self._stage("unet_number", 1 if unet_number is None else unet_number)
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
            loss = stage(_resize(image, stage.image_size), image_embed=image_embed, **caption)
            return (loss, None) if return_lowres_cond_image else loss
        low_res = _resize(image, stage.low_res_size)
        loss = stage(_resize(image, stage.image_size), low_res)
        return (loss, _resize(low_res, stage.image_size)) if return_lowres_cond_image else loss

    @torch.no_grad()
    def sample(
        self,
        image: Tensor | None = None,  # [B, C, H, W] in [0, 1]: the picture of the stage before the first
        image_embed: Tensor | None = None,  # [B, E]
        text: Tensor | None = None,  # int64 [B, L]
        text_encodings: Tensor | None = None,  # [B, L, D]
        batch_size: int = 1,  # where neither embedding nor caption says it
        cond_scale: float | tuple[float, ...] = 1.0,  # guidance; stages after the first have none
        start_at_unet_number: int = 1,
        stop_at_unet_number: int | None = None,
        distributed: bool = False,  # accepted; every process draws its own images
        inpaint_image: Tensor | None = None,
        inpaint_mask: Tensor | None = None,
        inpaint_resample_times: int = 5,
        one_unet_in_gpu_at_time: bool = True,  # accepted; stages are not moved between devices
        *,
        text_embed: Tensor | None = None,  # [B, E], beside text_encodings
        **options,  # seeds, generator, steps, sampler, ... of our modules' sample()
    ) -> Tensor:
        """Images [B, C, H, W] float32 in [0, 1], of the last stage that ran."""
        if inpaint_image is not None or inpaint_mask is not None:
            raise NotImplementedError(
                "inpaint_image, inpaint_mask: this adapter does not inpaint; use dalle2_fast.DALLE2 itself"
            )
        first = self._stage("start_at_unet_number", start_at_unet_number)
        last = self._stage("stop_at_unet_number", stop_at_unet_number or self.num_unets)
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
            image = _resize(image, self.unets[first - 1].low_res_size)
        for stage in self.unets[max(1, first - 1) : last]:
            image = stage.sample(image, **options)
        return image

    def _caption(self, text: Tensor | None, encodings: Tensor | None, embed: Tensor | None) -> dict:
        decoder = self.unets[0]
        if text is not None and encodings is None:
            if decoder.text_encoder is not None or self.clip is None:
                return dict(text=text)
            embed, encodings = self.clip.embed_text(text)
        if encodings is None:
            return {}
        return dict(text_encodings=encodings, text_mask=(encodings != 0).any(-1), text_embed=embed)

    def _stage(self, name: str, number: int) -> int:
        if not 1 <= number <= self.num_unets:
            raise ValueError(f"{name}: expected 1 ... {self.num_unets}, got {number!r}")
        return number


class _DiffusionPrior(_Foreign):
    """A `dalle2_fast.DiffusionPrior` as DALLE2-pytorch's.

    prior: the module that is trained. clip: makes embeddings from `text` and `image`, a `dalle2_fast.CLIP`;
        by default the prior's own.
    """

    def __init__(self, prior: models.DiffusionPrior, *, clip: models.CLIP | None = None) -> None:
        super().__init__()
        _expect("prior", prior, models.DiffusionPrior)
        self.net = prior
        clip = prior.clip if clip is None else clip
        self.clip = None if clip is None else __getattr__("ClipAdapter")(clip).requires_grad_(False)
        self.image_embed_dim = prior.image_embed_dim
        self.sample_timesteps = prior.sample_timesteps
        self.condition_on_text_encodings = True

    def forward(
        self,
        text: Tensor | None = None,  # int64 [B, L], needs clip
        image: Tensor | None = None,  # [B, 3, H, W] in [0, 1], needs clip
        text_embed: Tensor | None = None,  # [B, E]
        image_embed: Tensor | None = None,  # [B, E]
        text_encodings: Tensor | None = None,  # [B, L, D]; rows of zeros are padding
    ) -> Tensor:
        """The training loss, a scalar. The tensors that are passed stay as they are."""
        if (image is None) == (image_embed is None):
            raise ValueError("image, image_embed: expected exactly one of the two")
        if image is not None:
            image_embed = self._need_clip("image").embed_image(image).image_embed
        return self.net(image_embed=image_embed, **self._caption(text, text_embed, text_encodings))

    @torch.no_grad()
    def sample(
        self,
        text: Tensor,  # int64 [B, L], needs clip
        num_samples_per_batch: int = 2,
        cond_scale: float = 1.0,
        timesteps: int | None = None,
        **options,  # seeds, generator, sampler, ... of our prior's sample()
    ) -> Tensor:
        """An image embedding [B, E] a caption: of num_samples_per_batch the one nearest to the text's."""
        return self.net.sample(
            **self._caption(text, None, None), num_samples_per_batch=num_samples_per_batch,
            cond_scale=cond_scale, steps=timesteps, **options,
        )  # fmt: skip

    @torch.no_grad()
    def p_sample_loop(
        self,
        shape: tuple[int, int],
        text_cond: dict[str, Tensor],  # text_embed [B, E], text_encodings [B, L, D]
        cond_scale: float = 1.0,
        timesteps: int | None = None,
        **options,
    ) -> Tensor:
        """One image embedding for each row of text_cond, [B, E] = shape."""
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
        return self.p_sample_loop((batch_size, self.image_embed_dim), text_cond, cond_scale)

    def _caption(self, text: Tensor | None, embed: Tensor | None, encodings: Tensor | None) -> dict:
        if (text is None) == (embed is None):
            raise ValueError("text, text_embed: expected exactly one of the two")
        if text is not None:
            embed, encodings = self._need_clip("text").embed_text(text)
        mask = None if encodings is None else (encodings != 0).any(-1)
        return dict(text_embed=embed, text_encodings=encodings, text_mask=mask)

    def _need_clip(self, what: str):
        if self.clip is None:
            raise ValueError(f"{what}: needs a prior built with clip=...; without one pass {what}_embed")
        return self.clip


def _expect(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name}: expected a dalle2_fast.{kind.__name__}, got {type(value).__name__}")


def _resize(image: Tensor, side: int) -> Tensor:
    """Bicubic and antialiased; DALLE2-pytorch takes the nearest pixels, which trains on aliased images."""
    if tuple(image.shape[-2:]) == (side, side):
        return image
    return F.interpolate(image, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
