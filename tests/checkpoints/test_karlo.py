"""Karlo from diffusers' folder and from the original files: networks and pipeline against diffusers."""

from __future__ import annotations

import shutil
from copy import copy as copy_of
from copy import deepcopy

import pytest
import torch

from dalle2_fast import DALLE2, Decoder, DiffusionPrior, Upsampler, functional
from dalle2_fast.checkpoints import CheckpointError
from dalle2_fast.diffusion.sampling import INITIAL_NOISE
from dalle2_fast.models.captions import Caption
from dalle2_fast.models.prior.base import candidate_seeds
from dalle2_fast.pipeline.context import STAGES, GenerationContext
from dalle2_fast.pipeline.decoding import encode_decoder_captions
from dalle2_fast.pipeline.settings import resolve_settings
from dalle2_fast.pipeline.stages import sample_decoder, upsample
from dalle2_fast.seeds import sample_seed

pytest.importorskip("diffusers", reason="needs diffusers, whose Karlo is the oracle")
pytest.importorskip("transformers", reason="needs transformers, whose CLIP the pipeline uses")

from tests.support import tiny_karlo  # noqa: E402
from tests.support.tiny_pipeline import load_on_cpu

PROMPTS = ["the red ring", "and"]


@pytest.fixture(scope="module")
def ours(karlo_folder) -> DALLE2:
    return load_on_cpu(karlo_folder)


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


TIMES = torch.tensor([3, 500, 999])
MASK = torch.arange(tiny_karlo.LENGTH) < torch.tensor([[4], [13], [2]])


# --------------------------------------------------------------------------------- networks against diffusers


@torch.no_grad()
def test_prior_equals_diffusers(karlo, ours):
    given = (rows(3, 64), TIMES, rows(3, 64, seed=1), rows(3, 13, 64, seed=2), MASK)
    expected = karlo.prior(*given).predicted_image_embedding
    assert difference(ours.prior.net(*given), expected) < 1e-5
    # without gaps and masks, in the order in which sampling does it
    prefix = ours.prior.net.encode_prefix(*given[2:])
    assert difference(ours.prior.net.denoise(given[0], given[1], prefix), expected) < 1e-5
    assert difference(ours.prior.restore(given[0]), karlo.prior.post_process_latents(given[0])) < 1e-6


@torch.no_grad()
def test_decoder_equals_diffusers(karlo, ours):
    x, context, classes = rows(3, 3, 16, 16), rows(3, 17, 48, seed=1), rows(3, 256, seed=2)
    mask = torch.nn.functional.pad(MASK, (4, 0), value=True)
    expected = karlo.decoder(x, TIMES, context, class_labels=classes, attention_mask=mask).sample
    assert difference(ours.decoder.unet(x, TIMES, context, classes, mask), expected) < 1e-5


@torch.no_grad()
def test_text_proj_equals_diffusers(karlo, ours):
    """Also the unconditional rows: the learned image embedding, and a caption that is not dropped."""
    image, text, encodings = rows(3, 64), rows(6, 64, seed=1), rows(6, 13, 64, seed=2)
    context, classes = karlo.text_proj(
        image_embeddings=image, prompt_embeds=text, text_encoder_hidden_states=encodings,
        do_classifier_free_guidance=True,
    )  # fmt: skip
    keep = torch.tensor([False] * 3 + [True] * 3)
    caption = Caption(text, encodings, torch.ones(6, 13, dtype=torch.bool))
    found, _, vector = ours.decoder.text_proj(torch.cat([image, image]), caption, keep, torch.ones_like(keep))
    assert difference(found, context) < 1e-5
    assert difference(vector, classes) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", ["first", "last"])
def test_upsampler_nets_equal_diffusers(karlo, ours, name):
    x = rows(3, 6, 32, 32)
    net = ours.upsampler.unet if name == "first" else ours.upsampler.last_unet
    expected = getattr(karlo, f"super_res_{name}")(x, TIMES).sample
    assert difference(net(x, TIMES), expected) < 1e-5


@torch.no_grad()
def test_text_encoder_equals_transformers(karlo, ours):
    inputs = karlo.tokenizer(PROMPTS, padding="max_length", max_length=13, return_tensors="pt")
    expected = karlo.text_encoder(inputs.input_ids)
    embed, encodings, mask = ours.clip.encode_text(ours.tokenizer.encode(PROMPTS), normalize=False)
    assert torch.equal(mask, inputs.attention_mask.bool())
    assert difference(embed, expected.text_embeds) < 1e-5
    assert difference(encodings[mask], expected.last_hidden_state[mask]) < 1e-5


