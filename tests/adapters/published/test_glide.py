"""GLIDE's files: the networks against a second statement of them, and files that are not right."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dalle2_fast.adapters.published import Glide, load_glide
from dalle2_fast.checkpoints import CheckpointError
from dalle2_fast.checkpoints.formats.glide import read_glide
from tests.support.published.adm_layout import Net, random_tensors, text_shapes, unet_shapes
from tests.support.tiny_karlo import Malicious

LENGTH, WIDTH, VOCABULARY = 6, 48, 20
TIMES = torch.tensor([3, 500, 999])
TOKENS = torch.randint(0, VOCABULARY, (3, LENGTH), generator=torch.Generator().manual_seed(0))
MASK = torch.arange(LENGTH) < torch.tensor([[3], [6], [0]])


def written(folder, in_channels=3, dtype=torch.float32):
    """(the file, its tensors) of a small network."""
    shapes = unet_shapes(32, (1, 2), 2, (1,), in_channels=in_channels, text=WIDTH)
    tensors = random_tensors(shapes | text_shapes(VOCABULARY, LENGTH, WIDTH, 2, 128))
    tensors = {key: value.to(dtype) for key, value in tensors.items()}
    torch.save(tensors, folder / "model.pt")
    return folder / "model.pt", tensors


def loaded(folder, in_channels=3, **options):
    """(our model, the second statement of it), in float64."""
    file, tensors = written(folder, in_channels)
    options = dict(image_size=16, head_dim=16) | options
    model = load_glide(file, dtype=torch.float64, **options)
    return model, Net({key: value.double() for key, value in tensors.items()}, head_dim=16)


def rows(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def difference(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


@torch.no_grad()
def test_the_text_tower_equals_a_second_statement_of_it(tmp_path):
    """Catches: heads in the wrong order, padding that is not replaced, a mask in the attention."""
    model, theirs = loaded(tmp_path)
    for ours, expected in zip(model.text(TOKENS, MASK), theirs.tower(TOKENS, MASK), strict=True):
        assert difference(ours, expected) < 1e-12
    changed = TOKENS.clone()
    changed[0, 4] = (changed[0, 4] + 1) % VOCABULARY  # padding: its token does not count
    assert torch.equal(model.text(changed, MASK)[1], model.text(TOKENS, MASK)[1])


@torch.no_grad()
@pytest.mark.parametrize("in_channels", [3, 6, 7, 10])
def test_the_networks_equal_a_second_statement_of_them(tmp_path, in_channels):
    """Catches: the text in the wrong place, input channels in another order, another filter."""
    model, theirs = loaded(tmp_path, in_channels, low_res_size=4)
    x, parts, given = rows(3, 3, 16, 16), [], {}
    if model.inpaint:
        given["kept"] = rows(3, 4, 16, 16, seed=3)
        parts.append(given["kept"])
    if model.low_res_size:
        given["low_res"] = rows(3, 3, 4, 4, seed=2)
        parts.append(F.interpolate(given["low_res"], (16, 16), mode="bilinear", align_corners=False))
    vector, encodings = theirs.tower(TOKENS, MASK)
    expected = theirs.unet(torch.cat([x, *parts], dim=1), TIMES, vector=vector, text=encodings)
    assert difference(model(x, TIMES, TOKENS, MASK, **given), expected) < 1e-5
    assert model.diffusion.schedule.name == ("linear" if model.low_res_size else "cosine")


def test_guidance_leads_away_from_no_caption(tmp_path):
    """Catches: unconditional rows that have the caption, or rows in the wrong order."""
    model = loaded(tmp_path)[0]
    seeds, nothing = torch.arange(3), torch.zeros_like(MASK)
    plain, guided = (model.sample(TOKENS, MASK, seeds=seeds, steps=3, guidance=w) for w in (1.0, 4.0))
    assert not torch.allclose(plain[:2], guided[:2], atol=1e-3)
    torch.testing.assert_close(plain[2], guided[2])  # this caption is empty
    torch.testing.assert_close(
        model.sample(TOKENS, MASK, seeds=seeds, steps=3, guidance=0.0, sampler="ddim"),
        model.sample(TOKENS, nothing, seeds=seeds, steps=3, sampler="ddim"),
    )


def test_repainting_keeps_the_rest(tmp_path):
    """Catches: a mask whose meaning is exchanged, a kept part that the network does not get."""
    model = loaded(tmp_path, 7)[0]
    image, repaint = torch.rand(3, 3, 16, 16), torch.zeros(3, 1, 16, 16, dtype=torch.bool)
    repaint[..., 8:] = True
    options = dict(image=image, repaint=repaint, seeds=torch.arange(3), steps=3)
    painted = model.sample(TOKENS, MASK, **options)
    torch.testing.assert_close(painted[..., :8], image[..., :8].double())
    other = model.sample(TOKENS, MASK, **options | dict(image=image.flip(3).flip(2)))
    assert not torch.allclose(painted[..., 8:], other[..., 8:], atol=1e-3)
    with pytest.raises(ValueError, match="image, repaint: expected both or neither"):
        model.sample(TOKENS, MASK, image=image)


def test_half_precision_and_saving(tmp_path):
    """Catches: a file in float16 that stays so or is refused, a saved model that comes back as another."""
    file, tensors = written(tmp_path, dtype=torch.float16)
    model = load_glide(file, image_size=16, head_dim=16)
    assert {x.dtype for x in model.state_dict().values()} == {torch.float32}
    assert torch.equal(model.text.token_embedding.weight, tensors["token_embedding.weight"].float())
    half = type(model)(**model.config).bfloat16()
    half.load_state_dict(model.state_dict())
    x = rows(3, 3, 16, 16).float()
    with torch.no_grad():
        assert difference(half(x, TIMES, TOKENS, MASK), model(x, TIMES, TOKENS, MASK)) < 5e-2
    assert half.sample(TOKENS, MASK, seeds=torch.arange(3), steps=2).dtype == torch.float32
    again = Glide.from_pretrained(model.save_pretrained(tmp_path / "ours"))
    assert again.config == model.config
    assert torch.equal(again(x, TIMES, TOKENS, MASK), model(x, TIMES, TOKENS, MASK))


@pytest.mark.parametrize(("change", "says"), [
    (lambda t: t.pop("transformer.resblocks.1.ln_2.bias"), r"missing 1 \(transformer.resblocks.1.ln_2.b"),
    (lambda t: t.update({"unemb.weight": torch.zeros(1)}), r"left over 1 \(unemb.weight\)"),
    (lambda t: t.update(positional_embedding=torch.zeros(LENGTH, 5)),
     r"glide.text.positional_embedding: expected \[6, 48\], got \[6, 5\]"),
    (lambda t: t.pop("token_embedding.weight"), r"missing 1 \(token_embedding.weight\)"),
    (lambda t: [t.pop(name) for name in [*t] if "encoder_kv" in name], "U-Net of GLIDE.*one without text"),
    (lambda t: t.update({"input_blocks.0.0.weight": torch.zeros(32, 5, 3, 3)}), "got one with 5 input ch"),
    (lambda t: [t.pop(name) for name in [*t] if name.startswith("output")], "expected a U-Net"),
])  # fmt: skip
def test_what_does_not_fit_is_named(tmp_path, change, says):
    file, tensors = written(tmp_path)
    change(tensors)
    torch.save(tensors, file)
    with pytest.raises(CheckpointError, match=says):
        load_glide(file, image_size=16, head_dim=16)


def test_wrong_tokens_are_named(tmp_path):
    model = loaded(tmp_path)[0]
    with pytest.raises(ValueError, match=r"tokens: expected \[B, 6\], got \(3, 5\)"):
        model.sample(TOKENS[:, :5], MASK)
    with pytest.raises(TypeError, match="mask: expected a tensor of torch.bool, got torch.int64"):
        model.sample(TOKENS, MASK.long())
    with pytest.raises(ValueError, match="low_res: expected None"):
        model.sample(TOKENS, MASK, low_res=torch.rand(3, 3, 4, 4))


def test_a_malicious_pickle_is_refused_and_not_run(tmp_path):
    torch.save({"out.2.weight": Malicious(tmp_path / "proof")}, tmp_path / "base.pt")
    with pytest.raises(CheckpointError, match="nothing in it was run"):
        load_glide(tmp_path / "base.pt")
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize(("in_channels", "parameters"), [(3, 385_030_726), (6, 398_361_286), (7, None)])
def test_published_sizes_on_the_meta_device(monkeypatch, tmp_path, in_channels, parameters):
    """Catches: a published configuration whose tensors find no place. Counts: GLIDE's notebook."""
    base = ((1, 2, 3, 4), 3, (1, 2, 3))
    layout = ((1, 1, 2, 2, 4, 4), 2, (3, 4, 5)) if in_channels == 6 else base
    shapes = unet_shapes(192, *layout, in_channels=in_channels, text=512)
    with torch.device("meta"):
        shapes |= text_shapes(50_257, 128, 512, 16, 768)
        tensors = {key: torch.empty(shape) for key, shape in shapes.items()}
    monkeypatch.setattr("dalle2_fast.checkpoints.formats.glide.read_tensors", lambda file: tensors)
    config, weights = read_glide(tmp_path / "base.pt")
    with torch.device("meta"):
        model = Glide(**config)
    expected = {key: value.shape for key, value in model.state_dict().items()}
    assert {key: value.shape for key, value in weights.items()} == expected
    count = sum(value.numel() for value in tensors.values())
    assert parameters in (None, count)
