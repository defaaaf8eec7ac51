"""caption -> CLIP text -> prior -> image embedding -> decoder -> upsampler: DALL-E 2 (arXiv 2204.06125)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dalle2_fast.checkpoints import (
    CheckpointError,
    construct,
    embedded_path,
    join_states,
    load_folder,
    load_state,
    reject_leftovers,
    save_folder,
)
from dalle2_fast.models.watch import StageWatch

if TYPE_CHECKING:
    from PIL.Image import Image

    from dalle2_fast.data.tokenizer import WordTokenizer
    from dalle2_fast.models.clip import CLIP
    from dalle2_fast.models.decoder import Decoder
    from dalle2_fast.models.prior import DiffusionPrior
    from dalle2_fast.models.upsampler import Upsampler

SAMPLERS = ("ddpm", "ddim", "dpm++")
STAGES = ("text", "prior", "decoder", "upsampler")
# What a call uses when it says nothing; a checkpoint may carry its own values under "sampling" in its config.
SAMPLING = {
    "steps": 25,  # decoder
    "guidance": 3.0,  # decoder
    "prior_steps": 25,
    "prior_guidance": 1.0,
    "upsampler_steps": 10,
    "sampler": "dpm++",  # of all three diffusions
}
PARTS = ("clip", "prior", "decoder", "upsampler")


@dataclass
class Generation:
    """What `DALLE2.generate` made, P prompts times N images, prompt after prompt (B = P * N rows)."""

    images: Tensor  # float32 [B, 3, size, size] in [0, 1]
    low_res: Tensor  # float32 [B, 3, S, S] in [0, 1], the decoder's output
    image_embed: Tensor  # [B, D], the prior's output
    seed: int
    sample_seeds: Tensor  # int64 [B]
    seconds: dict[str, float] = field(default_factory=dict)  # stage -> wall-clock seconds


class DALLE2(nn.Module):
    """The whole chain. `pipe(prompt, ...)` gives images, `pipe.generate(prompt, ...)` the intermediate
    results too.

    clip, prior, decoder: the trained modules; upsampler: None makes images of the decoder's size only.
    tokenizer: text <-> ids of CLIP's (and the decoder's own) text tower.
    sampling: this model's values of SAMPLING where a call names none.
    metadata: anything JSON-able that is kept with the checkpoint (the world it was trained on, say).
    """

    def __init__(
        self,
        clip: CLIP,
        prior: DiffusionPrior,
        decoder: Decoder,
        upsampler: Upsampler | None = None,
        tokenizer: WordTokenizer | None = None,
        *,
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
        _check_sampling(sampling or {})
        _check_parts(clip, prior, decoder, upsampler, tokenizer)
        self.clip = clip
        self.prior = prior
        self.decoder = decoder
        self.upsampler = upsampler
        self.tokenizer = tokenizer
        self.sampling = {**SAMPLING, **(sampling or {})}
        self.metadata = dict(metadata or {})

    @property
    def sizes(self) -> tuple[int, ...]:
        """The image sizes that this chain makes, smallest first."""
        return (
            self.decoder.image_size,
            *((self.upsampler.image_size,) if self.upsampler is not None else ()),
        )

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
        prior_steps: int | None = None,
        prior_guidance: float | None = None,
        upsampler_steps: int | None = None,
        size: int | None = None,
        sampler: str | None = None,
        batch_size: int | None = None,
        progress: bool | Callable[[str, Iterable, int | None], Iterable] = False,
    ) -> Generation:
        """Caption(s) -> images, with everything made on the way.

        prompt: one caption or several; every word must be known to the tokenizer.
        seed: 0 ... 2^63 - 1. Image i of a prompt depends on (seed, i) only, not on num_images or the other
            prompts. None draws it from `generator`, or else from torch's own (torch.manual_seed decides).
        steps, guidance: of the decoder; prior_steps, prior_guidance: of the prior; upsampler_steps: of the
            upsampler, which has no guidance. 1 is no guidance, more follows the caption more closely.
        size: one of `sizes`, by default the largest.
        sampler: "ddpm", "ddim" or "dpm++", for every stage.
        batch_size: at most so many images at a time, to save memory; the same images up to rounding.
        progress: True draws one bar per stage on stderr; a callable(stage, iterable, total) -> iterable wraps
            the loops itself.

        What is None comes from the checkpoint (`sampling`). Runs without gradients, in evaluation mode.
        Raises ValueError for an unknown word, an empty or over-long caption and arguments out of range,
        FloatingPointError if the result is not finite (float16 may overflow).
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise ValueError("prompt: expected at least one caption, got an empty list")
        size = self.sizes[-1] if size is None else size
        if size not in self.sizes:
            raise ValueError(f"size: expected one of {', '.join(map(str, self.sizes))}, got {size!r}")
        given = {
            "steps": steps,
            "guidance": guidance,
            "prior_steps": prior_steps,
            "prior_guidance": prior_guidance,
            "upsampler_steps": upsampler_steps,
            "sampler": sampler,
        }
        chosen = self.sampling | {name: value for name, value in given.items() if value is not None}
        _check_sampling(chosen)
        rows = len(prompts) * _at_least_one("num_images", num_images)
        batch_size = rows if batch_size is None else _at_least_one("batch_size", batch_size)
        batches = [slice(start, start + batch_size) for start in range(0, rows, batch_size)]
        seed = _choose_seed(seed, generator)
        tokens = self.tokenizer.encode(prompts).to(self.device)  # [P, L]; names unknown words
        sample_seeds = [sample_seed(seed, index) for index in range(num_images)] * len(prompts)
        watch = StageWatch(progress, self.device)

        def sample(stage: str, steps: int, **options) -> Tensor:
            """One stage, batch after batch; the tensors among the options have a row for each image."""
            # With the same seed in every stage they would all start from the same noise.
            own = [sample_seed(seed, STAGES.index(stage)) for seed in sample_seeds]
            options |= {"seeds": torch.tensor(own, device=self.device)}
            results = []
            with watch(stage, len(batches)) as track:
                for part in batches:
                    inputs = {k: v[part] if isinstance(v, Tensor) else v for k, v in options.items()}
                    model = getattr(self, stage)
                    results.append(
                        model.sample(**inputs, steps=steps, sampler=chosen["sampler"], progress=track)
                    )
                return torch.cat(results)

        with _evaluating(self):
            with watch("text") as track:
                for _ in track(range(1), 1):
                    encoded = self.clip.encode_text(tokens)
            caption = {
                name: tensor.repeat_interleave(num_images, dim=0)
                for name, tensor in zip(("text_embed", "text_encodings", "text_mask"), encoded, strict=True)
            }
            image_embed = sample(
                "prior", chosen["prior_steps"], cond_scale=chosen["prior_guidance"], **caption
            )
            if self.decoder.text_encoder is not None:  # the decoder reads the caption with a tower of its own
                caption = {"text": tokens.repeat_interleave(num_images, dim=0)}
            low_res = images = sample(
                "decoder", chosen["steps"], cond_scale=chosen["guidance"], image_embed=image_embed, **caption
            )
            if size != self.decoder.image_size:
                images = sample("upsampler", chosen["upsampler_steps"], low_res=low_res)
        if not torch.isfinite(images).all():
            raise FloatingPointError(f"the images are not finite in {self.dtype}: use float32 or bfloat16")
        return Generation(
            images=images.float(),
            low_res=low_res.float(),
            image_embed=image_embed,
            seed=seed,
            sample_seeds=torch.tensor(sample_seeds),
            seconds=watch.seconds,
        )

    # ------------------------------------------------------------------------------------------- checkpoints

    def save_pretrained(self, path: str | PathLike, *, dtype: torch.dtype | None = None) -> Path:
        """Write the chain as a checkpoint folder (config.json, model.safetensors) and return the folder.

        Atomic: an earlier checkpoint there stays whole until the new one is complete. `dtype`: store
        floating-point weights in it (torch.bfloat16 halves the file); None keeps theirs.
        """
        parts = {name: getattr(self, name) for name in PARTS}
        config = {
            "model": "DALLE2",
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
    ) -> DALLE2:
        """Load a checkpoint folder, in evaluation mode; None is the one that is installed with the package.

        dtype: of the weights and of the computation, whatever the file stores. torch's random state is left
        alone. Raises FileNotFoundError for a missing folder or file and CheckpointError (a ValueError) for a
        damaged, truncated or unknown one, naming the keys that are missing, left over or of another shape.
        """
        from dalle2_fast.data.tokenizer import WordTokenizer
        from dalle2_fast.models.clip import CLIP
        from dalle2_fast.models.decoder import Decoder
        from dalle2_fast.models.prior import DiffusionPrior
        from dalle2_fast.models.upsampler import Upsampler

        path = embedded_path() if path is None else Path(path).expanduser()
        config, tensors = load_folder(path)
        if config.get("model") != "DALLE2":
            raise CheckpointError(
                f"{path}: expected a checkpoint of model 'DALLE2', got {config.get('model')!r}"
            )
        classes = {"clip": CLIP, "prior": DiffusionPrior, "decoder": Decoder, "upsampler": Upsampler}
        parts = {}
        with torch.random.fork_rng(devices=[]):  # constructors draw initial weights
            for name, part in classes.items():
                if config.get(name) is None and name == "upsampler":
                    continue
                parts[name] = construct(lambda options, part=part: part(**options), config, name, path)
        tokenizer = construct(WordTokenizer.from_config, config, "tokenizer", path)
        reject_leftovers(tensors, parts, path)
        for name, part in parts.items():
            load_state(part, tensors, name, path)
        try:
            pipe = cls(
                **parts, tokenizer=tokenizer, sampling=config.get("sampling"), metadata=config.get("metadata")
            )
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: config.json: {error}") from error
        return pipe.to(device=device, dtype=dtype).eval()


