"""SamplingSettings: how the stages sample. A checkpoint has its values; a call may replace each of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, TypedDict

from dalle2_fast.diffusion.names import SAMPLERS, check_guidance_interval
from dalle2_fast.diffusion.names import SPACINGS as SPACINGS  # for the command line
from dalle2_fast.pipeline.parts import UPSAMPLERS

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor

    from dalle2_fast.pipeline.dalle2 import DALLE2
    from dalle2_fast.pipeline.progress import Progress, StepCallback


@dataclass(frozen=True)
class SamplingSettings:
    """The settings of every stage, checked when they are made.

    Args:
        steps: diffusion steps of the decoder, at least 1.
        guidance: classifier-free guidance scale of the decoder, at least 0; 1 is no guidance.
        guidance_interval: (low, high) in log-SNR, log(alpha^2 / sigma^2): only the decoder's steps at
            low <= log-SNR < high have guidance; the others take half the time. None: all steps.
        candidates: images that the decoder samples for each image asked for; the one whose CLIP embedding is
            nearest to the caption's is kept.
        prior_steps: diffusion steps of the prior; an autoregressive prior has none.
        prior_guidance: guidance scale of the prior; 1 is no guidance.
        prior_guidance_interval: the same interval of log-SNR for the prior's steps; an autoregressive prior
            has none.
        prior_candidates: embeddings that the prior samples for each image; the one nearest to the caption's
            text embedding is kept.
        negative_prompt: the caption that guidance leads away from; None is no caption at all.
        upsampler_steps: diffusion steps of the first upsampler.
        upsampler2_steps: diffusion steps of the second upsampler.
        tile: side in pixels of the tiles in which the upsamplers run; None is each one's `sample_tile`.
        sampler: update rule of every diffusion, one of SAMPLERS.
        prior_sampler: that of the prior, where it differs: a distilled network knows "consistency" alone, and
            no other one knows it. None is `sampler`, also in the next two.
        upsampler_sampler: that of the first upsampler.
        upsampler2_sampler: that of the second upsampler.

    Raises:
        TypeError, ValueError: a value of another type or out of range.

    Example:
        >>> SamplingSettings(steps=10).to_dict()["sampler"]
        'dpm++'
    """

    steps: int = 25
    guidance: float = 3.0
    guidance_interval: tuple[float, float] | None = None
    candidates: int = 1
    prior_steps: int = 25
    prior_guidance: float = 1.0
    prior_guidance_interval: tuple[float, float] | None = None
    prior_candidates: int = 2
    negative_prompt: str | None = None
    upsampler_steps: int = 10
    upsampler2_steps: int = 15
    tile: int | None = None
    sampler: str = "dpm++"
    prior_sampler: str | None = None
    upsampler_sampler: str | None = None
    upsampler2_sampler: str | None = None

    def __post_init__(self) -> None:
        check_count("steps", self.steps)
        _check_scale("guidance", self.guidance)
        for name in ("guidance_interval", "prior_guidance_interval"):  # JSON has lists in place of tuples
            object.__setattr__(self, name, check_guidance_interval(getattr(self, name), name))
        check_count("candidates", self.candidates)
        check_count("prior_steps", self.prior_steps)
        _check_scale("prior_guidance", self.prior_guidance)
        check_count("prior_candidates", self.prior_candidates)
        if self.negative_prompt is not None and not isinstance(self.negative_prompt, str):
            raise TypeError(f"negative_prompt: expected a caption, got {self.negative_prompt!r}")
        check_count("upsampler_steps", self.upsampler_steps)
        check_count("upsampler2_steps", self.upsampler2_steps)
        if self.tile is not None:
            check_count("tile", self.tile)
        for name in ("sampler", "prior_sampler", "upsampler_sampler", "upsampler2_sampler"):
            value = getattr(self, name)
            if value not in SAMPLERS and (name == "sampler" or value is not None):
                raise ValueError(f"{name}: expected one of {', '.join(SAMPLERS)}, got {value!r}")

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The names of all settings, in order."""
        return tuple(field.name for field in fields(cls))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SamplingSettings:
        """Settings from a dict of some of them, such as config["sampling"]; the others have the defaults.

        Raises:
            ValueError: an unknown name, or a value out of range.
            TypeError: `values` is no mapping, or a value has another type.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"sampling: expected a dict of settings, got {values!r}")
        if unknown := set(values) - set(cls.names()):
            names = ", ".join(cls.names())
            raise ValueError(f"sampling: expected some of {names}, got {', '.join(sorted(unknown))}")
        return cls(**values)

    def sampler_of(self, stage: str) -> str:
        """The sampler of a stage: "prior", "decoder", "upsampler" or "upsampler2".

        Example:
            >>> settings = SamplingSettings(sampler="consistency", prior_sampler="ddim")
            >>> settings.sampler_of("decoder"), settings.sampler_of("prior")
            ('consistency', 'ddim')
        """
        return getattr(self, f"{stage}_sampler", None) or self.sampler

    def to_dict(self) -> dict[str, Any]:
        """All settings by name, in order; JSON can hold them."""
        return asdict(self)


class SettingOptions(TypedDict, total=False):
    """The SamplingSettings of a call, options of the decoder's sampler, and diffusers' names of some of them
    (see pipeline/like_diffusers/names.py)."""

    steps: int | None
    guidance: float | None
    guidance_interval: tuple[float, float] | None
    candidates: int | None
    prior_steps: int | None
    prior_guidance: float | None
    prior_guidance_interval: tuple[float, float] | None
    prior_candidates: int | None
    negative_prompt: str | None
    upsampler_steps: int | None
    upsampler2_steps: int | None
    tile: int | None
    sampler: str | None
    prior_sampler: str | None
    upsampler_sampler: str | None
    upsampler2_sampler: str | None
    guidance_rescale: float
    clip: float | None
    dynamic_threshold: float | None
    spacing: str | None
    num_inference_steps: int | None
    guidance_scale: float | None
    num_images_per_prompt: int
    prior_num_inference_steps: int | None
    prior_guidance_scale: float | None
    decoder_num_inference_steps: int | None
    decoder_guidance_scale: float | None
    super_res_num_inference_steps: int | None


class GenerateOptions(SettingOptions, total=False):
    """The keyword arguments of `DALLE2.generate`, for `DALLE2.__call__`, which passes them on."""

    seed: int | Sequence[int] | None
    generator: torch.Generator | None
    init_image: Tensor | Image | None
    strength: float
    size: int | None
    batch_size: int | None
    progress: Progress
    graphs: bool | str
    callback: StepCallback | None


def resolve_prompts(prompt: str | Sequence[str]) -> list[str]:
    """One caption or several as a list. TypeError for anything else, ValueError for none."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, (list, tuple)) or not all(isinstance(text, str) for text in prompts):
        raise TypeError(f"prompt: expected a caption or a list of captions, got {prompt!r}")
    if not prompts:
        raise ValueError("prompt: expected at least one caption, got an empty list")
    return list(prompts)