# ------------------------------------------------------------------------- the whole pipeline, the same noise


class OurNoise:
    """Stands in for diffusers' random numbers: those that our sampler draws for these rows, step by step."""

    def __init__(self, seed: int, count: int, steps: int):
        seeds = [sample_seed(seed, index) for index in range(count)] * len(PROMPTS)
        self.seeds = {stage: torch.tensor([sample_seed(s, STAGES.index(stage)) for s in seeds])
                      for stage in ("prior", "decoder", "upsampler")}  # fmt: skip
        self.seeds["prior"] = candidate_seeds(self.seeds["prior"], 1)
        self.order = iter([(stage, step) for stage in self.seeds for step in range(steps - 1)])

    def start(self, stage: str, *shape: int) -> torch.Tensor:
        return functional.sample_noise(self.seeds[stage], INITIAL_NOISE, (len(self.seeds[stage]), *shape))

    def __call__(self, shape, **options) -> torch.Tensor:
        stage, step = next(self.order)
        return functional.sample_noise(self.seeds[stage], step, tuple(shape))


def both(karlo, ours, monkeypatch, steps=5, count=2, guidance=(4.0, 8.0)):
    """(our images, theirs), both of the same noise."""
    noise = OurNoise(seed=7, count=count, steps=steps)
    monkeypatch.setattr("diffusers.schedulers.scheduling_unclip.randn_tensor", noise)
    expected = karlo(
        PROMPTS, num_images_per_prompt=count, prior_num_inference_steps=steps,
        decoder_num_inference_steps=steps, super_res_num_inference_steps=steps,
        prior_guidance_scale=guidance[0], decoder_guidance_scale=guidance[1], output_type="np",
        prior_latents=noise.start("prior", 64), decoder_latents=noise.start("decoder", 3, 16, 16),
        super_res_latents=noise.start("upsampler", 3, 32, 32),
    ).images  # fmt: skip
    assert next(noise.order, None) is None  # every number was used
    images = ours(PROMPTS, count, seed=7, steps=steps, prior_steps=steps, upsampler_steps=steps,
                  prior_guidance=guidance[0], guidance=guidance[1])
    return images, torch.from_numpy(expected).permute(0, 3, 1, 2)


def in_float64(scheduler) -> None:
    """diffusers' tables without their rounding: as float32, they miss the step at t = 999 by 1e-4 and that at
    t = 0 by 5e-4."""
    angle = ((torch.arange(1001, dtype=torch.float64) / 1000 + 0.008) / 1.008 * (torch.pi / 2)).cos() ** 2
    scheduler.betas = (1 - angle[1:] / angle[:-1]).clamp(max=0.999)
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)
    scheduler.one = torch.ones((), dtype=torch.float64)


@pytest.mark.parametrize(("exact", "tolerance"), [(False, 1e-3), (True, 1e-4)])
def test_the_whole_pipeline_equals_diffusers(karlo, ours, monkeypatch, exact, tolerance):
    """Schedules, strides, bounds, learned variance, guidance away from the empty text, statistics, resizing,
    the second net in the last step: any of them wrong shows here."""
    if exact:
        for scheduler in tiny_karlo.schedulers():
            monkeypatch.setattr(karlo, scheduler, copy_of(getattr(karlo, scheduler)))
            in_float64(getattr(karlo, scheduler))
    images, expected = both(karlo, ours, monkeypatch)
    assert images.shape == (4, 3, 32, 32)
    assert difference(images, expected) < tolerance


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("negative_prompt", "red"), ("sampler", "ddim"), ("prior_candidates", 2), ("guidance", 7.0),
        ("sample_clip", 0.5), ("last_unet", None), ("resize", "bilinear"), ("unit_norm", True),
    ],
)  # fmt: skip
def test_the_comparison_would_notice(karlo, karlo_folder, monkeypatch, change, value):
    """Each of Karlo's ways changed on our side: the pictures must differ by far more than is tolerated."""
    ours = load_on_cpu(karlo_folder)
    guidance = (4.0, 8.0)
    if change in ours.sampling and change != "guidance":
        ours.sampling[change] = value
    elif change == "guidance":
        changed = lambda *args, **given: DALLE2.generate(ours, *args, **given | {change: value})  # noqa: E731
        monkeypatch.setattr(ours, "generate", changed)
    else:
        part = ours.prior if change in ("sample_clip", "unit_norm") else ours.upsampler
        setattr(part, change, value)
    images, expected = both(karlo, ours, monkeypatch, steps=3, count=1, guidance=guidance)
    assert difference(images, expected) > 3e-3


