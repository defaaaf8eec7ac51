"""Presets consist of recipes, one for each stage; the command line changes some of their values.

Nothing here imports torch, so that `dalle2-fast train --help` answers at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

STAGES = ("clip", "prior", "decoder", "upsampler")
EXTRA_STAGES = ("upsampler2",)  # trained only on request; part of the pipeline if they are finished
PRIORS = ("diffusion", "autoregressive")


@dataclass(frozen=True)
class Optimisation:
    """How a stage is optimised, and how often it is logged, validated and saved.

    Args:
        batch_size: samples in each step.
        minutes: length of the training by the clock, unless `steps` is given.
        steps: length of the training in steps.
        optimizer: "adamw", or "muon" (Muon for hidden matrices, AdamW for the rest).
        learning_rate: peak learning rate.
        betas: of AdamW.
        weight_decay: of matrices and convolutions.
        warmup_steps: over which the learning rate rises linearly.
        hold: fraction of the training after which the learning rate begins to fall, 0 <= hold < 1.
        decay: how it falls, "cosine" or "linear".
        final_fraction: of the peak, at the end.
        clip_norm: largest norm of the gradient.
        ema_decay: final decay of the average of the weights.
        log_steps: between two lines of the log.
        save_minutes: between two saved states.
        save_steps: also save the state at multiples of this step.
        first_validation: validate at this step and at each doubling of it, and at the end.
        validation_minutes: also validate this often.

    Raises:
        ValueError: a value is outside its range, or neither `steps` nor `minutes` is given.
    """

    batch_size: int
    minutes: float | None = None
    steps: int | None = None
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    warmup_steps: int = 200
    hold: float = 0.0
    decay: str = "cosine"
    final_fraction: float = 0.02
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    log_steps: int = 50
    save_minutes: float = 5.0
    save_steps: int | None = None
    first_validation: int = 256
    validation_minutes: float = 10.0

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise ValueError("length of training: expected steps or minutes, got neither")
        positive = ("batch_size", "learning_rate", "clip_norm", "log_steps", "save_steps", "steps", "minutes")
        for name in positive:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: expected a number above 0, got {value}")
        for name, choices in (("optimizer", ("adamw", "muon")), ("decay", ("cosine", "linear"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if not 0.0 <= self.hold < 1.0:
            raise ValueError(f"hold: expected 0 <= hold < 1, got {self.hold}")

    def progress(self, step: int, elapsed: float) -> float:
        """The fraction of the training that is done, in [0, 1]. elapsed: in seconds."""
        done = step / self.steps if self.steps is not None else elapsed / (60.0 * self.minutes)
        return min(1.0, done)

    def rate(self, step: int, progress: float) -> float:
        """The learning rate after `step` steps, with the fraction `progress` of the training done.

        Example:
            >>> options = Optimisation(1, steps=100, warmup_steps=0, decay="linear", final_fraction=0.0)
            >>> [options.rate(step, options.progress(step, 0.0)) for step in (0, 50, 100)]
            [0.001, 0.0005, 0.0]
        """
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        fallen = max(0.0, progress - self.hold) / (1.0 - self.hold)
        left = 1.0 - fallen if self.decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * fallen))
        return self.learning_rate * warm * (self.final_fraction + (1.0 - self.final_fraction) * left)


@dataclass(frozen=True)
class Recipe:
    """How one stage is trained.

    Args:
        model: arguments of the model's constructor, without those that the tokenizer and CLIP determine.
        optimisation: optimiser, learning rate, length.
        data: options of the stage's batches, see the stages.
    """

    model: dict
    optimisation: Optimisation
    data: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Preset:
    """Recipes of all stages on one world.

    Args:
        name: of the preset.
        world: arguments of data.World; {} is the full world.
        clip: recipe of CLIP.
        prior: recipe of the prior.
        decoder: recipe of the decoder.
        upsampler: recipe of the upsampler.
        sampling: settings that the finished pipeline samples with, where they differ from DALLE2's defaults.
        prior_kind: what `prior` is a recipe of, one of PRIORS.
        ar_prior: recipe of an autoregressive prior, see `choose_prior`, or None.
        upsampler2: recipe of a second upsampler, or None.
        scenes: whether rendered scenes are enough for it; False needs images of the user.
    """

    name: str
    world: dict
    clip: Recipe
    prior: Recipe
    decoder: Recipe
    upsampler: Recipe
    sampling: dict = field(default_factory=dict)
    prior_kind: str = "diffusion"
    ar_prior: Recipe | None = None
    upsampler2: Recipe | None = None
    scenes: bool = True

    def recipe(self, stage: str) -> Recipe:
        """The recipe of `stage` (or "ar_prior"). ValueError if this preset has none."""
        recipe = getattr(self, stage)
        if recipe is None:
            raise ValueError(f"--preset: {self.name} has no recipe for {stage}")
        return recipe


def choose_prior(preset: Preset, kind: str) -> Preset:
    """The preset with the recipe of the prior called `kind`, one of PRIORS.

    Raises:
        ValueError: there is no such kind, or the preset has no recipe for it.
    """
    if kind not in PRIORS:
        raise ValueError(f"--prior: expected one of {', '.join(PRIORS)}, got {kind!r}")
    if kind == preset.prior_kind:
        return preset
    return replace(preset, prior=preset.recipe("ar_prior"), prior_kind=kind)


def adjust(
    preset: Preset,
    stages: tuple[str, ...],
    *,
    minutes: float | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    save_steps: int | None = None,
) -> Preset:
    """The preset with what the command line overrides for `stages`.

    Args:
        preset: to change; None of the following keeps its value.
        stages: names of the stages to change.
        minutes: length of all `stages` together, split in the preset's proportions.
        steps: length of each stage; it takes precedence over minutes.
        batch_size: of each stage.
        learning_rate: peak of each stage.
        save_steps: also save the state of each stage at multiples of this step.
    """
    total = sum(preset.recipe(stage).optimisation.minutes or 1.0 for stage in stages)
    changed = {}
    for stage in stages:
        before = preset.recipe(stage).optimisation
        overrides = dict(
            steps=steps, batch_size=batch_size, learning_rate=learning_rate, save_steps=save_steps
        )
        overrides = {name: value for name, value in overrides.items() if value is not None}
        if minutes is not None:
            overrides = dict(minutes=minutes * (before.minutes or 1.0) / total, steps=None) | overrides
        changed[stage] = replace(preset.recipe(stage), optimisation=replace(before, **overrides))
    return replace(preset, **changed)
