"""Decoders of DALLE2-pytorch: its classes as the oracle, its trainer's files, and damaged ones."""

from __future__ import annotations

import json
import re

import pytest
import torch

from dalle2_fast import functional
from dalle2_fast.adapters.published import Dalle2PytorchDecoder, load_dalle2_pytorch_decoder
from dalle2_fast.checkpoints import CheckpointError
from dalle2_fast.diffusion.sampling import INITIAL_NOISE
from tests.support.tiny_karlo import Malicious, shaken

EMBED, TEXT, SIDE = 20, 12, 16
TIMES = torch.tensor([0, 4, 9])
MASK = torch.arange(7) < torch.tensor([[4], [7], [2]])
THEIR_UNET = dict(
    dim=16, image_embed_dim=EMBED, text_embed_dim=TEXT, cond_dim=24, dim_mults=(1, 2), attn_heads=2,
    attn_dim_head=8, cond_on_text_encodings=True, cond_on_image_embeds=True, max_text_len=9,
)  # fmt: skip
UNET = dict(
    dim=16, widths=[16, 16, 32], blocks=[1, 1], attention=["linear", "self"], groups=[8, 8], channels_out=6,
    cond_dim=24, image_embed_dim=EMBED, text_embed_dim=TEXT, max_text_len=9, heads=2, dim_head=8,
)  # fmt: skip
CONFIG = {"image_size": SIDE}


