"""Our attention processors and context cache in diffusers' loops. Each test names its fault."""

from __future__ import annotations

import copy
import gc
import importlib
import pickle
import sys

import pytest
import torch

from benchmarks.cases import foreign_unets
from dalle2_fast.adapters import context_cache as cache_module
from dalle2_fast.adapters import diffusers as adapter
from dalle2_fast.adapters.context_cache import context_cache
from dalle2_fast.adapters.patch import patch, unpatch
from tests.support import tiny_karlo


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers", reason="diffusers is not installed")


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
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


# ------------------------------------------------------------------------------------------------- processors


def test_processors_through_set_attn_processor(diffusers):
    """Catches: a processor that diffusers does not accept, or that computes something else."""
    kinds = {"karlo decoder": "AttnAddedKVProcessor", "stable diffusion 1.5": "AttnProcessor"}
    for which, name in kinds.items():
        unet, inputs = small(which)
        before = unet(**inputs).sample
        processor = getattr(adapter, name)()
        unet.set_attn_processor(processor)
        assert set(unet.attn_processors.values()) == {processor}
        torch.testing.assert_close(unet(**inputs).sample, before, rtol=1e-5, atol=1e-5)
        assert pickle.loads(pickle.dumps(processor)).__class__ is getattr(adapter, name)


def test_biases_are_refused_as_masks(diffusers):
    """Catches: a bias between 0 and -1000, or one bias per query, treated as a mask."""
    unet, inputs = small("stable diffusion 1.5")
    unet.set_attn_processor(adapter.AttnProcessor())
    attention = unet.mid_block.attentions[0].transformer_blocks[0].attn2
    x, context = randn(2, 6, attention.query_dim), inputs["encoder_hidden_states"]
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
    seen.zero_()  # the same tensor with new values: its cached mask is outdated
    assert torch.equal(attention(x, context, seen), attention(x, context))


def test_a_row_that_masks_every_key_stays_as_it_was(diffusers):
    """Catches: zeros for a caption without tokens, where diffusers' softmax attends to all keys alike."""
    unet, inputs = small("stable diffusion 1.5")
    context = inputs["encoder_hidden_states"]
    mask = torch.ones(context.shape[:2], dtype=torch.int64)
    mask[0] = 0
    mask[1, 2:] = 0
    before, unmasked = unet(**inputs, encoder_attention_mask=mask).sample, unet(**inputs).sample
    # diffusers adds -10000 to every score of row 0, which rounds them to about 1e-3 in float32.
    torch.testing.assert_close(before[0], unmasked[0], rtol=1e-3, atol=1e-3)
    expected = torch.stack([unmasked[0], before[1]])

    patched = copy.deepcopy(unet)
    patch(patched)
    unet.set_attn_processor(adapter.AttnProcessor())
    for net in (unet, patched):
        actual = net(**inputs, encoder_attention_mask=mask).sample
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------ cache


def counted(monkeypatch) -> list[int]:
    """A list with one entry for each projection that was cached."""
    made = []
    plain = cache_module._Entry

    def entry(*args):
        made.append(1)
        return plain(*args)

    monkeypatch.setattr(cache_module, "_Entry", entry)
    return made


def test_the_context_is_projected_once_a_run(diffusers, monkeypatch):
    """Catches: outdated keys and values, from another context, other values in it, other weights or dtype."""
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
        other = randn(*inputs["encoder_hidden_states"].shape, seed=7)
        same_as_without(encoder_hidden_states=other)
        assert len(made) == 2 * attentions
        other.mul_(2)  # in place
        same_as_without(encoder_hidden_states=other)
        del other
        gc.collect()
        same_as_without(encoder_hidden_states=randn(*inputs["encoder_hidden_states"].shape, seed=8))
        assert len(made) == 4 * attentions
        for name, parameter in unet.named_parameters():
            if "add_k_proj" in name:
                with torch.no_grad():
                    parameter.mul_(1.5)
        same_as_without()
        for name, parameter in unet.named_parameters():
            if "add_v_proj" in name:
                parameter.data = parameter.data * 0.5  # as Module.to does
        same_as_without()
        with torch.autocast("cpu", torch.bfloat16):
            same_as_without()
        same_as_without()
        count = len(made)
        unet(**inputs).sample.sum().backward()  # with gradients nothing is cached
        unet.train()
        same_as_without()
        with torch.inference_mode():
            unet(**{**inputs, "encoder_hidden_states": randn(*inputs["encoder_hidden_states"].shape)})
        assert len(made) == count
    same_as_without()
    assert cache_module._store.get() is None


def test_a_patched_pipeline_makes_the_same_images(diffusers, monkeypatch, tmp_path):
    """Catches: a cached context of another prompt, guidance or run; a pipeline of another class."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    pipe = tiny_karlo.pipeline(tmp_path)
    pipe.set_progress_bar_config(disable=True)
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
        assert len(made) == attentions  # once per run, regardless of the number of steps
    pipe.decoder_scheduler = adapter.UnCLIPScheduler.from_config(pipe.decoder_scheduler.config)
    first = run("ab", 4.0)
    assert torch.equal(first, run("ab", 4.0)) and not torch.equal(first, expected[0])
    assert unpatch(pipe) == len(report.swapped) and type(pipe) is diffusers.UnCLIPPipeline
