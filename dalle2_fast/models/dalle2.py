"""caption -> CLIP text -> prior -> image embedding -> decoder -> upsampler: DALL-E 2 (arXiv 2204.06125) as one object."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from dalle2_fast.checkpoints import (
    CheckpointError,
    embedded_path,
    join_states,
    load_folder,
    load_state,
    reject_leftovers,
    save_folder,
)

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
MAX_SEED = 2**63 - 1


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
    """The whole chain. `pipe(prompt, ...)` gives images, `pipe.generate(prompt, ...)` the intermediate results too.

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
            raise ValueError(f"sampling: unknown {', '.join(sorted(unknown))}; expected {', '.join(SAMPLING)}")
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
        return (self.decoder.image_size, *((self.upsampler.image_size,) if self.upsampler is not None else ()))

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

        prompt: one caption or several, each at most as long as the tokenizer's context; every word must be known.
        seed: 0 ... 2^63 - 1; image i of a prompt depends on (seed, i) only, not on `num_images` or the other prompts.
            None draws it from `generator`, or else from torch's global generator (so torch.manual_seed decides).
        steps, guidance: of the decoder; prior_steps, prior_guidance: of the prior. guidance 1 follows the caption
            without amplification, larger values more closely. upsampler_steps: of the upsampler, which has no guidance.
        size: one of `sizes`; None is the largest. sampler: "ddpm", "ddim" or "dpm++", for every stage.
        batch_size: at most so many images at a time through a stage, to save memory; the same images up to rounding.
        progress: True draws one bar per stage on stderr; a callable(stage, iterable, total) wraps each loop itself.
        None everywhere else takes the checkpoint's own value (`sampling`). Runs without gradients, in evaluation mode.

        Raises ValueError for an unknown word, an empty or over-long caption and arguments out of range; ArithmeticError
        if the result is not finite (float16 may overflow).
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise ValueError("prompt: expected at least one caption, got an empty list")
        sampler = self.sampling["sampler"] if sampler is None else sampler
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler: expected one of {', '.join(SAMPLERS)}, got {sampler!r}")
        size = self.sizes[-1] if size is None else size
        if size not in self.sizes:
            raise ValueError(f"size: expected one of {', '.join(map(str, self.sizes))}, got {size!r}")
        num_images = _at_least_one("num_images", num_images)
        rows = len(prompts) * num_images
        batch_size = rows if batch_size is None else _at_least_one("batch_size", batch_size)
        steps = _at_least_one("steps", self._default("steps", steps))
        prior_steps = _at_least_one("prior_steps", self._default("prior_steps", prior_steps))
        upsampler_steps = _at_least_one("upsampler_steps", self._default("upsampler_steps", upsampler_steps))
        guidance = _finite("guidance", self._default("guidance", guidance))
        prior_guidance = _finite("prior_guidance", self._default("prior_guidance", prior_guidance))
        seed = _check_seed(seed, generator)
        tokens = self.tokenizer.encode(prompts).to(self.device)  # [P, L]; names unknown words

        sample_seeds = [sample_seed(seed, index) for index in range(num_images)] * len(prompts)
        batches = [slice(start, start + batch_size) for start in range(0, rows, batch_size)]
        watch = _Watch(progress, self.device, len(batches))
        with _evaluating(self):
            with watch("text") as track:
                (encoded,) = [self.clip.encode_text(tokens) for _ in track(range(1), 1)]
            embed, encodings, mask = [tensor.repeat_interleave(num_images, dim=0) for tensor in encoded]
            tokens = tokens.repeat_interleave(num_images, dim=0)

            with watch("prior") as track:
                seeds = self._stage_seeds(sample_seeds, "prior")
                image_embed = torch.cat([
                    self.prior.sample(
                        text_embed=embed[part], text_encodings=encodings[part], text_mask=mask[part], seeds=seeds[part],
                        steps=prior_steps, cond_scale=prior_guidance, sampler=sampler, progress=track,
                    )
                    for part in batches
                ])

            with watch("decoder") as track:
                seeds = self._stage_seeds(sample_seeds, "decoder")
                low_res = torch.cat([
                    self.decoder.sample(
                        image_embed[part], **self._decoder_text(tokens[part], encodings[part], mask[part]),
                        seeds=seeds[part], steps=steps, cond_scale=guidance, sampler=sampler, progress=track,
                    )
                    for part in batches
                ])

            images = low_res
            if size != self.decoder.image_size:
                with watch("upsampler") as track:
                    seeds = self._stage_seeds(sample_seeds, "upsampler")
                    images = torch.cat([
                        self.upsampler.sample(
                            low_res[part], seeds=seeds[part], steps=upsampler_steps, sampler=sampler, progress=track,
                        )
                        for part in batches
                    ])
        if not torch.isfinite(images).all():
            raise ArithmeticError(f"the images are not finite in {self.dtype}: use float32 or bfloat16")
        return Generation(
            images=images.float(),
            low_res=low_res.float(),
            image_embed=image_embed,
            seed=seed,
            sample_seeds=torch.tensor(sample_seeds),
            seconds=watch.seconds,
        )

    def _default(self, name: str, value: Any) -> Any:
        return self.sampling[name] if value is None else value

    def _stage_seeds(self, sample_seeds: list[int], stage: str) -> Tensor:
        """Seeds of one stage, int64 [B]: with one seed for all, the stages would start from the same noise."""
        seeds = [sample_seed(seed, STAGES.index(stage)) for seed in sample_seeds]
        return torch.tensor(seeds, device=self.device)

    def _decoder_text(self, tokens: Tensor, encodings: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """A decoder with a text tower of its own reads the caption, another one CLIP's encodings."""
        if getattr(self.decoder, "text_encoder", None) is not None:
            return {"text": tokens}
        return {"text_encodings": encodings, "text_mask": mask}

    # ------------------------------------------------------------------------------------------- checkpoints

    def save_pretrained(self, path: str | PathLike, *, dtype: torch.dtype | None = None) -> Path:
        """Write the chain as a checkpoint folder (config.json, model.safetensors) and return the folder.

        Atomic: an earlier checkpoint there stays whole until the new one is complete. `dtype`: store floating-point
        weights in it (torch.bfloat16 halves the file); None keeps theirs.
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

        dtype: of the weights and of the computation, whatever the file stores. torch's random state is left alone.
        Raises FileNotFoundError for a missing folder or file and CheckpointError (a ValueError) for a damaged, truncated
        or unknown one, naming the keys that are missing, left over or of another shape.
        """
        from dalle2_fast.data.tokenizer import WordTokenizer
        from dalle2_fast.models.clip import CLIP
        from dalle2_fast.models.decoder import Decoder
        from dalle2_fast.models.prior import DiffusionPrior
        from dalle2_fast.models.upsampler import Upsampler

        path = embedded_path() if path is None else Path(path).expanduser()
        config, tensors = load_folder(path)
        if config.get("model") != "DALLE2":
            raise CheckpointError(f"{path}: expected a checkpoint of model 'DALLE2', got {config.get('model')!r}")
        classes = {"clip": CLIP, "prior": DiffusionPrior, "decoder": Decoder, "upsampler": Upsampler}
        parts = {}
        with torch.random.fork_rng(devices=[]):  # constructors draw initial weights
            for name, part in classes.items():
                if config.get(name) is None and name == "upsampler":
                    continue
                parts[name] = _build(part, config.get(name), name, path)
        tokenizer = _build(WordTokenizer.from_config, config.get("tokenizer"), "tokenizer", path, spread=False)
        reject_leftovers(tensors, parts, path)
        for name, part in parts.items():
            load_state(part, tensors, name, path)
        try:
            pipe = cls(**parts, tokenizer=tokenizer, sampling=config.get("sampling"), metadata=config.get("metadata"))
        except ValueError as error:
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


class _Watch:
    """One progress bar and one clock per stage. A stage that runs in several batches still has one bar."""

    def __init__(self, progress: bool | Callable, device: torch.device, batches: int) -> None:
        if not isinstance(progress, bool) and not callable(progress):
            raise TypeError(f"progress: expected a bool or a callable, got {type(progress).__name__}")
        self.progress, self.device, self.batches = progress, device, batches
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[Callable[[Iterable, int | None], Iterable]]:
        batches = 1 if stage == "text" else self.batches
        bar = tqdm(desc=f"{stage:>9}", unit="step", delay=0) if self.progress is True else None

        def track(iterable: Iterable, total: int | None = None) -> Iterable:
            if callable(self.progress):
                yield from self.progress(stage, iterable, total)
                return
            if bar is not None and bar.total is None and total is not None:
                bar.reset(total * batches)
            for item in iterable:
                yield item
                if bar is not None:
                    bar.update()

        begin = self._now()
        try:
            yield track
            self.seconds[stage] = self._now() - begin
        finally:
            if bar is not None:
                bar.close()

    def _now(self) -> float:
        if self.device.type == "cuda":  # kernels run on after the call has returned
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


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


def _build(make: Callable, config: Any, name: str, path: Path, *, spread: bool = True) -> Any:
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: config.json: {name}: expected an object, got {config!r}")
    try:
        return make(**config) if spread else make(config)
    except (TypeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: config.json: {name}: cannot be built ({error})") from error


def _at_least_one(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    return value


def _finite(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name}: expected a finite number >= 0, got {value}")
    return float(value)


def _check_seed(seed: int | None, generator: torch.Generator | None) -> int:
    if seed is None:
        device = "cpu" if generator is None else generator.device
        return int(torch.randint(2**32, (), generator=generator, device=device))
    if generator is not None:
        raise ValueError("seed, generator: expected at most one of the two")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: expected an int, got {seed!r}")
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed: expected 0 ... 2**63 - 1, got {seed}")
    return seed
