"""Our modules in DALLE2-pytorch's trainers and classes. Each test names the fault it would catch."""

from __future__ import annotations

import importlib
import pickle
import sys

import pytest
import torch

from dalle2_fast.adapters import dalle2_pytorch as adapter
from tests.support.tiny_pipeline import tiny_pipeline

TOKENS = torch.tensor([[1, 2, 4, 0, 0, 0, 0, 0], [1, 3, 5, 6, 2, 0, 0, 0], [1, 2, 5, 0, 0, 0, 0, 0]])


def need_theirs():
    return pytest.importorskip("dalle2_pytorch", reason="DALLE2-pytorch is not installed")


@pytest.fixture
def pipe():
    return tiny_pipeline().requires_grad_(True).train()


@pytest.fixture
def images():
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def embed():
    values = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.normalize(values, dim=-1)


def test_without_the_package_it_says_so(monkeypatch):
    """Catches: an import of the package when the adapter is imported; an error that names something else."""
    monkeypatch.setitem(sys.modules, "dalle2_pytorch", None)
    monkeypatch.setitem(sys.modules, "dalle2_pytorch.dalle2_pytorch", None)
    adapter._classes.cache_clear()
    importlib.reload(adapter)
    with pytest.raises(ImportError, match="pip install dalle2-pytorch"):
        adapter.Decoder  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'Unet'"):
        adapter.Unet  # noqa: B018
    adapter._classes.cache_clear()


def test_the_decoder_trainer_trains_and_samples(pipe, images, embed, tmp_path):
    """Catches: weights that its optimiser does not get (text tower, projections), averages that sampling does
    not use, a checkpoint that does not come back."""
    need_theirs()
    from dalle2_pytorch.trainer import DecoderTrainer

    torch.manual_seed(0)
    decoder = adapter.Decoder(pipe.decoder, pipe.upsampler)
    trainer = DecoderTrainer(decoder, lr=3e-3, wd=0.0, ema_beta=0.5, ema_update_after_step=0,
                             ema_update_every=1, accelerator=cpu_accelerator())  # fmt: skip
    before = {name: value.clone() for name, value in pipe.decoder.named_parameters()}
    losses = []
    for _ in range(20):
        losses.append(trainer(images, text=TOKENS, image_embed=embed, unet_number=1))
        trainer.update(unet_number=1)
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    still = [name for name, value in pipe.decoder.named_parameters() if torch.equal(before[name], value)]
    assert not still
    assert trainer(images, unet_number=2) > 0
    trainer.update(unet_number=2)

    sampled = trainer.sample(image_embed=embed, text=TOKENS, seeds=torch.arange(3), steps=2)
    assert sampled.shape == (3, 3, 32, 32) and sampled.min() >= 0 and sampled.max() <= 1
    latest = trainer.sample(image_embed=embed, text=TOKENS, seeds=torch.arange(3), steps=2, use_non_ema=True)
    assert not torch.equal(sampled, latest)
    small = trainer.sample(image_embed=embed, text=TOKENS, stop_at_unet_number=1, max_batch_size=2, steps=2)
    assert small.shape == (3, 3, 16, 16)
    trainer.save(str(tmp_path / "trainer.pt"))
    state = torch.load(tmp_path / "trainer.pt", weights_only=False)
    fresh = tiny_pipeline(seed=1)
    again = adapter.Decoder(fresh.decoder, fresh.upsampler)
    again = DecoderTrainer(again, wd=0.0, accelerator=cpu_accelerator())
    again.load_state_dict(state)
    for name, value in pipe.decoder.state_dict().items():
        assert torch.equal(value, fresh.decoder.state_dict()[name]), name


