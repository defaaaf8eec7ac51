"""The decoder as an editor: what it keeps, what it sees of it, where it starts, and back to the noise."""

from __future__ import annotations

import json

import pytest
import torch

from dalle2_fast.models.decoder.masks import draw_masks
from dalle2_fast.models.decoder.model import Decoder
from tests.models.test_decoder import UNET, batch, fixed, small_decoder

MASK = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
MASK[..., 4:12, 6:] = True
SEEDS = torch.arange(4)
FINE = dict(
    channels=(16,), attention_levels=(0,), patch_size=4, fine=dict(patch_size=2, channels=8, layers=1)
)  # fmt: skip


def edit(decoder: Decoder, **options) -> torch.Tensor:
    image, text, image_embed = batch()
    return decoder.sample(image_embed, text, **dict(seeds=SEEDS, steps=4, image=image, mask=MASK) | options)


@pytest.mark.parametrize("inpaint", [False, True])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_keeps_pixels_to_the_bit_and_repaints_the_rest(inpaint, sampler):
    decoder, image = small_decoder(inpaint=inpaint), batch()[0]
    made = edit(decoder, sampler=sampler, cond_scale=2.0)
    kept = ~MASK.expand_as(image)
    assert torch.equal(made[kept], image[kept])
    assert (made[~kept] - image[~kept]).abs().mean() > 0.05
    again = edit(decoder, sampler=sampler, cond_scale=2.0, resample=2, jump=2)
    assert torch.equal(again[kept], image[kept]) and not torch.equal(again, made)


def test_the_seam_is_seen():
    """What is repainted depends on what is kept; a paste after sampling would not."""
    decoder, image = small_decoder(), batch()[0]
    made, other = edit(decoder), edit(decoder, image=1 - image)
    new = MASK.expand_as(image)
    assert (made[new] - other[new]).abs().mean() > 1e-3


def test_an_inpainting_decoder_sees_the_image_and_the_mask():
    decoder, image = small_decoder(inpaint=True), batch()[0]
    seen = []
    hook = decoder.unet.conv_in.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    edit(decoder, steps=1)
    decoder.sample(batch()[2], batch()[1], seeds=SEEDS, steps=1)
    hook.remove()
    channels, nothing = (torch.pixel_shuffle(x, 2) for x in seen)  # [B, 7, 16, 16]
    assert torch.equal(channels[:, 6:], MASK.float().expand(4, -1, -1, -1))
    assert torch.equal(channels[:, 3:6], (image * 2 - 1).masked_fill(MASK, 0.0))
    assert (nothing[:, 3:6] == 0).all() and (nothing[:, 6:] == 1).all()  # without a mask all is painted


@pytest.mark.parametrize("unet", [{}, FINE, dict(out_channels=6)], ids=["plain", "fine", "learned range"])
def test_a_trained_decoder_becomes_an_inpainting_one_that_draws_the_same(unet):
    options = dict(variance="learned_range", timesteps=20) if "out_channels" in unet else {}
    decoder = small_decoder(unet, **options)
    wider = Decoder.for_inpainting(decoder)
    assert wider.inpaint and wider.channels == 3 and wider.unet.in_channels == 7
    torch.testing.assert_close(edit(wider), edit(decoder), atol=1e-5, rtol=0)
    again = Decoder(**json.loads(json.dumps(wider.config)))
    again.load_state_dict(wider.state_dict())
    assert again.config == wider.config and torch.equal(edit(again), edit(wider))
    with pytest.raises(ValueError, match="decoder: expected one with inpaint=False"):
        Decoder.for_inpainting(wider)


def test_training_reaches_the_new_channels_and_depends_on_the_mask():
    decoder = Decoder.for_inpainting(small_decoder())
    image, text, image_embed = batch()
    losses = [decoder(image, text, image_embed, generator=fixed(seed)) for seed in (0, 1, 0)]
    assert losses[0] != losses[1] and losses[0] == losses[2]
    losses[0].backward()
    gradient = decoder.unet.conv_in.weight.grad.unflatten(1, (7, 4))
    assert all(gradient[:, channel].abs().sum() > 0 for channel in range(7))
    trained = small_decoder(inpaint=True)
    drawn, everything = (
        trained(image, text, image_embed, generator=fixed(), mask=mask)
        for mask in (MASK, torch.ones_like(MASK))
    )
    assert drawn != everything