def test_times_are_those_of_both_sources(ours):
    """diffusers multiplies its stride, the original adds it up; both round to even."""
    from diffusers.schedulers import UnCLIPScheduler

    scheduler = UnCLIPScheduler()
    for steps in (5, 7, 25, 50, 100):
        scheduler.set_timesteps(steps)
        place, original = 0.0, set()
        for _ in range(steps):
            original.add(round(place))
            place += 999 / (steps - 1)
        found = ours.decoder.diffusion.times(steps).tolist()
        assert found == scheduler.timesteps.tolist() == sorted(original, reverse=True), steps


def test_defaults_are_karlos(ours):
    wanted = dict(steps=25, guidance=8.0, prior_steps=25, prior_guidance=4.0, prior_candidates=1,
                  negative_prompt="", upsampler_steps=7, sampler="ddpm")  # fmt: skip
    assert {name: ours.sampling[name] for name in wanted} == wanted
    assert (ours.prior.sample_clip, ours.prior.diffusion.prediction) == (5.0, "sample")
    assert (ours.decoder.diffusion.variance, ours.upsampler.diffusion.variance) == (
        "learned_range", "fixed_small")  # fmt: skip
    assert ours.upsampler.resize == "bicubic" and ours.sizes == (16, 32)


# ---------------------------------------------------------------------------------------- what else is loaded


def test_pickled_weights_give_the_same(karlo, ours, tmp_path):
    karlo.save_pretrained(tmp_path, safe_serialization=False)
    assert list(tmp_path.rglob("*.bin")) and not list((tmp_path / "decoder").glob("*.safetensors"))
    same(load_on_cpu(tmp_path), ours)