def resolve_size(pipe: DALLE2, size: int | None) -> int:
    """`size`, or the largest that the pipeline makes. ValueError for one that it does not make."""
    size = pipe.sizes[-1] if size is None else size
    if size not in pipe.sizes:
        raise ValueError(f"size: expected one of {', '.join(map(str, pipe.sizes))}, got {size!r}")
    return size


def resolve_settings(pipe: DALLE2, size: int, **given: Any) -> SamplingSettings:
    """The checkpoint's settings, replaced by those of `given` that are not None.

    Raises:
        TypeError, ValueError: as SamplingSettings does; also for a setting of an upsampler that does not run
            for images of `size`, because it would change nothing, and for one that a distilled network does
            not know.
    """
    given = {name: value for name, value in given.items() if value is not None}
    settings = SamplingSettings.from_dict({**pipe.sampling, **given})
    running = pipe.sizes.index(size)  # the first so many upsamplers
    unused = [(f"{stage}_steps", stage) for stage in UPSAMPLERS[running:]]
    unused += [("tile", "upsampler")] if running == 0 else []
    for name, stage in unused:
        if name in given:
            raise ValueError(f"{name}: no {stage} runs for images of {size} x {size}, got {given[name]}")
    _check_distilled(pipe, settings, UPSAMPLERS[:running])
    return settings


def _check_distilled(pipe: DALLE2, settings: SamplingSettings, upsamplers: Sequence[str]) -> None:
    """ValueError for what a network does not know, before the stages in front of it run."""
    import torch

    from dalle2_fast.models.distilled import resolve_sampler

    stages = ["decoder", *upsamplers]
    if pipe.prior is not None and pipe.prior.diffuses:
        stages.append("prior")
    for stage in stages:
        network, prefix = getattr(pipe, stage), "" if stage == "decoder" else f"{stage}_"
        try:
            resolve_sampler(network, settings.sampler_of(stage), getattr(settings, f"{prefix}steps"))
            if (guidance := getattr(network, "guidance_input", None)) is not None:
                weight = getattr(settings, f"{prefix}guidance")
                guidance.weights(network.part, weight, 1, torch.device("cpu"))
        except ValueError as error:  # begins with the name of the network's argument
            raise ValueError(f"{prefix}{error}") from None


def check_count(name: str, value: Any) -> int:
    """`value` if it is an int of at least 1; TypeError or ValueError, naming `name`, if not."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    return value


def _check_scale(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}: expected a finite number >= 0, got {value}")
