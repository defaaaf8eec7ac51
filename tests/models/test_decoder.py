"""The decoder: which condition reaches the image, when it is dropped, and that a seed fixes the image."""

from __future__ import annotations

import json

import pytest
import torch

from dalle2_fast.models.captions import Caption
from dalle2_fast.models.clip.model import CLIP
from dalle2_fast.models.decoder.conditioning import ConditionProjection
from dalle2_fast.models.decoder.model import Decoder

UNET = dict(
    in_channels=3,
    out_channels=3,
    channels=(16, 16),
    layers_per_block=1,
    attention_levels=(1,),
    head_dim=8,
    cross_dim=12,
    patch_size=2,
    num_groups=8,
)
TEXT = dict(num_tokens=20, context_length=7, dim=16, depth=1, heads=2, causal=False)


def shake(module: torch.nn.Module) -> None:
    """Random weights everywhere: an untrained U-Net returns zero for every input."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def small_decoder(unet: dict | None = None, **options) -> Decoder:
    torch.manual_seed(0)
    defaults = dict(image_size=16, image_embed_dim=10, text_encoder=TEXT, variance="fixed_small")
    decoder = Decoder(UNET | (unet or {}), **defaults | options)
    shake(decoder)
    return decoder


def batch(size: int = 4):
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(size, 3, 16, 16, generator=generator)
    text = torch.randint(1, 20, (size, 7), generator=generator)
    text[torch.arange(7) >= torch.tensor([4, 2, 5, 3])[:size, None]] = 0
    return image, text, torch.randn(size, 10, generator=generator)


def fixed(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_default_size_is_karlos():
    with torch.device("meta"):
        decoder = Decoder()
    assert sum(p.numel() for p in decoder.text_proj.parameters()) == 7_878_400
    assert sum(p.numel() for p in decoder.parameters()) == 893_318_086


@pytest.mark.parametrize("options", [{}, dict(schedule=dict(name="cosine", timesteps=50))], ids=str)
def test_config_rebuilds_the_same_decoder(options):
    decoder = small_decoder(log_snr_focus=(-4, 1, 0.5), **options)
    again = Decoder(**json.loads(json.dumps(decoder.config)))
    again.load_state_dict(decoder.state_dict())
    assert again.config == decoder.config
    assert torch.equal(again(*batch(), generator=fixed()), decoder(*batch(), generator=fixed()))


@pytest.mark.parametrize(
    "unet, options",
    [
        ({}, {}),
        (dict(out_channels=6), dict(variance="learned_range", timesteps=20)),
        ({}, dict(text_encoder=None, text_embed_dim=5, text_encoding_dim=6)),
    ],
    ids=["plain", "learned range", "encoded captions"],
)
def test_gradients_reach_every_parameter(unet, options):
    """A parameter that training cannot reach: a null embedding, the variance half, the text tower."""
    decoder = small_decoder(unet, image_cond_drop_prob=0.5, text_cond_drop_prob=0.5, **options)
    image, text, image_embed = batch()
    captions = dict(text=text)
    if decoder.text_encoder is None:
        captions = dict(text_encodings=torch.randn(4, 7, 6), text_mask=text > 0, text_embed=torch.randn(4, 5))
    for seed in range(3):
        decoder(image, image_embed=image_embed, generator=fixed(seed), **captions).backward()
    silent = [n for n, p in decoder.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent


def test_learns_the_brightness_of_its_images():
    """Training and sampling agree on sign, range and parametrisation."""
    torch.manual_seed(0)
    decoder = Decoder(
        UNET,
        image_size=16,
        image_embed_dim=10,
        text_encoder=TEXT,
        variance="fixed_small",
        prediction="sample",
        weighting="uniform",
    )
    _, text, image_embed = batch()
    optimiser = torch.optim.Adam(decoder.parameters(), lr=1e-2)
    for step in range(25):
        loss = decoder(torch.full((4, 3, 16, 16), 0.9), text, image_embed, generator=fixed(step))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    drawn = decoder.sample(image_embed, text, seeds=torch.arange(4), steps=4)
    assert abs(drawn.mean().item() - 0.9) < 0.05


@pytest.mark.parametrize("drop_image, drop_text", [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_conditions_are_dropped_independently(drop_image, drop_text):
    """With probability 1 a condition changes nothing, with 0 it always does, regardless of the other one."""
    decoder = small_decoder(image_cond_drop_prob=float(drop_image), text_cond_drop_prob=float(drop_text))
    image, text, image_embed = batch()
    base = decoder(image, text, image_embed, generator=fixed())
    other_image = decoder(image, text, image_embed.flip(0), generator=fixed())
    other_text = decoder(image, text.flip(0), image_embed, generator=fixed())
    assert torch.equal(base, other_image) == bool(drop_image)
    # Flipped captions change the padding of the batch, and so the rounding.
    assert torch.isclose(base, other_text, rtol=1e-5).item() == bool(drop_text)


def test_projection_drops_the_rows_it_is_told_to():
    torch.manual_seed(0)
    projection = ConditionProjection(10, 5, 6, embed_dim=8, cross_dim=12, num_image_tokens=4)
    caption = Caption(torch.randn(3, 5), torch.randn(3, 7, 6), torch.ones(3, 7, dtype=torch.bool))
    keep_image, keep_text = torch.tensor([True, False, False]), torch.tensor([False, True, False])
    context, mask, classes = projection(torch.randn(3, 10), caption, keep_image, keep_text)
    assert context.shape == (3, 4 + 7, 12) and classes.shape == (3, 8)
    assert mask.sum(1).tolist() == [4 + 1, 4 + 7, 4 + 1]  # a dropped caption is one token
    torch.testing.assert_close(context[1, :4], context[2, :4])
    assert (context[0, :4] - context[1, :4]).abs().max() > 0.1
    torch.testing.assert_close(context[0, 4], context[2, 4])
    nothing = projection.image_to_time(projection.null_image_embed) + projection.text_to_time.bias
    torch.testing.assert_close(classes[2], nothing)


def test_does_not_write_into_what_it_is_given():
    """DALLE2-pytorch scales the caller's embedding in place."""
    decoder, given = small_decoder(), batch()
    copies = [value.clone() for value in given]
    decoder(*given, generator=fixed())
    decoder.sample(given[2], given[1], seeds=torch.arange(4), steps=1)
    assert all(torch.equal(value, copy) for value, copy in zip(given, copies, strict=True))