def test_shards_and_half_precision(karlo, ours, tmp_path):
    karlo.save_pretrained(tmp_path)
    shutil.rmtree(tmp_path / "decoder")
    karlo.decoder.save_pretrained(tmp_path / "decoder", max_shard_size="1MB")
    assert (tmp_path / "decoder" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    shutil.rmtree(tmp_path / "prior")
    deepcopy(karlo.prior).half().save_pretrained(tmp_path / "prior", variant="fp16")
    loaded = load_on_cpu(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    half = {name: x.half().float() for name, x in ours.prior.state_dict().items()}
    assert all(torch.equal(x, half[name]) for name, x in loaded.prior.state_dict().items())
    same(loaded.decoder, ours.decoder)


def same(one: torch.nn.Module, two: torch.nn.Module) -> None:
    one, two = one.state_dict(), two.state_dict()
    assert one.keys() == two.keys() and not [name for name in one if not torch.equal(one[name], two[name])]


def test_dtype_is_that_of_the_call(karlo_folder):
    prior = DiffusionPrior.from_pretrained(karlo_folder, dtype=torch.bfloat16)
    assert {x.dtype for x in prior.state_dict().values()} == {torch.bfloat16} and not prior.training


@pytest.mark.parametrize(("kind", "part"), [(DiffusionPrior, "prior"), (Decoder, "decoder"),
                                            (Upsampler, "upsampler")])  # fmt: skip
def test_networks_on_their_own(karlo_folder, ours, kind, part):
    same(kind.from_pretrained(karlo_folder), getattr(ours, part))


def test_a_prior_without_a_pipeline(karlo_folder, ours, tmp_path):
    """Kandinsky's prior is of this class, too."""
    shutil.copytree(karlo_folder / "prior", tmp_path / "prior")
    alone = DiffusionPrior.from_pretrained(tmp_path / "prior")
    same(alone, ours.prior)
    same(DiffusionPrior.from_pretrained(karlo_folder / "prior"), ours.prior)
    with pytest.raises(CheckpointError, match="expected a Decoder or a DALLE2, got 'DiffusionPrior'"):
        Decoder.from_pretrained(tmp_path / "prior")


def test_the_command_line_describes_it(karlo_folder, capsys):
    from dalle2_fast import cli

    assert cli.main(["info", "--checkpoint", str(karlo_folder)]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("checkpoint:"))
    assert "(diffusers's layout, float32; numbers stored: prior" in line and ", clip " in line


def test_saved_again_as_ours_it_is_the_same(ours, tmp_path):
    again = load_on_cpu(ours.save_pretrained(tmp_path / "ours"))
    same(again, ours)
    assert again.sampling == ours.sampling and again.tokenizer == ours.tokenizer
    assert [again.prior.config, again.decoder.config, again.upsampler.config, again.clip.config] == [
        ours.prior.config, ours.decoder.config, ours.upsampler.config, ours.clip.config]  # fmt: skip
    options = dict(seed=0, steps=2, prior_steps=2, upsampler_steps=2)
    assert torch.equal(again("the ring", 1, **options), ours("the ring", 1, **options))


def test_a_pipeline_of_image_variations(karlo, ours, monkeypatch, tmp_path):
    """It has an image encoder and no prior; its caption is the empty one."""
    from diffusers import UnCLIPImageVariationPipeline
    from transformers import CLIPImageProcessor

    names = ("decoder", "text_proj", "super_res_first", "super_res_last", "decoder_scheduler",
             "super_res_scheduler", "text_encoder", "tokenizer")
    variations = UnCLIPImageVariationPipeline(
        **{name: karlo.components[name] for name in names}, image_encoder=tiny_karlo.image_encoder(),
        feature_extractor=CLIPImageProcessor(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, do_normalize=True),
    )  # fmt: skip
    variations.save_pretrained(tmp_path / "theirs")
    variations.set_progress_bar_config(disable=True)
    loaded = load_on_cpu(tmp_path / "theirs")
    assert loaded.prior is None
    same(loaded.decoder, ours.decoder)
    with pytest.raises(ValueError, match="prompt: this pipeline has no prior"):
        loaded("the ring", prior_steps=2)
    with pytest.raises(CheckpointError, match="a DALLE2 with a DiffusionPrior as its prior, got none"):
        DiffusionPrior.from_pretrained(tmp_path / "theirs")
    again = load_on_cpu(loaded.save_pretrained(tmp_path / "ours"))
    same(again, loaded)

    noise = OurNoise(seed=7, count=1, steps=3)
    noise.seeds.pop("prior")
    noise.seeds = {stage: seeds[:1] for stage, seeds in noise.seeds.items()}
    noise.order = iter([(stage, step) for stage in noise.seeds for step in range(2)])
    monkeypatch.setattr("diffusers.schedulers.scheduling_unclip.randn_tensor", noise)
    picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(x)[:, None, None] for x in (again.clip.image_mean, again.clip.image_std))
    expected = variations(
        image=(picture - mean) / std, decoder_num_inference_steps=3, super_res_num_inference_steps=3,
        decoder_latents=noise.start("decoder", 3, 16, 16), output_type="np",
        super_res_latents=noise.start("upsampler", 3, 32, 32),
    ).images  # fmt: skip
    context = GenerationContext.for_inputs(again, 1, 1, seed=7)
    settings = resolve_settings(again, 32, steps=3, upsampler_steps=3)
    with context.evaluation_mode(), torch.no_grad():  # `variations` samples with DDIM, as the paper does
        captions = encode_decoder_captions(context, None, 1, settings)
        low_res = sample_decoder(context, again.embed_image(picture), captions, settings)
        images = upsample(context, low_res, settings, 32)
    assert difference(images, torch.from_numpy(expected).permute(0, 3, 1, 2)) < 1e-3


# ----------------------------------------------------------------------------------------- the original files


def test_original_files_give_the_same_weights(karlo_originals, ours):
    """Written by walking diffusers' modules in the order in which they run; read by rules."""
    loaded = load_on_cpu(karlo_originals)
    for part in ("prior", "decoder", "upsampler"):
        same(getattr(loaded, part), getattr(ours, part))
        one, two = getattr(loaded, part).config, getattr(ours, part).config
        sizes = {"image_size": (64, 256), "low_res_size": (64,), "sample_clip": (10.0,)}  # Karlo's own
        differ = {name for name in one if one[name] != two[name]}
        assert differ <= sizes.keys() and all(one[name] in sizes[name] for name in differ)
    assert loaded.sizes == (64, 256) and loaded.prior.sample_clip == 10.0
    assert loaded.sampling == ours.sampling
    assert loaded.tokenizer.vocab_size == 49408 and loaded.tokenizer.context_length == 77


def test_original_files_are_told_apart_by_their_keys(karlo_originals, ours, tmp_path):
    for index, file in enumerate(sorted(karlo_originals.iterdir())):
        shutil.copy(file, tmp_path / f"{index}.ckpt")
    same(Decoder.from_pretrained(tmp_path), ours.decoder)
    shutil.copy(tmp_path / "0.ckpt", tmp_path / "again.ckpt")
    with pytest.raises(CheckpointError, match="expected one .* of Karlo, got 0.ckpt and again.ckpt"):
        DALLE2.from_pretrained(tmp_path)
