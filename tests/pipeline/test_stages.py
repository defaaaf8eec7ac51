"""The pipeline with other parts: an autoregressive prior, a second upsampler, tiles, candidates."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dalle2_fast import DALLE2, ARPrior, Upsampler
from dalle2_fast.cli import main
from dalle2_fast.pipeline.context import STAGES, GenerationContext, candidate_seeds
from dalle2_fast.pipeline.settings import SamplingSettings
from dalle2_fast.pipeline.stages import encode_captions, sample_decoder, sample_image_embeddings
from dalle2_fast.seeds import sample_seed
from tests.support.tiny_pipeline import load_on_cpu, tiny_pipeline

UNET = dict(in_channels=6, out_channels=3, patch_size=2, channels=(16, 16), layers_per_block=1, num_groups=4,
            attention_levels=())


def full_chain(ar: bool = True, **options) -> DALLE2:
    tiny = tiny_pipeline()
    torch.manual_seed(0)
    prior = tiny.prior
    if ar:
        prior = ARPrior(dict(dim=16, depth=1, heads=2, embed_dim=16, text_dim=16, context_length=8,
                             num_components=6, num_buckets=16, num_dot_buckets=4))
        prior.fit(*(F.normalize(torch.randn(50, 16), dim=-1) for _ in range(2)))
    second = Upsampler(UNET, image_size=128, low_res_size=32, sample_timesteps=2)
    with torch.no_grad():
        second.unet.conv_out.weight.normal_(std=0.1)
    options = dict(sampling=tiny.sampling | dict(upsampler2_steps=2), upsampler2=second) | options
    return DALLE2(tiny.clip, prior, tiny.decoder, tiny.upsampler, tiny.tokenizer, **options).eval()


@pytest.fixture(scope="module")
def pipe():
    return full_chain()


def test_every_size_of_the_pipeline(pipe):
    """Catches: a size that runs one upsampler too many, or passes on the wrong image."""
    assert pipe.sizes == (16, 32, 128)
    made = pipe.generate("a red ring", 2, seed=0)
    assert made.images.shape == (2, 3, 128, 128) and made.low_res.shape == (2, 3, 16, 16)
    assert list(made.seconds) == ["text", "prior", "decoder", "upsampler", "upsampler2"]
    middle = pipe.generate("a red ring", 2, seed=0, size=32)
    assert list(middle.seconds) == ["text", "prior", "decoder", "upsampler"]
    assert torch.equal(middle.images, tiny_upsampled(pipe, made.low_res))
    assert torch.equal(middle.low_res, made.low_res)
    with pytest.raises(ValueError, match="size: expected one of 16, 32, 128, got 64"):
        pipe("a red ring", 1, size=64)


def tiny_upsampled(pipe, low_res):
    seeds = torch.tensor([sample_seed(sample_seed(0, i), STAGES.index("upsampler")) for i in range(2)])
    return pipe.upsampler.sample(low_res, seeds=seeds, steps=2, sampler="dpm++")


def test_same_seed_same_image_in_any_batch(pipe):
    four = pipe("a red ring", 3, seed=5)
    for options in (dict(num_images=1), dict(num_images=3, batch_size=2)):
        images = pipe("a red ring", seed=5, **options)
        torch.testing.assert_close(images, four[: len(images)], atol=1e-4, rtol=0)


def test_the_candidate_nearest_to_the_caption_is_kept(pipe):
    """Catches: another row's candidate, the farthest one, an upsampled loser, seeds of another image."""
    captions = ["a red ring", "a blue square"]
    made = pipe.generate(captions, 2, seed=3, candidates=3)
    assert made.images.shape == (4, 3, 128, 128) and len(made.sample_seeds) == 4
    seeds = [own for index in range(2) for own in candidate_seeds(sample_seed(3, index), 3)]
    for row, caption in enumerate(captions):
        drawn = [alone(pipe, caption, own) for own in seeds]
        text = pipe.clip.encode_text(pipe.tokenizer.encode([caption]))[0]
        cosine = torch.cat([pipe.clip.encode_image(image) for image in drawn]) @ text[0]
        for index in range(2):
            best = 3 * index + int(cosine[3 * index : 3 * index + 3].argmax())
            torch.testing.assert_close(made.low_res[2 * row + index], drawn[best][0], atol=1e-4, rtol=0)
            assert made.sample_seeds[2 * row + index] == seeds[best]
    upsampled = pipe.generate(captions, 2, seed=3, candidates=3, batch_size=4)
    torch.testing.assert_close(upsampled.images, made.images, atol=1e-4, rtol=0)
    assert torch.equal(pipe.generate(captions, 2, seed=3, candidates=3, size=16).images, made.low_res)