def test_padding_of_captions_does_not_matter():
    """Captions are cut to the longest of the batch, which must change nothing."""
    decoder = small_decoder(text_cond_drop_prob=0.0)
    image, text, image_embed = batch()
    loss = decoder(image, text, image_embed, generator=fixed())
    torch.testing.assert_close(decoder(image, text[:, :5], image_embed, generator=fixed()), loss)
    encodings, mask = decoder.text_encoder.encode_tokens(text)
    encodings = torch.where(mask[..., None], encodings, 1e3)
    given = decoder(image, None, image_embed, text_encodings=encodings, text_mask=mask, generator=fixed())
    torch.testing.assert_close(given, loss)


def test_clip_encodes_what_is_not_given():
    torch.manual_seed(0)
    clip = CLIP(
        dim_text=16,
        dim_image=16,
        dim_latent=10,
        num_text_tokens=20,
        text_enc_depth=1,
        text_seq_len=7,
        text_heads=2,
        visual_enc_depth=1,
        visual_heads=2,
        visual_image_size=8,
        visual_patch_size=4,
    )
    decoder = small_decoder(clip=clip, text_encoder=None, image_embed_dim=None)
    assert (decoder.image_embed_dim, decoder.text_embed_dim, decoder.text_encoding_dim) == (10, 10, 16)
    assert not any(name.startswith("clip") for name in decoder.state_dict())
    image, text, _ = batch()
    loss = decoder(image, text, generator=fixed())
    loss.backward()
    assert loss.isfinite() and all(parameter.grad is None for parameter in clip.parameters())
    embed, encodings, mask = clip.encode_text(text)
    given = dict(text_encodings=encodings, text_mask=mask, text_embed=embed)
    small = torch.nn.functional.interpolate(image, (8, 8), mode="bicubic", antialias=True).clamp(0, 1)
    again = decoder(image, image_embed=clip.encode_image(small), generator=fixed(), **given)
    torch.testing.assert_close(again, loss)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_same_seed_same_picture_whatever_the_batch(sampler):
    decoder = small_decoder()
    _, text, image_embed = batch()
    options = dict(steps=4, cond_scale=2.0, sampler=sampler)
    images = decoder.sample(image_embed, text, seeds=torch.tensor([5, 6, 7, 5]), **options)
    assert images.shape == (4, 3, 16, 16) and images.dtype == torch.float32
    assert 0 <= images.min() and images.max() <= 1 and images.std() > 0.01
    alone = decoder.sample(image_embed[2:3], text[2:3], seeds=torch.tensor([7]), **options)
    torch.testing.assert_close(images[2:3], alone, atol=1e-4, rtol=0)
    other = decoder.sample(image_embed[2:3], text[2:3], seeds=torch.tensor([8]), **options)
    assert (other - alone).abs().max() > 0.01


