"""Large images in tiles: the weights, equality with the whole image, seams, memory."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dalle2_fast.models.unet.model import UNet
from dalle2_fast.models.upsampler import UNCLIP_256, UNCLIP_1024, Upsampler
from dalle2_fast.models.upsampler.tiles import windows

UNET = dict(in_channels=6, out_channels=3, channels=(16, 16), layers_per_block=1, attention_levels=(),
            num_groups=8, film=False, cross_dim=None)


class ShortSighted(nn.Module):
    """A U-Net's shape without its norms: what it answers depends on pixels at most 7 away."""

    in_channels, out_channels, class_embed_dim, size_multiple = 6, 3, None, 2

    def __init__(self, out_channels: int = 3):
        super().__init__()
        self.out_channels = out_channels
        self.config = {}
        self.conv_in, self.low = nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.conv_out = nn.Conv2d(16, out_channels, 3, padding=1)
        self.sizes = []
        with torch.no_grad():
            self.low.weight.mul_(4)
            self.conv_out.weight.mul_(2)

    def forward(self, sample, timestep, class_labels=None):
        self.sizes.append(tuple(sample.shape))
        x = self.conv_in(sample)
        low = F.interpolate(torch.tanh(self.low(F.avg_pool2d(x, 2))), scale_factor=2)
        time = timestep[:, None, None, None] / 1000 + 0.5
        return self.conv_out(torch.cat([torch.tanh(x), low], dim=1)) * time


def short_sighted(**options) -> Upsampler:
    torch.manual_seed(0)
    upsampler = Upsampler(UNET, image_size=64, low_res_size=16, **options)
    upsampler.unet = ShortSighted(3 * (1 + (upsampler.diffusion.variance == "learned_range")))
    return upsampler.eval()


def low(height: int = 24, width: int = 16, batch: int = 2) -> torch.Tensor:
    picture = torch.rand(batch, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    return F.interpolate(picture, (height, width), mode="bicubic").clamp(0, 1)


@pytest.mark.parametrize("length", [32, 40, 64, 72, 200])
@pytest.mark.parametrize("tile, overlap", [(32, 8), (32, 16), (64, 16)])
def test_weights_sum_to_one_and_spare_the_edges(length, tile, overlap):
    """Catches: gaps, an overlap below the one asked for, windows off the grid, padded edges that count."""
    total = torch.zeros(length, dtype=torch.float64)
    found = windows(length, tile, overlap, 8)
    for (start, weight), after in zip(found, [*found[1:], None], strict=True):
        assert start % 8 == 0 and len(weight) == min(tile, length) and start + len(weight) <= length
        assert weight.min() >= 0
        total[start : start + len(weight)] += weight
        if start > 0:
            assert not weight[: overlap // 4].any()
        if after is not None:
            assert start + tile - after[0] >= overlap
            assert not weight[-(overlap // 4) :].any()
    assert found[0][0] == 0 and found[-1][0] + len(found[-1][1]) == length
    torch.testing.assert_close(total, torch.ones(length, dtype=torch.float64))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
def test_tiled_is_whole_where_the_net_sees_no_farther(sampler, variance):
    """Catches: noise drawn for each tile, a condition cut at another place than the image, visible padding,
    mixed images of the batch, lost channels of the variance."""
    unet = UNET | dict(out_channels=6 if variance == "learned_range" else 3)
    torch.manual_seed(0)
    upsampler = Upsampler(unet, image_size=64, low_res_size=16, variance=variance)
    upsampler.unet = ShortSighted(unet["out_channels"])
    options = dict(seeds=torch.tensor([3, 4]), steps=4, sampler=sampler)
    whole = upsampler.sample(low(), **options)
    assert whole.shape == (2, 3, 96, 64)
    upsampler.unet.sizes.clear()
    tiled = upsampler.sample(low(), tile=64, overlap=32, **options)
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-5)
    assert set(upsampler.unet.sizes) == {(1, 6, 64, 64)}  # one window of one image: the memory's bound
    assert len(upsampler.unet.sizes) == 4 * 2 * 2
    # The width of the overlap is what does it: with less, the net's reach passes the quarter.
    narrow = upsampler.sample(low(), tile=32, overlap=2, **options)
    assert (narrow - whole).abs().max() > 1e-2


def test_a_tile_that_holds_the_picture_is_one_pass():
    upsampler = short_sighted(sample_tile=96)
    upsampler.sample(low(), steps=2)
    assert set(upsampler.unet.sizes) == {(2, 6, 96, 64)}
    upsampler.unet.sizes.clear()
    upsampler.sample(low(), steps=2, tile=48)
    assert {size[2:] for size in upsampler.unet.sizes} == {(48, 48)}


def test_noise_level_and_last_net_are_tiled_too():
    torch.manual_seed(0)
    unet = UNET | dict(class_embed_dim=8)
    upsampler = Upsampler(unet, last_unet=unet, image_size=64, low_res_size=16, max_noise_level=0.5)
    sizes = []
    for net in (upsampler.unet, upsampler.last_unet):
        net.register_forward_pre_hook(lambda _, given: sizes.append(tuple(given[0].shape)))
    drawn = upsampler.sample(low(), steps=2, noise_level=0.3, tile=48, seeds=torch.arange(2))
    assert drawn.shape == (2, 3, 96, 64) and drawn.isfinite().all()
    assert set(sizes) == {(1, 6, 48, 48)}


def test_seams_do_not_show():
    """A net with norms uses the moments of each tile; the blend must spread the difference over
    the overlap. Pasted tiles, for comparison, jump at the seam."""
    upsampler = short_sighted(prediction="sample", residual=True)
    inner = upsampler.unet.forward
    upsampler.unet.forward = lambda x, t, class_labels=None: (
        0.05 * inner(x, t) + 0.5 * x[:, 3:].mean(dim=(1, 2, 3), keepdim=True)
    )
    ramp = torch.linspace(0.3, 0.7, 32).expand(1, 3, 16, 32).contiguous()  # tiles of unlike brightness
    noise = torch.randn(1, 3, 64, 128, generator=torch.Generator().manual_seed(0))
    options = dict(steps=4, sampler="ddim")
    whole = upsampler.sample(ramp, x_T=noise, **options)
    tiled = upsampler.sample(ramp, x_T=noise, tile=64, overlap=32, **options)
    halves = [upsampler.sample(ramp[..., part], x_T=noise[..., side], **options)
              for part, side in ((slice(0, 16), slice(0, 64)), (slice(16, 32), slice(64, 128)))]

    def jumps(images):
        """What lies between neighbouring columns and not in the whole image, mean over the rows."""
        return (images - whole).diff(dim=3).mean(dim=2).abs().amax(dim=(0, 1))

    pasted = jumps(torch.cat(halves, dim=3))
    assert pasted.argmax() == 63 and pasted[63] > 0.02
    assert jumps(tiled).max() < 0.15 * pasted[63]  # over 16 pixels, at most pi / 32 of it a pixel


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(tile=30), "tile: expected a multiple of 4 from 8 on, got 30"),
        (dict(tile=4), "tile: expected a multiple of 4 from 8 on, got 4"),
        (dict(tile=32.0), "tile: expected a multiple of 4 from 8 on, got 32.0"),
        (dict(tile=32, overlap=20), "overlap: expected a multiple of 4 up to tile / 2 = 16, got 20"),
        (dict(tile=32, overlap=0), "overlap: expected a multiple of 4 up to tile / 2 = 16, got 0"),
        (dict(overlap=16), "overlap: expected a tile as well, got overlap=16 alone"),
    ],
)
def test_impossible_tiles_are_named(options, message):
    upsampler = Upsampler(UNET | dict(channels=(16, 16, 16)), image_size=64, low_res_size=16)
    with pytest.raises(ValueError, match=message):
        upsampler.sample(low(), steps=1, **options)
    with pytest.raises(ValueError, match="tile: expected a multiple of 4"):
        Upsampler(UNET | dict(channels=(16, 16, 16)), image_size=64, low_res_size=16, sample_tile=30)


