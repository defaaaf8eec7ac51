"""Image editing on a tiny random pipeline: identities that hold for any weights."""

from __future__ import annotations

import pytest
import torch

from dalle2_fast import DALLE2, Upsampler
from dalle2_fast.models.prior.pca import PCA
from dalle2_fast.pipeline import editing
from tests.support.tiny_pipeline import shaken_pipeline, tiny_pipeline


@pytest.fixture(scope="module")
def pipe():
    return shaken_pipeline()


def picture(seed: int = 0, side: int = 32) -> torch.Tensor:
    return torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(seed))


def close(a, b, atol=1e-4):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def test_variations(pipe):
    """They differ from each other, not with their number; eta 0 from the image's noise has one outcome."""
    four = pipe.variations(picture(), 4, seed=3)
    assert four.images.shape == (4, 3, 32, 32) and four.seed == 3
    close(pipe.variations(picture(), 2, seed=3, batch_size=1).images, four.images[:2])
    assert (four.images[0] - four.images[1]).abs().max() > 0.01
    assert (pipe.variations(picture(), 1, seed=4).images - four.images[:1]).abs().max() > 0.01
    calm = pipe.variations(picture(), 2, eta=0.0, inversion_steps=4, seed=3)
    close(calm.low_res[0], calm.low_res[1])
    prompted = pipe.variations(picture(), 1, prompt="a red ring", seed=3)
    assert (prompted.low_res - four.low_res[:1]).abs().max() > 1e-3
    several = pipe.variations(torch.cat([picture(0), picture(1)]), 2, seed=3)
    close(several.images[:2], four.images[:2])


def test_interpolation_ends_are_the_ends(pipe):
    first, second = picture(0), picture(1)
    frames = pipe.interpolate(first, second, 5, seed=2)
    for index, end in ((0, first), (4, second)):
        close(frames.image_embed[index], pipe.embed_image(end)[0])
        close(frames.images[index], pipe.decode(pipe.embed_image(end), seed=2).images[0])
    close(frames.image_embed.norm(dim=1), torch.ones(5))
    three = pipe.interpolate(first, second, 3, seed=2)  # frames do not depend on how many there are
    close(three.images, frames.images[::2])
    both = pipe.interpolate(first, second, 3, noise="slerp", inversion_steps=4, guidance=1.0, seed=2)
    pair = pipe.invert(second, steps=4)
    close(both.low_res[2], pipe.decode(pair.image_embed, x_T=pair.x_T, guidance=1.0, seed=0).low_res[0])


def test_text_diff_begins_with_the_picture_and_turns_towards_the_caption(pipe):
    frames = pipe.text_diff(picture(), "a red ring", "a blue ring", 3, theta=0.5, inversion_steps=4, seed=0)
    z = pipe.embed_image(picture())
    assert torch.equal(frames.image_embed[:1], z)
    text = pipe.clip.encode_text(pipe.tokenizer.encode(["a red ring", "a blue ring"]))[0]
    towards = frames.image_embed @ torch.nn.functional.normalize(text[1] - text[0], dim=0)
    assert towards[0] < towards[1] < towards[2]
    still = pipe.text_diff(picture(), "a red ring", "a blue ring", 2, theta=0.0, inversion_steps=None, seed=5)
    close(still.images[1], pipe.decode(z, seed=5).images[0])


def test_inversion_round_trip(pipe):
    """Catches: an inversion that more steps do not make more exact."""
    calm = tiny_pipeline(upsampler=False)
    with torch.no_grad():
        for parameter in calm.decoder.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    errors = []
    for steps in (8, 64):
        pair = calm.invert(picture(side=16), steps=steps)
        assert pair.x_T.shape == (1, 3, 16, 16) and pair.seconds.keys() >= {"inversion"}
        back = calm.decode(pair.image_embed, x_T=pair.x_T, steps=steps, guidance=1.0, clip=None, seed=0)
        errors.append((back.images - pair.image).abs().mean().item())
    assert errors[1] < errors[0] / 3 and errors[1] < 0.02


