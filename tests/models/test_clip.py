"""CLIP and its towers: sizes, initialisation, causality, padding, both losses, messages."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F

from dalle2_fast.models.clip.model import CLIP
from dalle2_fast.models.transformer import TextTransformer, Transformer, token_lengths

SMALL = dict(
    dim_text=32, dim_image=32, dim_latent=24, num_text_tokens=50, text_enc_depth=2, text_seq_len=12,
    text_heads=4, visual_enc_depth=2, visual_heads=4, visual_image_size=32, visual_patch_size=8,
)
KINDS = {
    "vit": {},
    "conv_vit": dict(visual_kind="conv_vit"),
    "resnet": dict(visual_kind="resnet", visual_enc_depth=(1, 1, 1, 1), dim_image=8),
}


def small_clip(kind: str = "vit", **options) -> CLIP:
    torch.manual_seed(0)
    return CLIP(**(SMALL | KINDS[kind] | options))


def captions(rows: int = 4, length: int = 12, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 50, (rows, length), generator=generator)
    lengths = torch.randint(3, length - 2, (rows,), generator=generator)
    return tokens * (torch.arange(length) < lengths[:, None])


def pictures(rows: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.rand(rows, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def parameters_of(**options) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in CLIP(**options).parameters())


def test_published_sizes():
    """A layer, bias or embedding too many or too few in any of the three published kinds."""
    assert parameters_of() == 427_616_513  # ViT-L/14
    assert parameters_of(
        dim_text=512, dim_image=768, dim_latent=512, text_heads=8, visual_enc_depth=12, visual_heads=12,
        visual_patch_size=32,
    ) == 151_277_313  # ViT-B/32
    assert parameters_of(
        dim_text=512, dim_image=64, dim_latent=1024, text_heads=8, visual_kind="resnet",
        visual_enc_depth=(3, 4, 6, 3), visual_heads=32,
    ) == 102_007_137  # RN50


def test_weight_names_are_those_of_openai():
    names = set(small_clip().state_dict()) | set(small_clip("resnet").state_dict())
    assert {
        "positional_embedding", "text_projection", "logit_scale", "token_embedding.weight", "ln_final.weight",
        "transformer.resblocks.1.attn.in_proj_weight", "transformer.resblocks.1.attn.out_proj.bias",
        "transformer.resblocks.0.ln_1.weight", "transformer.resblocks.0.mlp.c_fc.weight",
        "transformer.resblocks.0.mlp.c_proj.bias", "visual.class_embedding", "visual.positional_embedding",
        "visual.proj", "visual.conv1.weight", "visual.ln_pre.weight", "visual.ln_post.bias",
        "visual.transformer.resblocks.0.attn.in_proj_bias", "visual.layer1.0.downsample.0.weight",
        "visual.layer4.0.bn3.running_var", "visual.attnpool.c_proj.weight", "visual.bn1.weight",
    } <= names


def test_block_equals_torch():
    """A wrong order of q, k, v or of the heads in the fused projection."""
    torch.manual_seed(0)
    tower = Transformer(32, 1, 4)
    block, truth = tower.resblocks[0], torch.nn.MultiheadAttention(32, 4, batch_first=True)
    truth.load_state_dict(block.attn.state_dict())
    x = torch.randn(2, 7, 32)
    normed = block.ln_1(x)
    causal = torch.ones(7, 7, dtype=torch.bool).triu(1)
    expected = x + truth(normed, normed, normed, attn_mask=causal, need_weights=False)[0]
    expected = expected + block.mlp(block.ln_2(expected))
    torch.testing.assert_close(tower(x, causal=True), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_parameter(kind):
    """A parameter that is registered and never used."""
    clip = small_clip(kind)
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    clip(captions(), pictures()).backward()
    silent = [name for name, parameter in clip.named_parameters() if not parameter.grad.abs().sum() > 0]
    # A bias added to every key moves all logits of a softmax alike, so its gradient is zero up to rounding.
    assert [name for name in silent if not name.endswith("k_proj.bias")] == []


@pytest.mark.parametrize("kind", KINDS)
def test_config_rebuilds_the_model(kind):
    clip = small_clip(kind).eval()
    again = CLIP(**json.loads(json.dumps(clip.config))).eval()
    again.load_state_dict(clip.state_dict())
    assert torch.equal(again.encode_image(pictures()), clip.encode_image(pictures()))


def test_text_tower_is_causal():
    """An attention that looks ahead: a changed token must leave all earlier encodings as they were."""
    tower = TextTransformer(50, 12, 32, 2, 4)
    tokens = torch.randint(1, 50, (2, 10))
    changed = tokens.clone()
    changed[:, 6] = (tokens[:, 6] + 1) % 49 + 1
    before, after = tower(tokens), tower(changed)
    torch.testing.assert_close(before[:, :6], after[:, :6])
    assert not torch.allclose(before[:, 6:], after[:, 6:], atol=1e-3)


@pytest.mark.parametrize("causal", [True, False])
def test_padding_changes_nothing(causal):
    """Trimming, padding and batch mates must not show in a caption's encodings; padded places are zero."""
    tower = TextTransformer(50, 12, 32, 2, 4, causal=causal)
    tokens = captions()
    together, mask = tower.encode_tokens(tokens)
    assert together.shape == (4, 12, 32) and mask.shape == (4, 12)
    assert not together[~mask].any()
    for row, length in enumerate(mask.sum(dim=1).tolist()):
        alone = tower(tokens[row : row + 1, :length])
        torch.testing.assert_close(together[row, :length], alone[0], rtol=1e-5, atol=1e-5)


