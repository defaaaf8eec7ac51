"""What Karlo's weights need of the models: a second net for the last step, and the caption of the empty text
where other weights have no caption."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from dalle2_fast.models.clip.model import CLIP
from dalle2_fast.models.decoder.encoding import encode_captions
from dalle2_fast.models.decoder.guidance import condition
from dalle2_fast.models.decoder.model import Decoder
from dalle2_fast.models.prior.diffusion import DiffusionPrior
from dalle2_fast.models.upsampler.model import Upsampler
from tests.support.tiny_pipeline import tiny_pipeline

UNET = dict(channels=(16, 16), layers_per_block=1, patch_size=2, num_groups=8)
CONVOLUTIONS = UNET | dict(in_channels=6, out_channels=3, attention_levels=(), film=False, cross_dim=None)


def shaken(module: torch.nn.Module) -> torch.nn.Module:
    """Random weights everywhere: an untrained U-Net answers zero to every input."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module.eval()


def upsampler(**options) -> Upsampler:
    torch.manual_seed(0)
    return shaken(Upsampler(CONVOLUTIONS, image_size=16, low_res_size=8, **options))


def caption(rows: int, seed: int) -> tuple[torch.Tensor, ...]:
    """(embed [rows, 12], encodings [rows, 5, 10], mask), two to five tokens long."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 6, (rows, 1), generator=generator)
    embed = torch.randn(rows, 12, generator=generator)
    return embed, torch.randn(rows, 5, 10, generator=generator), torch.arange(5) < lengths


def named(caption: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    return dict(zip(("text_embed", "text_encodings", "text_mask"), caption, strict=True))


def prior() -> DiffusionPrior:
    torch.manual_seed(0)
    net = dict(dim=16, depth=1, heads=2, dim_head=8, embed_dim=12, text_dim=10, context_length=5)
    return shaken(DiffusionPrior(net, sample_timesteps=3))


def decoder() -> Decoder:
    torch.manual_seed(0)
    unet = UNET | dict(in_channels=3, out_channels=3, attention_levels=(1,), head_dim=8, cross_dim=12)
    return shaken(Decoder(unet, image_size=16, image_embed_dim=12, text_embed_dim=12, text_encoding_dim=10,
                          variance="fixed_small", sample_timesteps=3))


# ------------------------------------------------------------------------------ a net for the last step alone


@pytest.mark.parametrize("steps", [1, 4])
def test_the_last_step_and_no_other_uses_the_second_net(steps, monkeypatch):
    """Karlo's second net finishes the picture; one step more or less of it draws something else."""
    model, called = upsampler(last_unet=CONVOLUTIONS), []
    for name in ("unet", "last_unet"):
        unet = getattr(model, name)
        monkeypatch.setattr(unet, "forward", lambda *x, unet=unet, name=name, **y: (
            called.append(name), type(unet).forward(unet, *x, **y))[1])
    model.sample(torch.rand(2, 3, 8, 8), steps=steps, seeds=torch.arange(2))
    assert called == ["unet"] * (steps - 1) + ["last_unet"]


def test_a_second_net_like_the_first_changes_nothing_and_is_part_of_the_config():
    one, two = upsampler(), upsampler(last_unet=CONVOLUTIONS)
    two = Upsampler(**json.loads(json.dumps(two.config)))
    two.unet.load_state_dict(one.unet.state_dict())
    low_res = torch.rand(1, 3, 8, 8)
    draw = dict(low_res=low_res, steps=3, seeds=torch.arange(1))
    two.last_unet.load_state_dict(one.unet.state_dict())
    torch.testing.assert_close(two.sample(**draw), one.sample(**draw))
    shaken(two.last_unet)
    assert not torch.allclose(two.sample(**draw), one.sample(**draw), atol=1e-3)


def test_a_second_net_of_other_channels_is_refused():
    with pytest.raises(ValueError, match="last_unet: expected out_channels = 3, as the unet has it, got 6"):
        upsampler(last_unet=CONVOLUTIONS | dict(out_channels=6))


# ------------------------------------------------------------------------- a caption in place of no caption


def test_prior_guidance_leads_away_from_the_negative_caption():
    """By hand: uncond + w (cond - uncond), each row predicted on its own, at every step."""
    model, positive, other = prior(), caption(2, seed=1), caption(1, seed=2)
    seen = []
    original = model.net.denoise
    model.net.denoise = lambda x, t, prefix: seen.append((x, t, original(x, t, prefix))) or seen[-1][2]
    model.sample(**named(positive), negative=other, guidance=3.0, num_samples_per_batch=1,
                 seeds=torch.arange(2))
    x, t, out = seen[0]
    scaled = F.normalize(other[0], dim=-1) * model.embed_scale
    expected = model.net(x[2:], t[2:], scaled.expand(2, -1), *(y.expand(2, *y.shape[1:]) for y in other[1:]))
    torch.testing.assert_close(out[2:], expected, rtol=1e-4, atol=1e-5)