def test_reconstruction_with_all_dimensions_is_the_original(pipe):
    pca = pipe.fit_pca([torch.cat([picture(seed, 16) for seed in range(20)])])
    made = pipe.reconstruct(picture(), (0, 4, 16), pca, seed=1)
    original = pipe.decode(pipe.embed_image(picture()), seed=1)
    assert torch.equal(made.image_embed[2:], original.image_embed)
    close(made.images[2], original.images[0])
    assert (made.image_embed[0] - made.image_embed[1]).abs().max() > 1e-3
    close(pipe.reconstruct(picture(), [4], pca, seed=1).images[0], made.images[1])


def test_the_worlds_components_are_those_of_the_seed(pipe):
    first, again, other = (pipe.fit_pca(count=40, seed=seed, batch_size=16) for seed in (0, 0, 1))
    assert torch.equal(first.components, again.components)
    assert not torch.equal(first.mean, other.mean)
    stranger = tiny_pipeline()
    for stranger.metadata in ({}, {"world": None}):  # a checkpoint of own pictures has the second
        with pytest.raises(ValueError, match="images: expected batches, because the .* names no world"):
            stranger.fit_pca()


@pytest.mark.parametrize("prompt", [None, "a red ring"])
def test_inpainting_keeps_pixels_to_the_bit_at_the_size_that_comes_out(pipe, prompt):
    image = picture()
    mask = torch.zeros(1, 1, 32, 32, dtype=torch.bool)
    mask[..., 5:20, 10:] = True
    made = pipe.inpaint(image, mask, prompt, 2, seed=0)
    kept = ~mask.expand(2, 3, -1, -1)
    assert torch.equal(made.images[kept], image.expand(2, -1, -1, -1)[kept])
    assert (made.images - image)[~kept].abs().mean() > 0.05
    assert (made.images[0] - made.images[1]).abs().max() > 0.01
    close(pipe.inpaint(image, mask, prompt, 1, seed=0).images[0], made.images[0])
    again = pipe.inpaint(image, mask, prompt, 1, seed=0, resample=2, jump=1)
    assert torch.equal(again.images[kept[:1]], image[kept[:1]])
    small = pipe.inpaint(image, mask[..., ::2, ::2], prompt, 1, seed=0, size=16)
    assert small.images.shape == (1, 3, 16, 16)


