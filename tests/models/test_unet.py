"""The U-Net: size, wiring, what it must depend on and what it must not."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from dalle2_fast.models.time_embedding import sinusoidal_embedding
from dalle2_fast.models.unet import ContextCache, UNet

SMALL = dict(
    in_channels=3,
    out_channels=3,
    channels=(16, 24),
    layers_per_block=1,
    attention_levels=(1,),
    head_dim=8,
    cross_dim=12,
    num_groups=8,
)


def small_unet(**options) -> UNet:
    """With random weights everywhere: an untrained net returns zero for every input."""
    torch.manual_seed(0)
    net = UNet(**SMALL | options)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


def inputs(batch: int = 3, size: int = 8, channels: int = 3, tokens: int = 5):
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(batch, channels, size, size, generator=generator)
    time = torch.tensor([0.0, 10.0, 900.0, 500.0])[:batch]
    context = torch.randn(batch, tokens, 12, generator=generator)
    mask = torch.arange(tokens) < torch.tensor([5, 3, 1, 2])[:batch, None]
    return sample, time, context, mask


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_default_sizes_are_those_of_the_public_checkpoints():
    """A missing layer, bias or skip connection changes the number of parameters."""
    with torch.device("meta"):
        decoder = UNet()
        upsampler = UNet(in_channels=6, out_channels=3, attention_levels=(), cross_dim=None, film=False)
    assert parameters(decoder) == 885_439_686
    assert parameters(upsampler) == 691_579_523
    assert len(decoder.attention_blocks()) == 22


def test_config_rebuilds_the_same_net():
    net = small_unet(
        patch_size=2, layers_per_block=(1, 2), head_dim=(8, 12), class_embed_dim=7, narrow_up=True
    )
    again = UNet(**json.loads(json.dumps(net.config)))
    again.load_state_dict(net.state_dict())
    sample, time, context, mask = inputs()
    classes = torch.randn(3, 7)
    assert torch.equal(net(sample, time, context, classes, mask), again(sample, time, context, classes, mask))


def test_starts_at_zero():
    """ADM: the last convolution starts at zero, so an untrained net predicts zero."""
    sample, time, context, mask = inputs()
    assert not UNet(**SMALL)(sample, time, context, None, mask).any()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"film": False},
        {"patch_size": 2},
        {"narrow_up": True},
        {"class_embed_dim": 7},
        {"cross_dim": None},
        {"patch_size": 2, "fine": {"patch_size": 1, "channels": 8, "layers": 2}},
    ],
    ids=str,
)
def test_gradients_reach_every_parameter(options):
    """A layer that is built but not called has no gradient."""
    net = small_unet(**options)
    sample, time, context, mask = inputs()
    if net.cross_dim is None:
        context = mask = None
    classes = torch.randn(3, 7) if net.class_embed_dim else None
    net(sample, time, context, classes, mask).square().sum().backward()
    silent = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent


def test_patches_are_channels():
    """patch_size p is exactly the net of p^2 times the channels on the rearranged image."""
    patched = small_unet(patch_size=2)
    plain = UNet(**SMALL | dict(in_channels=12, out_channels=12))
    plain.load_state_dict(patched.state_dict())
    sample, time, context, mask = inputs(size=16)
    expected = F.pixel_shuffle(plain(F.pixel_unshuffle(sample, 2), time, context, None, mask), 2)
    torch.testing.assert_close(patched(sample, time, context, None, mask), expected)


def test_depends_on_time_context_and_classes():
    net = small_unet()
    sample, time, context, mask = inputs()
    classes = torch.randn(3, net.embed_dim)
    base = net(sample, time, context, classes, mask)
    for changed in (
        net(sample, time + 50, context, classes, mask),
        net(sample, time, context + 1, classes, mask),
        net(sample, time, context, classes + 1, mask),
        net(sample, time, context, None, mask),
    ):
        assert ((changed - base).flatten(1).norm(dim=1) > 1e-3).all()


def test_masked_context_is_not_seen():
    net = small_unet()
    sample, time, context, mask = inputs()
    base = net(sample, time, context, None, mask)
    garbage = torch.where(mask[..., None], context, 1e3)
    torch.testing.assert_close(net(sample, time, garbage, None, mask), base)
    longer = F.pad(context, (0, 0, 0, 4), value=7.0), F.pad(mask, (0, 4))
    torch.testing.assert_close(net(sample, time, longer[0], None, longer[1]), base)


def test_context_encoded_once_gives_the_same():
    net = small_unet(attention_levels=(0, 1))
    sample, time, context, mask = inputs()
    cache = net.encode_context(context, mask)
    assert isinstance(cache, ContextCache) and len(cache.keys) == len(net.attention_blocks())
    assert torch.equal(net(sample, time, cache), net(sample, time, context, None, mask))


def test_rows_do_not_mix():
    net = small_unet()
    sample, time, context, mask = inputs()
    together = net(sample, time, context, None, mask)
    alone = net(sample[1:2], time[1:2], context[1:2], None, mask[1:2])
    torch.testing.assert_close(together[1:2], alone)


def test_other_sizes_than_square():
    net = small_unet(patch_size=2)
    _, time, context, mask = inputs()
    assert net(torch.randn(3, 3, 8, 20), time, context, None, mask).shape == (3, 3, 8, 20)


def test_half_precision_weights_answer_in_the_samples_dtype():
    net = small_unet()
    sample, time, context, mask = inputs(batch=1)
    truth = net(sample, time, context, None, mask)
    half = net.to(torch.bfloat16)(sample, time, context, None, mask)
    assert half.dtype == torch.float32
    assert (half - truth).norm() < 0.05 * truth.norm()


def test_time_embedding_is_the_formula():
    time = torch.tensor([0.0, 3.0, 999.0])
    embedding = sinusoidal_embedding(time, 6)
    for column, frequency in enumerate((1.0, 10000 ** (-1 / 3), 10000 ** (-2 / 3))):
        torch.testing.assert_close(embedding[:, column], (time * frequency).cos())
        torch.testing.assert_close(embedding[:, 3 + column], (time * frequency).sin())


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(num_groups=7), "num_groups: 7 must divide every width"),
        (dict(head_dim=7), "head_dim: 7 must divide the width 24"),
        (dict(layers_per_block=(1, 2, 3)), "layers_per_block: expected one int or one per level"),
        (dict(attention_levels=(2,)), r"attention_levels: expected levels 0..1, got \(2,\)"),
        (dict(channels=()), "expected positive numbers"),
        (dict(kernel_in=2), "expected odd sizes, got 2, 3"),
    ],
)
def test_impossible_configurations_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        UNet(**SMALL | options)


def test_wrong_inputs_are_named():
    net = small_unet(patch_size=2)
    sample, time, context, mask = inputs()
    with pytest.raises(ValueError, match=r"sample: .* must be multiples of 4 .* got \(3, 3, 10, 8\)"):
        net(torch.randn(3, 3, 10, 8), time, context)
    with pytest.raises(ValueError, match=r"sample: expected \[B, 3, H, W\], got \(3, 4, 8, 8\)"):
        net(torch.randn(3, 4, 8, 8), time, context)
    with pytest.raises(ValueError, match=r"timestep: expected \[B\] = \(3,\), got \(1,\)"):
        net(sample, time[:1], context)
    with pytest.raises(ValueError, match=r"encoder_hidden_states: expected \[B, S, 12\], got \(3, 5, 11\)"):
        net(sample, time, context[..., :11])
    with pytest.raises(ValueError, match=r"attention_mask: expected bool .* = \(3, 5\), got torch.float32"):
        net(sample, time, context, None, mask.float())
    with pytest.raises(ValueError, match=r"class_labels: expected \[B, 64\], got \(3, 5\)"):
        net(sample, time, context, torch.randn(3, 5))
    with pytest.raises(ValueError, match="takes no context"):
        small_unet(cross_dim=None)(sample, time, context)


def test_layout_speaks_to_each_cell():
    """Catches: a layout that is not added, that says the same everywhere, or that takes any size."""
    torch.manual_seed(0)
    net = UNet(**SMALL | dict(grid_size=8, kernel_in=1))
    cells = net.layout(torch.zeros(1, net.embed_dim)).detach().flatten(2)[0].T
    assert torch.cdist(cells, cells).add(torch.eye(64)).min() > 0.05
    sample, time, context, mask = inputs()
    net.conv_out.weight.data.normal_()
    before = net(sample, time, context, attention_mask=mask)
    with torch.no_grad():
        net.layout.cells.bias.zero_()
    assert not torch.allclose(before, net(sample, time, context, attention_mask=mask), atol=1e-3)
    with pytest.raises(ValueError, match="sample: grid_size asks for 8 x 8 pixels, got"):
        net(torch.randn(1, 3, 16, 16), time[:1], context[:1])


FINE = dict(patch_size=2, channels=8, layers=2)


def test_a_trained_net_is_given_a_fine_level_without_a_change():
    """Catches: a fine level that is not a correction, or whose config is lost."""
    coarse, sizes = small_unet(patch_size=4), dict(patch_size=4, fine=FINE)
    net = UNet(**json.loads(json.dumps(UNet(**SMALL | sizes).config)))
    missing, unexpected = net.load_state_dict(coarse.state_dict(), strict=False)
    assert not unexpected and all(name.startswith("fine.") for name in missing)
    sample, time, context, mask = inputs(size=16)
    args = (time, context, None, mask)
    assert torch.equal(net(sample, *args), coarse(sample, *args))
    net.fine.conv_out.weight.data.normal_()
    drawn = net(sample, *args)
    for part in (net.fine.lift, net.fine.conv_in):  # the coarse net's features; the pixels
        weight = part.weight.data.clone()
        part.weight.data.zero_()
        assert not torch.allclose(drawn, net(sample, *args), atol=1e-3)
        part.weight.data.copy_(weight)


@pytest.mark.parametrize(
    "fine, message",
    [
        (dict(patch_size=2, channels=8), "fine: expected positive ints patch_size, channels, layers, got"),
        (FINE | dict(layers=0), "fine: expected positive ints"),
        (FINE | dict(patch_size=3), "fine: patch_size must divide the net's, 4, and be smaller, got 3"),
        (FINE | dict(patch_size=4), "fine: patch_size must divide the net's, 4, and be smaller, got 4"),
        (FINE | dict(channels=12), "num_groups: 8 must divide fine's channels, got 12"),
    ],
)
def test_impossible_fine_levels_are_named(fine, message):
    with pytest.raises(ValueError, match=message):
        UNet(**SMALL | dict(patch_size=4, fine=fine))
