"""The autoregressive prior: PCA and buckets, the dot product's prefix, the cache, drops, guidance, seeds."""

from __future__ import annotations

import json
import math

import numpy
import pytest
import torch
import torch.nn.functional as F

from dalle2_fast import ARPrior, DiffusionPrior
from dalle2_fast.models.prior.autoregressive import ARPriorNetwork, draw
from dalle2_fast.models.prior.base import best_candidate, candidate_seeds

EMBED, TEXT, LENGTH, KEPT, BUCKETS, DOTS = 24, 20, 9, 6, 16, 8
NET = dict(
    dim=32, depth=2, heads=4, embed_dim=EMBED, text_dim=TEXT, context_length=LENGTH, num_components=KEPT,
    num_buckets=BUCKETS, num_dot_buckets=DOTS,
)


def embeddings(rows: int = 400, seed: int = 1, width: int = EMBED) -> torch.Tensor:
    """Unit vectors around a common direction, with a few strong directions, as CLIP's are."""
    generator = torch.Generator().manual_seed(seed)
    fixed = torch.Generator().manual_seed(99)
    basis = torch.linalg.qr(torch.randn(width, width, generator=fixed))[0]
    spread = torch.randn(rows, width, generator=generator) * 0.7 ** torch.arange(width)
    return F.normalize(2 * basis[0] + spread @ basis, dim=-1)


def small_net(**changes) -> ARPriorNetwork:
    torch.manual_seed(0)
    net = ARPriorNetwork(**NET | changes)
    with torch.no_grad():  # at its small initial weights the context would hardly show
        net.proj_out.weight.mul_(20)
        net.positional_embedding.mul_(20)
        net.code_embedding.weight.mul_(20)
        net.dot_embedding.weight.mul_(20)
    return net


def small_prior(fitted: bool = True, **options) -> ARPrior:
    prior = ARPrior(small_net(), **options)
    if fitted:
        prior.fit(embeddings(), embeddings(seed=2))
    return prior


