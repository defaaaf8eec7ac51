"""The pipeline: which option reaches which stage, what a seed determines, what is refused."""

from __future__ import annotations

import pytest
import torch

from dalle2_fast import DALLE2, DiffusionPrior, Upsampler
from dalle2_fast.data.images import to_pil
from dalle2_fast.data.text.tokenizer import WordTokenizer
from dalle2_fast.seeds import sample_seed
from tests.support.tiny_pipeline import tiny_pipeline


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def test_images_shape_type_and_range(pipe):
    images = pipe("a red ring", num_images=3, seed=0)
    assert images.shape == (3, 3, 32, 32) and images.dtype == torch.float32
    assert 0 <= images.min() and images.max() <= 1 and not images.requires_grad
    assert pipe("a red ring", num_images=1, seed=0, size=16).shape == (1, 3, 16, 16)


def test_same_seed_same_image_for_any_number(pipe):
    """Catches noise drawn for the batch as a whole, and a batch split that restarts the seeds."""
    four = pipe("a red ring", num_images=4, seed=5)
    for options in (dict(num_images=2), dict(num_images=4, batch_size=3)):
        images = pipe("a red ring", seed=5, **options)
        torch.testing.assert_close(images, four[: len(images)], atol=1e-4, rtol=0)
    assert not torch.allclose(four[0], four[1], atol=1e-2)
    assert not torch.allclose(pipe("a red ring", num_images=1, seed=6)[0], four[0], atol=1e-2)


def test_several_prompts_are_sampled_as_if_alone(pipe):
    """Catches rows of different prompts being mixed up (repeat instead of repeat_interleave)."""
    prompts = ["a red ring", "a blue square above a ring"]
    both = pipe.generate(prompts, 2, seed=3)
    alone = [pipe.generate(prompt, 2, seed=3) for prompt in prompts]
    torch.testing.assert_close(both.images, torch.cat([a.images for a in alone]), atol=1e-4, rtol=0)
    torch.testing.assert_close(both.image_embed, torch.cat([a.image_embed for a in alone]), atol=1e-4, rtol=0)
    assert both.sample_seeds.tolist() == [sample_seed(3, 0), sample_seed(3, 1)] * 2


def test_one_seed_for_each_prompt(pipe):
    """Catches: seeds that reach the rows of another prompt, and a list of another length that is repeated."""
    made = pipe.generate(["a red ring", "a blue ring"], 2, seed=[3, 8], size=16)
    assert made.seed == (3, 8)
    for rows, prompt, seed in ((slice(2), "a red ring", 3), (slice(2, 4), "a blue ring", 8)):
        alone = pipe.generate(prompt, 2, seed=seed, size=16)
        assert made.sample_seeds[rows].tolist() == alone.sample_seeds.tolist()
        assert torch.allclose(made.images[rows], alone.images, atol=1e-4)
    with pytest.raises(ValueError, match="seed: expected one, or one per prompt = 2, got 3"):
        pipe.generate(["a ring", "a square"], 1, seed=[1, 2, 3])
    with pytest.raises(TypeError, match="seed: expected ints"):
        pipe.generate(["a ring"], 1, seed=[None])