def test_the_candidate_nearest_to_the_caption_is_repainted(pipe, monkeypatch):
    """Catches: candidates that are sampled and not compared, or compared with another image's caption."""
    images, captions = torch.cat([picture(0), picture(1)]), ["a red ring", "a blue square"]
    mask, rows = torch.zeros(1, 1, 32, 32, dtype=torch.bool), []
    mask[..., :20] = True
    choose = editing.choose_candidates

    def recording(context, low_res, *others):
        rows.append(low_res)
        return choose(context, low_res, *others)

    monkeypatch.setattr(editing, "choose_candidates", recording)
    made = pipe.inpaint(images, mask, captions, 2, seed=0, candidates=3, size=16)
    assert rows[0].shape == (12, 3, 16, 16) and made.images.shape == (4, 3, 16, 16)
    text = pipe.clip.encode_text(pipe.tokenizer.encode(captions))[0]
    for number, candidates in enumerate(rows[0].split(3)):
        cosines = pipe.embed_image(candidates) @ text[number // 2]
        close(made.images[number][:, mask[0, 0, ::2, ::2]],
              candidates[cosines.argmax()][:, mask[0, 0, ::2, ::2]])  # fmt: skip
    with pytest.raises(ValueError, match="candidates: expected 1, as no prompt chooses among them, got 2"):
        pipe.inpaint(images, mask, candidates=2)


def test_images_that_are_repainted_together_equal_each_alone(pipe):
    """Catches: rows of images, masks, captions and seeds that are not those of one another."""
    images, captions, seeds = torch.cat([picture(0), picture(1)]), ["a red ring", "a blue square"], [5, 6]
    masks = torch.zeros(2, 1, 32, 32, dtype=torch.bool)
    masks[0, ..., :12], masks[1, ..., 20:, :] = True, True
    made = pipe.inpaint(images, masks, captions, 2, seed=seeds).images
    for row in range(2):
        alone = pipe.inpaint(images[row], masks[row], captions[row], 2, seed=seeds[row]).images
        close(made[2 * row : 2 * row + 2], alone)
    with pytest.raises(ValueError, match="mask: expected one or 3, one for each image, got 2"):
        pipe.inpaint(images[[0, 1, 1]], masks)
    with pytest.raises(ValueError, match="prompt: expected one caption or 2, got 1"):
        pipe.inpaint(images, masks, captions[:1])


def test_strength_one_equals_generate(pipe):
    plain = pipe.generate("a red ring", 2, seed=1, steps=5)
    started = pipe.generate("a red ring", 2, seed=1, steps=5, init_image=picture(), strength=1.0)
    assert torch.equal(started.images, plain.images)
    near = pipe.generate("a red ring", 2, seed=1, steps=5, init_image=picture(), strength=0.4)
    assert (near.low_res - plain.low_res).abs().max() > 0.01


def test_weights_that_know_a_caption_for_none_are_given_it():
    """Karlo was trained with the empty caption where others have none: None must mean that caption."""
    plain, with_caption = shaken_pipeline(), shaken_pipeline()
    with_caption.sampling["negative_prompt"] = "a"
    z = plain.embed_image(picture())
    options = dict(seed=0, size=16, guidance=1.0)
    images = with_caption.decode(z, **options).images
    assert torch.equal(images, plain.decode(z, prompt="a", **options).images)
    assert not torch.equal(images, plain.decode(z, **options).images)
    assert with_caption.variations(picture(), 2, seed=0, inversion_steps=2).images.isfinite().all()
    mask = torch.ones(8, 8)
    assert with_caption.inpaint(picture(), mask, num_images=2, seed=0).images.shape == (2, 3, 32, 32)

    # A negative caption without a caption: only the unconditional rows of guidance are conditioned on it.
    options = dict(seed=0, size=16)
    led = plain.decode(z, negative_prompt="a red ring", guidance=3.0, **options).images
    assert not torch.equal(led, plain.decode(z, guidance=3.0, **options).images)
    unguided = plain.decode(z, negative_prompt="a red ring", guidance=1.0, **options).images
    assert torch.equal(unguided, plain.decode(z, guidance=1.0, **options).images)


def test_two_upsamplers_in_tiles_keep_pixels_too():
    """Each stage keeps the image at its size; the last one determines the result."""
    tiny = tiny_pipeline()
    second = Upsampler(**tiny.upsampler.config | {"image_size": 64, "low_res_size": 32})
    chain = DALLE2(tiny.clip, tiny.prior, tiny.decoder, tiny.upsampler, tiny.tokenizer, upsampler2=second)
    image, mask = picture(side=64), torch.zeros(1, 1, 64, 64, dtype=torch.bool)
    mask[..., 20:50, 7:33] = True
    options = dict(seed=0, steps=2, prior_steps=2, upsampler_steps=2, upsampler2_steps=2)
    made = chain.inpaint(image, mask, "a red ring", 2, tile=32, **options).images
    assert made.shape == (2, 3, 64, 64)
    kept = ~mask.expand_as(made)
    assert torch.equal(made[kept], image.expand_as(made)[kept])


def test_a_batch_of_inversions_is_each_alone(pipe):
    both = pipe.invert(torch.cat([picture(0), picture(1)]), steps=3, batch_size=1)
    close(both.x_T[1], pipe.invert(picture(1), steps=3).x_T[0])


def test_every_edit_has_guidance_in_the_same_steps(pipe):
    """Catches: an inversion with the checkpoint's interval, or with none, where the decoding has another."""
    rows = []
    hook = pipe.decoder.unet.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    decoder = pipe.decoder.diffusion
    late = decoder.schedule.log_snr(decoder.times(3)[2:]).item()
    options = dict(guidance=3.0, guidance_interval=(-100.0, late), steps=3, size=16)  # not in the last step
    pair = pipe.invert(picture(), steps=3, guidance=3.0, guidance_interval=(-100.0, late))
    assert pair.guidance_interval == (-100.0, late) and rows == [1, 2]
    inverted = dict(options, inversion_steps=3)
    calls = {
        "variations": (lambda: pipe.variations(picture(), 1, **inverted), 1, [1, 2]),
        "text_diff": (lambda: pipe.text_diff(picture(), "a ring", "a square", 2, **inverted), 2, [1, 2]),
        "inpaint": (lambda: pipe.inpaint(picture(), torch.ones(8, 8), "a ring", 1, **options), 1, []),
    }
    for name, (call, images, before) in calls.items():
        rows.clear()
        call()
        assert rows == [*before, 2 * images, 2 * images, images], name
    hook.remove()


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda p: p.variations(picture()[..., :16]), ValueError, "image: expected .*square image"),
        (lambda p: p.variations(picture() * 2), ValueError, r"image: expected values in \[0, 1\]"),
        (lambda p: p.variations("a ring"), TypeError, "image: expected a tensor .* or PIL images, got str"),
        (lambda p: p.variations(picture(), eta=2.0), ValueError, "eta: expected a number"),
        (lambda p: p.variations(picture(), 0), ValueError, "num_images: expected at least 1"),
        (lambda p: p.variations(picture(), hue=1), TypeError, "hue: not an option here"),
        (lambda p: p.variations(picture(), prompt="zebra"), ValueError, "zebra"),
        (lambda p: p.decode(torch.zeros(1, 3)), ValueError, r"image_embed: expected \[P >= 1, 16\]"),
        (lambda p: p.decode([1.0]), TypeError, "image_embed: expected a floating-point tensor"),
        (lambda p: p.decode(torch.ones(1, 16), x_T=torch.ones(2, 3, 16, 16)), ValueError, "x_T: expected"),
        (lambda p: p.decode(torch.ones(2, 16), prompt=["a ring"] * 3), ValueError, "prompt: expected one"),
        (lambda p: p.interpolate(picture(), picture(1), 1), ValueError, "num_frames: expected at least 2"),
        (lambda p: p.interpolate(picture(), picture(1), noise="pink"), ValueError, "noise: expected 'fixed'"),
        (lambda p: p.interpolate(picture().repeat(2, 1, 1, 1), picture()), ValueError, "first: expected one"),
        (lambda p: p.text_diff(picture(), "a ring", "a ring"), ValueError, "captions that differ"),
        (lambda p: p.text_diff(picture(), "a ring", "a red ring", theta=2), ValueError, "theta: expected"),
        (lambda p: p.invert(picture(), steps=1), ValueError, "steps"),
        (lambda p: p.reconstruct(picture(), [], PCA.fit(torch.rand(9, 16))), ValueError, "dims: expected"),
        (lambda p: p.reconstruct(picture(), [1], PCA.fit(torch.rand(9, 4))), ValueError, "pca: expected"),
        (lambda p: p.fit_pca([]), ValueError, "images: expected at least one batch"),
        (lambda p: p.inpaint(picture(), torch.ones(3, 4)), ValueError, r"mask: expected \[B, 1, S, S\]"),
        (lambda p: p.inpaint(picture(), None), TypeError, "mask: expected a tensor or a PIL image"),
        (lambda p: p.generate("a ring", init_image=picture(), strength=0.0), ValueError, "strength"),
        (lambda p: p.generate("a ring", init_image=picture().repeat(2, 1, 1, 1)), ValueError, "init_image"),
    ],
)
def test_bad_calls(pipe, call, error, says):
    with pytest.raises(error, match=says):
        call(pipe)


@pytest.mark.gpu
def test_on_the_gpu_as_on_the_cpu(pipe):
    made = shaken_pipeline().to("cuda").variations(picture(), 2, seed=1)
    close(made.images.cpu(), pipe.variations(picture(), 2, seed=1).images, 2e-2)