def caption(rows: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([5, 2, 9, 0, 7, 1])[:rows]
    return dict(
        text_embed=F.normalize(torch.randn(rows, EMBED, generator=generator), dim=-1),
        text_encodings=torch.randn(rows, LENGTH, TEXT, generator=generator),
        text_mask=torch.arange(LENGTH) < lengths[:, None],
    )


def told(row: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return row["text_embed"], row["text_encodings"], row["text_mask"]


def some_codes(rows: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return (torch.randint(BUCKETS, (rows, KEPT), generator=generator),
            torch.randint(DOTS + 1, (rows,), generator=generator))


# ------------------------------------------------------------------------------------------ PCA and buckets


def test_pca_is_numpys():
    """Catches: an uncentred covariance, rising order, columns for rows."""
    prior, x = small_prior(), embeddings().double().numpy() * math.sqrt(EMBED)
    _, sizes, rows = numpy.linalg.svd(x - x.mean(axis=0), full_matrices=False)
    expected = torch.tensor(sizes**2 / (len(x) - 1)).float()
    torch.testing.assert_close(prior.eigenvalues, expected, rtol=1e-4, atol=1e-5)
    cosines = (prior.components.double() * torch.tensor(rows[:KEPT])).sum(dim=1).abs()
    torch.testing.assert_close(cosines, torch.ones(KEPT, dtype=torch.float64), rtol=0, atol=1e-5)
    share = (sizes[:KEPT] ** 2).sum() / (sizes**2).sum()
    assert prior.explained_variance == pytest.approx(share, rel=1e-5)
    torch.testing.assert_close(prior.components @ prior.components.T, torch.eye(KEPT), rtol=0, atol=1e-5)


def test_round_trip_is_within_half_a_bucket():
    """Catches: edges taken for centres, an index off by one, a range that leaves out its own data."""
    prior, x = small_prior(unit_norm=False, embed_scale=3.0), embeddings()
    codes = prior.quantise(x)
    assert codes.shape == (400, KEPT) and codes.dtype == torch.int64
    assert codes.amin(dim=0).eq(0).all() and codes.amax(dim=0).eq(BUCKETS - 1).all()
    error = ((prior.restore(codes) - x) * 3.0) @ prior.components.T
    half = (prior.high - prior.low) / BUCKETS / 2
    assert (error.abs() <= half * (1 + 1e-4)).all()
    assert (error.abs().amax(dim=0) > 0.8 * half).all()  # the bound is tight: buckets are not finer than told
    assert torch.equal(prior.quantise(prior.restore(codes)), codes)


def test_all_components_and_many_buckets_lose_nothing():
    prior = ARPrior(small_net(num_components=EMBED, num_buckets=4096))
    prior.fit(embeddings(), embeddings(seed=2))
    back = prior.restore(prior.quantise(embeddings()))
    torch.testing.assert_close(back, embeddings(), rtol=0, atol=2e-3)
    torch.testing.assert_close(back.norm(dim=-1), torch.ones(400))
    assert prior.explained_variance == pytest.approx(1.0)


def test_what_lies_outside_is_clamped():
    prior = small_prior(unit_norm=False)
    far = 50 * prior.components[0]
    codes = prior.quantise(torch.stack([far, -far]))
    assert codes[:, 0].tolist() == [BUCKETS - 1, 0]


def test_dot_buckets_have_equal_shares():
    """Catches: even steps of the dot product, whose top half would be another half."""
    prior = small_prior()
    dots = (embeddings() * embeddings(seed=2)).sum(dim=-1)
    counts = torch.bucketize(dots, prior.dot_edges, right=True).bincount(minlength=DOTS)
    assert counts.sum() == 400 and (counts - 400 / DOTS).abs().max() <= 2


def test_fit_needs_enough_pairs_and_use_needs_fit():
    prior = small_prior(fitted=False)
    with pytest.raises(RuntimeError, match="ARPrior: call fit"):
        prior(**caption(), image_embed=embeddings(4))
    with pytest.raises(RuntimeError, match="ARPrior: call fit"):
        prior.sample(**caption())
    with pytest.raises(ValueError, match="image_embed: expected more than num_components = 6 .* got 6"):
        prior.fit(embeddings(6), embeddings(6))
    with pytest.raises(ValueError, match=r"text_embed: expected \[B, E\] = \(400, 24\), got \(5, 24\)"):
        prior.fit(embeddings(), embeddings(5))
    with pytest.raises(ValueError, match="expected finite embeddings"):
        prior.fit(embeddings() * float("nan"), embeddings())
    assert not prior.fitted  # a failed fit leaves nothing half done
    prior.fit(embeddings(), embeddings(seed=2))
    assert prior.sample(**caption()).shape == (4, EMBED)


# --------------------------------------------------------------------------------------------------- network


def test_paper_size():
    """319 of 768 dimensions, 1024 buckets, 24 layers of 26 heads x 64: 802 million parameters."""
    with torch.device("meta"):
        prior = ARPrior()
    layer = 12 * 1664**2 + 13 * 1664
    tables = (1024 + 1025 + 78 + 319 + 768 + 768 + 1024) * 1664 + 2 * 1664 + 1024 + 2 * 1664
    assert sum(parameter.numel() for parameter in prior.parameters()) == 24 * layer + tables


def test_each_dimension_sees_only_those_before_it():
    """Catches: a shifted sequence, which would learn to copy and sample noise."""
    net, (codes, dots) = small_net(), some_codes()
    logits = net(codes, dots, *told(caption()))
    assert logits.shape == (4, KEPT, BUCKETS)
    for place in range(KEPT):
        changed = codes.clone()
        changed[:, place] = (codes[:, place] + 5) % BUCKETS
        difference = (net(changed, dots, *told(caption())) - logits).abs().amax(dim=(0, 2))
        assert difference[: place + 1].max() < 1e-5
        assert (difference[place + 1 :] > 1e-3).all()
    other = (net(codes, (dots + 1) % DOTS, *told(caption())) - logits).abs().amax(dim=(0, 2))
    assert (other > 1e-3).all()


def test_padding_changes_nothing():
    net, (codes, dots), words = small_net(), some_codes(), caption()
    logits = net(codes, dots, *told(words))
    noise = torch.where(words["text_mask"][..., None], words["text_encodings"], 100.0)
    torch.testing.assert_close(net(codes, dots, words["text_embed"], noise, words["text_mask"]), logits)
    for i, length in enumerate(words["text_mask"].sum(dim=1).tolist()):
        row = slice(i, i + 1)
        encodings = words["text_encodings"][row, :length] if length else None
        alone = net(codes[row], dots[row], words["text_embed"][row], encodings)
        torch.testing.assert_close(alone, logits[row], rtol=1e-4, atol=1e-4)


def test_cache_equals_no_cache():
    """Catches: keys at a wrong position, a mask that forgets the grown part."""
    net, (codes, dots), words = small_net().double(), some_codes(), caption()
    words = told({k: v if v.dtype == torch.bool else v.double() for k, v in words.items()})
    expected = net(codes, dots, *words)
    prefix = net.remember(*words)
    for place in range(KEPT):
        logits, prefix = net.extend(dots if place == 0 else codes[:, place - 1], place, prefix)
        torch.testing.assert_close(logits, expected[:, place], rtol=1e-9, atol=1e-9)


def test_gradients_reach_every_parameter():
    prior = small_prior(cond_drop_prob=0.0)
    prior(**caption(), image_embed=embeddings(4)).backward()
    silent = [name for name, p in prior.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


# -------------------------------------------------------------------------------------------------- training


def test_loss_is_the_cross_entropy_of_the_buckets():
    prior, words, image = small_prior(cond_drop_prob=0.0), caption(), embeddings(4)
    logits = prior.net(
        prior.quantise(image),
        torch.bucketize((image * words["text_embed"]).sum(-1), prior.dot_edges, right=True),
        words["text_embed"] * math.sqrt(EMBED), words["text_encodings"], words["text_mask"],
    )
    likely = logits.log_softmax(dim=-1).gather(2, prior.quantise(image)[:, :, None])
    torch.testing.assert_close(prior(**words, image_embed=image), -likely.mean())
    with torch.no_grad():
        prior.net.proj_out.weight.zero_()
    assert prior(**words, image_embed=image).item() == pytest.approx(math.log(BUCKETS))


def test_drop_takes_embedding_encodings_and_dot_product():
    """With a drop of 1 nothing of the caption may be left, the dot product with it included."""
    prior, image = small_prior(cond_drop_prob=1.0), embeddings(4)
    losses = [
        prior(**caption(seed=seed), image_embed=image, generator=torch.Generator().manual_seed(0)).item()
        for seed in (0, 1)
    ]
    assert losses[0] == losses[1]
    assert small_prior().cond_drop_prob == 0.1  # the paper's


def test_compiled_training_is_one_graph():
    """Catches: a look at a value in the training step, which breaks the graph and stalls a GPU."""
    prior, words, image = small_prior(cond_drop_prob=0.0), caption(), embeddings(4)
    compiled = torch.compile(prior, backend="eager", fullgraph=True)(**words, image_embed=image)
    torch.testing.assert_close(compiled, prior(**words, image_embed=image))


def test_same_generator_same_loss_and_the_caller_keeps_its_tensors():
    prior, words, image = small_prior(cond_drop_prob=0.5), caption(), embeddings(4)
    kept = {name: tensor.clone() for name, tensor in words.items()} | {"image_embed": image.clone()}
    first, again, other = (
        prior(**words, image_embed=image, generator=torch.Generator().manual_seed(seed)).item()
        for seed in (3, 3, 4)
    )
    assert first == again != other
    prior.sample(**words)
    for name, tensor in (words | {"image_embed": image}).items():
        assert torch.equal(tensor, kept[name]), name


def test_it_learns_the_embedding_of_its_caption():
    """Catches: a loss that falls while what is sampled stays noise."""
    torch.manual_seed(0)
    prior, words, image = ARPrior(ARPriorNetwork(**NET), cond_drop_prob=0.1), caption(), embeddings(4)
    prior.fit(embeddings(), embeddings(seed=2))
    optimiser = torch.optim.AdamW(prior.parameters(), lr=3e-3)
    losses = []
    for step in range(100):
        optimiser.zero_grad()
        generator = torch.Generator().manual_seed(step)
        losses.append(prior(**words, image_embed=image, generator=generator))
        losses[-1].backward()
        optimiser.step()
    assert losses[0] > 2.5 and sum(losses[-10:]) / 10 < 0.4
    drawn = prior.eval().sample(**words, temperature=0, dot_quantile=0.0, cond_scale=1.5)
    torch.testing.assert_close(drawn, prior.restore(prior.quantise(image)))
    assert (drawn * image).sum(dim=-1).min() > 0.9


# -------------------------------------------------------------------------------------------------- sampling


def test_sample_shape_norm_and_seeds():
    """The same seed gives the same embedding, alone or among others; another seed another one."""
    prior, words = small_prior().eval(), caption()
    seeds = torch.tensor([11, 12, 13, 14])
    together = prior.sample(**words, seeds=seeds, cond_scale=2.0)
    assert together.shape == (4, EMBED) and together.dtype == torch.float32
    torch.testing.assert_close(together.norm(dim=-1), torch.ones(4))
    assert torch.equal(prior.sample(**words, seeds=seeds, cond_scale=2.0), together)
    for row in range(4):
        one = {name: tensor[row : row + 1] for name, tensor in words.items()}
        alone = prior.sample(**one, seeds=seeds[row : row + 1], cond_scale=2.0)
        torch.testing.assert_close(alone, together[row : row + 1], rtol=1e-5, atol=1e-6)
    other = prior.sample(**words, seeds=seeds + 100, cond_scale=2.0)
    assert (other - together).norm(dim=-1).min() > 1e-3
    drawn = [prior.sample(**words, generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*drawn)


def test_samples_follow_the_distribution():
    """draw() by even chances has the softmax's frequencies; temperature sharpens, 0 takes the likeliest."""
    logits = torch.tensor([[1.0, -float("inf"), 3.0, 2.0]])
    chance = (torch.arange(40_000) + 0.5) / 40_000
    for temperature in (1.0, 0.5):
        counts = draw(logits.expand(40_000, -1), chance, temperature).bincount(minlength=4) / 40_000
        torch.testing.assert_close(counts, (logits[0] / temperature).softmax(-1), rtol=0, atol=1e-3)
    assert draw(logits, chance[:1], 0).item() == 2
    assert draw(logits, torch.zeros(1)).item() == 0
    assert draw(logits, torch.full((1,), 1 - 2**-24)).item() == 3


def record(prior: ARPrior, monkeypatch) -> list[tuple[torch.Tensor, int]]:
    calls, inner = [], prior.net.extend

    def extend(codes, place, prefix):
        calls.append((codes, place))
        return inner(codes, place, prefix)

    monkeypatch.setattr(prior.net, "extend", extend)
    return calls


@pytest.mark.parametrize("quantile", [0.5, 0.0, 0.875])
def test_dot_product_comes_from_the_top(quantile, monkeypatch):
    """Catches: the lower half, the top bucket alone, guidance that tells the unconditional rows."""
    prior = small_prior().eval()
    calls = record(prior, monkeypatch)
    one = {name: tensor[:1].repeat(40, *[1] * (tensor.ndim - 1)) for name, tensor in caption().items()}
    prior.sample(**one, dot_quantile=quantile, seeds=torch.arange(40), cond_scale=2.0)
    codes, place = calls[0]
    assert place == 0 and len(codes) == 160  # two candidates, two rows each
    assert set(codes[:80].tolist()) == set(range(int(quantile * DOTS), DOTS))
    assert set(codes[80:].tolist()) == {DOTS}
    assert torch.equal(calls[1][0][:80], calls[1][0][80:])
    assert [place for _, place in calls] == list(range(KEPT))


def test_guidance_is_the_formula(monkeypatch):
    """Logits = unconditional + scale (conditional - unconditional), in one pass of twice the rows."""
    prior, words = small_prior().eval(), caption()
    options = dict(seeds=torch.arange(4), num_samples_per_batch=1, temperature=0)
    calls = record(prior, monkeypatch)
    guided = prior.sample(**words, cond_scale=3.0, **options)
    assert {len(codes) for codes, _ in calls} == {8}
    assert torch.equal(prior.sample(**words, guidance=torch.full((4,), 3.0), **options), guided)
    codes, dots = [], calls[0][0][:4]
    empty = torch.zeros(4, BUCKETS)
    for place in range(KEPT):  # without cache, from the whole sequence every time
        so_far = torch.stack([*codes, *[torch.zeros(4, dtype=torch.int64)] * (KEPT - place)], dim=1)
        scaled = words["text_embed"] * math.sqrt(EMBED), words["text_encodings"], words["text_mask"]
        nothing = torch.zeros(4, EMBED), words["text_encodings"], torch.zeros(4, LENGTH, dtype=torch.bool)
        conditional = prior.net(so_far, dots, *scaled)[:, place]
        empty = prior.net(so_far, torch.full((4,), DOTS), *nothing)[:, place]
        codes.append((empty + 3 * (conditional - empty)).argmax(dim=-1))
    assert torch.equal(prior.quantise(guided), prior.quantise(prior.restore(torch.stack(codes, dim=1))))
    assert not torch.equal(prior.sample(**words, **options), guided)


def test_rerank_keeps_the_candidate_nearest_to_the_text():
    """Catches: the first candidate, or the farthest; candidates that share their chances."""
    prior, words = small_prior().eval(), caption()
    seeds = torch.tensor([11, 12, 13, 14])
    best = prior.sample(**words, seeds=seeds, num_samples_per_batch=3)
    three = {name: tensor.repeat_interleave(3, 0) for name, tensor in words.items()}
    # The one candidate of a seed s is drawn by s xor the first offset: undo that, and see all three alone.
    own = candidate_seeds(seeds, 3) ^ candidate_seeds(torch.zeros(1, dtype=torch.int64), 1)
    alone = prior.sample(**three, seeds=own, num_samples_per_batch=1)
    cosines = (alone * three["text_embed"]).sum(-1).unflatten(0, (4, 3))
    assert (cosines.amax(1) > cosines.amin(1) + 1e-3).all()
    torch.testing.assert_close(best, best_candidate(alone, words["text_embed"]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close((best * words["text_embed"]).sum(-1), cosines.amax(1))


def test_progress_counts_dimensions():
    seen = []
    small_prior().eval().sample(
        **caption(), progress=lambda iterable, total: seen.append(total) or iterable
    )
    assert seen == [KEPT]


def test_wrong_inputs():
    prior, words = small_prior(), caption()
    with pytest.raises(ValueError, match=r"dot_quantile: expected a number in \[0, 1\), got 1"):
        prior.sample(**words, dot_quantile=1.0)
    with pytest.raises(ValueError, match="temperature: expected a finite number >= 0, got -1"):
        prior.sample(**words, temperature=-1)
    with pytest.raises(ValueError, match="num_samples_per_batch: expected at least 1, got 0"):
        prior.sample(**words, num_samples_per_batch=0)
    with pytest.raises(ValueError, match="text, text_embed: expected exactly one"):
        prior(image_embed=embeddings(4))
    with pytest.raises(ValueError, match="num_components: expected 1 to embed_dim = 24, got 25"):
        small_net(num_components=25)
    with pytest.raises(ValueError, match="num_buckets: expected at least 2, got 1"):
        small_net(num_buckets=1)
    with pytest.raises(ValueError, match="image_embed_dim: expected width net.embed_dim = 24, got 32"):
        small_prior(image_embed_dim=32)


# ----------------------------------------------------------------------------------- config, dtype, the chain


def test_config_and_state_rebuild_the_prior():
    """Catches: statistics that are not saved, or a loaded prior that thinks it was never fitted."""
    prior = small_prior(cond_drop_prob=0.2).eval()
    again = ARPrior(**json.loads(json.dumps(prior.config))).eval()
    again.load_state_dict(prior.state_dict())
    seeds = torch.arange(4)
    assert torch.equal(again.sample(**caption(), seeds=seeds), prior.sample(**caption(), seeds=seeds))
    assert again.config == prior.config


def test_saved_and_loaded_on_its_own(tmp_path):
    prior = small_prior().eval()
    again = ARPrior.from_pretrained(prior.save_pretrained(tmp_path))
    seeds = torch.arange(4)
    assert torch.equal(again.sample(**caption(), seeds=seeds), prior.sample(**caption(), seeds=seeds))
    with pytest.raises(ValueError, match="expected a DiffusionPrior or a whole chain, got 'ARPrior'"):
        DiffusionPrior.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    prior = small_prior().to(dtype).eval()
    words = {k: v if v.dtype == torch.bool else v.to(dtype) for k, v in caption().items()}
    drawn = prior.sample(**words, seeds=torch.arange(4), cond_scale=2.0)
    assert drawn.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert drawn.isfinite().all()
    assert prior(**words, image_embed=embeddings(4).to(dtype)).isfinite()


@pytest.mark.gpu
def test_on_the_gpu_as_on_the_cpu():
    prior, words, seeds = small_prior().eval(), caption(), torch.arange(4)
    options = dict(cond_scale=2.0, temperature=0)  # a chance near an edge may fall on its other side
    expected = prior.sample(**words, seeds=seeds, **options)
    loss = prior(**words, image_embed=embeddings(4), generator=torch.Generator().manual_seed(0))
    prior, words = prior.cuda(), {name: tensor.cuda() for name, tensor in words.items()}
    drawn = prior.sample(**words, seeds=seeds.cuda(), **options)
    torch.testing.assert_close(drawn.cpu(), expected, rtol=1e-4, atol=1e-4)
    again = prior(**words, image_embed=embeddings(4).cuda(), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(again.cpu(), loss, rtol=1e-4, atol=1e-4)