def test_seed_from_a_generator_and_from_torch(pipe):
    made = [pipe.generate("a ring", 1, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    assert made[0].seed == made[1].seed and torch.equal(made[0].images, made[1].images)
    torch.manual_seed(7)
    first = pipe.generate("a ring", 1, size=16)
    again = pipe.generate("a ring", 1, size=16)
    assert first.seed != again.seed
    torch.manual_seed(7)
    assert pipe.generate("a ring", 1, size=16).seed == first.seed


def test_sample_seed_is_int64_and_does_not_collide():
    seeds = [sample_seed(seed, index) for seed in (0, 1, 2**63 - 1, -(2**63)) for index in range(500)]
    assert len(set(seeds)) == len(seeds)
    assert all(-(2**63) <= seed < 2**63 for seed in seeds)
    torch.tensor(seeds)  # would raise beyond int64


class Recorder:
    """Stands in for a stage's `sample` and keeps what it was given."""

    def __init__(self, monkeypatch, model):
        self.inner, self.calls = model.sample, []
        monkeypatch.setattr(model, "sample", self)

    def __call__(self, *args, **options):
        self.calls.append(options)
        return self.inner(*args, **options)


def test_every_option_reaches_its_stage(pipe, monkeypatch):
    prior, decoder, upsampler = (Recorder(monkeypatch, m) for m in (pipe.prior, pipe.decoder, pipe.upsampler))
    pipe(
        "a ring",
        1,
        seed=0,
        steps=3,
        guidance=1.5,
        prior_steps=4,
        prior_guidance=2.5,
        guidance_interval=(-3, 2),
        prior_guidance_interval=[-1, 4],
        upsampler_steps=5,
        sampler="ddim",
    )
    (prior,), (decoder,), (upsampler,) = prior.calls, decoder.calls, upsampler.calls
    assert (prior["steps"], prior["cond_scale"], prior["sampler"]) == (4, 2.5, "ddim")
    assert (decoder["steps"], decoder["cond_scale"], decoder["sampler"]) == (3, 1.5, "ddim")
    assert (decoder["guidance_interval"], prior["guidance_interval"]) == ((-3.0, 2.0), (-1.0, 4.0))
    assert (upsampler["steps"], upsampler["sampler"]) == (5, "ddim")
    assert "text" in decoder  # its own text tower reads the caption
    seeds = {int(options["seeds"]) for options in (prior, decoder, upsampler)}
    assert len(seeds) == 3  # otherwise the stages share their noise


def test_without_options_the_checkpoint_decides(pipe, monkeypatch):
    decoder = Recorder(monkeypatch, pipe.decoder)
    pipe("a ring", 1, seed=0, size=16)
    assert (decoder.calls[0]["steps"], decoder.calls[0]["cond_scale"]) == (2, 2.0)


def test_decoder_without_text_tower_gets_clips_encodings():
    pipe = tiny_pipeline(upsampler=False, own_text_encoder=False)
    assert pipe.sizes == (16,)
    assert pipe("a red ring", 2, seed=0).shape == (2, 3, 16, 16)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_samplers(pipe, sampler):
    assert torch.isfinite(pipe("a ring", 1, seed=0, sampler=sampler)).all()


def test_training_mode_is_given_back(pipe):
    """A trainer that samples images must not find its model in evaluation mode afterwards."""
    pipe.decoder.train()
    pipe.prior.eval()
    pipe("a ring", 1, seed=0, size=16)
    assert pipe.decoder.training and pipe.decoder.unet.training and not pipe.prior.training


def test_pil(pipe):
    pictures = pipe("a ring", 2, seed=0, output_type="pil")
    assert [(p.size, p.mode) for p in pictures] == [((32, 32), "RGB")] * 2
    colours = torch.tensor([0.0, 0.4, 1.0])[:, None, None].expand(3, 2, 5)  # [3, H, W]
    (picture,) = to_pil(colours[None])
    assert picture.size == (5, 2) and picture.getpixel((4, 1)) == (0, 102, 255)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        (dict(prompt=""), ValueError, "caption"),
        (dict(prompt="a red ring a red ring a red ring"), ValueError, "caption"),
        (dict(prompt="a red zebra"), ValueError, "zebra"),
        (dict(prompt=[]), ValueError, "at least one caption"),
        (dict(num_images=0), ValueError, "num_images: expected at least 1, got 0"),
        (dict(num_images=1.5), TypeError, "num_images"),
        (dict(steps=0), ValueError, "steps: expected at least 1, got 0"),
        (dict(prior_steps="two"), TypeError, "prior_steps"),
        (dict(guidance=float("nan")), ValueError, "guidance"),
        (dict(prior_guidance=-1.0), ValueError, "prior_guidance"),
        (dict(size=100), ValueError, "size: expected one of 16, 32, got 100"),
        (dict(sampler="euler"), ValueError, "sampler: .*, dpm\\+\\+, consistency, got 'euler'"),
        (dict(batch_size=0), ValueError, "batch_size"),
        (dict(seed=-1), ValueError, "seed"),
        (dict(seed=2**63), ValueError, "seed"),
        (dict(seed=0.5), TypeError, "seed"),
        (dict(seed=0, generator=torch.Generator()), ValueError, "seed, generator"),
        (dict(output_type="jpg"), ValueError, "output_type"),
        (dict(progress=3), TypeError, "progress"),
    ],
)
def test_bad_calls(pipe, options, error, says):
    with pytest.raises(error, match=says):
        pipe(**{"prompt": "a ring", **options})


