"""Presets consist of recipes, one for each stage; the command line changes some of their values."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from dalle2_fast.training.optimisers import Optimisation

STAGES = ("clip", "prior", "decoder", "upsampler")
EXTRA_STAGES = ("upsampler2",)  # trained only on request; part of the pipeline if they are finished
PRIORS = ("diffusion", "autoregressive")


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
) -> Preset:
    """The preset with what the command line overrides for `stages`.

    Args:
        preset: to change; None of the following keeps its value.
        stages: names of the stages to change.
        minutes: length of all `stages` together, split in the preset's proportions.
        steps: length of each stage; it takes precedence over minutes.
        batch_size: of each stage.
        learning_rate: peak of each stage.
    """
    total = sum(preset.recipe(stage).optimisation.minutes or 1.0 for stage in stages)
    changed = {}
    for stage in stages:
        before = preset.recipe(stage).optimisation
        overrides = dict(steps=steps, batch_size=batch_size, learning_rate=learning_rate)
        overrides = {name: value for name, value in overrides.items() if value is not None}
        if minutes is not None:
            overrides = dict(minutes=minutes * (before.minutes or 1.0) / total, steps=None) | overrides
        changed[stage] = replace(preset.recipe(stage), optimisation=replace(before, **overrides))
    return replace(preset, **changed)
