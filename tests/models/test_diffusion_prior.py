"""The diffusion prior: size, causality, padding, the caption's cache, drops, guidance, rerank, messages."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from dalle2_fast.diffusion import GaussianDiffusion, make_schedule
from dalle2_fast.models.captions import Caption
from dalle2_fast.models.clip.model import CLIP
from dalle2_fast.models.prior.caption_prefix import embed_caption
from dalle2_fast.models.prior.diffusion import DiffusionPrior, DiffusionPriorNetwork
from tests.support.gaussian_data import DEVIATION, MEAN, exact_net

EMBED, TEXT, LENGTH = 24, 20, 9
NET = dict(dim=32, depth=2, heads=4, dim_head=8, embed_dim=EMBED, text_dim=TEXT, context_length=LENGTH)


def small_net() -> DiffusionPriorNetwork:
    torch.manual_seed(0)
    return DiffusionPriorNetwork(**NET)


def small_prior(**options) -> DiffusionPrior:
    return DiffusionPrior(small_net(), **options)


def caption(rows: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([5, 2, 9, 0, 7, 1])[:rows]
    return dict(
        text_embed=F.normalize(torch.randn(rows, EMBED, generator=generator), dim=-1),
        text_encodings=torch.randn(rows, LENGTH, TEXT, generator=generator),
        text_mask=torch.arange(LENGTH) < lengths[:, None],
    )


def image_embeddings(rows: int = 4, seed: int = 1) -> torch.Tensor:
    return F.normalize(torch.randn(rows, EMBED, generator=torch.Generator().manual_seed(seed)), dim=-1)


def conditions(row: dict[str, torch.Tensor], rows: slice = slice(None)) -> tuple[torch.Tensor, ...]:
    return row["text_embed"][rows], row["text_encodings"][rows], row["text_mask"][rows]


# --------------------------------------------------------------------------------------------------- network


def test_default_size_is_that_of_karlo():
    with torch.device("meta"):
        prior = DiffusionPrior()
    assert sum(tensor.numel() for tensor in prior.state_dict().values()) == 1_022_030_080
    assert sum(parameter.numel() for parameter in prior.parameters()) == 1_022_030_080 - 2 * 768


def test_padding_changes_nothing():
    """Packing, trimming, the values in the padding and other rows must not show in the output of a row."""
    net, words, x, t = small_net(), caption(), image_embeddings(), torch.tensor([3.0, 500.0, 20.0, 999.0])
    out = net(x, t, *conditions(words))
    noise = torch.where(words["text_mask"][..., None], words["text_encodings"], 100.0)
    torch.testing.assert_close(net(x, t, words["text_embed"], noise, words["text_mask"]), out)
    for i, length in enumerate(words["text_mask"].sum(dim=1).tolist()):
        row = slice(i, i + 1)
        encodings = words["text_encodings"][row, :length] if length else None
        alone = net(x[row], t[row], words["text_embed"][row], encodings)
        torch.testing.assert_close(alone, out[row], rtol=1e-5, atol=1e-5)


def test_attention_equals_a_masked_one():
    """Moving the padding behind the tail must be the same as masking it where it is (the paper's order)."""
    net, words, x, t = small_net(), caption(), image_embeddings(), torch.arange(4.0)
    prefix, valid = embed_caption(net, *conditions(words))
    tokens = torch.cat([prefix, net._embed_tail(x, t)], dim=1)
    valid = F.pad(valid, (0, 3), value=True)
    size = tokens.shape[1]
    assert size == LENGTH + 4
    mask = torch.ones(size, size, dtype=torch.bool).tril() & valid[:, None, :]
    mask = mask | torch.eye(size, dtype=torch.bool)
    for block in net.transformer.resblocks:
        tokens, _ = block(tokens, mask=mask[:, None])
    expected = net.proj_out(net.ln_final(tokens[:, -1]))
    torch.testing.assert_close(net(x, t, *conditions(words)), expected, rtol=1e-5, atol=1e-5)


def test_network_is_causal():
    """The text must not see time or noise: else its cached keys would be wrong from the second step on."""
    net, words = small_net(), caption()
    states = []
    hook = net.transformer.register_forward_hook(lambda module, inputs, output: states.append(output))
    full = words["text_embed"], words["text_encodings"], None
    net(image_embeddings(seed=1), torch.full((4,), 10.0), *full)
    net(image_embeddings(seed=2), torch.full((4,), 900.0), *full)
    hook.remove()
    torch.testing.assert_close(states[0][:, : LENGTH + 1], states[1][:, : LENGTH + 1])
    assert not torch.allclose(states[0][:, -1], states[1][:, -1], atol=1e-3)


def test_remembered_caption_equals_the_full_pass():
    net, words, x, t = small_net(), caption(), image_embeddings(), torch.tensor([0.0, 10.0, 500.0, 999.0])
    prefix = net.encode_prefix(*conditions(words))
    torch.testing.assert_close(net.denoise(x, t, prefix), net(x, t, *conditions(words)), rtol=1e-5, atol=1e-5)
    twice = net.denoise(x.repeat_interleave(2, 0), t.repeat_interleave(2), prefix.repeat_interleave(2))
    torch.testing.assert_close(twice[1::2], net(x, t, *conditions(words)), rtol=1e-5, atol=1e-5)


def test_gradients_reach_every_parameter():
    prior = small_prior(cond_drop_prob=0.0)
    prior(**caption(), image_embed=image_embeddings()).backward()
    assert [name for name, parameter in prior.named_parameters() if not parameter.grad.abs().sum() > 0] == []


# -------------------------------------------------------------------------------------------------- training


def test_the_caller_keeps_its_tensors():
    """DALLE2-pytorch scales the caller's image embedding in place: the next epoch learns something else."""
    prior, words, image = small_prior(), caption(), image_embeddings()
    kept = {name: tensor.clone() for name, tensor in words.items()} | {"image_embed": image.clone()}
    prior(**words, image_embed=image).backward()
    prior.fit_statistics(image)
    prior.sample(**words, steps=2)
    for name, tensor in (words | {"image_embed": image}).items():
        assert torch.equal(tensor, kept[name]), name


def test_loss_is_the_plain_squared_error_of_the_embedding():
    """A network that answers with zero has the loss |z|^2 / D = 1 for unit embeddings times sqrt(D)."""
    prior = small_prior()
    with torch.no_grad():
        prior.net.proj_out.weight.zero_()
    loss = prior(**caption(), image_embed=image_embeddings())
    assert loss.shape == () and loss.item() == pytest.approx(1.0, rel=1e-5)


def test_same_generator_same_loss():
    prior, words, image = small_prior(cond_drop_prob=0.5), caption(), image_embeddings()
    first, again, other = (
        prior(**words, image_embed=image, generator=torch.Generator().manual_seed(seed)).item()
        for seed in (3, 3, 4)
    )
    assert first == again != other


def test_drop_takes_embedding_and_encodings_together():
    """With a drop of 1 nothing of the caption may be left: neither its embedding nor its words."""
    prior, image = small_prior(cond_drop_prob=1.0), image_embeddings()
    losses = [
        prior(**caption(seed=seed), image_embed=image, generator=torch.Generator().manual_seed(0)).item()
        for seed in (0, 1)
    ]
    assert losses[0] == losses[1]
    keep = torch.tensor([True, False, True, False])
    seen = prior.condition(Caption(*conditions(caption())), keep)
    assert not seen.embed[~keep].any() and not seen.mask[~keep].any()
    assert seen.embed[keep].any(dim=1).all() and torch.equal(seen.mask[keep], caption()["text_mask"][keep])


def test_statistics_standardise_and_come_back():
    prior = small_prior()
    narrow = F.normalize(0.1 * torch.randn(500, EMBED) + torch.randn(EMBED), dim=-1)
    prior.fit_statistics(narrow)
    x = prior.standardised(narrow)
    torch.testing.assert_close(x.mean(dim=0), torch.zeros(EMBED), rtol=0, atol=1e-4)
    torch.testing.assert_close(x.std(dim=0), torch.ones(EMBED), rtol=0, atol=1e-4)
    torch.testing.assert_close(prior.restore(x), narrow)
    assert {"clip_mean", "clip_std"} <= set(prior.state_dict())


# -------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_sample_shape_norm_and_seeds(sampler):
    """The same seed gives the same embedding, alone or among others; another seed another one."""
    prior, words = small_prior().eval(), caption()
    options = dict(steps=4, sampler=sampler)
    seeds = torch.tensor([11, 12, 13, 14])
    together = prior.sample(**words, seeds=seeds, **options)
    assert together.shape == (4, EMBED)
    torch.testing.assert_close(together.norm(dim=-1), torch.ones(4))
    assert torch.equal(prior.sample(**words, seeds=seeds, **options), together)
    alone = prior.sample(**{k: v[2:3] for k, v in words.items()}, seeds=seeds[2:3], **options)
    torch.testing.assert_close(alone, together[2:3], rtol=1e-4, atol=1e-5)
    other = prior.sample(**words, seeds=seeds + 100, **options)
    assert (other - together).norm(dim=-1).min() > 1e-4
    drawn = [prior.sample(**words, generator=torch.Generator().manual_seed(5), **options) for _ in range(2)]
    assert torch.equal(*drawn)


def test_rerank_keeps_the_candidate_nearest_to_the_text():
    prior, words = small_prior().eval(), caption()
    seeds = torch.tensor([11, 12, 13, 14])
    scores = []
    for count in (1, 2, 4):
        best = prior.sample(**words, seeds=seeds, steps=4, num_samples_per_batch=count)
        scores.append((best * words["text_embed"]).sum(dim=-1))
    # Candidate k does not depend on how many there are, so more of them can only be better.
    assert (scores[1] >= scores[0] - 1e-5).all() and (scores[2] >= scores[1] - 1e-5).all()
    assert (scores[2] > scores[0] + 1e-4).any()


def test_guidance_is_one_pass_and_the_formula():
    """At one deterministic step x0 = uncond + scale (cond - uncond); conditional rows come first."""
    prior, words = small_prior(unit_norm=False, sample_clip=None).eval(), caption()
    sizes = []
    denoise = prior.net.denoise
    prior.net.denoise = lambda x, t, prefix: sizes.append(len(x)) or denoise(x, t, prefix)
    seeds = torch.arange(4)
    options = dict(seeds=seeds, steps=1, sampler="ddim", num_samples_per_batch=1)
    plain = prior.sample(**words, **options)
    no_words = torch.zeros(4, LENGTH, dtype=torch.bool)
    nothing = dict(words, text_embed=torch.zeros(4, EMBED), text_mask=no_words)
    unconditional = prior.sample(**nothing, **options)
    guided = prior.sample(**words, cond_scale=3.0, **options)
    torch.testing.assert_close(guided, unconditional + 3 * (plain - unconditional), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(prior.sample(**words, guidance=torch.full((4,), 3.0), **options), guided)
    assert sizes == [4, 4, 8, 8]


def test_steps_outside_the_guidance_interval_have_the_conditional_rows_alone():
    """Catches: unconditional rows in such steps, and a cached prefix of other rows than the candidates'."""
    prior, words = small_prior().double().eval(), {k: v.double() if v.is_floating_point() else v
                                                   for k, v in caption().items()}  # fmt: skip
    sizes = []
    denoise = prior.net.denoise
    prior.net.denoise = lambda x, t, prefix: sizes.append(len(x)) or denoise(x, t, prefix)
    log_snr = prior.diffusion.schedule.log_snr(prior.diffusion.times(4)).tolist()

    def sample(interval, **options):
        sizes.clear()
        given = dict(seeds=torch.arange(4), steps=4, sampler="dpm++", guidance_interval=interval) | options
        return prior.sample(**words, **given)

    everywhere = sample((-100.0, 100.0), cond_scale=3.0)
    assert sizes == [16] * 4 and torch.equal(everywhere, sample(None, cond_scale=3.0))
    half = sample((log_snr[1], log_snr[3]), cond_scale=3.0)
    assert sizes == [8, 16, 16, 8] and (half - everywhere).abs().max() > 1e-3
    nowhere = sample((0.0, 0.0), cond_scale=3.0)
    assert sizes == [8] * 4
    torch.testing.assert_close(nowhere, sample(None), atol=1e-12, rtol=0)


def test_default_steps_and_progress():
    seen = []
    prior = small_prior(sample_timesteps=6).eval()
    prior.sample(**caption(), progress=lambda iterable, total: seen.append(total) or iterable)
    prior.sample(**caption(), steps=3, progress=lambda iterable, total: seen.append(total) or iterable)
    assert seen == [6, 3]


def test_prior_learns_the_embedding_of_its_caption():
    torch.manual_seed(0)
    prior, words, image = small_prior(cond_drop_prob=0.0), caption(), image_embeddings()
    optimiser = torch.optim.AdamW(prior.parameters(), lr=3e-3)
    for _ in range(120):
        optimiser.zero_grad()
        prior(**words, image_embed=image).backward()
        optimiser.step()
    drawn = prior.eval().sample(**words, steps=8, seeds=torch.arange(4))
    assert (drawn * image).sum(dim=-1).min() > 0.9


# ------------------------------------------------------------------------------------------- clip and config


def test_clip_stays_outside_and_gives_the_same_as_its_embeddings():
    torch.manual_seed(0)
    clip = CLIP(
        dim_text=TEXT, dim_image=32, dim_latent=EMBED, num_text_tokens=50, text_enc_depth=1,
        text_seq_len=LENGTH, text_heads=2, visual_enc_depth=1, visual_heads=4, visual_image_size=16,
        visual_patch_size=8,
    )
    prior = DiffusionPrior(dict(dim=32, depth=1, heads=4, dim_head=8), clip=clip)
    assert not any("clip." in name for name in prior.state_dict()) and not clip.training
    text, image = torch.randint(1, 50, (3, LENGTH)), torch.rand(3, 3, 16, 16)
    embed, encodings, mask = clip.encode_text(text)
    words = dict(text_embed=embed, text_encodings=encodings, text_mask=mask)
    loss = prior(text, image, generator=torch.Generator().manual_seed(0))
    same = prior(
        **words, image_embed=clip.encode_image(image), generator=torch.Generator().manual_seed(0)
    )
    assert torch.equal(loss, same)
    loss.backward()
    assert all(parameter.grad is None for parameter in clip.parameters())
    seeds = torch.arange(3)
    assert torch.equal(prior.sample(text, steps=2, seeds=seeds), prior.sample(**words, steps=2, seeds=seeds))


def test_config_rebuilds_the_prior():
    prior = small_prior(cond_drop_prob=0.2, sample_timesteps=5).eval()
    prior.fit_statistics(image_embeddings())
    again = DiffusionPrior(**json.loads(json.dumps(prior.config))).eval()
    again.load_state_dict(prior.state_dict())
    seeds = torch.arange(4)
    assert torch.equal(again.sample(**caption(), seeds=seeds), prior.sample(**caption(), seeds=seeds))
    assert again.config == prior.config


def test_half_precision_keeps_its_state_in_float32():
    prior = small_prior().to(torch.bfloat16).eval()
    words = {k: v if v.dtype == torch.bool else v.bfloat16() for k, v in caption().items()}
    drawn = prior.sample(**words, steps=2, seeds=torch.arange(4))
    assert drawn.dtype == torch.float32 and drawn.isfinite().all()


def test_wrong_inputs():
    prior, words, image = small_prior(), caption(), image_embeddings()
    with pytest.raises(ValueError, match="text, text_embed: expected exactly one"):
        prior(image_embed=image)
    with pytest.raises(ValueError, match="image, image_embed: expected exactly one"):
        prior(**words)
    with pytest.raises(ValueError, match="text: needs a prior built with clip"):
        prior(torch.ones(4, 5, dtype=torch.int64), image_embed=image)
    with pytest.raises(ValueError, match=r"image_embed: expected \[B, E\] = \(4, 24\), got \(3, 24\)"):
        prior(**words, image_embed=image[:3])
    with pytest.raises(TypeError, match=r"text_embed: expected a floating-point tensor .*got torch.int64"):
        prior.sample(text_embed=words["text_embed"].long())
    with pytest.raises(ValueError, match=r"text_encodings: expected .*\(4, L <= 9, 20\), got \(4, 9, 21\)"):
        prior.sample(text_embed=words["text_embed"], text_encodings=torch.zeros(4, 9, 21))
    with pytest.raises(ValueError, match=r"text_mask: expected bool .*\(4, 9\), got torch.float32"):
        prior.sample(**(words | {"text_mask": words["text_mask"].float()}))
    with pytest.raises(ValueError, match=r"seeds: expected int64 \[B\] = \(4,\), got torch.int64 \(2,\)"):
        prior.sample(**words, seeds=torch.arange(2))
    with pytest.raises(ValueError, match="num_samples_per_batch: expected at least 1, got 0"):
        prior.sample(**words, num_samples_per_batch=0)
    with pytest.raises(ValueError, match="cond_drop_prob: expected a probability"):
        small_prior(cond_drop_prob=1.5)
    with pytest.raises(ValueError, match=r"image_embed_dim: expected width net.embed_dim = 24, got 32"):
        small_prior(image_embed_dim=32)


# ------------------------------------------------------------------------------------------ optimal variance


def test_analytic_variance_samples_the_datas_variance():
    """With the exact network of normal data the reverse steps are normal, and their variance is the one from
    the error: few steps then keep the data's spread, which the posterior's variance alone loses."""
    process = GaussianDiffusion(make_schedule("cosine", 1000), prediction="sample")
    alpha, sigma = (f(torch.arange(1000)) for f in (process.schedule.alpha, process.schedule.sigma))
    error = (DEVIATION**2 * sigma**2) / (alpha**2 * DEVIATION**2 + sigma**2)  # Var(x0 | x_t)
    net = exact_net(process.schedule, "sample")
    options = dict(seeds=torch.arange(50), steps=4, sampler="ddpm", clip=None, dtype=torch.float64)
    plain, optimal = (process.sample(net, (50, 2000), x0_error=x0_error, **options)
                      for x0_error in (None, error))
    assert plain.std().item() < 0.9 * DEVIATION
    assert optimal.std().item() == pytest.approx(DEVIATION, rel=0.02)
    assert optimal.mean().item() == pytest.approx(MEAN, abs=0.01)
    with pytest.raises(ValueError, match=r"x0_error: expected \[timesteps\] = \(1000,\), got \(4,\)"):
        process.sample(net, (50, 8), x0_error=error[:4], **options)
    with pytest.raises(ValueError, match=r"x0_error: expected \[steps\] = \(4,\) numbers >= 0"):
        process.sample(net, (50, 8), x0_error=error - 1, **options)


def test_fit_variance_is_the_error_of_the_network():
    """A network that answers with zero has the error E[x^2] = 1 of scaled unit embeddings, at any time."""
    prior = small_prior(analytic_variance=True, timesteps=100).eval()
    with pytest.raises(RuntimeError, match="needs fit_variance"):
        prior.sample(**caption())
    prior.sample(**caption(), sampler="ddim", steps=2)  # has no use for it
    with torch.no_grad():
        prior.net.proj_out.weight.zero_()
    prior.fit_variance(**caption(), image_embed=image_embeddings(), points=7)
    torch.testing.assert_close(prior.x0_error, torch.ones(100))
    again = DiffusionPrior(**json.loads(json.dumps(prior.config)))
    again.load_state_dict(prior.state_dict())
    seeds = torch.arange(4)
    options = dict(seeds=seeds, steps=4)
    assert torch.equal(again.sample(**caption(), **options), prior.sample(**caption(), **options))
    with pytest.raises(ValueError, match="expected a prior with analytic_variance=True"):
        small_prior().fit_variance(**caption(), image_embed=image_embeddings())
    with pytest.raises(ValueError, match="schedule: analytic_variance needs discrete times"):
        small_prior(analytic_variance=True, schedule="continuous_cosine")


def test_fitted_error_follows_time_and_generator():
    prior = small_prior(analytic_variance=True, timesteps=100).eval()
    found = []
    for seed, points in ((1, 100), (1, 100), (2, 100), (1, 9)):
        generator = torch.Generator().manual_seed(seed)
        prior.fit_variance(**caption(), image_embed=image_embeddings(), points=points, generator=generator)
        found.append(prior.x0_error.clone())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert (found[3].diff().diff().abs() > 1e-4).sum() <= 7 * 2  # straight between the points
