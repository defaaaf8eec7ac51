"""Priors of DALLE2-pytorch: its classes as the oracle, its trainer's files, and files that are not right."""

from __future__ import annotations

import json
import re

import pytest
import torch

from dalle2_fast import functional
from dalle2_fast.adapters.published import Dalle2PytorchPrior, load_dalle2_pytorch_prior
from dalle2_fast.checkpoints import CheckpointError
from dalle2_fast.diffusion.sampling import INITIAL_NOISE
from dalle2_fast.models.prior.base import candidate_seeds
from tests.support.tiny_karlo import Malicious, shaken

DIM, LENGTH = 48, 12
NET = dict(dim=DIM, depth=2, heads=3, dim_head=40, ff_inner=4 * DIM, num_timesteps=10, max_text_len=LENGTH)
TIMES = torch.tensor([0, 4, 9])
MASK = torch.arange(9) < torch.tensor([[4], [9], [2]])


def rows(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def difference(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


def inputs(dtype=torch.float64):
    """Noised embeddings, times, embeddings and encodings of captions; encodings of padding are zero."""
    encodings = rows(3, 9, DIM, seed=2, dtype=dtype) * MASK[..., None]
    return rows(3, DIM, dtype=dtype), TIMES, rows(3, DIM, seed=1, dtype=dtype), encodings


def theirs(**options):
    """DALLE2-pytorch's DiffusionPrior with random weights, in float64."""
    package = pytest.importorskip("dalle2_pytorch", reason="DALLE2-pytorch is not installed")
    shared = dict(dim=DIM, depth=2, num_timesteps=10, dim_head=40, heads=3, max_text_len=LENGTH)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = package.DiffusionPriorNetwork(**shared | options)
        prior = package.DiffusionPrior(net, image_embed_dim=DIM, timesteps=10, cond_drop_prob=0.1)
        kept = {name: x.clone() for name, x in prior.named_parameters() if name.endswith("freqs")}
        shaken(prior, 0.1).load_state_dict(kept, strict=False)
    for module in prior.modules():
        if hasattr(module, "fp16_eps"):  # its norms take this one in float64, too
            module.fp16_eps = module.eps
    return prior.double()


def stored(folder, content, name="prior.pth"):
    torch.save(content, folder / name)
    return folder / name


def state_of(prior):
    """Its weights as DALLE2-pytorch stores them: with the frequencies of the rotation."""
    name = "net.causal_transformer.layers.0.0.rotary_emb.freqs"
    return prior.state_dict() | {name: 10000.0 ** (-torch.arange(0, 32, 2) / 32)}


def ours(**net):
    torch.manual_seed(0)
    return shaken(Dalle2PytorchPrior(NET | net, timesteps=10))


@torch.no_grad()
@pytest.mark.parametrize("options", [
    {}, dict(normformer=True, norm_in=True), dict(rotary_emb=False, norm_out=False, final_proj=False),
    dict(num_time_embeds=2, num_image_embeds=2, num_text_embeds=3, ff_mult=2),
], ids=str)  # fmt: skip
def test_the_network_equals_dalle2_pytorchs(tmp_path, options):
    """Catches: any difference of attention, rotation, bias, gates, norms, order of tokens or padding."""
    their = theirs(**options)
    config = {"net": {"rotary_emb": options.get("rotary_emb", True)}}
    prior = load_dalle2_pytorch_prior(stored(tmp_path, their.state_dict()), config, dtype=torch.float64)
    x, t, embed, encodings = inputs()
    expected = their.net(x, t, text_embed=embed, text_encodings=encodings)
    assert difference(prior.net(x, t, embed, encodings), expected) < 1e-6
    dropped = their.net(x, t, text_embed=embed, text_encodings=encodings, text_cond_drop_prob=1.0,
                        image_cond_drop_prob=1.0)  # fmt: skip
    keep = torch.zeros(3, dtype=torch.bool)
    assert difference(prior.net(x, t, embed, encodings, keep=keep), dropped) < 1e-6
    assert difference(dropped, expected) > 1e-2
    assert difference(prior.net(x, t, embed), their.net(x, t, text_embed=embed)) < 1e-6


@torch.no_grad()
def test_the_whole_chain_equals_dalle2_pytorchs(tmp_path, monkeypatch):
    """Catches: another schedule, variance, scale of the embeddings, bound or guidance."""
    their = theirs()
    prior = load_dalle2_pytorch_prior(stored(tmp_path, their.state_dict()), dtype=torch.float64)
    _, _, embed, encodings = inputs()
    seeds = candidate_seeds(torch.tensor([5, 6, 7]), 1)
    draws = iter([INITIAL_NOISE, *range(10)])

    def noise(shape, **_):
        step = next(draws)
        return functional.sample_noise(seeds, step, tuple(shape)).double()

    monkeypatch.setattr(torch, "randn", noise)
    monkeypatch.setattr(torch, "randn_like", lambda x: noise(x.shape))
    condition = dict(text_embed=embed, text_encodings=encodings)
    expected = their.p_sample_loop((3, DIM), text_cond=condition, cond_scale=2.0)
    monkeypatch.undo()
    found = prior.sample(**condition, num_samples_per_batch=1, seeds=torch.tensor([5, 6, 7]), steps=10,
                         cond_scale=2.0)  # fmt: skip
    assert difference(found, expected) < 1e-3  # their tables are float32
    other = prior.sample(**condition, num_samples_per_batch=1, seeds=torch.tensor([5, 6, 7]), steps=10)
    assert difference(other, expected) > 1e-2


def test_the_trainers_file_loads_with_its_average(tmp_path):
    """Catches: a trainer's file that is refused for its version object, the wrong weights of the two."""
    pytest.importorskip("pytorch_warmup", reason="DALLE2-pytorch is not installed")
    theirs()
    from accelerate import Accelerator
    from dalle2_pytorch.trainer import DiffusionPriorTrainer

    trainer = DiffusionPriorTrainer(
        theirs().float(), use_ema=True, accelerator=Accelerator(cpu=True), warmup_steps=None, lr=1e-3
    )
    with torch.no_grad():
        trainer.ema_diffusion_prior.ema_model.net.learned_query.fill_(3.0)
    trainer.save(tmp_path / "latest.pth")
    prior = load_dalle2_pytorch_prior(tmp_path / "latest.pth")
    assert (prior.net.learned_query == 3.0).all()
    last = load_dalle2_pytorch_prior(tmp_path / "latest.pth", ema=False)
    assert torch.equal(last.net.learned_query, trainer.diffusion_prior.net.learned_query)


def renamed_to(version, state):
    """A state_dict under the names of an older version."""
    if version == "0.15.4":
        state = {re.sub(r"\.g$", ".gamma", name): x for name, x in state.items()}
        gains = {name: x for name, x in state.items() if name.endswith("gamma")}
        state |= {name[:-5] + "beta": torch.zeros_like(x) for name, x in gains.items()}
    return state


@pytest.mark.parametrize(("version", "options"), [
    ("0.15.4", dict(padding="masked", max_text_len=None, cosine_sim=False, divides=False)),
    ("0.26.2", dict(padding="text", cosine_sim=False, bias_scale=128.0)),
    ("1.6.5", dict(padding="text")),
    ("1.11.0", {}),
])  # fmt: skip
def test_the_version_decides(tmp_path, version, options):
    """Catches: a version that is read as another one, with other attention, norms or padding."""
    prior = ours(**options)
    content = {"model": renamed_to(version, state_of(prior)), "version": version}
    loaded = load_dalle2_pytorch_prior(stored(tmp_path, content))
    full = {"bias_scale": 1.0, "divides": True, "cosine_sim": True, "padding": "all"} | options
    assert {name: loaded.net.config[name] for name in full} == full
    x, t, embed, encodings = inputs(torch.float32)
    assert torch.equal(loaded.net(x, t, embed, encodings), prior.net(x, t, embed, encodings))
    condition = dict(text_embed=embed, text_encodings=encodings, seeds=torch.arange(3), steps=2)
    if options.get("padding") == "text":
        with pytest.raises(ValueError, match="guidance: expected 1, because this version"):
            loaded.sample(**condition, guidance=2.0)
    else:
        guided = loaded.sample(**condition, guidance=2.0)
        assert not torch.allclose(guided, loaded.sample(**condition))


def test_configuration_precision_and_saving(tmp_path):
    """Catches: a configuration that is not read, weights that stay in float16, a changed saved model."""
    prior = ours()
    file = stored(tmp_path, {name: x.half() for name, x in state_of(prior).items()})
    (tmp_path / "prior_config.json").write_text(json.dumps({"prior": {
        "net": {"dim": DIM}, "predict_x_start": True, "beta_schedule": "linear", "image_embed_scale": 2.0,
        "sampling_final_clamp_l2norm": True, "sample_timesteps": 5,
    }}))  # fmt: skip
    loaded = load_dalle2_pytorch_prior(file)
    assert {x.dtype for x in loaded.state_dict().values()} == {torch.float32}
    assert (loaded.embed_scale, loaded.unit_norm, loaded.sample_timesteps) == (2.0, True, 5)
    assert loaded.diffusion.schedule.name == "linear" and loaded.diffusion.schedule.timesteps == 10
    with pytest.raises(CheckpointError, match="self_cond: this library has no such option"):
        load_dalle2_pytorch_prior(file, config={"net": {"self_cond": True}})
    with pytest.raises(CheckpointError, match="beta_schedule: expected cosine or linear, got 'jsd'"):
        load_dalle2_pytorch_prior(file, config={"beta_schedule": "jsd"})
    again = Dalle2PytorchPrior.from_pretrained(loaded.save_pretrained(tmp_path / "ours"))
    condition = dict(text_embed=rows(2, DIM, dtype=torch.float32), seeds=torch.arange(2))
    assert torch.equal(again.sample(**condition), loaded.sample(**condition))


@torch.no_grad()
def test_half_precision_stays_close(tmp_path):
    """Catches: angles of the rotation, or another small number, that half precision spoils."""
    net = dict(max_text_len=200)
    file = stored(tmp_path, state_of(ours(**net)))
    x, t, embed, encodings = inputs(torch.float32)
    full, half = (load_dalle2_pytorch_prior(file, dtype=dtype) for dtype in (torch.float32, torch.float16))
    expected = full.net(x, t, embed, encodings)
    assert difference(half.net(x, t, embed, encodings).float(), expected) < 5e-3
    sampled = half.sample(text_embed=embed, text_encodings=encodings, seeds=torch.arange(3), steps=2)
    assert sampled.dtype == torch.float32 and torch.isfinite(sampled).all()


def test_a_clip_in_the_file_is_left_alone(tmp_path):
    """Catches: priors that were saved with their CLIP and are refused for its tensors."""
    state = state_of(ours()) | {"clip.clip.logit_scale": torch.zeros(())}
    assert load_dalle2_pytorch_prior(stored(tmp_path, state)).net.dim == DIM


@pytest.mark.parametrize(("change", "options", "says"), [
    (lambda t: t.pop("net.causal_transformer.layers.1.0.to_q.weight"), {}, r"missing 1 \(prior.net.causal"),
    (lambda t: t.update({"net.extra": torch.zeros(1)}), {}, r"left over 1 \(prior.net.extra\)"),
    (lambda t: t.update({"other.x": torch.zeros(1)}), {}, r"left over 1 \(other.x\)"),
    (lambda t: t.update({"net.learned_query": torch.zeros(2, 3)}), {}, "learned_query: expected 1 dim"),
    (lambda t: t.pop("net.causal_transformer.layers.0.0.rotary_emb.freqs"), {}, '"rotary_emb": false'),
    (lambda t: t.pop("net.null_text_encodings"), {}, "DALLE2-pytorch 0.16 to 0.22"),
    (lambda t: t.update({"noise_scheduler.betas": torch.full((10,), 0.1)}), {}, "betas: expected those of a"),
    (lambda t: t.update({"net.causal_transformer.layers.0.0.rotary_emb.freqs": torch.ones(16)}), {},
     "expected the frequencies"),
    (lambda t: t.update({"net.null_text_embed": t.pop("net.null_text_encodings")}), {}, "pass version="),
    (lambda t: None, dict(ema=True), "ema=True: the file holds no average"),
    (lambda t: None, dict(version="new"), "version: expected that of DALLE2-pytorch.*got 'new'"),
    (lambda t: [t.pop(name) for name in [*t]] and t.update({"unets.0.x": torch.zeros(1)}), {},
     r"expected a prior, with tensors net\.\.\.\., got unets.0.x"),
])  # fmt: skip
def test_what_does_not_fit_is_named(tmp_path, change, options, says):
    state = state_of(ours())
    change(state)
    with pytest.raises(CheckpointError, match=says):
        load_dalle2_pytorch_prior(stored(tmp_path, state), **options)


@pytest.mark.parametrize("key", ["version", "model", "warmup_scheduler"])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, key):
    """Catches: objects of a trainer that are allowed, and with them any code."""
    content = {"model": ours().state_dict(), key: Malicious(tmp_path / "proof")}
    with pytest.raises(CheckpointError, match="nothing in it was run .it asks for (posix|os).system"):
        load_dalle2_pytorch_prior(stored(tmp_path, content))
    assert not (tmp_path / "proof").exists()


def test_laions_size_on_the_meta_device():
    """Catches: LAION's configuration (prior.md of DALLE2-pytorch) that makes another network."""
    net = dict(dim=768, depth=24, dim_head=64, heads=32, ff_inner=4 * 768, normformer=True, max_text_len=77)
    with torch.device("meta"):
        prior = Dalle2PytorchPrior(net)
    count = sum(x.numel() for x in prior.parameters())
    block = 2 * 768 * 2048 + 2 * 768 * 64 + 2 * 64 + 3 * 768 * 3072 + 3 * 768 + 3072
    assert count == 24 * block + 768 * 768 + 768 + 32 * 32 + 1000 * 768 + 768 + 77 * 768 + 2 * 768