def rows(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def difference(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


def exact(module):
    """In float64, with the eps that DALLE2-pytorch's norms take in float32 alone."""
    for part in module.modules():
        if hasattr(part, "fp16_eps"):
            part.fp16_eps = part.eps
    return module.double()


def theirs(*unets, **options):
    """DALLE2-pytorch's Decoder with random weights, in float64."""
    package = pytest.importorskip("dalle2_pytorch", reason="DALLE2-pytorch is not installed")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = tuple(package.Unet(**THEIR_UNET | unet) for unet in unets)
        return exact(shaken(package.Decoder(made, **dict(image_size=SIDE, timesteps=10) | options), 0.1))


def caption(dtype=torch.float64):
    return rows(3, EMBED, seed=1, dtype=dtype), rows(3, 7, TEXT, seed=2, dtype=dtype) * MASK[..., None]


def stored(folder, content, name="latest.pth"):
    torch.save(content, folder / name)
    return folder / name


def ours(*changes):
    torch.manual_seed(0)
    stages = [
        dict(unet=UNET | change, image_size=SIDE, timesteps=10, variance="learned_range")
        for change in changes or ({},)
    ]
    return shaken(Dalle2PytorchDecoder(stages))


@torch.no_grad()
@pytest.mark.parametrize("options", [
    {}, dict(memory_efficient=True, sparse_attn=True, self_attn=(False, True), num_resnet_blocks=3),
    dict(cross_embed_downsample=True, scale_skip_connection=True, final_conv_kernel_size=3, resnet_groups=4),
    dict(pixel_shuffle_upsample=False, init_cross_embed=False, cosine_sim_cross_attn=True,
         cosine_sim_self_attn=True, self_attn=True),
], ids=str)  # fmt: skip
def test_the_network_equals_dalle2_pytorchs(tmp_path, options):
    """Catches: any difference of attention, norms, FiLM, changes of resolution, skips or contexts."""
    their = theirs(options)
    config = CONFIG | {"unets": [options]}
    file = stored(tmp_path, {"model": their.state_dict(), "version": "1.15.6"})
    decoder = load_dalle2_pytorch_decoder(file, config, dtype=torch.float64)
    x, (embed, encodings) = rows(3, 3, SIDE, SIDE), caption()
    given = dict(image_embed=embed, text_encodings=encodings)
    expected = their.unets[0](x, TIMES, **given)
    found = decoder.unets[0](x, TIMES, embed, encodings)
    assert difference(found, expected) < 1e-5  # the sines of the time are float32 in ours
    dropped = their.unets[0](x, TIMES, image_cond_drop_prob=1.0, text_cond_drop_prob=1.0, **given)
    keep = torch.zeros(3, dtype=torch.bool)
    assert difference(decoder.unets[0](x, TIMES, embed, encodings, keep=keep), dropped) < 1e-5
    assert difference(dropped, expected) > 1e-2


@torch.no_grad()
def test_the_cascade_equals_dalle2_pytorchs(tmp_path, monkeypatch):
    """Catches: another schedule, variance, bound, size or filter, an upsampler without its small image."""
    upsampler = dict(self_attn=True, cond_on_text_encodings=False, text_embed_dim=None)
    schedules = ["cosine", "cosine"]  # "linear" has no 10 steps
    their = theirs({}, upsampler, image_size=None, image_sizes=(8, SIDE), beta_schedule=schedules)
    file = stored(tmp_path, {"model": their.state_dict(), "version": "1.15.6"})
    decoder = load_dalle2_pytorch_decoder(file, {"image_sizes": [8, SIDE]}, dtype=torch.float64)
    assert [stage["schedule"] for stage in decoder.stages] == schedules
    assert [stage["variance"] for stage in decoder.stages] == ["learned_range", "fixed_small"]
    embed, encodings = caption()
    seeds, draws = torch.tensor([5, 6, 7]), iter([INITIAL_NOISE, *range(10)] * 2)
    from dalle2_fast.seeds import derived_seeds

    both = [seeds, derived_seeds(seeds, 1)]

    def noise(shape, **_):
        step, stage = next(draws), int(shape[-1] == SIDE)
        return functional.sample_noise(both[stage], step, tuple(shape)).double()

    monkeypatch.setattr(torch, "randn", noise)
    monkeypatch.setattr(torch, "randn_like", lambda x: noise(x.shape))
    expected = their.sample(image_embed=embed, text_encodings=encodings)
    monkeypatch.undo()
    found = decoder.sample(embed, text_encodings=encodings, seeds=seeds, steps=10)
    assert difference(found, expected) < 1e-3  # their tables are float32
    second = load_dalle2_pytorch_decoder(file, {"image_sizes": [8, SIDE]}, unets=[2], dtype=torch.float64)
    small = torch.rand(3, 3, 8, 8)
    assert second.sample(embed, image=small, seeds=seeds, steps=2).shape == (3, 3, SIDE, SIDE)
    with pytest.raises(ValueError, match="image: expected exactly where the first stage is an upsampler"):
        second.sample(embed, seeds=seeds)


def test_the_trainers_file_loads_with_its_averages(tmp_path):
    """Catches: a trainer's file that is refused, the wrong weights of the two."""
    theirs({})
    from accelerate import Accelerator
    from dalle2_pytorch.trainer import DecoderTrainer

    trainer = DecoderTrainer(theirs({}).float(), use_ema=True, accelerator=Accelerator(cpu=True), lr=1e-3)
    with torch.no_grad():
        trainer.ema_unets[0].ema_model.to_out.bias.fill_(3.0)
    trainer.save(tmp_path / "latest.pth")
    (tmp_path / "decoder_config.json").write_text(json.dumps({"decoder": CONFIG}))
    decoder = load_dalle2_pytorch_decoder(tmp_path / "latest.pth")
    assert (decoder.unets[0].to_out.bias == 3.0).all()
    last = load_dalle2_pytorch_decoder(tmp_path / "latest.pth", ema=False)
    assert torch.equal(last.unets[0].to_out.bias, trainer.decoder.unets[0].to_out.bias)


def test_the_oldest_names_load(tmp_path):
    """Catches: files of version 0.15, whose norms and attention have other names, read as new ones."""
    decoder = ours(dict(down="conv", up="transposed", scaled_twice=False, unit_values=False))
    state = {}
    for name, tensor in decoder.state_dict().items():
        name = name.replace(".cross_attn.", ".cross_attn.fn.")
        # The norms of pixels have their new names already.
        if name.endswith(".g") and tensor.ndim == 1:
            state[name[:-1] + "beta"] = torch.zeros_like(tensor)
            name = re.sub(r"\.g$", ".gamma", name)
        state[name] = tensor
    loaded = load_dalle2_pytorch_decoder(stored(tmp_path, state), CONFIG)
    assert loaded.unets[0].config == decoder.unets[0].config
    x, (embed, encodings) = rows(3, 3, SIDE, SIDE, dtype=torch.float32), caption(torch.float32)
    args = (x, TIMES, embed, encodings)
    assert torch.equal(loaded.unets[0](*args), decoder.unets[0](*args))


def test_precision_saving_and_guidance(tmp_path):
    """Catches: weights that stay in float16, a changed saved model, a condition that does not arrive."""
    decoder = ours()
    state = {name: x.half() for name, x in decoder.state_dict().items()}
    file = stored(tmp_path, {"model": state, "version": "1.6.5"})
    loaded = load_dalle2_pytorch_decoder(file, CONFIG)
    assert {x.dtype for x in loaded.state_dict().values()} == {torch.float32}
    again = Dalle2PytorchDecoder.from_pretrained(loaded.save_pretrained(tmp_path / "ours"))
    embed, encodings = caption(torch.float32)
    given = dict(text_encodings=encodings, seeds=torch.arange(3), steps=2)
    images = loaded.sample(embed, **given)
    assert images.min() >= 0 and images.max() <= 1 and torch.equal(again.sample(embed, **given), images)
    assert not torch.allclose(loaded.sample(embed, guidance=3.0, **given), images, atol=1e-3)
    assert not torch.allclose(loaded.sample(embed.flip(0), **given), images, atol=1e-3)
    other = loaded.sample(embed, **given | dict(text_encodings=-encodings))
    assert not torch.allclose(other, images, atol=1e-4)
    with pytest.raises(ValueError, match="text_encodings: expected encodings of captions"):
        loaded.sample(embed)


@torch.no_grad()
def test_bfloat16_stays_close():
    """Catches: an argument that is not converted, the time in half precision."""
    decoder = ours()
    x, (embed, encodings) = rows(3, 3, SIDE, SIDE, dtype=torch.float32), caption(torch.float32)
    expected = decoder.unets[0](x, TIMES, embed, encodings)
    half = decoder.bfloat16()
    found = half.unets[0](x.bfloat16(), TIMES, embed.bfloat16(), encodings.bfloat16())
    assert difference(found.float(), expected) < 5e-2
    images = half.sample(embed, text_encodings=encodings, text_mask=MASK, seeds=torch.arange(3), steps=2)
    assert images.dtype == torch.float32 and torch.isfinite(images).all()


@pytest.mark.parametrize(("change", "options", "says"), [
    (lambda t: t.pop("unets.0.mid_block1.block1.project.bias"), {}, r"missing 1 \(decoder.unets.0.mid_bl"),
    (lambda t: t.update({"unets.0.extra": torch.zeros(1)}), {}, r"left over 1 \(decoder.unets.0.extra\)"),
    (lambda t: t.update({"vaes.0.x": torch.zeros(1)}), {}, "left over vaes.0.x"),
    (lambda t: t.update({"unets.0.norm_cond.weight": torch.zeros(2, 3)}), {}, "norm_cond.weight: expected 1"),
    (lambda t: t.update({"unets.0.to_lowres_noise_cond.1.bias": torch.ones(1)}), {}, "to_lowres_noise"),
    (lambda t: t.update({"noise_schedulers.0.betas": torch.full((9,), 0.1)}), {}, "betas: expected those"),
    (lambda t: [t.pop(name) for name in [*t] if "downs" in name], {}, "expected the blocks of a U-Net"),
    (lambda t: None, dict(version=None), "pass version="),
    (lambda t: None, dict(version="0.20.0"), "version: expected one up to 0.15 or from 0.23.6, got 0.2"),
    (lambda t: None, dict(config={}), "image_sizes: expected a config with one side of images per U-Net"),
    (lambda t: None, dict(config=CONFIG | {"use_dynamic_thres": True}), "use_dynamic_thres: this lib"),
    (lambda t: None, dict(config=CONFIG | {"unets": [{"resnet_weight_standardization": True}]}),
     "resnet_weight_standardization: expected False"),
])  # fmt: skip
def test_what_does_not_fit_is_named(tmp_path, change, options, says):
    state = dict(ours().state_dict())
    change(state)
    with pytest.raises(CheckpointError, match=says):
        load_dalle2_pytorch_decoder(stored(tmp_path, state), **dict(config=CONFIG, version="1.6.5") | options)


def test_a_malicious_pickle_is_refused_and_not_run(tmp_path):
    content = {"model": ours().state_dict(), "version": Malicious(tmp_path / "proof")}
    with pytest.raises(CheckpointError, match="nothing in it was run .it asks for (posix|os).system"):
        load_dalle2_pytorch_decoder(stored(tmp_path, content), CONFIG)
    assert not (tmp_path / "proof").exists()


def test_laions_size_on_the_meta_device(tmp_path):
    """Catches: tensors of LAION's decoder (1.5B_laion2B/decoder_config.json) that find no place."""
    package = pytest.importorskip("dalle2_pytorch", reason="DALLE2-pytorch is not installed")
    config = dict(
        dim=320, image_embed_dim=768, text_embed_dim=768, cond_dim=512, dim_mults=(1, 2, 3, 4), attn_heads=8,
        num_resnet_blocks=4, attn_dim_head=64, sparse_attn=True, memory_efficient=True, channels_out=6,
        cond_on_text_encodings=True, cond_on_image_embeds=True, self_attn=(False, True, True, True),
    )  # fmt: skip
    from dalle2_fast.checkpoints.formats.dalle2_pytorch.stored import Stored
    from dalle2_fast.checkpoints.formats.dalle2_pytorch.unet import unet_of

    with torch.device("meta"):
        state = {f"unets.0.{name}": x for name, x in package.Unet(**config).state_dict().items()}
    unet, weights = unet_of(Stored(tmp_path, state, (1, 15, 6), {}, False), 0, config)
    with torch.device("meta"):
        decoder = Dalle2PytorchDecoder([dict(unet=unet, image_size=64, variance="learned_range")])
    expected = {name: x.shape for name, x in decoder.unets[0].state_dict().items()}
    assert {name: x.shape for name, x in weights.items()} == expected
    assert sum(x.numel() for x in weights.values()) == 956_805_318