def test_masks_to_train_on():
    """Shares, sizes and the generator's hand: masks of one kind teach one kind of gap."""
    masks = draw_masks(2000, 16, 24, generator=fixed())
    assert masks.shape == (2000, 1, 16, 24) and masks.dtype == torch.bool
    share = masks.float().mean((1, 2, 3))
    assert (share == 1).float().mean() == pytest.approx(0.2, abs=0.03)
    assert (share == 0).sum() == 0
    border = torch.stack([masks[:, 0, 0, 0], masks[:, 0, 0, -1], masks[:, 0, -1, 0], masks[:, 0, -1, -1]])
    outside = (border.all(0) & (share < 1)).float().mean()
    assert 0.05 < outside < 0.25
    assert share.std() > 0.2 and torch.equal(masks, draw_masks(2000, 16, 24, generator=fixed()))
    assert draw_masks(0, 8, 8).shape == (0, 1, 8, 8)


def test_strength_one_is_all_of_the_steps_and_less_stays_closer_to_the_image():
    decoder = small_decoder(prediction="sample")
    image, text, image_embed = batch()

    def start(strength, **options):
        options = dict(seeds=SEEDS, steps=10, sampler="ddim", init_image=image, strength=strength) | options
        return decoder.sample(image_embed, text, **options)

    plain = decoder.sample(image_embed, text, seeds=SEEDS, steps=10, sampler="ddim")
    assert torch.equal(start(1.0), plain)
    calls = []
    hook = decoder.unet.conv_in.register_forward_pre_hook(lambda _, given: calls.append(given[0]))
    start(0.3)
    assert len(calls) == 3
    calls.clear()
    start(0.001)
    assert len(calls) == 1  # at least the last step
    hook.remove()
    # The last step sees the image almost without noise.
    seen = torch.pixel_shuffle(calls[0], 2)
    torch.testing.assert_close(seen, image * 2 - 1, atol=0.1, rtol=0)
    kept = ~MASK.expand_as(image)
    assert torch.equal(start(0.5, image=image, mask=MASK)[kept], image[kept])


def test_inversion_leads_back():
    """Without shaking the net far: an untrained net that predicts v, near zero, has an almost linear path."""
    torch.manual_seed(0)
    decoder = Decoder(UNET, image_size=16, image_embed_dim=10, text_embed_dim=10, text_encoding_dim=6,
                      variance="fixed_small", prediction="v_prediction")  # fmt: skip
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    image, _, image_embed = batch()
    errors = []
    for steps, refine in ((10, 0), (80, 0), (10, 4)):
        x_T = decoder.invert(image, image_embed, steps=steps, cond_scale=1.5, refine=refine)
        assert x_T.shape == image.shape and x_T.dtype == torch.float32
        options = dict(steps=steps, cond_scale=1.5, sampler="ddim", x_T=x_T, clip=None)
        back = decoder.sample(image_embed, seeds=SEEDS, **options)
        errors.append((back - image).abs().mean().item())
    assert errors[1] < errors[0] / 2 and errors[2] < errors[0] / 2 and errors[1] < 0.02
    wider = Decoder.for_inpainting(decoder)
    torch.testing.assert_close(
        wider.invert(image, image_embed, steps=4), decoder.invert(image, image_embed, steps=4)
    )


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(mask=None), "image, mask: expected both or neither"),
        (dict(mask=MASK[:, :, :8]), r"mask: expected a shape that broadcasts to \(4, 3, 16, 16\)"),
        (dict(mask=MASK.expand(1, 3, 16, 16)), r"mask: expected \[1 or B, 1, H, W\], got \(1, 3, 16, 16\)"),
        (dict(mask=MASK * 0.5), r"mask: expected 0 \(keep\) and 1 \(repaint\) only"),
        (dict(image=batch()[0] * 3), r"image: expected values in \[0, 1\]"),
        (dict(init_image=batch()[0]), "init_image, strength: expected both or neither"),
        (dict(strength=0.5), "init_image, strength: expected both or neither"),
        (dict(init_image=batch()[0], strength=0.0), r"strength: expected a number in \(0, 1\], got 0.0"),
        (dict(init_image=batch()[0], strength=1.5), r"strength: expected a number in \(0, 1\], got 1.5"),
        (dict(init_image=batch()[0][:, :, :8], strength=0.5), r"init_image: expected .*got \(4, 3, 8, 16\)"),
    ],
)
def test_wrong_edits_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        edit(small_decoder(), **options)


def test_impossible_inpainting_is_named():
    with pytest.raises(ValueError, match=r"in_channels = 2 C \+ 1 = 7 for inpaint=True .*, got 5"):
        small_decoder(dict(in_channels=5), inpaint=True)
    image, text, image_embed = batch()
    with pytest.raises(ValueError, match="mask: expected None, because this decoder has inpaint=False"):
        small_decoder()(image, text, image_embed, mask=MASK)
