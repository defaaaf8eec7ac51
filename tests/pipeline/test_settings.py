"""SamplingSettings: defaults, checks, and how a call's settings replace the checkpoint's."""

from __future__ import annotations

import dataclasses
import inspect
import json

import pytest
import torch

from dalle2_fast import DALLE2
from dalle2_fast.pipeline.settings import (
    GenerateOptions,
    SamplingSettings,
    SettingOptions,
    resolve_settings,
)
from dalle2_fast.training.distillation.student import make_student
from tests.support.tiny_pipeline import tiny_pipeline


def test_a_dict_and_back():
    """Catches: a setting that is lost on the way into config.json."""
    settings = SamplingSettings(steps=3, negative_prompt="a ring", tile=64, guidance_interval=(-4.0, 1.0))
    assert SamplingSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
    assert list(settings.to_dict()) == list(SamplingSettings.names())
    assert SamplingSettings.from_dict({}) == SamplingSettings()
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.steps = 4


@pytest.mark.parametrize(
    ("values", "error", "says"),
    [
        ({"speed": 1, "hue": 2}, ValueError, "sampling: expected some of steps, .*, got hue, speed"),
        ([("steps", 1)], TypeError, "sampling: expected a dict of settings"),
        ({"steps": None}, TypeError, "steps: expected an int, got None"),
        ({"steps": True}, TypeError, "steps: expected an int, got True"),
        ({"prior_candidates": 0}, ValueError, "prior_candidates: expected at least 1, got 0"),
        ({"tile": 0.5}, TypeError, "tile: expected an int, got 0.5"),
        ({"guidance": "3"}, TypeError, "guidance: expected a number, got '3'"),
        ({"prior_guidance": float("inf")}, ValueError, "prior_guidance: expected a finite number >= 0"),
        ({"negative_prompt": 3}, TypeError, "negative_prompt: expected a caption, got 3"),
        ({"guidance_interval": 1.0}, TypeError, "^guidance_interval: expected two numbers"),
        ({"prior_guidance_interval": (2, 1)}, ValueError, "prior_guidance_interval: expected finite numbers"),
        ({"sampler": "euler"}, ValueError, "sampler: expected one of ddpm, ddim, dpm"),
    ],
)
def test_refused(values, error, says):
    with pytest.raises(error, match=says):
        SamplingSettings.from_dict(values)


def test_a_call_replaces_what_it_names():
    """Catches: None that replaces the checkpoint's value, and a call that changes the checkpoint's values."""
    pipe = tiny_pipeline()
    before = dict(pipe.sampling)
    settings = resolve_settings(pipe, 32, steps=7, guidance=None)
    assert settings == SamplingSettings(**before | {"steps": 7}) and pipe.sampling == before


def test_sampling_of_the_pipeline_may_be_edited():
    """Catches: values that are checked when the pipeline is built and not when they are used."""
    pipe = tiny_pipeline(upsampler=False)
    pipe.sampling["steps"] = 0
    with pytest.raises(ValueError, match="steps: expected at least 1, got 0"):
        pipe("a ring", 1)
    pipe.sampling |= {"steps": 2, "speed": 1}
    with pytest.raises(ValueError, match="sampling: .*got speed"):
        pipe("a ring", 1)


def test_settings_that_an_older_pipeline_does_not_have():
    """Catches: a pickle of an earlier version, with fewer names in `sampling`, that can no longer sample."""
    pipe = tiny_pipeline(upsampler=False)
    expected, z = pipe("a ring", 1, seed=0), torch.ones(1, 16)
    decoded = pipe.decode(z, seed=0).images
    younger = ("candidates", "upsampler2_steps", "tile", "negative_prompt", "guidance_interval",
               "prior_guidance_interval")  # fmt: skip
    for name in younger:
        del pipe.sampling[name]
    assert torch.equal(pipe("a ring", 1, seed=0), expected)
    assert torch.equal(pipe.decode(z, seed=0).images, decoded)


def test_the_options_of_a_call_are_those_of_generate():
    """Catches: a keyword of `generate` that a type checker refuses in `pipe(...)`, or one that it misses."""
    keywords = [name for name, parameter in inspect.signature(DALLE2.generate).parameters.items()
                if parameter.kind is inspect.Parameter.KEYWORD_ONLY]  # fmt: skip
    assert {*GenerateOptions.__annotations__} == {*keywords, *SettingOptions.__annotations__}
    assert {*SamplingSettings.names()} <= {*SettingOptions.__annotations__}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (dict(steps=3), "^steps: expected 1 or 2, for which this decoder was distilled, got 3"),
        (dict(guidance=9.0), "^guidance: expected 1 to 4, for which this decoder was distilled, got 9"),
        (dict(prior_steps=3), "^prior_steps: expected 1 or 2, for which this prior was distilled, got 3"),
        (dict(prior_guidance=0.5), "^prior_guidance: expected 1 to 4, for which this prior was distilled"),
        (dict(sampler="ddim"), "^sampler: expected 'consistency', for which this decoder was distilled"),
    ],
)
def test_what_a_distilled_network_does_not_know_is_said_at_once(monkeypatch, given, says):
    """Catches: an error of the decoder that comes after the prior has run."""
    pipe = tiny_pipeline()
    prior, decoder = (make_student(each, 2, (1.0, 4.0)) for each in (pipe.prior, pipe.decoder))
    sampling = dict(steps=2, prior_steps=1, upsampler_steps=1)
    sampling |= dict(sampler="consistency", upsampler_sampler="ddim")
    pipe = DALLE2(pipe.clip, prior, decoder, pipe.upsampler, pipe.tokenizer, sampling=sampling).eval()
    assert pipe.generate("a red ring", 1, seed=0).images.shape == (1, 3, 32, 32)
    monkeypatch.setattr(type(pipe.clip), "encode_text", None)  # nothing may be computed before the error
    with pytest.raises(ValueError, match=says):
        pipe.generate("a red ring", 1, seed=0, **given)
