"""caption -> CLIP text -> prior -> image embedding -> decoder -> upsamplers: DALL-E 2 (arXiv 2204.06125)."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dalle2_fast.checkpoints import (
    CheckpointError,
    construct,
    join_states,
    open_checkpoint,
    save_folder,
)
from dalle2_fast.data.images import as_images, resized, to_pil
from dalle2_fast.pipeline.chain import SAMPLING, UPSAMPLERS, check_sampling
from dalle2_fast.pipeline.editing import Manipulations
from dalle2_fast.pipeline.generation import (
    Generation,
    Progress,
    Run,
    at_least_one,
    candidate_seeds,
    choose_seed,
)
from dalle2_fast.seeds import sample_seed

if TYPE_CHECKING:
    from PIL.Image import Image

    from dalle2_fast.data.text.tokenizer import Tokenizer
    from dalle2_fast.models.clip.model import CLIP
    from dalle2_fast.models.decoder.model import Decoder
    from dalle2_fast.models.prior.autoregressive import ARPrior
    from dalle2_fast.models.prior.diffusion import DiffusionPrior
    from dalle2_fast.models.upsampler.model import Upsampler

PARTS = ("clip", "prior", "decoder", *UPSAMPLERS)


class DALLE2(Manipulations, nn.Module):
    """The whole chain. `pipe(prompt, ...)` gives images, `pipe.generate(prompt, ...)` the intermediate
    results too; what begins with a picture (variations, inpaint, ...) is in Manipulations.

    clip, prior (a DiffusionPrior or an ARPrior), decoder: the trained modules. prior: None can only do what
    begins with a picture. upsampler: None makes images of the decoder's size only; upsampler2: a second one,
    from the first one's size (unCLIP's: 256 to 1024).
    tokenizer: text <-> ids of CLIP's (and the decoder's own) text tower.
    sampling: this model's values of SAMPLING where a call names none.
    metadata: anything JSON-able that is kept with the checkpoint (the world it was trained on, say).
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
        if unknown := set(sampling or {}) - set(SAMPLING):
            raise ValueError(
                f"sampling: expected some of {', '.join(SAMPLING)}, got {', '.join(sorted(unknown))}"
            )
        check_sampling(sampling or {})
        _check_parts(clip, prior, decoder, (upsampler, upsampler2), tokenizer)
        self.clip = clip
        self.prior = prior
        self.decoder = decoder
        self.upsampler = upsampler
        self.upsampler2 = upsampler2
        self.tokenizer = tokenizer
        self.sampling = {**SAMPLING, **(sampling or {})}
        self.metadata = dict(metadata or {})

    @property
    def sizes(self) -> tuple[int, ...]:
        """The image sizes that this chain makes, smallest first."""
        chain = (self.decoder, self.upsampler, self.upsampler2)
        return tuple(part.image_size for part in chain if part is not None)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    # ------------------------------------------------------------------------------------------------ images

    def __call__(
        self,
        prompt: str | Sequence[str],
        num_images: int = 4,
        *,
        output_type: str = "pt",
        **options,  # as in generate()
    ) -> Tensor | list[Image]:
        """`num_images` images of each prompt: float32 [B, 3, size, size] in [0, 1], or PIL images with
        `output_type="pil"`. The other keywords are those of `generate`."""
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
        seed: int | None = None,
        generator: torch.Generator | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        candidates: int | None = None,
        prior_steps: int | None = None,
        prior_guidance: float | None = None,
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
    ) -> Generation:
        """Caption(s) -> images, with everything made on the way.

        prompt: one caption or several; every word must be known to the tokenizer.
        seed: 0 ... 2^63 - 1. Image i of a prompt depends on (seed, i) only, not on num_images or the other
            prompts. None draws it from `generator`, or else from torch's own (torch.manual_seed decides).
        steps, guidance: of the decoder; prior_steps, prior_guidance: of the prior (an autoregressive one has
            no steps); upsampler_steps, upsampler2_steps: of the upsamplers, which have no guidance. 1 is no
            guidance, more follows the caption more closely.
        candidates: pictures that the decoder draws for each image; the one that CLIP finds nearest to the
            caption is kept, and upsampled.
        negative_prompt: a caption that guidance leads away from.
        init_image, strength: let the decoder start from this picture (square, of any size; one, or one a
            prompt), noised, and make the last `strength` in (0, 1] of its steps: 1 forgets the picture.
        size: one of `sizes`, by default the largest. tile: side of the windows in which an upsampler makes a
            larger picture, to save memory, see Upsampler.sample.
        sampler: "ddpm", "ddim" or "dpm++", for every stage.
        batch_size: at most so many images at a time, to save memory; the same images up to rounding.
        progress: True draws one bar per stage on stderr; a callable(stage, iterable, total) -> iterable wraps
            the loops itself.

        What is None comes from the checkpoint (`sampling`). Runs without gradients, in evaluation mode.
        Raises ValueError for an unknown word, an empty or over-long caption and arguments out of range,
        FloatingPointError if the result is not finite (float16 may overflow).
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(prompts, (list, tuple)) or not all(isinstance(text, str) for text in prompts):
            raise TypeError(f"prompt: expected a caption or a list of captions, got {prompt!r}")
        if not prompts:
            raise ValueError("prompt: expected at least one caption, got an empty list")
        size = self._size(size)
        chosen = self._chosen(
            size,
            steps=steps,
            guidance=guidance,
            candidates=candidates,
            prior_steps=prior_steps,
            prior_guidance=prior_guidance,
            negative_prompt=negative_prompt,
            upsampler_steps=upsampler_steps,
            upsampler2_steps=upsampler2_steps,
            tile=tile,
            sampler=sampler,
        )
        self._need_prior()
        if prior_steps is not None and not self.prior.diffuses:
            raise ValueError(f"prior_steps: an autoregressive prior has none, got {prior_steps}")
        if chosen["candidates"] > 1 and self.clip.visual is None:
            raise ValueError(f"candidates: this chain's CLIP sees no images: 1, got {chosen['candidates']}")
        rows = at_least_one("num_images", num_images) * chosen["candidates"]  # of a prompt
        seed = choose_seed(seed, generator)
        seeds = []
        for index in range(num_images):
            seeds += candidate_seeds(sample_seed(seed, index), chosen["candidates"])
        run = Run(self, seed, seeds * len(prompts), batch_size=batch_size, progress=progress)
        for_decoder = {}
        if init_image is not None:
            start = resized(as_images("init_image", init_image, self.device), self.decoder.image_size)
            if len(start) not in (1, len(prompts)):
                raise ValueError(f"init_image: expected one image or {len(prompts)}, got {len(start)}")
            start = start.expand(len(prompts), -1, -1, -1).repeat_interleave(rows, dim=0)
            for_decoder = {"init_image": start, "strength": strength}
        with run.evaluating():
            image_embed, told = self._prior(run, prompts, rows, chosen)
            return self._draw(run, image_embed, chosen, size, prompts=prompts, **for_decoder, **told)

    # ------------------------------------------------------------------------------------------- checkpoints

    def save_pretrained(self, path: str | PathLike, *, dtype: torch.dtype | None = None) -> Path:
        """Write the chain as a checkpoint folder (config.json, model.safetensors) and return the folder.

        Atomic: an earlier checkpoint there stays whole until the new one is complete. `dtype`: store
        floating-point weights in it (torch.bfloat16 halves the file); None keeps theirs.
        """
        parts = {name: getattr(self, name) for name in PARTS}
        config = {
            "model": "DALLE2",
            "prior_class": None if self.prior is None else type(self.prior).__name__,
            **{name: None if part is None else part.config for name, part in parts.items()},
            "tokenizer": self.tokenizer.to_config(),
            "sampling": self.sampling,
            "metadata": self.metadata,
        }
        return save_folder(path, config, join_states(parts), dtype=dtype)

    @classmethod
    def from_pretrained(
        cls,
        path: str | PathLike | None = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        revision: str | None = None,
    ) -> DALLE2:
        """Load a checkpoint, in evaluation mode; None is the one that is installed with the package.

        path: a folder that `save_pretrained` wrote; a diffusers UnCLIPPipeline (or
            UnCLIPImageVariationPipeline, which has no prior), safetensors or .bin; a folder of Karlo's
            original .ckpt files; or an id of the Hugging Face hub, "kakaobrain/karlo-v1-alpha", for which
            huggingface_hub has to be installed; revision: then a branch, tag or commit.
        dtype: of the weights and of the computation, whatever the file stores.

        torch's random state is left alone, and nothing in a file is run: weights are read from safetensors or
        by torch.load(weights_only=True). Raises FileNotFoundError for a missing folder or file and
        CheckpointError (a ValueError) for a damaged, truncated or unknown one, naming the keys that are
        missing, left over or of another shape.
        """
        from dalle2_fast.data.text.tokenizer import tokenizer_from_config
        from dalle2_fast.models.clip.model import CLIP
        from dalle2_fast.models.decoder.model import Decoder
        from dalle2_fast.models.prior.autoregressive import ARPrior
        from dalle2_fast.models.prior.diffusion import DiffusionPrior
        from dalle2_fast.models.upsampler.model import Upsampler

        checkpoint = open_checkpoint(path, revision=revision)
        path, config = checkpoint.path, checkpoint.config
        if config.get("model") != "DALLE2":
            raise CheckpointError(
                f"{path}: expected a checkpoint of model 'DALLE2', got {config.get('model')!r}"
            )
        priors = {"DiffusionPrior": DiffusionPrior, "ARPrior": ARPrior, None: None}
        prior = config.get("prior_class", "DiffusionPrior")  # absent in older ones
        if prior not in priors:
            raise CheckpointError(
                f"{path}: config.json: prior_class: expected DiffusionPrior or ARPrior, got {prior!r}"
            )
        kinds = {"clip": CLIP, "decoder": Decoder} | ({} if prior is None else {"prior": priors[prior]})
        kinds |= {name: Upsampler for name in UPSAMPLERS if config.get(name) is not None}
        checkpoint.reject_leftovers(kinds)
        tokenizer = construct(tokenizer_from_config, config, "tokenizer", path)
        parts = {"prior": None} | checkpoint.make(kinds, device, dtype)
        try:
            pipe = cls(
                **parts, tokenizer=tokenizer, sampling=config.get("sampling"), metadata=config.get("metadata")
            )
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: config.json: {error}") from error
        return pipe.eval()


def _check_parts(
    clip: CLIP,
    prior: DiffusionPrior | ARPrior | None,
    decoder: Decoder,
    upsamplers: tuple[Upsampler | None, Upsampler | None],
    tokenizer: Tokenizer,
) -> None:
    """ValueError for parts that were not made for each other: they would fail, or draw nonsense, later."""
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
    upsampler, upsampler2 = upsamplers
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