def alone(pipe, caption, own):
    """The decoder's image of one caption from a sample seed."""
    context, settings = GenerationContext(pipe, 0, [own]), SamplingSettings.from_dict(pipe.sampling)
    with torch.no_grad():
        captions = encode_captions(context, [caption], None)
        image_embed = sample_image_embeddings(context, captions, settings)
        return sample_decoder(context, image_embed, captions.for_decoder, settings)


def test_more_candidates_begin_with_the_same_ones():
    assert candidate_seeds(7, 1) == [7] and candidate_seeds(7, 3) == candidate_seeds(7, 5)[:3]
    stages = {sample_seed(7, index) for index in range(len(STAGES))}
    assert len({*candidate_seeds(7, 5), *stages}) == 5 + len(STAGES)


def test_candidates_need_a_clip_that_sees(pipe):
    blind = full_chain()
    blind.clip.visual = None
    with pytest.raises(ValueError, match="candidates: expected 1, because this CLIP has no image tower"):
        blind("a red ring", 1, candidates=2)
    with pytest.raises(ValueError, match="candidates: expected at least 1, got 0"):
        pipe("a red ring", 1, candidates=0)


def test_tiles_reach_the_upsamplers(pipe):
    """The second one runs in tiles of 64; for the first one's 32 pixels such a tile is one pass."""
    sizes = []
    hooks = [part.unet.register_forward_pre_hook(lambda _, given: sizes.append(tuple(given[0].shape)))
             for part in (pipe.upsampler, pipe.upsampler2)]
    whole, tiled = (pipe("a red ring", 2, seed=0, tile=tile) for tile in (None, 64))
    for hook in hooks:
        hook.remove()
    assert sizes[:4] == [(2, 6, 32, 32)] * 2 + [(2, 6, 128, 128)] * 2
    assert sizes[4:6] == [(2, 6, 32, 32)] * 2 and set(sizes[6:]) == {(1, 6, 64, 64)}
    assert (tiled - whole).abs().mean() < 0.1
    with pytest.raises(ValueError, match="tile: expected a multiple of 4 from 8 on, got 30"):
        pipe("a red ring", 1, tile=30)
    with pytest.raises(ValueError, match="tile: expected at least 1, got 0"):
        pipe("a red ring", 1, tile=0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(size=16, upsampler_steps=3), "upsampler_steps: no upsampler runs for images of 16 x 16, got 3"),
        (dict(size=32, upsampler2_steps=3), "upsampler2_steps: no upsampler2 runs .* 32 x 32, got 3"),
        (dict(size=16, tile=64), "tile: no upsampler runs for images of 16 x 16, got 64"),
    ],
)
def test_settings_without_effect_are_refused(pipe, options, says):
    """Catches: an option that is taken and changes nothing, in `generate` and in image editing."""
    with pytest.raises(ValueError, match=says):
        pipe("a red ring", 1, **options)
    with pytest.raises(ValueError, match=says):
        pipe.variations(torch.zeros(1, 3, 16, 16), 1, **options)