def test_decoder_guidance_leads_away_from_the_negative_caption():
    """The unconditional rows have the learned image embedding and the negative caption."""
    model, positive, other = decoder(), caption(2, seed=1), caption(1, seed=2)
    embed = torch.randn(2, 12)
    seen = []
    forward = model.unet.forward
    model.unet.forward = lambda *x: seen.append((x, forward(*x))) or seen[-1][1]
    model.sample(embed, **named(positive), negative=other, guidance=3.0, seeds=torch.arange(2))
    (x, t, *_), out = seen[0]
    other = tuple(y.expand(2, *y.shape[1:]) for y in other)
    context, mask, classes = condition(
        model, 2, None, encode_captions(model, 2, None, other[1], other[2], other[0]),
        torch.zeros(2, dtype=torch.bool), torch.ones(2, dtype=torch.bool),
    )
    torch.testing.assert_close(out[2:], forward(x[2:], t[2:], context, classes, mask), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [prior, decoder])
def test_negative_captions_of_any_length_and_number(make):
    model, positive = make(), named(caption(3, seed=1))
    first = (torch.randn(3, 12),) if make is decoder else ()
    draw = dict(guidance=2.0, seeds=torch.arange(3), **positive)
    embed, encodings, mask = caption(1, seed=2)
    short = (embed, encodings[:, :2], mask[:, :2])
    rows = tuple(torch.cat([x] * 3) for x in short)
    mask = mask & (torch.arange(5) < 2)
    a, b, c = (model.sample(*first, negative=n, **draw) for n in (short, rows, (embed, encodings, mask)))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-5)  # what lies in the padding does not show
    assert not torch.allclose(a, model.sample(*first, **draw), atol=1e-3)
    with pytest.raises(ValueError, match="negative: expected 1 or 3 captions"):
        model.sample(*first, negative=tuple(x[:2] for x in rows), **draw)


# ------------------------------------------------------------------------------------------- in the pipeline


@pytest.mark.parametrize("own_text_encoder", [True, False])
def test_a_negative_prompt_reaches_prior_and_decoder(own_text_encoder):
    pipe = shaken(tiny_pipeline(upsampler=False, own_text_encoder=own_text_encoder))
    options = dict(num_images=3, seed=0, guidance=3.0, prior_guidance=3.0)
    plain = pipe.generate("a red ring", **options)
    other = pipe.generate("a red ring", negative_prompt="a blue square", **options)
    assert not torch.allclose(plain.image_embed, other.image_embed, atol=1e-4)
    in_batches = pipe.generate("a red ring", negative_prompt="a blue square", batch_size=2, **options)
    torch.testing.assert_close(in_batches.images, other.images, rtol=1e-3, atol=1e-4)
    decoder_only = options | dict(prior_guidance=1.0)
    plain = pipe.generate("a red ring", **decoder_only)
    other = pipe.generate("a red ring", negative_prompt="a blue square", **decoder_only)
    assert torch.equal(plain.image_embed, other.image_embed)
    assert not torch.allclose(plain.images, other.images, atol=1e-4)


def test_the_checkpoint_may_have_a_negative_prompt_of_its_own():
    pipe = tiny_pipeline(upsampler=False)
    options = dict(seed=0, guidance=3.0, prior_guidance=3.0)
    wanted = pipe("a red ring", 1, negative_prompt="above", **options)
    pipe.sampling["negative_prompt"] = "above"
    assert torch.equal(pipe("a red ring", 1, **options), wanted)
    with pytest.raises(TypeError, match="negative_prompt: expected a caption, got 3"):
        pipe("a red ring", 1, negative_prompt=3)


def test_the_checkpoint_decides_how_many_candidates_the_prior_draws(monkeypatch):
    pipe, counts = tiny_pipeline(upsampler=False), []
    sample = pipe.prior.sample
    monkeypatch.setattr(pipe.prior, "sample", lambda **options: (
        counts.append(options["num_samples_per_batch"]), sample(**options))[1])
    pipe("a red ring", 1)
    pipe.sampling["prior_candidates"] = 1
    pipe("a red ring", 1)
    assert counts == [2, 1]


def test_nets_trained_on_raw_projections_are_given_those():
    """Karlo's prior and decoder never saw an embedding of length 1."""
    pipe = tiny_pipeline(upsampler=False, own_text_encoder=False)
    raw = pipe.clip.encode_text(pipe.tokenizer.encode("a red ring"), normalize=False)[0]
    pipe.prior.unit_norm = pipe.decoder.unit_norm = False
    pipe.prior.embed_scale = pipe.decoder.embed_scale = 1.0
    seen = []
    sample = pipe.decoder.sample
    pipe.decoder.sample = lambda **options: seen.append(options["text_embed"]) or sample(**options)
    pipe("a red ring", 1)
    torch.testing.assert_close(seen[0], raw)


def test_a_clip_without_an_image_tower():
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in CLIP(visual_kind=None).parameters())
    assert size == 123_650_304 + 1  # the text tower with its projection, and the temperature
    tower = dict(dim_text=16, dim_latent=8, num_text_tokens=9, text_enc_depth=1, text_heads=2)
    clip = CLIP(**tower, visual_kind=None)
    assert clip.encode_text(torch.tensor([[1, 2, 0]]))[0].shape == (1, 8)
    with pytest.raises(ValueError, match="expected a CLIP with an image tower"):
        clip.encode_image(torch.rand(1, 3, 224, 224))