def test_length_counts_a_zero_inside_a_caption():
    """id 0 is a real token ("!") in OpenAI's vocabulary: the length is the last non-zero token's."""
    tokens = torch.tensor([[1, 0, 7, 2, 0, 0], [1, 2, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
    assert token_lengths(tokens).tolist() == [4, 2, 0]
    _, mask = TextTransformer(50, 6, 16, 1, 2).encode_tokens(tokens)
    assert mask.sum(dim=1).tolist() == [4, 2, 0]


def test_the_first_end_of_text_ends_a_caption():
    """Rows padded with it, as Hugging Face's tokenizer pads, would be read at the last padding."""
    tokens = torch.tensor([[1, 0, 7, 9, 9, 9], [1, 9, 0, 0, 0, 0], [1, 5, 6, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
    assert token_lengths(tokens, eos_token_id=9).tolist() == [4, 2, 3, 0]
    assert token_lengths(tokens).tolist() == [6, 2, 3, 0]
    clip = small_clip(eos_token_id=9).eval()
    zeros = torch.where(torch.arange(6) < torch.tensor([[4]]), tokens[:1], 0)
    torch.testing.assert_close(clip.encode_text(tokens[:1])[0], clip.encode_text(zeros)[0])
    assert torch.equal(clip.text_tower()(tokens), clip.encode_text(tokens)[1])
    for wrong in (0, 50):
        with pytest.raises(ValueError, match=f"eos_token_id: expected an id from 1 to 49, got {wrong}"):
            small_clip(eos_token_id=wrong)


def test_one_tower_alone():
    """Catches: a tower that is built all the same, an error about something else when it is asked for."""
    text, image = small_clip(visual_kind=None), small_clip(text_enc_depth=None)
    assert not any(name.startswith("visual") for name in text.state_dict())
    assert all(name.startswith("visual") or name == "logit_scale" for name in image.state_dict())
    assert image.encode_image(pictures()).shape == (4, 24)
    for ask in (lambda: image.encode_text(captions()), lambda: image(captions(), pictures())):
        with pytest.raises(ValueError, match="text: expected a CLIP with a text tower, got .*=None"):
            ask()
    with pytest.raises(ValueError, match="text_tower: expected a CLIP with a text tower"):
        image.text_tower()
    with pytest.raises(ValueError, match="images: expected a CLIP with an image tower"):
        text(captions(), pictures())
    again = CLIP(**json.loads(json.dumps(image.config)))
    again.load_state_dict(image.state_dict())
    assert torch.equal(again.encode_image(pictures()), image.encode_image(pictures()))


def test_embeddings_have_unit_norm_and_leave_their_inputs_alone():
    clip, tokens, images = small_clip(), captions(), pictures()
    kept = tokens.clone(), images.clone()
    image = clip.encode_image(images)
    text, encodings, mask = clip.encode_text(tokens)
    for embedding in (image, text):
        assert embedding.shape == (4, 24)
        torch.testing.assert_close(embedding.norm(dim=-1), torch.ones(4))
    raw = clip.encode_image(images, normalize=False)
    torch.testing.assert_close(F.normalize(raw, dim=-1), image)
    last = encodings[torch.arange(4), mask.sum(dim=1) - 1]
    torch.testing.assert_close(F.normalize(last @ clip.text_projection, dim=-1), text)
    assert torch.equal(tokens, kept[0]) and torch.equal(images, kept[1])


def test_loss_is_the_formula():
    clip, tokens, images = small_clip(), captions(), pictures()
    logits = clip(tokens, images, return_loss=False)
    cosine = clip.encode_image(images) @ clip.encode_text(tokens)[0].T
    torch.testing.assert_close(logits, cosine / 0.07)
    target = torch.arange(4)
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(clip(tokens, images), expected)


def test_hard_negatives_widen_only_their_own_row():
    clip, tokens, images = small_clip(), captions(), pictures()
    negatives = torch.stack([captions(seed=1), captions(seed=2), captions(seed=3)], dim=1)
    mask = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]], dtype=torch.bool)
    loss = clip(tokens, images, negative_text=negatives, negative_mask=mask)
    logits = clip(tokens, images, return_loss=False)
    rows = []
    for i in range(4):
        wrong = clip(negatives[i], images[i : i + 1], return_loss=False)[0]
        rows.append(torch.cat([logits[i], wrong[mask[i]]]).logsumexp(0) - logits[i, i])
    expected = (torch.stack(rows).mean() + F.cross_entropy(logits.T, torch.arange(4))) / 2
    torch.testing.assert_close(loss, expected)
    nothing = clip(tokens, images, negative_text=negatives, negative_mask=torch.zeros_like(mask))
    torch.testing.assert_close(nothing, clip(tokens, images))


def test_logit_scale_is_clamped_and_can_come_back():
    """A clamp in the graph would kill the gradient, and the scale would stay at the limit for good."""
    clip = small_clip()
    with torch.no_grad():
        clip.logit_scale.fill_(7.0)
    clip(captions(), pictures()).backward()
    assert clip.logit_scale.item() == pytest.approx(math.log(100.0))
    assert clip.logit_scale.grad.abs() > 0


def test_clip_learns_to_tell_pairs_apart():
    clip, tokens, images = small_clip("conv_vit"), captions(8), pictures(8)
    optimiser = torch.optim.AdamW(clip.parameters(), lr=2e-3)
    for _ in range(30):
        optimiser.zero_grad()
        loss = clip(tokens, images)
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.1 * math.log(8)


def test_half_precision_is_finite():
    clip = small_clip().to(torch.bfloat16)
    image, (text, encodings, _) = clip.encode_image(pictures()), clip.encode_text(captions())
    assert image.dtype == text.dtype == encodings.dtype == torch.bfloat16
    assert image.isfinite().all() and text.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        loss = small_clip()(captions(), pictures(), negative_text=captions()[:, None])
    assert loss.dtype == torch.float32 and loss.isfinite()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(visual_kind="cnn"), r"visual_kind: expected .*got 'cnn'"),
        (dict(visual_kind="resnet"), r"visual_enc_depth: expected four stage depths"),
        (dict(visual_enc_depth=(1, 2)), r"visual_enc_depth: expected one integer"),
        (dict(visual_kind="conv_vit", visual_patch_size=3, visual_image_size=33), r"power of two.*got .*=3"),
        (dict(visual_image_size=30), r"visual_image_size: expected a multiple of .* 8, got 30"),
        (dict(text_heads=5), r"dim: expected a multiple of heads = 5, got 32"),
    ],
)
def test_wrong_configurations(change, words):
    with pytest.raises(ValueError, match=words):
        CLIP(**(SMALL | change))


