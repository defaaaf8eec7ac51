"""guided-diffusion's files: the network against a second statement of it, and files that are not right."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dalle2_fast.adapters.published import GuidedDiffusion, load_guided_diffusion
from dalle2_fast.checkpoints import CheckpointError
from dalle2_fast.checkpoints.formats.guided_diffusion import PUBLISHED, read_guided_diffusion
from tests.support.published.adm_layout import Net, random_tensors, unet_shapes
from tests.support.tiny_karlo import Malicious

SMALL = dict(model_channels=32, mults=(1, 2, 2), blocks=1, attention_levels=(1, 2))
TIMES = torch.tensor([3, 500, 999])
LABELS = torch.tensor([0, 6, 3])


def written(folder, name="model.pt", seed=0, dtype=torch.float32, **shapes):
    """(the file, its tensors) of a small network."""
    tensors = random_tensors(unet_shapes(**SMALL | shapes), seed)
    tensors = {key: value.to(dtype) for key, value in tensors.items()}
    torch.save(tensors, folder / name)
    return folder / name, tensors


def rows(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def difference(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


CASES = {
    "no classes": ({}, dict(num_head_channels=16)),
    "classes": (dict(classes=7), dict(num_head_channels=16)),
    "four heads at every level": (dict(classes=7), dict(num_heads=4)),
    "new order of qkv": (dict(classes=7), dict(num_head_channels=16, use_new_attention_order=True)),
    "no FiLM, fixed variance": (dict(film=False, out_channels=3), dict(num_head_channels=32)),
    "a first level of half the width": (dict(model_channels=64, mults=(0.5, 1, 1)), dict(num_heads=2)),
    "two blocks a level": (dict(blocks=2, attention_levels=(2,)), dict(num_head_channels=8)),
}


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_the_network_equals_a_second_statement_of_it(tmp_path, name):
    """Catches: a tensor in the wrong place, rows of heads in the wrong order, a wrong scale, a lost label."""
    shapes, flags = CASES[name]
    file, tensors = written(tmp_path, **shapes)
    model = load_guided_diffusion(file, image_size=16, dtype=torch.float64, **flags)
    assert not model.training
    theirs = Net(
        {key: value.double() for key, value in tensors.items()}, heads=flags.get("num_heads"),
        head_dim=flags.get("num_head_channels"), new_order=flags.get("use_new_attention_order", False),
    )  # fmt: skip
    labels = LABELS if "classes" in shapes else None
    x = rows(3, 3, 16, 16)
    assert difference(model(x, TIMES, labels), theirs.unet(x, TIMES, labels)) < 1e-5
    # Each flag that the shapes do not show changes the result by far more.
    other = dict(num_head_channels=8 if flags.get("num_head_channels") != 8 else 32)
    wrong = load_guided_diffusion(file, image_size=16, dtype=torch.float64, **other)
    assert difference(wrong(x, TIMES, labels), model(x, TIMES, labels)) > 1e-3


@torch.no_grad()
def test_an_upsampler_takes_the_small_image(tmp_path):
    """Catches: another filter or order of the channels."""
    file, tensors = written(tmp_path, in_channels=6, classes=7)
    model = load_guided_diffusion(file, image_size=16, small_size=4, num_heads=2, dtype=torch.float64)
    x, small = rows(3, 3, 16, 16), rows(3, 3, 4, 4, seed=2)
    both = torch.cat([x, F.interpolate(small, (16, 16), mode="bilinear")], dim=1)
    theirs = Net({key: value.double() for key, value in tensors.items()}, heads=2)
    assert difference(model(x, TIMES, LABELS, small), theirs.unet(both, TIMES, LABELS)) < 1e-5
    images = model.sample(LABELS, low_res=torch.rand(3, 3, 4, 4), seeds=torch.arange(3), steps=2)
    assert images.shape == (3, 3, 16, 16) and images.min() >= 0 and images.max() <= 1
    with pytest.raises(ValueError, match=r"low_res: expected \[B, 3, 4, 4\] in \[0, 1\], got None"):
        model.sample(LABELS)


def test_sampling_follows_seed_and_label(tmp_path):
    """Catches: a label or a seed that does not arrive, an image that depends on its neighbours."""
    file, _ = written(tmp_path, classes=7)
    model = load_guided_diffusion(file, image_size=16, num_head_channels=16)
    seeds = torch.tensor([5, 6, 5])
    images = model.sample(torch.tensor([1, 1, 2]), seeds=seeds, steps=3)
    alone = model.sample(torch.tensor([1]), seeds=seeds[1:2], steps=3)
    torch.testing.assert_close(alone[0], images[1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(images[0], images[2], atol=1e-3)
    with pytest.raises(TypeError, match=r"labels: expected int64 \[B\] = \(2,\) in 0..6, got None"):
        model.sample(batch_size=2)
    with pytest.raises(ValueError, match="in 0..6, got 2 to 7"):
        model.sample(torch.tensor([2, 7]))


def test_published_names_bring_their_flags(tmp_path):
    """Catches: flags of the README that are not applied, or that an argument cannot replace."""
    file, _ = written(tmp_path, "64x64_diffusion.pt", classes=7, model_channels=64)
    config, _ = read_guided_diffusion(file)
    assert (config["schedule"], config["image_size"], config["unet"]["head_dim"]) == ("cosine", 64, 64)
    assert read_guided_diffusion(file, num_heads=2)[0]["unet"]["head_dim"] == [32, 64, 64]
    model = load_guided_diffusion(file, noise_schedule="linear")
    assert model.diffusion.schedule.name == "linear" and model.diffusion.variance == "learned_range"


def test_half_precision_and_saving(tmp_path):
    """Catches: a file in float16 that stays so or is refused, a saved model that comes back as another."""
    file, tensors = written(tmp_path, classes=7, dtype=torch.float16)
    model = load_guided_diffusion(file, image_size=16, num_heads=4)
    assert {x.dtype for x in model.state_dict().values()} == {torch.float32}
    assert torch.equal(model.unet.label_embed.weight, tensors["label_emb.weight"].float())
    half = type(model)(**model.config).bfloat16()
    half.load_state_dict(model.state_dict())
    x = rows(3, 3, 16, 16).float()
    with torch.no_grad():
        assert difference(half(x, TIMES, LABELS), model(x, TIMES, LABELS)) < 5e-2
    assert half.sample(LABELS, seeds=torch.arange(3), steps=2).dtype == torch.float32
    again = GuidedDiffusion.from_pretrained(model.save_pretrained(tmp_path / "ours"))
    assert again.config == model.config
    assert torch.equal(again(x, TIMES, LABELS), model(x, TIMES, LABELS))


# ----------------------------------------------------------------------------------- files that are not right


@pytest.mark.parametrize(("change", "flags", "says"), [
    (lambda t: t.pop("middle_block.0.in_layers.2.bias"), {}, r"missing 1 \(middle_block.0.in_layers.2.b"),
    (lambda t: t.update(extra=torch.zeros(1)), {}, r"left over 1 \(extra\)"),
    (lambda t: t.update({"out.0.bias": torch.zeros(5)}), {},
     r"guided_diffusion.unet.norm_out.bias: expected \[32\], got \[5\]"),
    (lambda t: t.update({"input_blocks.2.0.op.weight": torch.zeros(1)}), {}, "resblock_updown=True"),
    (lambda t: t.update({"middle_block.1.encoder_kv.weight": torch.zeros(2, 3, 1)}), {}, "this may be GLIDE"),
    (lambda t: [t.pop(name) for name in [*t] if name.startswith("output")], {}, "such as a classifier"),
    (lambda t: t.clear(), {}, "expected a state_dict"),
    (lambda t: None, dict(image_size=None), r"pass image_size=\.\.\., the side of its images"),
    (lambda t: None, dict(num_heads=None), r"pass num_heads=\.\.\. or num_head_channels"),
    (lambda t: None, dict(num_heads=3), "a number of heads that divides the width 64, got 3"),
    (lambda t: None, dict(small_size=8), "its U-Net has 3 input channels: pass no small_size"),
])  # fmt: skip
def test_what_does_not_fit_is_named(tmp_path, change, flags, says):
    file, tensors = written(tmp_path)
    change(tensors)
    torch.save(tensors, file)
    with pytest.raises(CheckpointError, match=says):
        load_guided_diffusion(file, **dict(image_size=16, num_heads=4) | flags)


def test_damaged_and_malicious_files_are_refused(tmp_path):
    """Catches: a pickle that is executed, an error that does not name the file."""
    file, _ = written(tmp_path)
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match="model.pt: truncated or damaged"):
        load_guided_diffusion(file, image_size=16, num_heads=4)
    torch.save({"out.2.weight": Malicious(tmp_path / "proof")}, file)
    with pytest.raises(CheckpointError, match="nothing in it was run"):
        load_guided_diffusion(file, image_size=16, num_heads=4)
    assert not (tmp_path / "proof").exists()
    with pytest.raises(FileNotFoundError, match="none.pt: no such file"):
        load_guided_diffusion(tmp_path / "none.pt")


# ---------------------------------------------------------------------------------------- the published sizes

MULTS = {64: (1, 2, 3, 4), 128: (1, 1, 2, 3, 4), 256: (1, 1, 2, 2, 4, 4), 512: (0.5, 1, 1, 2, 2, 4, 4)}


def full_size(name: str) -> dict:
    """The shapes of a published file, from the flags of guided-diffusion's README."""
    flags, upsamples = PUBLISHED[name], "upsampler" in name
    size = flags["image_size"]
    mults = MULTS[256] if upsamples else MULTS[size]
    resolutions = (32, 16) if name == "128_512_upsampler.pt" else (32, 16, 8)
    levels = tuple(level for level in range(len(mults)) if size >> level in resolutions)
    return unet_shapes(
        192 if upsamples or size == 64 else 256, mults, 3 if size == 64 else 2, levels,
        in_channels=6 if upsamples else 3, classes=None if "lsun" in name or "uncond" in name else 1000,
    )  # fmt: skip


@pytest.mark.parametrize(("name", "millions"), [
    ("64x64_diffusion.pt", 296), ("128x128_diffusion.pt", 422), ("256x256_diffusion.pt", 554),
    ("256x256_diffusion_uncond.pt", None), ("512x512_diffusion.pt", 559), ("64_256_upsampler.pt", 312),
    ("128_512_upsampler.pt", 309), ("lsun_cat.pt", None),
])  # fmt: skip
def test_published_sizes_on_the_meta_device(monkeypatch, tmp_path, name, millions):
    """Catches: a published configuration whose tensors find no place. Counts: 2105.05233, appendix I."""
    with torch.device("meta"):
        tensors = {key: torch.empty(shape) for key, shape in full_size(name).items()}
    monkeypatch.setattr(
        "dalle2_fast.checkpoints.formats.guided_diffusion.read_tensors", lambda file: tensors
    )
    config, weights = read_guided_diffusion(tmp_path / name)
    with torch.device("meta"):
        model = GuidedDiffusion(**config)
    expected = {key: value.shape for key, value in model.state_dict().items()}
    assert {key: value.shape for key, value in weights.items()} == expected
    count = sum(value.numel() for value in tensors.values())
    assert millions is None or round(count / 1e6) == millions
