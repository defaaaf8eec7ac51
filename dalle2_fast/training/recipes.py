"""What a preset is made of: a recipe for each stage. How the command line changes one."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from dalle2_fast.training.optimisers import Optimisation

STAGES = ("clip", "prior", "decoder", "upsampler")
EXTRA_STAGES = ("upsampler2",)  # trained on request only, and part of the pipeline when they are there
PRIORS = ("diffusion", "autoregressive")


@dataclass(frozen=True)
class Recipe:
    """One stage: model constructor arguments, optimisation, data options."""

    model: dict
    optimisation: Optimisation
    data: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Preset:
    """Recipes for the four stages on one world (arguments of data.World; {} is the full world).

    sampling: defaults that the finished pipeline samples with, where they differ from DALLE2's own.
    prior_kind: what `prior` is a recipe of, one of PRIORS; ar_prior: the other one's, see `choose_prior`.
    upsampler2: a second upsampler's, or None.
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
        """ValueError where this preset has none."""
        recipe = getattr(self, stage)
        if recipe is None:
            raise ValueError(f"--preset: {self.name} has no recipe for {stage}")
        return recipe


def choose_prior(preset: Preset, kind: str) -> Preset:
    """The preset with the recipe of the prior called `kind`."""
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
    """The preset with the command line's overrides for `stages`.

    minutes: budget of all `stages` together, split in the preset's proportions.
    steps: length of each stage; wins over minutes.
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