# ---------------------------------------------------------------------------------------- the paper's sizes


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that are alive, and their peak: what a GPU would hold, workspaces aside."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known: dict[int, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.known:
                storage = tensor.untyped_storage()
                self.known[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.forget, storage._cdata)
        return result

    def forget(self, storage: int) -> None:
        self.now -= self.known.pop(storage, 0)


def estimated_bytes(unet: dict, side: int) -> int:
    """Weights and activations in float32 of one pass over one image of side x side, without running it."""
    with torch.device("meta"):
        net = UNet(**unet).eval()
        sample, time = torch.empty(1, net.in_channels, side, side), torch.empty(1)
    with torch.no_grad(), LiveBytes() as live:
        net(sample, time)
    return live.peak + 4 * sum(parameter.numel() for parameter in net.parameters())


def test_1024_pixels_fit_24_gigabytes_in_tiles():
    """An estimate: the live tensors of a pass on the meta device. Karlo's upsampler at 1024 px, float32."""
    karlo = dict(in_channels=6, out_channels=3, attention_levels=(), cross_dim=None, film=False)
    tile = UNCLIP_1024["sample_tile"]
    assert estimated_bytes(karlo, tile) < 0.4 * 24e9
    assert estimated_bytes(karlo, 1024) > 0.8 * 24e9  # in one pass a single image leaves little room
    assert estimated_bytes(UNCLIP_1024["unet"], tile) < 3.2e9


def test_unclips_sizes():
    """Appendix C: 700 and 300 million parameters; 27 and 15 steps."""
    with torch.device("meta"):
        first, second = Upsampler(**UNCLIP_256), Upsampler(**UNCLIP_1024)
    counts = [sum(parameter.numel() for parameter in model.parameters()) / 1e6 for model in (first, second)]
    assert counts == pytest.approx([700, 300], rel=0.07)
    assert (first.image_size, second.low_res_size, second.image_size) == (256, 256, 1024)
    assert (first.sample_timesteps, second.sample_timesteps) == (27, 15)
    assert second.diffusion.schedule.name == "linear" and second.degradation == "bsr"


@pytest.mark.gpu
def test_1024_pixels_stay_below_24_gigabytes_on_a_gpu():
    """What the estimate above leaves out, workspaces and fragmentation, measured: Karlo's net, float32."""
    karlo = dict(in_channels=6, out_channels=3, attention_levels=(), cross_dim=None, film=False)
    with torch.device("cuda"):
        upsampler = Upsampler(karlo, image_size=1024, low_res_size=256, sample_tile=512)
    torch.cuda.reset_peak_memory_stats()
    small = torch.rand(4, 3, 256, 256, device="cuda")
    drawn = upsampler.sample(small, steps=1, seeds=torch.arange(4, device="cuda"))
    assert drawn.shape == (4, 3, 1024, 1024) and drawn.isfinite().all()
    assert torch.cuda.max_memory_reserved() < 24e9
