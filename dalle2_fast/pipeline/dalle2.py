"""caption -> CLIP text -> prior -> image embedding -> decoder -> upsamplers: DALL-E 2 (arXiv 2204.06125)."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from dalle2_fast.data.images import to_pil
from dalle2_fast.pipeline import decoding, editing, inversion, reconstruction
from dalle2_fast.pipeline.checkpoint import load_pipeline, save_pipeline
from dalle2_fast.pipeline.compilation import graphs as cuda_graphs
from dalle2_fast.pipeline.compilation.pipeline import compile_networks
from dalle2_fast.pipeline.context import Generation, GenerationContext
from dalle2_fast.pipeline.parts import check_parts
from dalle2_fast.pipeline.progress import Progress
from dalle2_fast.pipeline.settings import (
    GenerateOptions,
    SamplingSettings,
    resolve_prompts,
    resolve_settings,
    resolve_size,
)
from dalle2_fast.pipeline.stages import (
    check_candidates,
    check_prior,
    choose_candidates,
    encode_captions,
    prepare_init_image,
    sample_decoder,
    sample_image_embeddings,
    upsample,
)

if TYPE_CHECKING:
    from PIL.Image import Image
    from typing_extensions import Unpack

    from dalle2_fast.data.text.tokenizer import Tokenizer
    from dalle2_fast.models.clip.model import CLIP
    from dalle2_fast.models.decoder.model import Decoder
    from dalle2_fast.models.prior.autoregressive import ARPrior
    from dalle2_fast.models.prior.diffusion import DiffusionPrior
    from dalle2_fast.models.upsampler.model import Upsampler


class DALLE2(nn.Module):
    """The whole pipeline: `pipe(prompt)` gives images, `pipe.generate(prompt)` the intermediate results, too.

    Further methods begin with an image: `variations`, `interpolate`, `text_diff`, `inpaint`, `invert`,
    `reconstruct`; `decode` begins with an image embedding.

    Args:
        clip: the trained CLIP.
        prior: a DiffusionPrior or an ARPrior; None can only do what begins with an image.
        decoder: the trained Decoder.
        upsampler: None makes images of the decoder's size only.
        tokenizer: text <-> token ids of the text tower of CLIP, and of the decoder's if it has one.
        upsampler2: a second one, from the first one's size (unCLIP's: 256 to 1024).
        sampling: values of SamplingSettings for this model, where a call names none.
        metadata: anything that JSON can hold, kept with the checkpoint (the world it was trained on, say).

    Attributes:
        sampling: all settings by name, as a dict; a call reads it.

    Raises:
        ValueError, TypeError: no tokenizer, parts that do not fit each other, or settings out of range.

    Example:
        >>> pipe = DALLE2.from_pretrained(device="cpu", dtype="fp32")
        >>> pipe.sizes, pipe.dtype
        ((64, 256), torch.float32)
    """

    def __init__(
        self,
        clip: CLIP,
        prior: DiffusionPrior | ARPrior | None,
        decoder: Decoder,
        upsampler: Upsampler | None = None,
        tokenizer: Tokenizer | None = None,
        *,
        upsampler2: Upsampler | None = None,
        sampling: dict[str, Any] | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if tokenizer is None:
            raise ValueError("tokenizer: expected the tokenizer that the CLIP was trained with, got None")
        settings = SamplingSettings.from_dict(sampling or {})
        check_parts(clip, prior, decoder, upsampler, upsampler2, tokenizer)
        self.clip = clip
        self.prior = prior
        self.decoder = decoder
        self.upsampler = upsampler
        self.upsampler2 = upsampler2
        self.tokenizer = tokenizer
        self.sampling = settings.to_dict()
        self.metadata = dict(metadata or {})

    @property
    def sizes(self) -> tuple[int, ...]:
        """The image sizes that this pipeline makes, smallest first."""
        parts = (self.decoder, self.upsampler, self.upsampler2)
        return tuple(part.image_size for part in parts if part is not None)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights and of the computation."""
        return next(self.parameters()).dtype

    # ---------------------------------------------------------------------------------- captions to images

    @overload
    def __call__(
        self,
        prompt: str | Sequence[str],
        num_images: int = 4,
        *,
        output_type: Literal["pt"] = "pt",
        **options: Unpack[GenerateOptions],
    ) -> Tensor: ...

    @overload
    def __call__(
        self,
        prompt: str | Sequence[str],
        num_images: int = 4,
        *,
        output_type: Literal["pil"],
        **options: Unpack[GenerateOptions],
    ) -> list[Image]: ...

    def __call__(
        self,
        prompt: str | Sequence[str],
        num_images: int = 4,
        *,
        output_type: str = "pt",
        **options: Unpack[GenerateOptions],
    ) -> Tensor | list[Image]:
        """`num_images` images of each prompt.

        Args:
            prompt: as in `generate`.
            num_images: as in `generate`.
            output_type: "pt" for a tensor, "pil" for PIL images.
            options: the other arguments of `generate`.

        Returns:
            float32 [B, 3, size, size] in [0, 1], or a list of B PIL images.

        Raises:
            ValueError: another output_type; and as `generate` does.

        Example:
            >>> pipe = DALLE2.from_pretrained()
            >>> few = dict(steps=2, prior_steps=2, candidates=1, size=64)
            >>> pipe("a red circle", 1, seed=0, output_type="pil", **few)[0].size
            (64, 64)
        """
        if output_type not in ("pt", "pil"):
            raise ValueError(f"output_type: expected 'pt' or 'pil', got {output_type!r}")
        images = self.generate(prompt, num_images, **options).images
        return images if output_type == "pt" else to_pil(images)

    @torch.no_grad()
    def generate(
        self,
        prompt: str | Sequence[str],
        num_images: int = 4,
        *,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        candidates: int | None = None,
        prior_steps: int | None = None,
        prior_guidance: float | None = None,
        prior_guidance_interval: tuple[float, float] | None = None,
        negative_prompt: str | None = None,
        init_image: Tensor | Image | None = None,
        strength: float = 0.6,
        upsampler_steps: int | None = None,
        upsampler2_steps: int | None = None,
        size: int | None = None,
        tile: int | None = None,
        sampler: str | None = None,
        batch_size: int | None = None,
        progress: Progress = False,
        graphs: bool | str = "auto",
    ) -> Generation:
        """Captions -> images, without gradients and in evaluation mode.

        A setting that is None is the checkpoint's (`sampling`).

        Args:
            prompt: one caption or several; every word must be known to the tokenizer.
            num_images: images of each caption.
            seed: 0 ... 2^63 - 1. Image i of a prompt depends on (seed, i) only, not on num_images or on the
                other prompts; a list has one seed for each prompt. None draws it from `generator`, or from
                torch's global generator (torch.manual_seed).
            generator: see seed.
            steps: diffusion steps of the decoder.
            guidance: guidance scale of the decoder; 1 is no guidance, more follows the caption more closely.
            guidance_interval: (low, high) in log-SNR, log(alpha^2 / sigma^2): only the decoder's steps at
                low <= log-SNR < high have guidance, see GaussianDiffusion.sample. (-100, 100) is all steps.
            candidates: images that the decoder samples for each image asked for; the one that CLIP finds
                nearest to the caption is kept, and upsampled.
            prior_steps: diffusion steps of the prior; an autoregressive prior has none.
            prior_guidance: guidance scale of the prior.
            prior_guidance_interval: the same of the prior's steps; an autoregressive prior has none.
            negative_prompt: a caption that guidance leads away from.
            init_image: the decoder starts from this image, noised: one image, or one per prompt; square, of
                any size.
            strength: the part of the decoder's steps that it then makes, in (0, 1]; 1 forgets the image.
            upsampler_steps: diffusion steps of the first upsampler; upsamplers have no guidance.
            upsampler2_steps: diffusion steps of the second upsampler.
            size: one of `sizes`; None is the largest.
            tile: side in pixels of the tiles in which an upsampler makes a larger image, to save memory, see
                Upsampler.sample.
            sampler: "ddpm", "ddim" or "dpm++", for every stage; "consistency" for distilled ones, see
                SamplingSettings.
            batch_size: at most so many images at a time, to save memory; the images are the same up to
                rounding.
            progress: True draws one bar per stage on stderr; a callable(stage, iterable, total) -> iterable
                wraps each loop itself.
            graphs: whether the steps of a stage are captured as a CUDA graph when its shapes are new, and
                then replayed: "auto" where the device has CUDA graphs, True (an error where it has none),
                or False. The result's `graphs` says what each stage did.

        Raises:
            ValueError: an unknown word, an empty or over-long caption, an argument out of range, or a setting
                of a stage that does not run.
            TypeError: an argument of another type.
            FloatingPointError: the result of a stage is not finite (float16 may overflow).
            RuntimeError: graphs=True, and a step cannot be captured.

        Example:
            >>> pipe = DALLE2.from_pretrained()
            >>> few = dict(steps=2, prior_steps=2, candidates=1, size=64)
            >>> made = pipe.generate("a red circle", 2, seed=0, **few)
            >>> made.images.shape, list(made.seconds)
            (torch.Size([2, 3, 64, 64]), ['text', 'prior', 'decoder'])
        """
        prompts = resolve_prompts(prompt)
        size = resolve_size(self, size)
        settings = resolve_settings(
            self,
            size,
            steps=steps,
            guidance=guidance,
            guidance_interval=guidance_interval,
            candidates=candidates,
            prior_steps=prior_steps,
            prior_guidance=prior_guidance,
            prior_guidance_interval=prior_guidance_interval,
            negative_prompt=negative_prompt,
            upsampler_steps=upsampler_steps,
            upsampler2_steps=upsampler2_steps,
            tile=tile,
            sampler=sampler,
        )
        check_prior(self, prior_steps=prior_steps, prior_guidance_interval=prior_guidance_interval)
        check_candidates(self, settings.candidates)
        context = GenerationContext.for_inputs(
            self,
            len(prompts),
            num_images,
            candidates=settings.candidates,
            seed=seed,
            generator=generator,
            batch_size=batch_size,
            progress=progress,
            graphs=graphs,
        )
        start: dict[str, Any] = {}
        if init_image is not None:
            image = prepare_init_image(context, init_image, len(prompts))
            start = {"init_image": image, "strength": strength}

        with context.evaluation_mode():
            captions = encode_captions(context, prompts, settings.negative_prompt)
            image_embed = sample_image_embeddings(context, captions, settings)
            low_res = sample_decoder(context, image_embed, captions.for_decoder, settings, **start)
            low_res, image_embed = choose_candidates(context, low_res, image_embed, prompts, settings)
            images = upsample(context, low_res, settings, size)
        return context.result(images, low_res, image_embed)

    # ------------------------------------------------------- what begins with an image or an image embedding

    embed_image = decoding.embed_image
    decode = decoding.decode
    variations = editing.variations
    interpolate = editing.interpolate
    text_diff = editing.text_diff
    inpaint = editing.inpaint
    invert = inversion.invert
    reconstruct = reconstruction.reconstruct
    fit_pca = reconstruction.fit_pca

    # ------------------------------------------------------------------- compiled programs and CUDA graphs

    compile = compile_networks
    capture = cuda_graphs.capture
    release_graphs = cuda_graphs.release_graphs

    # ----------------------------------------------------------------------------------------- checkpoints

    def save_pretrained(self, path: str | PathLike, *, dtype: torch.dtype | None = None) -> Path:
        """Write the pipeline as a checkpoint folder (config.json, model.safetensors).

        An earlier checkpoint there stays whole until the new one is complete.

        Args:
            path: the folder.
            dtype: store floating-point weights in it (torch.bfloat16 halves the file); None keeps theirs.

        Returns:
            The folder.

        Raises:
            OSError: the folder cannot be written.
        """
        return save_pipeline(self, path, dtype)

    @classmethod
    def from_pretrained(
        cls,
        path: str | PathLike | None = None,
        *,
        device: torch.device | str = "auto",
        dtype: torch.dtype | str = "auto",
        revision: str | None = None,
    ) -> DALLE2:
        """Load a checkpoint, in evaluation mode.

        torch's random state stays as it is, and no code from a file is run: weights are read from safetensors
        or by torch.load(weights_only=True).

        Args:
            path: a folder that `save_pretrained` wrote; a diffusers UnCLIPPipeline (or
                UnCLIPImageVariationPipeline, which has no prior), safetensors or .bin; a folder of Karlo's
                original .ckpt files; or an id of the Hugging Face hub, "kakaobrain/karlo-v1-alpha", for which
                huggingface_hub has to be installed. None is the checkpoint that is installed with the
                package.
            device: of the weights. "auto" is a GPU if there is one, else the CPU, as for the command line.
            dtype: of the weights and of the computation, regardless of what the file stores: a floating-point
                torch.dtype, "fp32", "bf16", "fp16", or "auto", which is bfloat16 on a device that is
                fast in it (a CPU with AMX, a GPU since Ampere), else float32, as for the command line.
            revision: a branch, tag or commit of the hub.

        Raises:
            FileNotFoundError: a missing folder or file.
            CheckpointError: (a ValueError) a damaged, truncated or unknown checkpoint; the message names the
                keys that are missing, left over or of another shape.
            TypeError, ValueError: another device or dtype, or a device that this machine does not have.

        Example:
            >>> DALLE2.from_pretrained(dtype=torch.bfloat16).dtype
            torch.bfloat16
        """
        return load_pipeline(cls, path, device, dtype, revision)