def test_wrong_inputs():
    clip, tokens, images = small_clip(), captions(), pictures()
    with pytest.raises(ValueError, match=r"images: expected .*32, 32.*got \(4, 3, 16, 16\)"):
        clip.encode_image(images[:, :, :16, :16])
    with pytest.raises(ValueError, match=r"images: expected values in \[0, 1\], got .* to 255"):
        clip.encode_image(images.clone().fill_(255.0))
    with pytest.raises(TypeError, match=r"images: expected a floating-point tensor .*got torch.uint8"):
        clip.encode_image(images.to(torch.uint8))
    with pytest.raises(TypeError, match=r"text: expected token ids, an int64 tensor .*got torch.float32"):
        clip.encode_text(tokens.float())
    with pytest.raises(TypeError, match=r"text: expected token ids.*got list"):
        clip.encode_text(["a red circle"])
    with pytest.raises(ValueError, match=r"text: expected \[B, L\] with 1 <= L <= 12, got \(4, 13\)"):
        clip.encode_text(F.pad(tokens, (0, 1)))
    with pytest.raises(ValueError, match=r"text: expected token ids in \[0, 49\], got 0 to 50"):
        clip.encode_text(torch.tensor([[1, 50, 0]]))
    with pytest.raises(ValueError, match=r"text: expected one caption per image = 4, got 3"):
        clip(tokens[:3], images)
    with pytest.raises(ValueError, match=r"negative_text: expected .*\(4, K, 12\), got \(4, 12\)"):
        clip(tokens, images, negative_text=tokens)
    with pytest.raises(ValueError, match=r"negative_mask: expected bool .*\(4, 1\), got torch.int64"):
        clip(tokens, images, negative_text=tokens[:, None], negative_mask=torch.ones(4, 1, dtype=torch.int64))


def test_text_tower_is_a_trainable_copy():
    """Catches: another activation or depth than CLIP's, weights shared with it, a frozen copy."""
    clip = small_clip(quick_gelu=True, mlp_ratio=2.0).double().requires_grad_(False)
    tower, text = clip.text_tower(), captions()
    assert torch.equal(tower(text), clip.encode_text(text)[1])
    for parameter in tower.parameters():
        assert parameter.requires_grad
        parameter.data.zero_()
    assert clip.encode_text(text)[1].abs().sum() > 0