def test_seeds_come_from_the_generator():
    decoder = small_decoder()
    _, text, image_embed = batch()
    pictures = [decoder.sample(image_embed, text, generator=fixed(seed), steps=2) for seed in (3, 3, 4)]
    assert torch.equal(pictures[0], pictures[1]) and not torch.equal(pictures[0], pictures[2])


def test_guidance_is_one_batched_call_per_step_with_the_unconditional_rows_last():
    decoder = small_decoder()
    _, text, image_embed = batch(2)
    shapes = []
    hook = decoder.unet.conv_in.register_forward_pre_hook(lambda _, given: shapes.append(given[0].shape[0]))
    seeds = torch.arange(2)
    guided = decoder.sample(image_embed, text, seeds=seeds, steps=3, cond_scale=3.0, sampler="ddim")
    assert shapes == [4, 4, 4]
    plain = decoder.sample(image_embed, text, seeds=seeds, steps=3, sampler="ddim")
    assert shapes[3:] == [2, 2, 2]
    hook.remove()
    nothing = decoder.sample(image_embed, text, seeds=seeds, steps=3, cond_scale=0.0, sampler="ddim")
    unconditional = decoder.sample(batch_size=2, seeds=seeds, steps=3, sampler="ddim")
    torch.testing.assert_close(nothing, unconditional, atol=1e-5, rtol=0)
    assert (guided - plain).abs().max() > 1e-3 and (unconditional - plain).abs().max() > 1e-3
    per_image = torch.tensor([3.0, 1.0])
    mixed = decoder.sample(image_embed, text, seeds=seeds, steps=3, guidance=per_image, sampler="ddim")
    torch.testing.assert_close(mixed[0], guided[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(mixed[1], plain[1], atol=1e-5, rtol=0)


def test_steps_outside_the_guidance_interval_have_the_conditional_rows_alone():
    """Catches: unconditional rows in such steps, and a cached context or class embedding of other rows."""
    decoder = small_decoder().double()
    _, text, image_embed = batch(3)
    log_snr = decoder.diffusion.schedule.log_snr(decoder.diffusion.times(4)).tolist()
    shapes = []
    hook = decoder.unet.conv_in.register_forward_pre_hook(lambda _, given: shapes.append(given[0].shape[0]))

    def sample(interval, **options):
        shapes.clear()
        given = dict(seeds=torch.arange(3), steps=4, sampler="dpm++", guidance_interval=interval) | options
        return decoder.sample(image_embed.double(), text, **given)

    # A negative caption that is longer than the captions pads the conditional rows, too.
    for options in (dict(cond_scale=3.0), dict(cond_scale=3.0, negative=torch.ones(1, 7, dtype=torch.int64))):
        everywhere = sample((-100.0, 100.0), **options)
        assert shapes == [6] * 4 and torch.equal(everywhere, sample(None, **options))
        half = sample((log_snr[1], log_snr[3]), **options)
        assert shapes == [3, 6, 6, 3] and (half - everywhere).abs().max() > 1e-3
        nowhere = sample((0.0, 0.0), **options)
        assert shapes == [3] * 4
        torch.testing.assert_close(nowhere, sample(None), atol=1e-12, rtol=0)
    x_T = decoder.invert(
        nowhere, image_embed.double(), text, steps=4, cond_scale=3.0, guidance_interval=(0.0, 0.0)
    )
    plain = decoder.invert(nowhere, image_embed.double(), text, steps=4)
    torch.testing.assert_close(x_T, plain, atol=1e-12, rtol=0)
    hook.remove()


def test_a_tenth_of_the_images_and_half_of_the_captions_are_dropped():
    """The paper's rates, as defaults, and independently: 1/20 of the rows see neither."""
    decoder, seen = small_decoder(), []
    inner = decoder.text_proj.forward

    def spy(image_embed, caption, keep_image, keep_text):
        seen.append((keep_image, keep_text))
        return inner(image_embed, caption, keep_image, keep_text)

    decoder.text_proj.forward = spy
    image, text, image_embed = (x.repeat(256, *[1] * (x.ndim - 1)) for x in batch())
    with torch.no_grad():
        decoder(image, text, image_embed, generator=fixed())
    ((keep_image, keep_text),) = seen
    assert (~keep_image).float().mean().item() == pytest.approx(0.1, abs=0.03)
    assert (~keep_text).float().mean().item() == pytest.approx(0.5, abs=0.05)
    assert (~keep_image & ~keep_text).float().mean().item() == pytest.approx(0.05, abs=0.02)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_guidance_and_its_rescaling_are_their_formulas(prediction, rescale):
    """One step in float64: out = u + w (c - u), then phi out std(c) / std(out) + (1 - phi) out."""
    schedule = dict(name="continuous_log_linear", log_snr_min=0.0)  # where x0 is not all beyond its bound
    decoder = small_decoder(prediction=prediction, schedule=schedule).double()
    _, text, image_embed = batch(2)
    outputs = []
    hook = decoder.unet.register_forward_hook(lambda _, given, out: outputs.append((given[0], out)))
    made = decoder.sample(
        image_embed.double(), text, seeds=torch.arange(2), steps=1, cond_scale=3.0, sampler="ddim",
        guidance_rescale=rescale,
    )  # fmt: skip
    hook.remove()
    ((x, output),) = outputs
    x, (with_it, without) = x[:2], output.chunk(2)
    guided = without + 3.0 * (with_it - without)
    spread = [y.flatten(1).std(1)[:, None, None, None] for y in (with_it, guided)]
    guided = rescale * guided * spread[0] / spread[1] + (1 - rescale) * guided
    t = torch.tensor(1.0)
    alpha, sigma = decoder.diffusion.schedule.alpha(t), decoder.diffusion.schedule.sigma(t)
    x0 = {
        "sample": guided, "epsilon": (x - sigma * guided) / alpha, "v_prediction": alpha * x - sigma * guided,
    }[prediction]  # fmt: skip
    assert (x0.abs() < 1).float().mean() > 0.2
    torch.testing.assert_close(made, (x0.clamp(-1, 1) + 1) / 2, rtol=0, atol=1e-9)


def test_each_condition_alone_is_enough():
    decoder = small_decoder()
    _, text, image_embed = batch(2)
    seeds = torch.arange(2)
    pictures = [
        decoder.sample(image_embed, seeds=seeds, steps=2),
        decoder.sample(text=text, seeds=seeds, steps=2),
        decoder.sample(image_embed, text, seeds=seeds, steps=2),
    ]
    for first in range(3):
        for second in range(first):
            assert (pictures[first] - pictures[second]).abs().max() > 1e-3


def test_learned_range_samples_and_other_sizes():
    decoder = small_decoder(dict(out_channels=6), variance="learned_range", timesteps=20)
    _, text, image_embed = batch(2)
    images = decoder.sample(image_embed, text, seeds=torch.arange(2), steps=5, cond_scale=2.0, size=(8, 24))
    assert images.shape == (2, 3, 8, 24) and images.isfinite().all()


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_the_image_embedding_may_give_no_tokens():
    # Catches: "cannot reshape" of a projection to no tokens; the class embedding still depends on the image.
    decoder = small_decoder(num_image_tokens=0)
    _, text, image_embed = batch(2)
    options = dict(seeds=torch.arange(2), steps=2)
    one, other = (decoder.sample(each, text, **options) for each in (image_embed, -image_embed))
    assert one.shape == (2, 3, 16, 16) and not torch.equal(one, other)


def test_pixel_weight_counts():
    decoder = small_decoder()
    image, text, image_embed = batch()
    base = decoder(image, text, image_embed, generator=fixed())
    double = decoder(
        image, text, image_embed, generator=fixed(), pixel_weight=torch.full((4, 1, 16, 16), 2.0)
    )
    torch.testing.assert_close(double, 2 * base)


def test_wrong_inputs_are_named():
    decoder = small_decoder()
    image, text, image_embed = batch()
    with pytest.raises(ValueError, match=r"image: expected values in \[0, 1\], got .* to 2"):
        decoder(image * 0 + 2, text, image_embed)
    with pytest.raises(ValueError, match=r"image: expected values in \[0, 1\]"):
        decoder(image * float("nan"), text, image_embed)
    with pytest.raises(ValueError, match=r"image: expected .* with H, W = 16, 16, got \(4, 3, 8, 8\)"):
        decoder(image[..., :8, :8], text, image_embed)
    with pytest.raises(TypeError, match="image: expected a floating-point tensor .* got torch.uint8"):
        decoder((image * 255).byte(), text, image_embed)
    with pytest.raises(ValueError, match=r"image_embed: expected \[B, E\] = \(4, 10\), got \(4, 9\)"):
        decoder(image, text, image_embed[:, :9])
    with pytest.raises(ValueError, match=r"text: expected \[B, L, D\] = \(4, L, 16\), got \(3, 7, 16\)"):
        decoder(image, text[:3], image_embed)
    with pytest.raises(ValueError, match="text: expected token ids or text_encodings .* got neither"):
        decoder(image, image_embed=image_embed)
    with pytest.raises(ValueError, match="image_embed: expected .* only a decoder built with clip"):
        decoder(image, text)
    with pytest.raises(ValueError, match="expected either text or text_encodings"):
        decoder(image, text, image_embed, text_encodings=torch.randn(4, 7, 16))
    with pytest.raises(ValueError, match="at least one of them, or a batch_size"):
        decoder.sample(steps=1)
    with pytest.raises(ValueError, match=r"seeds: expected int64 \[B\] = \(4,\), got torch.float32 \(4,\)"):
        decoder.sample(image_embed, seeds=torch.zeros(4), steps=1)
    with pytest.raises(ValueError, match="has neither: pass text_encodings"):
        small_decoder(text_encoder=None)(image, text, image_embed)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(variance="learned_range"), "out_channels = 6 for variance='learned_range', got 3"),
        (dict(image_size=18), "image_size: expected a multiple of the unet's 4, got 18"),
        (dict(text_cond_drop_prob=1.5), r"text_cond_drop_prob: expected a probability in \[0, 1\], got 1.5"),
        (dict(text_embed_dim=9), "expected the text_encoder's 16, got 9"),
        (dict(num_image_tokens=-1), "num_image_tokens: expected at least 0, got -1"),
    ],
)
def test_impossible_configurations_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        small_decoder(**options)
