"""PSNR. Each test names the fault it would catch."""

from __future__ import annotations

import pytest
import torch

from dalle2_fast.evaluation.psnr import psnr


def test_the_mean_is_over_decibels():
    """Catches: a mean over the wrong axes."""
    truth = torch.zeros(2, 3, 4, 4)
    assert psnr(truth + 0.1, truth).mean().item() == pytest.approx(20.0, abs=1e-3)
    images = torch.stack([truth[0] + 0.1, truth[0] + 0.01])
    assert psnr(images, truth).mean().item() == pytest.approx(30.0, abs=1e-3)


def test_psnr():
    """Catches: a PSNR of the batch instead of one for each image; decibels of the wrong base or range."""
    truth = torch.full((2, 3, 4, 4), 0.5)
    images = truth + torch.tensor([0.1, 0.01])[:, None, None, None]
    assert psnr(images, truth).tolist() == pytest.approx([20.0, 40.0], abs=1e-3)
