"""caption -> CLIP text -> prior -> image embedding -> decoder -> upsamplers: DALL-E 2 (arXiv 2204.06125)."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from dalle2_fast.pipeline import decoding, editing, inversion, reconstruction
from dalle2_fast.pipeline.checkpoint import load_pipeline, save_pipeline
from dalle2_fast.pipeline.compilation import graphs as cuda_graphs
from dalle2_fast.pipeline.compilation.pipeline import compile_networks
from dalle2_fast.pipeline.context import Generation, GenerationContext
from dalle2_fast.pipeline.like_diffusers import hub, offload
from dalle2_fast.pipeline.like_diffusers.names import (
    accept_names,
    check_output_type,
    convert_images,
    like_diffusers,
)
from dalle2_fast.pipeline.parts import PARTS, check_parts
from dalle2_fast.pipeline.progress import Progress, StepCallback
from dalle2_fast.pipeline.settings import (
    GenerateOptions,
    SamplingSettings,
    SettingOptions,
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
    from typing_extensions import Self, Unpack

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

    _offload_device: torch.device | None = None  # where the stages run, see enable_model_cpu_offload

    def __repr__(self) -> str:
        """One line; `print(pipe.decoder)` shows the layers of a stage."""
        stages = {name: getattr(self, name) for name in PARTS}
        counts = [f"{name} {hub.count_parameters(net):,}" for name, net in stages.items() if net is not None]
        where = f"{self.device}, {str(self.dtype).removeprefix('torch.')}"
        sizes = ", ".join(map(str, self.sizes))
        return f"{type(self).__name__}({', '.join(counts)} parameters; {where}; sizes {sizes})"

    @property
    def sizes(self) -> tuple[int, ...]:
        """The image sizes that this pipeline makes, smallest first."""
        parts = (self.decoder, self.upsampler, self.upsampler2)
        return tuple(part.image_size for part in parts if part is not None)

    @property
    def device(self) -> torch.device:
        """Where the stages run: where the weights are, except with `enable_model_cpu_offload`."""
        return self._offload_device or next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights and of the computation."""
        return next(self.parameters()).dtype

    def to(self, *args: Any, **options: Any) -> Self:
        """Move all networks or change their dtype, as nn.Module.to; a device ends `enable_model_cpu_offload`.

        Returns:
            The same pipeline.
        """
        if torch._C._nn._parse_to(*args, **options)[0] is not None:
            self._offload_device = None
        return super().to(*args, **options)

    enable_model_cpu_offload = offload.enable_model_cpu_offload

    # ---------------------------------------------------------------------------------- captions to images

    @overload
    def __call__(
        self,
        prompt: str | Sequence[str],
        num_images: int = 4,
        *,
        output_type: Literal["pt"] = "pt",
        return_dict: Literal[False] = False,
        **options: Unpack[GenerateOptions],
    ) -> Tensor: ...

    @overload
    def __call__(
        self,
        prompt: str | Sequence[str],
        num_images: int = 4,
        *,
        output_type: Literal["pil"],
        return_dict: Literal[False] = False,
        **options: Unpack[GenerateOptions],
    ) -> list[Image]: ...

    @overload
    def __call__(
        self,
        prompt: str | Sequence[str],
        num_images: int = 4,
        *,
        output_type: str = "pt",
        return_dict: bool = False,
        **options: Unpack[GenerateOptions],
    ) -> Any: ...

    @accept_names
    def __call__(
        self,
        prompt: str | Sequence[str],
        num_images: int = 4,
        *,
        output_type: str = "pt",
        return_dict: bool = False,
        **options: Unpack[GenerateOptions],
    ) -> Any:
        """`num_images` images of each prompt.

        Args:
            prompt: as in `generate`.
            num_images: as in `generate`.
            output_type: "pt" for a tensor, "np" for float32 [B, size, size, 3] in NumPy, "pil" for a list of
                PIL images.
            return_dict: True for the Generation with the images as `.images`, as diffusers' pipelines return
                it.
            options: the other arguments of `generate`.

        Returns:
            float32 [B, 3, size, size] in [0, 1], or the images as output_type says.

        Raises:
            ValueError: another output_type; and as `generate` does.

        Example:
            >>> pipe = DALLE2.from_pretrained()
            >>> few = dict(num_inference_steps=2, prior_num_inference_steps=2, candidates=1, size=64)
            >>> pipe("a red circle", 1, seed=0, output_type="pil", **few)[0].size
            (64, 64)
        """
        check_output_type(output_type)
        made = self.generate(prompt, num_images, **options)
        made.images = convert_images(made.images, output_type)
        return made if return_dict else made.images

    @like_diffusers
    @torch.no_grad()
    def generate(
        self,
        prompt: str | Sequence[str],
        num_images: int = 4,
        *,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        init_image: Tensor | Image | None = None,
        strength: float = 0.6,
        size: int | None = None,
        batch_size: int | None = None,
        progress: Progress = False,
        graphs: bool | str = "auto",
        callback: StepCallback | None = None,
        **settings: Unpack[SettingOptions],
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
            init_image: the decoder starts from this image, noised: one image, or one per prompt; square, of
                any size.
            strength: the part of the decoder's steps that it then makes, in (0, 1]; 1 forgets the image.
            size: one of `sizes`; None is the largest.
            batch_size: at most so many images at a time, to save memory; the images are the same up to
                rounding.
            progress: True draws one bar per stage on stderr; a callable(stage, iterable, total) -> iterable
                wraps each loop itself.
            graphs: whether the steps of a stage are captured as a CUDA graph when its shapes are new, and
                then replayed: "auto" where the device has CUDA graphs, True (an error where it has none),
                or False. The result's `graphs` says what each stage did.
            callback: called as callback(stage, step, x0) after each step of decoder and upsamplers, which run
                without CUDA graphs then. x0: [B, 3, S, S] in [0, 1], candidates next to each other.
            settings: those of SamplingSettings: steps, guidance, guidance_interval, candidates, prior_steps,
                prior_guidance, prior_guidance_interval, prior_candidates, negative_prompt, upsampler_steps,
                upsampler2_steps, tile, sampler, prior_sampler, upsampler_sampler and upsampler2_sampler; and
                guidance_rescale, clip, dynamic_threshold and spacing as in GaussianDiffusion.sample, for the
                decoder. diffusers' names are known, too: num_inference_steps, guidance_scale,
                num_images_per_prompt, {prior,decoder,super_res}_num_inference_steps,
                {prior,decoder}_guidance_scale, and output_type ("pt", "np", "pil") for the result's images.

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
        given, decoder_options = decoding.split_options(settings, SamplingSettings.names())
        chosen = resolve_settings(self, size, **given)
        of_diffusion = ("prior_steps", "prior_guidance_interval")
        check_prior(self, **{name: given.get(name) for name in of_diffusion})
        check_candidates(self, chosen.candidates)
        context = GenerationContext.for_inputs(
            self,
            len(prompts),
            num_images,
            candidates=chosen.candidates,
            seed=seed,
            generator=generator,
            batch_size=batch_size,
            progress=progress,
            graphs=graphs,
            callback=callback,
        )
        start = dict(decoder_options)
        if init_image is not None:
            image = prepare_init_image(context, init_image, len(prompts))
            start |= {"init_image": image, "strength": strength}

        with context.evaluation_mode():
            captions = encode_captions(context, prompts, chosen.negative_prompt)
            image_embed = sample_image_embeddings(context, captions, chosen)
            low_res = sample_decoder(context, image_embed, captions.for_decoder, chosen, **start)
            low_res, image_embed = choose_candidates(context, low_res, image_embed, prompts, chosen)
            images = upsample(context, low_res, chosen, size)
        return context.result(images, low_res, image_embed)

    # ------------------------------------------------------- what begins with an image or an image embedding

    embed_image = decoding.embed_image
    decode = like_diffusers(decoding.decode)
    variations = like_diffusers(editing.variations)
    interpolate = like_diffusers(editing.interpolate)
    text_diff = like_diffusers(editing.text_diff)
    inpaint = like_diffusers(editing.inpaint)
    invert = accept_names(inversion.invert)
    reconstruct = like_diffusers(reconstruction.reconstruct)
    fit_pca = reconstruction.fit_pca

    # ------------------------------------------------------------------- compiled programs and CUDA graphs

    compile = compile_networks
    capture = cuda_graphs.capture
    release_graphs = cuda_graphs.release_graphs

    # ----------------------------------------------------------------------------------------- checkpoints

    push_to_hub = hub.push_to_hub

    def save_pretrained(
        self, path: str | PathLike, *, dtype: torch.dtype | None = None, model_card: bool = False
    ) -> Path:
        """Write the pipeline as a checkpoint folder (config.json, model.safetensors).

        An earlier checkpoint there stays whole until the new one is complete.

        Args:
            path: the folder.
            dtype: store floating-point weights in it (torch.bfloat16 halves the file); None keeps theirs.
            model_card: also write a model card, README.md; one that is there is replaced.

        Returns:
            The folder.

        Raises:
            OSError: the folder cannot be written.
        """
        folder = save_pipeline(self, path, dtype)
        if model_card:
            hub.write_card(self, folder, str(path))
        return folder

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
