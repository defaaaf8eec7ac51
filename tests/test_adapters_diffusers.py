"""Our schedulers, attention processors and context cache in diffusers' loops. Each test names its fault."""

from __future__ import annotations

import copy
import gc
import importlib
import pickle
import sys
from types import SimpleNamespace

import pytest
import torch
from truth import assert_close_to_truth

from benchmarks import foreign_unets
from dalle2_fast import functional
from dalle2_fast.adapters import context_cache as cache_module
from dalle2_fast.adapters import diffusers as adapter
from dalle2_fast.adapters.context_cache import context_cache
from dalle2_fast.adapters.patch import patch, unpatch


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers", reason="diffusers is not installed")


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_without_the_package_it_says_so(monkeypatch):
    """Catches: an import of the package when the adapter is imported; an error that names something else."""
    monkeypatch.setitem(sys.modules, "diffusers", None)
    adapter._classes.cache_clear()
    importlib.reload(adapter)
    with pytest.raises(ImportError, match="pip install diffusers"):
        adapter.UnCLIPScheduler  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'Scheduler'"):
        adapter.Scheduler  # noqa: B018
    adapter._classes.cache_clear()


def small(name: str) -> tuple[torch.nn.Module, dict]:
    torch.manual_seed(0)
    unet = foreign_unets.build(name, small=True).eval()
    return unet, foreign_unets.inputs(name, unet, 2, torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------------------------- schedulers

UNCLIP = [
    dict(prediction_type="epsilon", variance_type="learned_range"),
    dict(prediction_type="epsilon", variance_type="fixed_small_log"),
    dict(prediction_type="sample", variance_type="learned_range", clip_sample_range=0.7),
    dict(prediction_type="sample", variance_type="fixed_small_log", clip_sample_range=5.0),
    dict(prediction_type="epsilon", variance_type="fixed_small_log", clip_sample=False),
]
DDPM = [
    dict(),
    dict(variance_type="learned_range", beta_schedule="squaredcos_cap_v2", clip_sample_range=2.0),
    dict(variance_type="fixed_large", prediction_type="v_prediction", timestep_spacing="trailing"),
    dict(variance_type="fixed_small_log", prediction_type="sample", steps_offset=1),
    dict(thresholding=True),
]
DDIM = [
    dict(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
    dict(clip_sample=False, prediction_type="v_prediction", rescale_betas_zero_snr=False),
    dict(clip_sample=True),
]


def pair(diffusers, name: str, options: dict):
    theirs = getattr(diffusers, name)(**options)
    ours = getattr(adapter, name).from_config(theirs.config)
    assert isinstance(ours, getattr(diffusers, name)) and dict(ours.config) == dict(theirs.config)
    return theirs, ours


def chain(scheduler, steps: int, dtype: torch.dtype, call, channels: int = 2, shape=(4, 4)):
    """The same made-up network at every step; call(scheduler, output, t, x, place) -> step's output."""
    scheduler.set_timesteps(steps)
    learned = scheduler.config.get("variance_type") in ("learned_range", "learned")
    x, found = draw(2, channels, *shape).to(dtype), []
    for place, t in enumerate(scheduler.timesteps):
        width = channels * (2 if learned else 1)
        out = call(scheduler, draw(2, width, *shape, seed=place).mul(0.6).to(dtype), t, x, place)
        found += [out.prev_sample, out.pred_original_sample]
        x = found[0] = out.prev_sample  # what one step does wrong the next ones see
    return torch.cat([one.flatten(1) for one in found], dim=1)


def assert_equal_chains(diffusers, name: str, options: dict, call, monkeypatch, **kwargs) -> None:
    """Ours at float32 against theirs at float32, both against theirs in float64; call(..., noise) is a
    step in which noise is what theirs would draw."""
    theirs, ours = pair(diffusers, name, options)
    noise: list[torch.Tensor] = []
    module = sys.modules[type(theirs).__module__]
    monkeypatch.setattr(module, "randn_tensor", lambda *_, dtype=None, **__: noise[0].to(dtype))
    exact = copy.deepcopy(theirs)
    exact.betas = exact.betas.double()
    exact.alphas = 1 - exact.betas
    exact.alphas_cumprod = exact.alphas.cumprod(0)
    exact.one = torch.ones((), dtype=torch.float64)
    if name == "DDIMScheduler":
        first = exact.one if options.get("set_alpha_to_one", True) else exact.alphas_cumprod[0]
        exact.final_alpha_cumprod = first

    def drawn(scheduler, output, t, x, place):
        noise[:] = [draw(*x.shape, seed=99 + place)]
        return call(scheduler, output, t, x, place, noise[0].to(x.dtype))

    results = [
        chain(scheduler, 7, dtype, drawn, **kwargs)
        for scheduler, dtype in ((ours, torch.float32), (theirs, torch.float32), (exact, torch.float64))
    ]
    assert_close_to_truth(*results)


@pytest.mark.parametrize("options", UNCLIP, ids=str)
@pytest.mark.parametrize("shape", [(4, 4), ()], ids=["images", "embeddings"])
def test_unclip_steps_are_theirs(diffusers, options, shape, monkeypatch):
    """Catches: a wrong coefficient, bound, range or last step; strides between timesteps not used."""

    def call(scheduler, output, t, x, place, noise):
        times = scheduler.timesteps
        previous = times[place + 1] if place + 1 < len(times) else None
        given = dict(noise=noise) if isinstance(scheduler, adapter.UnCLIPScheduler) else {}
        return scheduler.step(output, t, x, previous, **given)

    assert_equal_chains(diffusers, "UnCLIPScheduler", options, call, monkeypatch, shape=shape)


@pytest.mark.parametrize("options", DDPM, ids=str)
def test_ddpm_steps_are_theirs(diffusers, options, monkeypatch):
    """Catches: as above; options that have no fused step computed as if they had."""

    def call(scheduler, output, t, x, place, noise):
        fused = isinstance(scheduler, adapter.DDPMScheduler) and not options.get("thresholding")
        return scheduler.step(output, t, x, **(dict(noise=noise) if fused else {}))

    assert_equal_chains(diffusers, "DDPMScheduler", options, call, monkeypatch)


@pytest.mark.parametrize("eta", [0.0, 0.6])
@pytest.mark.parametrize("options", DDIM, ids=str)
def test_ddim_steps_are_theirs(diffusers, options, eta, monkeypatch):
    """Catches: as above; a direction taken from the bounded x0 where theirs takes the network's."""

    def call(scheduler, output, t, x, place, noise):
        bounded = dict(use_clipped_model_output=bool(place % 2))
        return scheduler.step(output, t, x, eta=eta, variance_noise=noise if eta else None, **bounded)

    assert_equal_chains(diffusers, "DDIMScheduler", options, call, monkeypatch)


@pytest.mark.parametrize("options", UNCLIP[:2], ids=str)
def test_noise_that_the_op_draws(diffusers, options, monkeypatch):
    """Catches: a wrong standard deviation of drawn noise; seeds that are not the generator's."""
    theirs, ours = pair(diffusers, "UnCLIPScheduler", options)
    learned = options["variance_type"] == "learned_range"
    output, x = draw(3, 4 if learned else 2, 8, 8), draw(3, 2, 8, 8, seed=1)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(5)
    t, previous = ours.timesteps[1], ours.timesteps[2]
    seeds = torch.tensor([4, 5, 6])
    got = ours.step(output, t, x, previous, seeds=seeds)
    place = ours._table((int(t), int(previous)), x, 0.0)[1]
    noise = functional.sample_noise(seeds, place, x.shape)
    module = sys.modules[type(theirs).__module__]
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: noise)
    expected = theirs.step(output, t, x, previous)
    torch.testing.assert_close(got.prev_sample, expected.prev_sample, rtol=1e-5, atol=1e-6)

    def generated(seed):
        return ours.step(output, t, x, previous, generator=torch.Generator().manual_seed(seed)).prev_sample

    assert torch.equal(generated(1), generated(1)) and not torch.equal(generated(1), generated(2))
    one_each = [torch.Generator().manual_seed(seed) for seed in (1, 2, 3)]
    alone = ours.step(output[1:2], t, x[1:2], previous, generator=[torch.Generator().manual_seed(2)])
    batch = ours.step(output, t, x, previous, generator=one_each)
    assert torch.equal(batch.prev_sample[1:2], alone.prev_sample)
    again = ours.step(output, t, x, previous, generator=one_each)  # a generator goes on
    assert not torch.equal(again.prev_sample, batch.prev_sample)


def test_a_step_reads_nothing_from_the_device(diffusers, monkeypatch):
    """Catches: a timestep that is read back at every step; a table that is not kept."""
    ours = adapter.UnCLIPScheduler()
    ours.set_timesteps(5)
    times, x = ours.timesteps, draw(1, 2, 4, 4)
    ours.step(x, times[0], x, times[1])
    tables = ours._tables
    for method in ("__int__", "item", "tolist", "__float__", "__bool__"):
        monkeypatch.setattr(torch.Tensor, method, lambda *_: pytest.fail("read from the device"))
    for place in range(1, 4):
        ours.step(x, times[place], x, times[place + 1], return_dict=False)
    ours.step(x, times[4], x, seeds=torch.tensor([1]))
    assert ours._tables is tables and len(tables) == 1
    monkeypatch.undo()
    values = [ours.step(x, t, x, 100, seeds=torch.tensor([1])).prev_sample for t in (times[1], int(times[1]))]
    assert torch.equal(*values)
    times[1] = 600  # changed in place: the place of a view no longer says its old value
    assert ours._int_of(times[1]) == 600
    ours.set_timesteps(3)
    assert ours._int_of(ours.timesteps[1]) == int(ours.timesteps[1])


def test_the_schedulers_are_diffusers_own(diffusers, tmp_path):
    """Catches: configs, pickles or class names that diffusers cannot read back."""
    ours = adapter.UnCLIPScheduler(prediction_type="sample", clip_sample_range=5.0)
    assert pickle.loads(pickle.dumps(ours)).config == ours.config
    ours.save_pretrained(tmp_path)
    back = diffusers.UnCLIPScheduler.from_pretrained(tmp_path)
    assert type(back) is diffusers.UnCLIPScheduler and back.config.clip_sample_range == 5.0
    noisy = ours.add_noise(draw(2, 3), draw(2, 3, seed=1), torch.tensor([5, 900]))
    assert torch.equal(noisy, back.add_noise(draw(2, 3), draw(2, 3, seed=1), torch.tensor([5, 900])))


def test_wrong_steps_are_named(diffusers):
    ours = adapter.UnCLIPScheduler()
    x = draw(2, 3, 4, 4)
    with pytest.raises(ValueError, match="prev_timestep: expected less than timestep = 5, got 7"):
        ours.step(x, 5, x, 7)
    with pytest.raises(ValueError, match=r"model_output: expected \[B, C, ...\]"):
        ours.step(draw(2, 6, 4, 4), 5, x)
    with pytest.raises(ValueError, match="noise: expected without generator and seeds"):
        ours.step(x, 5, x, noise=x, seeds=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="generator: expected one a sample, 2, got 1"):
        ours.step(x, 5, x, generator=[torch.Generator()])
    ddpm = adapter.DDPMScheduler()
    ddpm.set_timesteps(3)
    with pytest.raises(ValueError, match="timestep: expected one of scheduler.timesteps, got 5"):
        ddpm.step(x, 5, x)
    with pytest.raises(ValueError, match="noise, seeds: expected None because of thresholding"):
        adapter.DDPMScheduler(thresholding=True).step(x, 5, x, seeds=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="num_inference_steps"):
        adapter.DDIMScheduler(clip_sample=False).step(x, 5, x)


# ------------------------------------------------------------------------------------------------- processors


def test_processors_through_set_attn_processor(diffusers):
    """Catches: a processor that diffusers does not take, or that computes something else."""
    kinds = {"karlo decoder": "AttnAddedKVProcessor", "stable diffusion 1.5": "AttnProcessor"}
    for which, name in kinds.items():
        unet, inputs = small(which)
        before = unet(**inputs).sample
        processor = getattr(adapter, name)()
        unet.set_attn_processor(processor)
        assert set(unet.attn_processors.values()) == {processor}
        torch.testing.assert_close(unet(**inputs).sample, before, rtol=1e-5, atol=1e-5)
        assert pickle.loads(pickle.dumps(processor)).__class__ is getattr(adapter, name)


def test_masks_that_are_no_masks_are_refused(diffusers):
    """Catches: a bias between 0 and -1000, or one for each query, read as yes or no."""
    unet, inputs = small("stable diffusion 1.5")
    unet.set_attn_processor(adapter.AttnProcessor())
    attention = unet.mid_block.attentions[0].transformer_blocks[0].attn2
    x, context = draw(2, 6, attention.query_dim), inputs["encoder_hidden_states"]
    keys = context.shape[1]
    with pytest.raises(RuntimeError, match="attention_mask: expected 0 .attend. or at most -1000"):
        attention(x, context, torch.full((2, 1, keys), -2.0))
    with pytest.raises(ValueError, match=r"attention_mask: expected one for all queries, \[B, 1, S\]"):
        attention(x, context, torch.zeros(2, 6, keys))
    with pytest.raises(ValueError, match=r"attention_mask: expected \[B, 1, S\] = \(2, 1, \d\), got"):
        attention(x, context, torch.zeros(2, 1, keys + 1))
    seen = torch.zeros(2, 1, keys)
    seen[0, 0, 2:] = -10000.0
    same = attention(x, context, seen), attention(x, context, seen == 0)
    assert torch.equal(*same) and not torch.equal(same[0][0], attention(x, context)[0][0])
    seen.zero_()  # the same tensor, changed: what was read of it before is old
    assert torch.equal(attention(x, context, seen), attention(x, context))


# ------------------------------------------------------------------------------------------------------ cache


def counted(monkeypatch) -> list[int]:
    """How often something was projected and kept."""
    made = []
    plain = cache_module._Entry

    def entry(*args):
        made.append(1)
        return plain(*args)

    monkeypatch.setattr(cache_module, "_Entry", entry)
    return made


def test_the_context_is_projected_once_a_run(diffusers, monkeypatch):
    """Catches: keys and values of an older context: of other values in it, other weights, another dtype."""
    unet, inputs = small("karlo decoder")
    unet.eval()
    patch(unet)
    attentions = sum(type(module).__name__ == "Attention" for module in unet.modules())
    made = counted(monkeypatch)

    @torch.no_grad()
    def same_as_without(**changed) -> None:
        given = {**inputs, **changed}
        got = unet(**given).sample
        token = cache_module._store.set(None)
        expected = unet(**given).sample
        cache_module._store.reset(token)
        assert torch.equal(got, expected)

    with context_cache():
        for _ in range(3):
            same_as_without()
        assert len(made) == attentions
        other = draw(*inputs["encoder_hidden_states"].shape, seed=7)
        same_as_without(encoder_hidden_states=other)
        assert len(made) == 2 * attentions
        other.mul_(2)  # in place
        same_as_without(encoder_hidden_states=other)
        del other
        gc.collect()
        same_as_without(encoder_hidden_states=draw(*inputs["encoder_hidden_states"].shape, seed=8))
        assert len(made) == 4 * attentions
        for name, parameter in unet.named_parameters():
            if "add_k_proj" in name:
                with torch.no_grad():
                    parameter.mul_(1.5)
        same_as_without()
        for name, parameter in unet.named_parameters():
            if "add_v_proj" in name:
                parameter.data = parameter.data * 0.5  # what Module.to does
        same_as_without()
        with torch.autocast("cpu", torch.bfloat16):
            same_as_without()
        same_as_without()
        count = len(made)
        unet(**inputs).sample.sum().backward()  # gradients are wanted: nothing is kept
        unet.train()
        same_as_without()
        with torch.inference_mode():
            unet(**{**inputs, "encoder_hidden_states": draw(*inputs["encoder_hidden_states"].shape)})
        assert len(made) == count
    same_as_without()
    assert cache_module._store.get() is None


def test_a_patched_pipeline_draws_the_same(diffusers, monkeypatch):
    """Catches: a context kept from another prompt, guidance or run; a pipeline that is another class."""
    pipe = karlo(diffusers)
    attentions = sum(type(one).__name__ == "Attention" for one in pipe.decoder.modules())
    made = counted(monkeypatch)

    def run(prompt: str, guidance: float) -> torch.Tensor:
        generator = torch.Generator().manual_seed(5)
        steps = dict(
            prior_num_inference_steps=2, decoder_num_inference_steps=3, super_res_num_inference_steps=2
        )
        guided = dict(prior_guidance_scale=1.0, decoder_guidance_scale=guidance)
        images = pipe([prompt], generator=generator, output_type="pt", **steps, **guided).images
        return images if isinstance(images, torch.Tensor) else torch.as_tensor(images)

    prompts = [("ab", 4.0), ("cd", 4.0), ("cd", 1.0), ("ab", 4.0)]
    expected = [run(*prompt) for prompt in prompts]
    assert not torch.equal(expected[0], expected[1]) and torch.equal(expected[0], expected[3])
    report = patch(pipe)
    assert type(pipe).__name__ == "UnCLIPPipeline" and isinstance(pipe, diffusers.UnCLIPPipeline)
    assert any(name.startswith("super_res_last.") for name in report.swapped)
    for prompt, image in zip(prompts, expected, strict=True):
        made.clear()
        torch.testing.assert_close(run(*prompt), image, rtol=1e-4, atol=1e-4)
        assert len(made) == attentions  # once a run, whatever the number of steps
    pipe.decoder_scheduler = adapter.UnCLIPScheduler.from_config(pipe.decoder_scheduler.config)
    first = run("ab", 4.0)
    assert torch.equal(first, run("ab", 4.0)) and not torch.equal(first, expected[0])
    assert unpatch(pipe) == len(report.swapped) and type(pipe) is diffusers.UnCLIPPipeline


def karlo(diffusers):
    """UnCLIPPipeline with random weights, nothing downloaded: a letter is a token."""
    from diffusers.pipelines.deprecated.unclip import UnCLIPTextProjModel

    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    decoder = foreign_unets.build("karlo decoder", small=True)
    width, tokens = decoder.config.cross_attention_dim, 6
    text = transformers.CLIPTextConfig(
        vocab_size=300, hidden_size=16, intermediate_size=16, projection_dim=16, num_hidden_layers=1,
        num_attention_heads=2, bos_token_id=1, eos_token_id=2, max_position_embeddings=tokens,
    )  # fmt: skip
    prior = diffusers.PriorTransformer(num_attention_heads=2, attention_head_dim=8, num_layers=1,
                                       embedding_dim=16, num_embeddings=tokens)  # fmt: skip
    schedulers = {
        "prior": dict(prediction_type="sample", clip_sample_range=5.0),
        "decoder": dict(variance_type="learned_range"),
        "super_res": dict(),
    }
    pipe = diffusers.UnCLIPPipeline(
        prior=prior, decoder=decoder, text_encoder=transformers.CLIPTextModelWithProjection(text),
        tokenizer=Letters(tokens),
        text_proj=UnCLIPTextProjModel(clip_embeddings_dim=16, cross_attention_dim=width,
                                      time_embed_dim=4 * decoder.config.block_out_channels[0]),
        super_res_first=foreign_unets.build("karlo upsampler", small=True),
        super_res_last=foreign_unets.build("karlo upsampler", small=True),
        **{f"{name}_scheduler": diffusers.UnCLIPScheduler(**options) for name, options in schedulers.items()},
    )  # fmt: skip
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Letters:
    """As much of a tokenizer as the pipeline asks for."""

    def __init__(self, length: int) -> None:
        self.model_max_length = length

    def __call__(self, texts, padding="max_length", **_):
        rows = [[1, *map(ord, text), 2] for text in texts]
        length = self.model_max_length if padding == "max_length" else max(map(len, rows))
        ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
        return SimpleNamespace(input_ids=ids, attention_mask=(ids != 0).long())