def test_bad_construction(pipe):
    parts = dict(clip=pipe.clip, prior=pipe.prior, decoder=pipe.decoder)
    with pytest.raises(ValueError, match="tokenizer"):
        DALLE2(**parts)
    with pytest.raises(ValueError, match="sampling: .*got speed"):
        DALLE2(**parts, tokenizer=pipe.tokenizer, sampling={"speed": 1})


def test_parts_that_do_not_fit(pipe):
    parts = dict(
        clip=pipe.clip,
        prior=pipe.prior,
        decoder=pipe.decoder,
        upsampler=pipe.upsampler,
        tokenizer=pipe.tokenizer,
    )
    net = pipe.prior.net.config
    for change, says in [
        (dict(tokenizer=WordTokenizer(["word"], 9)), "tokenizer: .*at most CLIP's 8, got 9"),
        (
            dict(tokenizer=WordTokenizer([f"w{i}" for i in range(20)], 8)),
            "tokenizer: .*at most CLIP's 10 tokens",
        ),
        (dict(prior=DiffusionPrior(net | {"text_dim": 24})), "prior: text_dim: expected 16 .*, got 24"),
        (
            dict(prior=DiffusionPrior(net | {"embed_dim": 24})),
            "prior: image_embed_dim: expected 16 .*, got 24",
        ),
        (
            dict(upsampler=Upsampler(**pipe.upsampler.config | {"image_size": 64, "low_res_size": 32})),
            "upsampler: low_res_size: expected 16 .*, got 32",
        ),
    ]:
        with pytest.raises(ValueError, match=says):
            DALLE2(**parts | change)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("stage", "part", "function"),
    [
        ("text", "clip", "encode_text"),
        ("prior", "prior", "sample"),
        ("decoder", "decoder", "sample"),
        ("candidates", "clip", "encode_image"),
        ("upsampler", "upsampler", "sample"),
    ],
)
def test_a_result_that_is_not_finite_names_its_stage(monkeypatch, value, stage, part, function):
    """Elsewhere float16 gives black images without an error; here the next stage blamed its own input."""
    pipe = tiny_pipeline()
    inner = getattr(getattr(pipe, part), function)

    def spoiled(*args, **options):
        made = inner(*args, **options)
        first, *rest = made if isinstance(made, tuple) else (made,)
        first = torch.where(torch.arange(first.numel()).reshape(first.shape) == 3, value, first)
        return (first, *rest) if isinstance(made, tuple) else first

    monkeypatch.setattr(getattr(pipe, part), function, spoiled)
    with pytest.raises(FloatingPointError, match=f"^{stage}: the result is not finite in torch.float32"):
        pipe("a ring", 1, seed=0, candidates=2)


def test_a_result_that_is_not_finite_ends_the_call_before_the_next_batch(monkeypatch):
    pipe, calls = tiny_pipeline(), []
    spoiled = torch.full((1, 16), torch.nan)
    monkeypatch.setattr(pipe.prior, "sample", lambda **options: calls.append(1) or spoiled)
    with pytest.raises(FloatingPointError):
        pipe("a ring", 3, seed=0, batch_size=1)
    assert len(calls) == 1


def test_an_image_whose_embedding_is_not_finite(pipe, monkeypatch):
    monkeypatch.setattr(pipe.clip, "encode_image", lambda image, normalize: torch.full((1, 16), torch.nan))
    with pytest.raises(FloatingPointError, match="^image embedding: "):
        pipe.variations(torch.rand(3, 16, 16), 1)


@pytest.mark.parametrize("argument", ["image_embed", "x_T"])
def test_input_that_is_not_finite_is_named(pipe, argument):
    given = dict(image_embed=torch.zeros(1, 16), x_T=torch.zeros(1, 3, 16, 16))
    given[argument][0, 0] = torch.nan
    with pytest.raises(ValueError, match=f"^{argument}: expected finite numbers"):
        pipe.decode(**given)


@pytest.mark.gpu
def test_on_the_gpu_as_on_the_cpu(pipe):
    on_gpu = tiny_pipeline().to("cuda")
    images = on_gpu("a red ring", 2, seed=4)
    assert images.device.type == "cuda"
    torch.testing.assert_close(images.cpu(), pipe("a red ring", 2, seed=4), atol=2e-2, rtol=0)