@pytest.mark.parametrize("prompt", [None, 3, ["a red ring", 3]])
def test_what_is_no_caption_is_named(pipe, prompt):
    with pytest.raises(TypeError, match="prompt: expected a caption or a list of captions, got"):
        pipe(prompt, 1)


def test_an_autoregressive_prior_has_no_steps(pipe):
    assert pipe("a red ring", 1, seed=0, size=16, prior_guidance=2.0, sampler="ddpm").isfinite().all()
    with pytest.raises(ValueError, match="prior_steps: an autoregressive prior has none, got 3"):
        pipe("a red ring", 1, prior_steps=3)
    with pytest.raises(ValueError, match="prior_guidance_interval: an autoregressive prior has none"):
        pipe("a red ring", 1, prior_guidance_interval=(-1, 1))
    with pytest.raises(ValueError, match="prior_steps: an autoregressive prior has none, got 3"):
        pipe.inpaint(torch.zeros(3, 8, 8), torch.ones(8, 8), "a red ring", 1, prior_steps=3)


def test_a_negative_prompt_reaches_the_autoregressive_prior(pipe):
    options = dict(seed=0, size=16, prior_guidance=3.0)
    plain, led = (pipe.generate("a red ring", 4, negative_prompt=negative, **options)
                  for negative in (None, "a blue square"))
    assert (plain.image_embed - led.image_embed).abs().max() > 1e-3


@pytest.mark.parametrize("ar", [True, False])
def test_saved_and_loaded_draws_the_same(ar, tmp_path):
    """Catches: a prior of the other class, statistics lost, a second upsampler left out."""
    pipe = full_chain(ar)
    folder = pipe.save_pretrained(tmp_path / "saved")
    loaded = load_on_cpu(folder)
    assert type(loaded.prior) is type(pipe.prior) and loaded.sizes == (16, 32, 128)
    assert torch.equal(loaded("a red ring", 1, seed=1), pipe("a red ring", 1, seed=1))
    half = load_on_cpu(pipe.save_pretrained(tmp_path / "half", dtype=torch.bfloat16))
    assert half("a red ring", 1, seed=1).isfinite().all()
    config = json.loads((folder / "config.json").read_text())
    config["prior_class"] = "GAN"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="prior_class: expected DiffusionPrior or ARPrior, got 'GAN'"):
        DALLE2.from_pretrained(folder)


def test_upsamplers_must_follow_each_other(pipe):
    parts = dict(clip=pipe.clip, prior=pipe.prior, decoder=pipe.decoder, tokenizer=pipe.tokenizer)
    with pytest.raises(ValueError, match="upsampler2: expected an upsampler before it, got None"):
        DALLE2(**parts, upsampler2=pipe.upsampler2)
    wrong = Upsampler(UNET, image_size=128, low_res_size=64)
    with pytest.raises(ValueError, match=r"upsampler2: low_res_size: expected 32 \(the first .*\), got 64"):
        DALLE2(**parts, upsampler=pipe.upsampler, upsampler2=wrong)


def test_command_line_draws_the_largest_and_any_other_size(pipe, tmp_path, capsys):
    folder = str(pipe.save_pretrained(tmp_path / "saved"))
    file = tmp_path / "ring.png"
    common = ["generate", "a red ring", "--num-images", "1", "--checkpoint", folder, "--output", str(file),
              "--quiet", "--device", "cpu"]
    assert main([*common, "--tile", "64", "--upsampler2-steps", "1"]) == 0
    assert Image.open(file).size == (128, 128)
    assert json.loads(Image.open(file).text["settings"])["tile"] == 64
    assert main([*common, "--size", "32"]) == 0
    assert Image.open(file).size == (32, 32)
    assert main([*common, "--size", "256"]) == 2
    assert "size: expected one of 16, 32, 128, got 256" in capsys.readouterr().err
    assert main([*common, "--prior-steps", "4"]) == 2
    assert "prior_steps: an autoregressive prior" in capsys.readouterr().err
