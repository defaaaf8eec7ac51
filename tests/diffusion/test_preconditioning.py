"""EDM's preconditioning: its formulas, unit variances, near-clean input, every way through the package."""

from __future__ import annotations

import pytest
import torch

from dalle2_fast import Decoder, DiffusionPrior, Upsampler
from dalle2_fast.diffusion import GaussianDiffusion, make_schedule
from dalle2_fast.diffusion.preconditioning import precondition
from tests.support.gaussian_data import DEVIATION

SCHEDULE = make_schedule("continuous_cosine")
TIMES = torch.linspace(0.02, 0.98, 9, dtype=torch.float64)


def process(**options) -> GaussianDiffusion:
    return GaussianDiffusion(SCHEDULE, "edm", weighting="uniform", **options)


def test_input_and_target_have_unit_variance():
    """Catches: factors of other data, and of EDM's state where the process has its own."""
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(9, 20_000, generator=generator, dtype=torch.float64) for _ in range(2))
    x0 = DEVIATION * x0
    diffusion = process(sigma_data=DEVIATION)
    seen = []
    diffusion.training_loss(lambda x, time: seen.append(x) or torch.zeros_like(x), x0, t=TIMES, noise=noise)
    target = diffusion.preconditioned_target(x0, noise, TIMES)
    for value in (seen[0], target):
        torch.testing.assert_close(value.std(1), torch.ones(9, dtype=torch.float64), rtol=0.03, atol=0)


def test_near_clean_input_comes_back():
    """At least 50 dB at log-SNR 8 for a network that is wrong by a fifth; one that predicts x0 has 20 dB."""
    diffusion = process()
    t = SCHEDULE.time_at(torch.tensor([8.0]))
    x0 = torch.linspace(-1, 1, 300, dtype=torch.float64).reshape(1, 3, 10, 10)
    x_t = diffusion.add_noise(x0, t, torch.ones_like(x0))
    target = diffusion.preconditioned_target(x0, torch.ones_like(x0), t)
    error = (diffusion.predict_x0(x_t, t, target + 0.2) - x0).square().mean()
    assert 10 * torch.log10(4 / error) > 50
    torch.testing.assert_close(diffusion.predict_x0(x_t, t, target), x0)


def test_with_unit_variance_it_is_minus_v():
    """Catches a factor that is right for sigma_data = 0.5 alone."""
    log_snr = torch.linspace(-9, 9, 7)
    scale, skip, gain = precondition(log_snr, 1.0)
    torch.testing.assert_close(scale, torch.ones(7, dtype=torch.float64))
    torch.testing.assert_close(skip, torch.sigmoid(log_snr.double()).sqrt())
    torch.testing.assert_close(gain, torch.sigmoid(-log_snr.double()).sqrt())


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_the_deviation_of_the_data_is_positive(value):
    with pytest.raises(ValueError, match="sigma_data: expected a number > 0"):
        process(sigma_data=value)


def test_the_models_save_it_and_sample_with_it():
    """Catches a model that forgets the option, and a checkpoint of before that no longer loads."""
    unet = dict(channels=(8, 16), layers_per_block=1, num_groups=4, out_channels=3, attention_levels=(1,))
    decoder = dict(unet=unet | dict(head_dim=8, cross_dim=6), image_size=8, image_embed_dim=4,
                   text_embed_dim=4, text_encoding_dim=5, variance="fixed_small", text_cond_drop_prob=1.0)
    upsampler = dict(unet=dict(unet, in_channels=6, cross_dim=None, attention_levels=()), image_size=16,
                     low_res_size=8, variance="fixed_small")
    prior = dict(net=dict(dim=16, depth=1, heads=2, dim_head=8, text_dim=5, context_length=3),
                 image_embed_dim=6, timesteps=10)  # fmt: skip
    for kind, options in ((Decoder, decoder), (Upsampler, upsampler), (DiffusionPrior, prior)):
        model = kind(**options, prediction="edm", sigma_data=0.7)
        assert kind(**model.config).diffusion.to_config() == model.diffusion.to_config()
        assert model.diffusion.sigma_data == 0.7 and kind(**options).diffusion.prediction != "edm"
        before = {name: value for name, value in kind(**options).config.items() if name != "sigma_data"}
        assert kind(**before).config == kind(**options).config
    seeds = torch.tensor([3])
    images = Decoder(**decoder, prediction="edm").sample(torch.randn(1, 4), seeds=seeds, steps=2)
    assert images.isfinite().all() and images.shape == (1, 3, 8, 8)