def test_the_prior_trainer_trains_and_samples(pipe, embed):
    """Catches: an embedding scaled in place (an error in DALLE2-pytorch's prior), a loss that does not
    fall, p_sample_loop's arguments taken for others."""
    need_theirs()
    from dalle2_pytorch.trainer import DiffusionPriorTrainer

    torch.manual_seed(0)
    prior = adapter.DiffusionPrior(pipe.prior, clip=pipe.clip)
    trainer = DiffusionPriorTrainer(prior, lr=3e-3, accelerator=cpu_accelerator(), ema_update_every=1)
    text = prior.clip.embed_text(TOKENS)
    kept = embed.clone()
    cond = dict(text_embed=text.text_embed, text_encodings=text.text_encodings)
    losses = []
    for _ in range(30):
        losses.append(trainer(image_embed=embed, **cond))
        trainer.update()
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])
    assert torch.equal(embed, kept)
    sampled = trainer.p_sample_loop((3, 16), text_cond=cond, timesteps=2)
    assert sampled.shape == (3, 16)
    torch.testing.assert_close(sampled.norm(dim=-1), torch.ones(3))
    assert trainer.sample(TOKENS, num_samples_per_batch=2, timesteps=2).shape == (3, 16)


def test_their_dalle2_runs_our_parts(pipe):
    """Catches: attributes that their pipeline reads and our adapters lack."""
    theirs = need_theirs()
    torch.manual_seed(0)
    whole = theirs.DALLE2(
        prior=adapter.DiffusionPrior(pipe.prior, clip=pipe.clip),
        decoder=adapter.Decoder(pipe.decoder, pipe.upsampler),
    )
    pipe.prior.sample_timesteps = pipe.decoder.sample_timesteps = pipe.upsampler.sample_timesteps = 2
    assert whole(TOKENS, cond_scale=2.0).shape == (3, 3, 32, 32)


def test_their_prior_takes_our_clip(pipe, images):
    """Catches: an attribute of a CLIP that their classes need and the adapter lacks."""
    theirs = need_theirs()
    torch.manual_seed(0)
    clip = adapter.ClipAdapter(pipe.clip)
    net = theirs.DiffusionPriorNetwork(dim=16, depth=1, dim_head=8, heads=2, num_timesteps=8, max_text_len=8)
    prior = theirs.DiffusionPrior(net, clip=clip, timesteps=8, image_embed_dim=16)
    assert prior(TOKENS, images[..., :16, :16]).isfinite()
    # DALLE2-pytorch derives the mask from the encodings that are not zero.
    mask = (clip.embed_text(TOKENS).text_encodings != 0).any(-1)
    assert torch.equal(mask, pipe.clip.encode_text(TOKENS)[2])


def test_pickling_and_class(pipe):
    """Catches: classes that pickle cannot find, which spawned processes and torch.save need."""
    theirs = need_theirs()
    for made, base in ((adapter.Decoder(pipe.decoder), theirs.Decoder),
                       (adapter.DiffusionPrior(pipe.prior), theirs.DiffusionPrior)):  # fmt: skip
        again = pickle.loads(pickle.dumps(made))
        assert isinstance(again, base) and type(again) is type(made)
        assert again.state_dict().keys() == made.state_dict().keys()
    assert adapter.Decoder is adapter.Decoder


def test_wrong_arguments_are_named(pipe, images, embed):
    need_theirs()
    with pytest.raises(TypeError, match="decoder: expected a dalle2_fast.Decoder, got DiffusionPrior"):
        adapter.Decoder(pipe.prior)
    with pytest.raises(ValueError, match="upsampler of stage 3: expected low_res_size = 32, .* got 16"):
        adapter.Decoder(pipe.decoder, pipe.upsampler, pipe.upsampler)
    decoder = adapter.Decoder(pipe.decoder, pipe.upsampler)
    with pytest.raises(ValueError, match="unet_number: expected 1 ... 2, the stage to train, got None"):
        decoder(images, text=TOKENS, image_embed=embed)
    with pytest.raises(ValueError, match="unet_number: expected 1 ... 2, got 3"):
        decoder(images, unet_number=3)
    with pytest.raises(ValueError, match="image: expected at least 32 pixels a side for stage 2"):
        decoder(images[..., :16, :16], unet_number=2)
    with pytest.raises(NotImplementedError, match="inpaint_mask"):
        decoder.sample(image_embed=embed, inpaint_mask=images[:, 0] > 0)
    with pytest.raises(ValueError, match="image: expected exactly where start_at_unet_number"):
        decoder.sample(start_at_unet_number=2)
    with pytest.raises(ValueError, match="text: needs a prior built with clip"):
        adapter.DiffusionPrior(pipe.prior).sample(TOKENS)


def cpu_accelerator():
    from accelerate import Accelerator

    return Accelerator(cpu=True)
