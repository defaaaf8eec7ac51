"""Presets and recipes. Each test names the fault it would catch."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dalle2_fast.data import World
from dalle2_fast.models import CLIP, ARPrior, Decoder, DiffusionPrior, Upsampler
from dalle2_fast.training.presets import PRESETS, get_preset
from dalle2_fast.training.recipes import STAGES, adjust, choose_prior


def test_presets():
    """Catches: an unknown name that is not answered with the known ones, and wishes that are dropped."""
    with pytest.raises(
        ValueError,
        match="--preset: expected one of scenes-cpu, scenes-gpu, tiny, photos-64, karlo, got 'scenes'",
    ):
        get_preset("scenes")
    preset = PRESETS["scenes-cpu"]
    shorter = adjust(preset, STAGES, minutes=12.0)
    assert sum(shorter.recipe(stage).optimisation.minutes for stage in STAGES) == pytest.approx(12.0)
    stepped = adjust(preset, ("clip",), steps=7, batch_size=3, learning_rate=0.5)
    options = stepped.clip.optimisation
    assert (options.steps, options.batch_size, options.learning_rate) == (7, 3, 0.5)
    assert stepped.prior == preset.prior
    assert adjust(PRESETS["tiny"], ("clip",), minutes=1.0).clip.optimisation.steps is None


def test_presets_without_a_recipe_say_so():
    bare = dataclasses.replace(PRESETS["tiny"], ar_prior=None, upsampler2=None)
    with pytest.raises(ValueError, match="--preset: tiny has no recipe for ar_prior"):
        choose_prior(bare, "autoregressive")
    with pytest.raises(ValueError, match="--preset: tiny has no recipe for upsampler2"):
        bare.recipe("upsampler2")
    with pytest.raises(ValueError, match="--prior: expected one of diffusion, autoregressive, got 'flow'"):
        choose_prior(bare, "flow")


@pytest.mark.parametrize("name", ["scenes-cpu", "scenes-gpu"])
def test_preset_models_build_and_fit_the_size(name):
    """Catches: a preset whose arguments no model takes, or a pipeline over 40 MB in bf16."""
    preset = PRESETS[name]
    with torch.device("meta"):
        clip = CLIP(**preset.clip.model, num_text_tokens=126, text_seq_len=36)
        widths = dict(embed_dim=clip.dim_latent, text_dim=clip.config["dim_text"], context_length=36)
        prior = dict(preset.prior.model)
        prior["net"] = prior["net"] | widths
        decoder = dict(preset.decoder.model)
        decoder["text_encoder"] = clip.text_tower()
        decoder = Decoder(**decoder, image_embed_dim=clip.dim_latent)
        models = [clip, DiffusionPrior(**prior), decoder, Upsampler(**preset.upsampler.model)]
    assert 2 * sum(p.numel() for model in models for p in model.parameters()) < 40e6


@pytest.mark.parametrize(
    ("name", "sizes"), [("photos-64", (103, 88, 304, 91)), ("karlo", (428, 1022, 893, 692))]
)
def test_presets_for_own_data_build(name, sizes):
    """Catches: arguments that no model takes, sizes that are not those that the documents state."""
    preset, words = PRESETS[name], dict(num_text_tokens=49408, text_seq_len=77)
    assert not preset.scenes
    with torch.device("meta"):
        clip = CLIP(**preset.clip.model, **words)
        widths = dict(embed_dim=clip.dim_latent, text_dim=clip.config["dim_text"], context_length=77)
        prior = preset.prior.model | dict(net=preset.prior.model["net"] | widths)
        options = dict(preset.decoder.model)
        tower = clip.text_tower() if options.pop("text_encoder") == "clip" else None
        decoder = Decoder(**options, text_encoder=tower, image_embed_dim=clip.dim_latent)
        models = [clip, DiffusionPrior(**prior), decoder, Upsampler(**preset.upsampler.model)]
    millions = [round(sum(each.numel() for each in model.parameters()) / 1e6) for model in models]
    assert tuple(millions) == sizes


@pytest.mark.parametrize("name", ["scenes-cpu", "scenes-gpu"])
def test_the_other_recipes_build(name):
    preset = PRESETS[name]
    with torch.device("meta"):
        clip = CLIP(**preset.clip.model, num_text_tokens=126, text_seq_len=36)
        net = dict(embed_dim=clip.dim_latent, text_dim=clip.config["dim_text"], context_length=36)
        prior = ARPrior(net=preset.ar_prior.model["net"] | net)
        Upsampler(**preset.upsampler2.model)
    scenes = preset.ar_prior.optimisation.batch_size * preset.ar_prior.data["statistics_batches"]
    assert scenes > 20 * prior.net.num_components


@pytest.mark.parametrize("name", PRESETS)
def test_the_data_of_every_recipe_exists_in_its_world(name):
    """Catches: a factor on a shape, kind or relation that the preset's world does not have."""
    preset = PRESETS[name]
    for stage in STAGES:
        World(**preset.world).reweighted(preset.recipe(stage).data.get("factors", {}))