def sample_seed(seed: int, index: int) -> int:
    """A seed (int64, any sign) from a seed and an index: splitmix64 (Steele et al. 2014) at position `index`.

    For a fixed seed different indices never collide, and neighbouring seeds give unrelated ones.
    """
    mask = 2**64 - 1
    z = (_mix(seed & mask) + (index + 1) * 0x9E3779B97F4A7C15) & mask
    z = _mix(z)
    return z - 2**64 if z >= 2**63 else z


def _mix(z: int) -> int:
    mask = 2**64 - 1
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def to_pil(images: Tensor) -> list[Image]:
    """float [B, 3, H, W] in [0, 1] -> B PIL images, each value rounded to 8 bits."""
    from PIL import Image

    pixels = (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(picture) for picture in pixels.permute(0, 2, 3, 1).cpu().numpy()]


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every submodule as it was (a trainer may be drawing samples)."""
    training = [child for child in module.modules() if child.training]
    module.eval()
    try:
        yield
    finally:
        for child in training:
            child.training = True


def _at_least_one(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    return value


def _check_parts(
    clip: CLIP,
    prior: DiffusionPrior,
    decoder: Decoder,
    upsampler: Upsampler | None,
    tokenizer: WordTokenizer,
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
    equal = [
        ("prior: image_embed_dim", clip.dim_latent, prior.image_embed_dim, "CLIP's dim_latent"),
        ("prior: text_dim", width, prior.net.text_dim, "CLIP's dim_text"),
        ("decoder: image_embed_dim", clip.dim_latent, decoder.image_embed_dim, "CLIP's dim_latent"),
    ]
    if upsampler is not None:
        equal.append(
            ("upsampler: low_res_size", decoder.image_size, upsampler.low_res_size, "the decoder's size")
        )
    for name, expected, came, why in equal:
        if came != expected:
            raise ValueError(f"{name}: expected {expected} ({why}), got {came}")


def _check_sampling(chosen: dict[str, Any]) -> None:
    for name, value in chosen.items():
        if name == "sampler":
            if value not in SAMPLERS:
                raise ValueError(f"sampler: expected one of {', '.join(SAMPLERS)}, got {value!r}")
        elif name.endswith("steps"):
            _at_least_one(name, value)
        elif isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}: expected a number, got {value!r}")
        elif not 0 <= value < float("inf"):
            raise ValueError(f"{name}: expected a finite number >= 0, got {value}")


def _choose_seed(seed: int | None, generator: torch.Generator | None) -> int:
    if seed is None:
        device = "cpu" if generator is None else generator.device
        return int(torch.randint(2**32, (), generator=generator, device=device))
    if generator is not None:
        raise ValueError("seed, generator: expected at most one of the two")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: expected an int, got {seed!r}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed: expected 0 ... 2^63 - 1, got {seed}")
    return seed
