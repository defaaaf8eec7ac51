"""diffusers' names of arguments and kinds of results, on a tiny random pipeline."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dalle2_fast.pipeline.like_diffusers.names import NAMES
from tests.support.tiny_pipeline import tiny_pipeline


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline().eval()


IMAGE = torch.linspace(0, 1, 3 * 16 * 16).reshape(3, 16, 16)


@pytest.fixture
def sampled(pipe, monkeypatch):
    """stage -> the arguments of its last `sample`. (Images of random weights hardly depend on them.)"""
    seen = {}
    for stage in ("prior", "decoder", "upsampler"):
        inner = getattr(pipe, stage).sample

        def spy(stage=stage, inner=inner, **options):
            seen[stage] = options
            return inner(**options)

        monkeypatch.setattr(getattr(pipe, stage), "sample", spy)
    return seen


def test_the_names_of_unclip_and_stable_diffusion_mean_ours(pipe, sampled):
    """Catches: a name that is accepted and has no effect, or that of another stage."""
    unclip = dict(
        prior_num_inference_steps=4, decoder_num_inference_steps=3, super_res_num_inference_steps=5,
        prior_guidance_scale=2.5, decoder_guidance_scale=1.5, num_images_per_prompt=2,
    )  # fmt: skip
    stable = dict(num_inference_steps=3, guidance_scale=1.5)
    assert {*unclip, *stable} == {*NAMES}
    rest = {name: value for name, value in unclip.items() if not name.startswith("decoder")}
    for call in (pipe, pipe.generate):
        for options in (unclip, rest | stable):
            sampled.clear()
            call("a red ring", seed=1, **options)
            assert {stage: seen["steps"] for stage, seen in sampled.items()} == {
                "prior": 4, "decoder": 3, "upsampler": 5,
            }  # fmt: skip
            assert (sampled["prior"]["cond_scale"], sampled["decoder"]["cond_scale"]) == (2.5, 1.5)
            assert len(sampled["decoder"]["seeds"]) == 2


@pytest.mark.parametrize(
    ("args", "options", "says"),
    [
        ((), dict(steps=2, num_inference_steps=2), "steps, num_inference_steps: expected one of the two"),
        ((), dict(guidance_scale=2.0, decoder_guidance_scale=2.0), "guidance_scale, decoder_guidance_scale"),
        ((2,), dict(num_images_per_prompt=2), "num_images, num_images_per_prompt: expected one of the two"),
    ],
)
def test_two_names_of_one_argument_are_refused(pipe, args, options, says):
    """Catches: one of two contradicting values that wins silently."""
    for call in (pipe, pipe.generate):
        with pytest.raises(TypeError, match=says):
            call("a red ring", *args, **options)


def test_an_unknown_name_is_refused(pipe):
    """Catches: **settings that swallow a misspelt argument."""
    with pytest.raises(TypeError, match="num_inference_stpes: not an option"):
        pipe("a red ring", num_inference_stpes=2)


def test_output_types(pipe):
    """Catches: NumPy images in another layout than diffusers', or values that are not those of the tensor."""
    tensor = pipe("a red ring", 2, seed=0)
    array = pipe("a red ring", 2, seed=0, output_type="np")
    assert array.shape == (2, 32, 32, 3) and array.dtype == np.float32
    assert np.array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    made = pipe("a red ring", 2, seed=0, output_type="pil", return_dict=True)
    assert [image.size for image in made.images] == [(32, 32)] * 2 and made.seed == 0
    with pytest.raises(ValueError, match="output_type: expected 'pt', 'np' or 'pil', got 'latent'"):
        pipe("a red ring", output_type="latent")


def test_every_method_has_images_of_the_type_asked_for(pipe):
    """Catches: a method whose result has no `.images`, or that does not know output_type."""
    mask = torch.zeros(16, 16)
    mask[:8] = 1
    pca = pipe.fit_pca([torch.rand(16, 3, 16, 16)])
    few = dict(num_inference_steps=2, output_type="pil", seed=0)
    made = {
        "generate": pipe.generate("a red ring", 2, **few),
        "variations": pipe.variations(IMAGE, num_images_per_prompt=2, **few),
        "interpolate": pipe.interpolate(IMAGE, 1 - IMAGE, 2, **few),
        "text_diff": pipe.text_diff(IMAGE, "a red ring", "a blue ring", 2, inversion_steps=2, **few),
        "inpaint": pipe.inpaint(IMAGE, mask, "a red ring", 2, **few),
        "decode": pipe.decode(pipe.embed_image(IMAGE), 2, **few),
        "reconstruct": pipe.reconstruct(IMAGE, [1, 16], pca, **few),
    }
    assert {name: [image.size for image in result.images] for name, result in made.items()} == {
        name: [(32, 32)] * 2 for name in made
    }
    inverted = pipe.invert(IMAGE, num_inference_steps=2)
    assert inverted.images is inverted.image and inverted.steps == 2


def test_a_list_of_generators_is_refused(pipe):
    """Catches: an AttributeError for what diffusers takes and we do not."""
    with pytest.raises(TypeError, match="generator: expected one torch.Generator, got list"):
        pipe("a red ring", generator=[torch.Generator()])


@pytest.mark.parametrize(
    ("stage", "option", "value", "argument"),
    [
        ("prior", "prior_candidates", 3, "num_samples_per_batch"),
        ("prior", "prior_sampler", "ddpm", "sampler"),
        ("upsampler", "upsampler_sampler", "ddpm", "sampler"),
        ("decoder", "spacing", "log_snr", "spacing"),
        ("decoder", "guidance_rescale", 0.7, "guidance_rescale"),
        ("decoder", "dynamic_threshold", 0.9, "dynamic_threshold"),
    ],
)
def test_every_setting_of_a_chain_is_one_of_a_call(pipe, sampled, stage, option, value, argument):
    """Catches: a setting that only a checkpoint can have, or that a call takes and drops."""
    pipe("a red ring", 1, seed=0, **{option: value})
    assert sampled[stage][argument] == value
