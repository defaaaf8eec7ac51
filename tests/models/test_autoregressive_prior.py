"""The autoregressive prior: its loss, drops, guidance, the dot product's prefix, candidates, seeds."""

from __future__ import annotations

import json
import math

import pytest
import torch

from dalle2_fast import ARPrior, DiffusionPrior
from dalle2_fast.models.prior import ARPriorNetwork
from dalle2_fast.models.prior.base import best_candidate, candidate_seeds
from tests.support.small_autoregressive_prior import (
    BUCKETS,
    DOTS,
    EMBED,
    KEPT,
    LENGTH,
    NET,
    caption,
    embeddings,
    small_net,
    small_prior,
)

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
    undone = candidate_seeds(seeds, 3) ^ candidate_seeds(torch.zeros(1, dtype=torch.int64), 1)
    alone = prior.sample(**three, seeds=undone, num_samples_per_batch=1)
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
    with pytest.raises(ValueError, match="expected a DiffusionPrior or a DALLE2, got 'ARPrior'"):
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
